"""Where a run's first parameters come from: another run, or a parameter file.

    python -m vlp_jax.main --config=configs/transfer/vqa.py --config.init_from=WORKDIR

``config.init_from`` is a run's workdir (``config.init_checkpoint`` says which of its checkpoints),
one checkpoint of it, or a ``.safetensors`` file that ``tools.import_weights`` or
``tools.export_weights`` has written. Parts of the model are taken whole; the log and the report
say what became of them, and ``init_from.tsv`` of the workdir of every tensor. What holds tunables
alone (``train.tunables``) is read together with its base.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from vlp_jax.infra.checkpoint_reader import Restored, load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.manifest import DamagedCheckpointError
from vlp_jax.infra.report.from_facts import flat_config
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.pretrained import (
    NoPartFits,
    WeightsError,
    is_parameter_file,
    load_metadata,
    load_parameters,
)
from vlp_jax.models.pretrained.merge import fit
from vlp_jax.models.tuning import is_added, is_skipped
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.objectives import OBJECTIVES
from vlp_jax.train import base as of_base
from vlp_jax.train.base import Base

CHECKPOINT_FOLDER = "checkpoints"
KEY = "init_from"
HOW_COMPUTED = ("dtype", "attention")  # keys of config.model that are no geometry
CUT = "tuning.prune."  # what keys of config.model begin with that say what is cut out of blocks
_OF_WORDS = ("text_embedding", "vocabulary_head")  # parts of a model with a row for each word


@dataclasses.dataclass(frozen=True)
class Origin:
    """Parameters and what belongs to them.

    Attributes:
        where: the file or folder they were read from.
        step: updates that made them; None for a public checkpoint.
        arrays: path in the parameter tree -> array.
        config: of the run that made them.
        tokenizer: its tokenizer as JSON text; empty without one.
        classes: what its classification head tells apart.
        base: where those lie that are kept apart from the rest; None: all are in one place.
    """

    where: str
    step: int | None
    arrays: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: str
    classes: tuple[str, ...]
    base: Base | None = None

    def params(self) -> dict[str, Any]:
        """The parameters as nested dicts."""
        return nested(self.arrays)

    @property
    def reads_text(self) -> bool:
        """Whether some of the parameters belong to words of its tokenizer."""
        return any(path.split("/")[0] in _OF_WORDS for path in self.arrays)

    def check_fit(self, shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, Any]) -> None:
        """Raise unless a run can start from here.

        Args:
            shapes: of its parameters, by path.
            model: its ``config.model``, as nested dicts.

        Raises:
            NoPartFits: the run has none of the parts that are here.
            WeightsError: parts lack parameters, or shapes differ; the message names the keys of
                ``config.model`` that were other ones, where that is known.
        """
        try:
            fit(shapes, self.arrays, self.where, skipped=skipped_units(model))
        except NoPartFits:
            raise
        except WeightsError as error:
            apart = {
                key: f"config.model.{key}={made} and not {ours}"
                for key, made, ours in _geometries(self.config.get("model", {}), model)
                if made != ours and key not in HOW_COMPUTED
            }
            if not apart:
                raise
            problem = f"made with {', '.join(apart.values())}, so that {error.problem}"
            remedy = error.remedy
            if any(key.startswith(CUT) for key in apart):
                remedy = (
                    "Set these to what the weights were made with (config.adopt_model=True does), "
                    "or cut the weights by `python -m tools.prune_weights` and start from that"
                )
            elif any(
                is_skipped(path, skipped_units(self.config["model"])) and not is_added(path)
                for path in shapes.keys() - self.arrays.keys()
            ):
                remedy = (
                    "Skip the units that these weights lack (config.model.tuning.skip), or start "
                    "from weights that have them"
                )
            raise WeightsError(self.where, problem, remedy) from error

    @property
    def objectives(self) -> tuple[str, ...]:
        """Types of the objectives that trained it."""
        sections = self.config.get("objectives", {})
        return tuple(section.get("type", name) for name, section in sections.items())


def read_origin(path: str | pathlib.Path, checkpoint: str = "latest", base: str = "") -> Origin:
    """Read parameters and their company.

    What its evaluators saw is taken: the moving average where the run has one, and what objectives
    put in the place of parameters (``Objective.served``). Tunables are completed by their base.

    Args:
        path: of a workdir, a checkpoint, or a parameter file.
        checkpoint: of a workdir: ``latest``, ``best`` or a step.
        base: of tunables: where their base lies, if no longer where it was; any of the above.

    Raises:
        ConfigError: nothing there holds parameters, ``checkpoint`` is none of these or chooses
            where there is no choice, or what is there is damaged; or its base is absent, another
            one, or given to what has none.
        FileNotFoundError, ValueError: the checkpoint or file is absent, or the file damaged.
    """
    path = pathlib.Path(path)
    folder = path / CHECKPOINT_FOLDER
    if checkpoint != "latest" and path.exists() and not folder.is_dir():
        raise ConfigError(
            "init_checkpoint",
            f"{checkpoint!r} of {path}, which is a single one",
            "Leave it out, or give the run's workdir",
        )
    if is_parameter_file(path):
        metadata = load_metadata(path)
        arrays = load_parameters(path)
        if metadata.base:
            arrays |= _read_base(Base.from_json(metadata.base), str(path), base)
        classes = tuple(metadata.config.get("classes", ()))
        return Origin(
            str(path),
            metadata.step,
            arrays,
            metadata.config,
            metadata.tokenizer,
            classes,
            _base_now(metadata.base, base, path),
        )
    if not path.is_dir() or not (folder.is_dir() or path.parent.name == CHECKPOINT_FOLDER):
        raise ConfigError(
            KEY,
            f"{path} is neither a run's workdir, nor a checkpoint, nor a parameter file",
            "Give a folder with `checkpoints/` in it or a .safetensors file",
        )
    restored = (
        _restored(folder, _which(checkpoint), base)
        if folder.is_dir()
        else _restored(path, "latest", base)
    )
    return Origin(
        str(path),
        restored.step,
        by_path(restored.state),
        restored.extra["config"],
        restored.extra["tokenizer"],
        tuple(restored.extra.get("classes", ())),
        _base_now(restored.extra.get("base"), base, path),
    )


def _restored(folder: pathlib.Path, step: int | Literal["latest", "best"], base: str) -> Restored:
    def elsewhere(root: str, extra: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
        return parts_elsewhere(root, extra, base)

    try:
        return load_params(
            folder, step, ("extras/ema", "params"), overlays=_served, elsewhere=elsewhere
        )
    except DamagedCheckpointError as error:  # of another run: this one's input is bad
        raise ConfigError(KEY, str(error), "Or name another checkpoint of it") from error


def parts_elsewhere(root: str, extra: Mapping[str, Any], moved: str = "") -> dict[str, np.ndarray]:
    """What a checkpoint leaves to its base; see ``checkpoint_reader.Elsewhere``.

    Args:
        root: the checkpoint.
        extra: saved beside its state.
        moved: where the base lies, if no longer where it was.

    Returns:
        Path in the state -> array; empty for a whole checkpoint.

    Raises:
        ConfigError: the base is absent, or another one.
    """
    if not extra.get("base"):
        return {}
    found = {}
    for path, array in _read_base(Base.from_json(extra["base"]), root, moved).items():
        for place in state_paths([path], extra["config"]["optim"]["ema_decay"]):
            # A copy for each, since the buffers of a state are given up one by one.
            found[place] = array.copy()
    return found


def state_paths(paths: Iterable[str], ema_decay: float) -> Iterator[str]:
    """Where a state has what a base gives: the parameters, and their average where there is one."""
    for path in paths:
        yield f"params/{path}"
        if ema_decay:
            yield f"extras/ema/{path}"


def _base_now(told: Mapping[str, Any] | None, moved: str, path: pathlib.Path) -> Base | None:
    """Where the base of what was read lies now; None: it has none.

    Args:
        told: what it says of its base.
        moved: where that lies, if no longer where it was.
        path: what was read.
    """
    if told:
        base = Base.from_json(told)
        return dataclasses.replace(base, where=moved or base.where)
    if moved:
        raise ConfigError(
            of_base.KEY, f"{moved} is no base of {path}, which is whole", "Leave it out"
        )
    return None


def _read_base(base: Base, holder: str, moved: str) -> dict[str, np.ndarray]:
    """The arrays of a base, the same as they were.

    Args:
        base: as tunables name it.
        holder: of the tunables, for messages.
        moved: where it lies, if no longer where it was.
    """
    where = moved or base.where
    chooses = base.step is not None and (pathlib.Path(where) / CHECKPOINT_FOLDER).is_dir()
    try:
        found = read_origin(where, str(base.step) if chooses else "latest").arrays
    except (ValueError, OSError) as error:
        raise base.missing(holder, where, error) from error
    return base.taken(found, holder, where)


def _geometries(made: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Keys that two ``config.model`` have in common, with the values of both as JSON.

    That weights were made without tuning keeps none of them from a tuned model, but for one of
    which parts are cut out.
    """
    untuned = json.loads(tuning_config().to_json_best_effort())
    plain, before, now = (
        dict(flat_config({**of, "tuning": {**untuned, **of.get("tuning", {})}}))
        for of in ({}, made, ours)
    )
    for key, value in now.items():
        if key in before and (before[key] != plain.get(key) or key.startswith(CUT)):
            yield key, before[key], value


def skipped_units(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The units that a model of ``config.model`` does without, see ``models.tuning``."""
    return tuple(model.get("tuning", {}).get("skip", ()))


def served_paths(served_extras: Mapping[str, str]) -> tuple[str, ...]:
    """Where a state keeps what takes the place of parameters; see ``Program.served_extras``."""
    return tuple(f"extras/objectives/{name}/{key}" for name, key in served_extras.items())


def _served(extra: Mapping[str, Any]) -> tuple[str, ...]:
    """The same, of the run that wrote a checkpoint with this beside it."""
    sections = extra["config"].get("objectives", {})
    kinds = {name: OBJECTIVES.get(section.get("type", name)) for name, section in sections.items()}
    return served_paths({name: kind.served for name, kind in kinds.items() if kind and kind.served})


def _which(checkpoint: str) -> int | Literal["latest", "best"]:
    if checkpoint in ("latest", "best"):
        return checkpoint  # type: ignore[return-value]
    if checkpoint.isdigit():
        return int(checkpoint)
    raise ConfigError(
        "init_checkpoint", f"{checkpoint!r} is no checkpoint", "Use latest, best or a step"
    )
