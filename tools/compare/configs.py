"""What a config becomes for a cell: a run of one length, seed and rate, and nothing optional."""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import traceback
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError, unknown_key
from vlp_jax.objectives import learns_from
from vlp_jax.train.config import OPEN_SECTIONS, default_config
from vlp_jax.train.schedule import UNITS

# Keys that change neither what a run computes nor what its training time is.
_NO_EFFECT = (
    *("name", "log", "profile", "compile_cache"),
    *("data.cache_dir", "data.cache_workers"),
    # Where frozen parameters are kept. Of no job of an archive, whose keys stay as they were.
    *("init_base", "checkpoint.tunables_only"),
)
# Keys, besides those above, on which the cost of an update does not depend.
_SAME_COST = (
    *("seed", "evals", "schedule", "checkpoint", "init_from", "init_checkpoint"),
    *(f"total_{unit}" for unit in UNITS),
    *("optim.b1", "optim.b2", "optim.eps", "optim.weight_decay"),
    *(
        f"objectives.{name}.{key}"
        for name in ("simclr", "moco_v3", "simsiam", "dino", "mim")
        for key in (
            *("momentum", "temperature", "teacher_temperature"),
            # How large crops are; whether there are any, and all else of a view, has a cost.
            *("augment.scale", "augment_second.scale", "augment_small.scale"),
        )
    ),
)
# Keys that came after the first archives, with the value at which a run is what it was before there
# was the key: there they are left out, so that cells of docs/results count on.
_LATER: Mapping[str, Any] = {
    "compression": {
        **dict.fromkeys(("schedule", "file", "guard_file"), ""),
        **{key: [] for key in ("buckets", "costs", "shares")},
        "tail_percent": 0.0,
        "decisions": 10,
        "overhead_percent": 5.0,
        "guard_percent": 1.0,
    },
    "objectives.dino.centring": "mean",
    "objectives.dino.head_norm": False,
    "objectives.dino.momentum": 0.996,
    "objectives.dino.teacher_temperature": 0.04,
    "objectives.dino.temperature": 0.1,
    "objectives.mim.kept_share": 0.25,
    "objectives.moco_v3.momentum": 0.99,
    "objectives.moco_v3.temperature": 0.2,
    "objectives.simclr.temperature": 0.1,
    "data.batches.images.weight": 1.0,
    "data.batches.pairs.weight": 1.0,
    "model.image.positions": "learned",
    "model.image.drop_path": 0.0,
    "model.tuning.prune": {"heads": 0.0, "mlp": 0.0, "blocks": ""},
    "optim.final_weight_decay": None,
    "skip_from": "",
}
# A rate that ends above this share of its peak has not been annealed.
_ANNEALED = 0.2
_LOG_PERCENT = 5.0
# Of a calibration; the first half warms up, the second is measured.
CALIBRATION_INTERVALS = 6

Overrides = Mapping[str, Any]


class CommandError(ValueError):
    """A command line that cannot work; the message names the flag or the file, and the remedy."""


@dataclasses.dataclass(frozen=True)
class NamedConfig:
    """A config of the command line.

    Attributes:
        label: its name in tables: the file's stem, with ``:ARG`` where there is one.
        source: FILE or FILE:ARG, as given.
        config: complete and locked; copied before a key is changed.
    """

    label: str
    source: str
    config: ConfigDict

    @property
    def peak(self) -> float:
        """Its own learning rate."""
        return float(self.config.schedule.peak)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Evaluators that objectives learn from, as a bandit does that names one of their figures.

        They run in the middle of training as the config says; no other does.
        """
        return _teachers(self.config)

    def check_cost(self) -> None:
        """Refuse a config that compresses images at costs nobody has measured.

        The length of a run is its budget in updates of whole images, of which one is measured here;
        what its buckets cost, as shares of that, comes with the config.

        Raises:
            ConfigError: the costs are those of FLOPs, or the schedule spends more than its budget.
        """
        section = self.config.compression
        if section.schedule == "online":
            raise ConfigError(
                "compression.schedule",
                "the decisions of 'online' take time beside the updates, which are all that counts",
                "Compare the schedule that tools.gradient_error derives",
            )
        if section.schedule and not section.costs:
            raise ConfigError(
                "compression.costs",
                "are those of FLOPs, and a comparison by time needs measured ones",
                "Take compression.file of `tools.bench buckets --out`, or give the costs",
            )

    def run(
        self,
        *,
        steps: int,
        seed: int,
        step_seconds: float,
        save_seconds: float,
        overrides: Overrides,
    ) -> ConfigDict:
        """The config of one pretraining cell: a whole run of its own, schedule included.

        Args:
            steps: length of the run; the schedule and all durations in percent follow it.
            seed: of the run.
            step_seconds: measured cost of an update.
            save_seconds: training seconds between two checkpoints, which serve a killed cell.
            overrides: values by dotted key, such as ``{"schedule.peak": 1e-3}``.
        """
        config = with_overrides(self.config, {**overrides, "name": self.label})
        dataclasses.replace(self, config=config).check_cost()
        check_annealed(config)
        _set_duration(config, "total", steps)
        config.seed = seed
        _measured_only(config, save_steps=max(1, round(save_seconds / step_seconds)))
        return config

    def calibration(self, *, steps: int, overrides: Overrides) -> ConfigDict:
        """The config of a short run that shows what an update costs; its rate is all but zero.

        It logs at the end of each of its intervals, which are whole windows of the plan: then all
        hold the same mixture of buckets.

        Args:
            steps: least length of the run, rounded up to whole intervals.
            overrides: values by dotted key.
        """
        config = with_overrides(self.config, {**overrides, "name": self.label})
        config.compression = default_config().compression  # whole images are the unit of costs
        window = config.data.window_batches
        interval = window * -(-steps // (CALIBRATION_INTERVALS * window))
        _set_duration(config, "total", CALIBRATION_INTERVALS * interval)
        for name in ("warmup", "cooldown"):
            _set_duration(config.schedule, name, 0)
        config.schedule.update({"decay": "constant", "peak": 1e-2 * config.schedule.peak})
        _measured_only(config, save_steps=0)
        _set_duration(config.log, "every", interval)
        # What an objective learns from must be there; it would only disturb the measurement.
        teachers = {name: config.evals[name] for name in _teachers(config)}
        with config.unlocked():
            config.evals = teachers
            for section in config.evals.values():
                _set_duration(section, "every", CALIBRATION_INTERVALS * interval)
        return config

    def finetuning(self, *, seed: int, init_from: Path) -> ConfigDict:
        """The config of a fine-tuning run: all as its file says, from the checkpoint of a cell.

        Its evaluations stay, for it may choose its checkpoint by one and be judged by another.
        """
        start = {"init_from": str(init_from), "init_checkpoint": "latest"}
        config = with_overrides(self.config, {"name": self.label, "seed": seed, **start})
        _quiet(config)
        return config

    def from_scratch(self, *, seed: int, pretraining: ConfigDict) -> ConfigDict:
        """The config of the same fine-tuning run from fresh parameters.

        Args:
            seed: of the run.
            pretraining: what the run would have taken over, it takes from this config: the
                geometry by ``adopt_model``, and the tokenizer unless it names one of its own.
        """
        start = {"init_from": "", "adopt_model": False}
        config = with_overrides(self.config, {"name": self.label, "seed": seed, **start})
        source = ConfigDict(pretraining).copy_and_resolve_references()
        if self.config.adopt_model:
            for part in ("image", "text", "reconstructor"):  # as train.setup does
                config.model[part] = source.model[part]
        if not config.tokenizer.path:
            config.tokenizer = source.tokenizer
        _quiet(config)
        return config.lock()


def load(source: str) -> NamedConfig:
    """Read a config file.

    Args:
        source: FILE, or FILE:ARG where ``get_config`` takes an argument.

    Raises:
        CommandError: no such file, no ``get_config`` in it, or one that fails.
    """
    path, _, argument = source.partition(":")
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"_compared_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise CommandError(f"{path} is no Python file; name one such as configs/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise CommandError(f"{path} has no get_config(arg=None)")
    if argument and not inspect.signature(module.get_config).parameters:
        raise CommandError(f"get_config of {path} takes no argument; drop :{argument}")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of a key or of ARG
        raise CommandError(f"{source}: {_where(error, file)}{_words(error)}") from error
    label = f"{file.stem}:{argument}" if argument else file.stem
    return NamedConfig(label, source, with_overrides(config, {}))


def _where(error: Exception, file: Path) -> str:
    """The last line of a file that an error has passed through, such as "line 12: "."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file.absolute()]
    return f"line {lines[-1]}: " if lines else ""


def _words(error: BaseException) -> str:
    """What an error says, less the quotes that nesting it in another puts around it."""
    inner = error.args[0] if error.args else None
    return _words(inner) if isinstance(inner, BaseException) else str(inner or error)


def load_all(sources: Iterable[str], overrides: Overrides | None = None) -> tuple[NamedConfig, ...]:
    """Read several config files whose labels must differ.

    Args:
        sources: FILE or FILE:ARG each.
        overrides: values by dotted key, applied to all; by ``LABEL/KEY``, to one, and after them.

    Raises:
        CommandError, ConfigError: as ``load``; or two have one label, or none has that of a key.
    """
    loaded = tuple(load(source) for source in sources)
    labels = [named.label for named in loaded]
    for label in labels:
        if labels.count(label) > 1:
            raise CommandError(f"two configs are called {label}; rename a file")
    own: dict[str, dict[str, Any]] = {label: {} for label in ("", *labels)}
    for name, value in (overrides or {}).items():
        label, _, key = name.rpartition("/")
        if label not in own:
            raise CommandError(f"{name}: no config is called {label}; there are {labels}")
        own[label][key] = value
    return tuple(
        dataclasses.replace(
            named, config=with_overrides(named.config, {**own[""], **own[named.label]})
        )
        for named in loaded
    )


def parse_value(text: str) -> Any:
    """A value of the command line: a Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_values(text: str) -> tuple[Any, ...]:
    """Values of the command line with commas between them, such as ``0.9,0.95`` or ``(1,),(1,2)``.

    They are Python literals, or else texts.
    """
    try:
        return tuple(ast.literal_eval(f"[{text}]"))
    except (ValueError, SyntaxError):
        return tuple(parse_value(value) for value in text.split(",") if value)


def with_overrides(config: ConfigDict, overrides: Overrides) -> ConfigDict:
    """A copy of a config with some keys changed.

    A section whose name is the user's, such as ``evals.explain``, is dropped where its value is
    None.

    Raises:
        ConfigError: a key that the config does not have, or a value of another type.
    """
    changed = ConfigDict(config).copy_and_resolve_references()
    for key, value in overrides.items():
        *sections, last = key.split(".")
        section: Any = changed
        for name in (*sections, last):
            if not isinstance(section, ConfigDict) or name not in section:
                known = list(section) if isinstance(section, ConfigDict) else []
                raise unknown_key(key, known)
            if name is not last:
                section = section[name]
        if value is None and ".".join(sections) in OPEN_SECTIONS:
            with section.unlocked():
                del section[last]
            continue
        try:
            section[last] = value
        except TypeError as error:
            raise ConfigError(
                key, f"{value!r} is of another type than {section[last]!r}", "Mend the value"
            ) from error
    changed.lock()
    return changed


def shortened(config: ConfigDict, steps: int) -> ConfigDict:
    """A copy of a run of so many steps, evaluated and saved at its end alone."""
    short = ConfigDict(config).copy_and_resolve_references()
    _set_duration(short, "total", steps)
    _set_duration(short.checkpoint, "every", None)
    _evaluated_last(short)
    return short


def check_annealed(config: ConfigDict) -> None:
    """Refuse a schedule that does not come to its end within the budget.

    Raises:
        ConfigError: the rate stays above a fifth of its peak, so that the score at the end of a
            budget would be that of a run cut off in the middle.
    """
    schedule = config.schedule
    decays = schedule.decay in ("linear", "cosine") and schedule.final_factor <= _ANNEALED
    cools = any(schedule[f"cooldown_{unit}"] for unit in UNITS)
    if not decays and not cools:
        raise ConfigError(
            "schedule.decay",
            f"{schedule.decay!r} with final_factor={schedule.final_factor} never comes down, so "
            "that a score at the end of a budget would understate what the budget buys",
            "Use linear or cosine, or give schedule.cooldown_percent",
        )


def digest(config: ConfigDict, parent: str = "") -> str:
    """What a run computes and costs, in 64 hexadecimal digits.

    Args:
        config: of the run.
        parent: digest of the run it starts from, which counts in place of that run's folder.
    """
    kept = _plain(config, _NO_EFFECT)
    if parent:
        kept["init_from"] = parent
    return _sha256(kept)


def cost_digest(config: ConfigDict) -> str:
    """What the cost of an update depends on, in 64 hexadecimal digits."""
    return _sha256(_plain(config, (*_NO_EFFECT, *_SAME_COST)))


def _plain(config: ConfigDict, without: Iterable[str]) -> dict[str, Any]:
    """The config as JSON holds it, less some keys."""
    result: dict[str, Any] = json.loads(config.to_json_best_effort())
    for key in without:
        section, last = _parent(result, key)
        section.pop(last, None)
    for key, value in _LATER.items():
        section, last = _parent(result, key)
        if last in section and section[last] == value:
            del section[last]
    return result


def _parent(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section that a dotted key lies in, empty where there is none, and the key's last part."""
    *sections, last = key.split(".")
    return functools.reduce(lambda section, name: section.get(name, {}), sections, config), last


def _sha256(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _measured_only(config: ConfigDict, save_steps: int) -> None:
    """Leave out what only takes time in the middle of a run: reports, evaluations, most saves.

    Evaluations that objectives learn from stay.

    Args:
        config: changed in place.
        save_steps: steps between two checkpoints; 0: only at the end.
    """
    _evaluated_last(config, but=_teachers(config))
    with config.unlocked():
        for section in config.evals.values():
            if "on" in section:  # the last state is judged, that of the completed schedule
                del section["on"]
    _set_duration(config.checkpoint, "every", save_steps)
    config.checkpoint.update({"best_metric": "", "best_mode": "max"})
    config.checkpoint.update({"keep_latest": 1, "keep_best": 0})
    _set_duration(config.log, "every", None)
    config.log.every_percent = _LOG_PERCENT
    _quiet(config)


def _evaluated_last(config: ConfigDict, but: Collection[str] = ()) -> None:
    """Leave out evaluations in the middle of a run, of all evaluators but those named."""
    with config.unlocked():
        for name, section in config.evals.items():
            for key in [f"every_{unit}" for unit in UNITS]:
                if key in section and name not in but:
                    del section[key]


def _quiet(config: ConfigDict) -> None:
    """Write metrics to the file and nowhere else."""
    config.log.update({"tensorboard": False, "wandb": ""})
    config.profile.num_steps = 0


def _teachers(config: ConfigDict) -> tuple[str, ...]:
    """Evaluators that objectives learn from."""
    metrics = itertools.chain.from_iterable(learns_from(config.objectives).values())
    return tuple(sorted({metric.partition("/")[0] for metric in metrics} & set(config.evals)))


def _set_duration(section: ConfigDict, name: str, steps: int | None) -> None:
    """Give a duration in steps and in no other unit."""
    for unit in UNITS:
        section[f"{name}_{unit}"] = None
    section[f"{name}_steps"] = steps
