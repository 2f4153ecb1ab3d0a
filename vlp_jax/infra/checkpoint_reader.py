"""Reading checkpoints from disk: which are sound, which is best, and parameters without a run.

Nothing here is renamed or deleted, so a run may be writing to the directory meanwhile. The layout
is that of ``infra/checkpoint.py``.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlp_jax.infra.manifest import (
    MANIFEST,
    BestMode,
    CheckpointMismatchError,
    DamagedCheckpointError,
    Manifest,
    read_manifest,
    score,
    verify,
)
from vlp_jax.infra.sharding import by_path, nested

logger = logging.getLogger(__name__)

Leaf = TypeVar("Leaf")

# From the path of a checkpoint and the JSON saved with it to what its state has beyond the arrays
# it holds: path in the state -> array.
Elsewhere = Callable[[str, Mapping[str, Any]], Mapping[str, np.ndarray]]


def nothing_elsewhere(root: str, extra: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    """Of a checkpoint that holds the whole state."""
    return {}


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        state: the state in the structure of the abstract state, or the nested dict of parameters.
        step: the step it was saved at.
        extra: the JSON object saved with it.
    """

    state: Any
    step: int
    extra: dict[str, Any]


def load_params(
    directory: epath.PathLike,
    step: int | Literal["latest", "best"] = "latest",
    subtree: str | Sequence[str] = "params",
    ranking: tuple[str, BestMode] | None = None,
    overlays: Sequence[str] | Callable[[Mapping[str, Any]], Sequence[str]] = (),
    elsewhere: Elsewhere = nothing_elsewhere,
) -> Restored:
    """Read one subtree of a checkpoint, without knowing the type of the state it was saved in.

    Args:
        directory: the checkpoints of a run, or one checkpoint (``.../checkpoints/1200``).
        step: a step, "latest" (the newest sound one), or "best".
        subtree: path of the subtree, such as ``params`` or ``extras/ema``; of several, the first
            that is there is read.
        ranking: metric and mode of the best one; by default those that the newest checkpoint was
            to be ranked by.
        overlays: paths of subtrees whose leaves take the place of those of the same path within
            the first; or what gives them for the extra.
        elsewhere: gives the leaves that the checkpoint leaves out; what it raises is passed on.

    Returns:
        The subtree as nested dicts of NumPy arrays in the dtypes saved, its step, and the extra.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DamagedCheckpointError: it is damaged (for "latest" and "best": all candidates are).
        CheckpointMismatchError: it has no such subtree, or a leaf of an overlay has no place in it.
    """
    root, manifest = _find(epath.Path(directory).resolve(), step, ranking)
    asked = [subtree] if isinstance(subtree, str) else subtree
    found = [path for path in asked if any(name.startswith(f"{path}/") for name in manifest.arrays)]
    if not found:
        there = sorted({path.split("/")[0] for path in manifest.arrays})
        raise CheckpointMismatchError(
            f"{root} holds no {' or '.join(map(repr, asked))}; its top level is {', '.join(there)}"
        )
    extra = read_extra(root)
    given = _below(found[0], elsewhere(str(root), extra))
    places: dict[str, str] = {}  # path in the result -> where it is read
    for part in (found[0], *(overlays(extra) if callable(overlays) else overlays)):
        own = _below(part, {path: path for path in manifest.arrays})
        lost = sorted(set(own) - set(places) - set(given)) if places else []
        if lost or not own:
            problem = f"holds {lost[0]}, which {found[0]} does not" if own else "is absent"
            raise CheckpointMismatchError(f"{root}: {part} {problem}")
        places |= own
    wanted = set(places.values())
    abstract = {
        path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
        for path, (shape, dtype) in manifest.arrays.items()
        if path in wanted
    }
    restored = read_arrays(root, abstract, as_numpy=True)
    params = nested({**given, **{path: restored[place] for path, place in places.items()}})
    return Restored(params, manifest.step, extra)


def _below(part: str, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves of a subtree, by their path within it."""
    return {p.removeprefix(f"{part}/"): x for p, x in leaves.items() if p.startswith(f"{part}/")}


def has_checkpoint(directory: epath.PathLike) -> bool:
    """Whether a folder of checkpoints holds one that was written to its end, sound or not."""
    return bool(steps_of(epath.Path(directory)))


def steps_of(directory: epath.Path) -> list[int]:
    """Steps with a committed directory, newest first."""
    if not directory.is_dir():
        return []
    return sorted((int(p.name) for p in directory.iterdir() if p.name.isdigit()), reverse=True)


def _find(
    directory: epath.Path,
    step: int | Literal["latest", "best"],
    ranking: tuple[str, BestMode] | None,
) -> tuple[epath.Path, Manifest]:
    """The directory of one checkpoint and its manifest, verified."""
    if (directory / MANIFEST).is_file():
        return directory, verify(directory)
    if isinstance(step, int):
        if not (directory / str(step)).is_dir():
            raise FileNotFoundError(
                f"{directory} has no checkpoint of step {step}; there are "
                f"{', '.join(map(str, steps_of(directory))) or 'none'}"
            )
        return directory / str(step), verify(directory / str(step))
    steps = _ranked_steps(directory, ranking) if step == "best" else steps_of(directory)
    sound, damaged = first_sound(directory, steps)
    if sound is not None:
        return directory / str(sound[0]), sound[1]
    if damaged:
        raise all_damaged(directory, damaged)
    raise FileNotFoundError(
        f"{directory} holds no {'ranked ' if step == 'best' else ''}checkpoint; "
        "name the folder of checkpoints of a run, or one checkpoint in it"
    )


def _ranked_steps(directory: epath.Path, ranking: tuple[str, BestMode] | None) -> list[int]:
    """Steps that have the metric of the ranking, the best one first.

    All are ranked by one: a run may have been resumed with another metric than it was begun with,
    and scores by two of them do not compare.
    """
    scores = {}
    for step in steps_of(directory):
        try:
            manifest = read_manifest(directory / str(step))
        except DamagedCheckpointError as error:
            logger.warning("%s", error)
            continue
        if ranking is None:  # of the newest
            ranking = manifest.best_metric or "", manifest.best_mode
        scores[step] = score(manifest.metrics, *ranking)
    ranked = [step for step in scores if scores[step] > -math.inf]
    return sorted(ranked, key=lambda step: (scores[step], step), reverse=True)


def first_sound(
    directory: epath.Path, steps: Sequence[int]
) -> tuple[tuple[int, Manifest] | None, list[DamagedCheckpointError]]:
    """The first sound step of a list with its manifest, and what is wrong with those before."""
    damaged: list[DamagedCheckpointError] = []
    for step in steps:
        try:
            return (step, verify(directory / str(step))), damaged
        except DamagedCheckpointError as error:
            logger.warning("%s; it is passed over", error)
            damaged.append(error)
    return None, damaged


def all_damaged(
    directory: epath.Path, damaged: Sequence[DamagedCheckpointError]
) -> DamagedCheckpointError:
    """The error that names them all and the remedy."""
    reasons = "".join(f"\n  {error}" for error in damaged)
    return DamagedCheckpointError(
        f"every checkpoint in {directory} is damaged. Restore the directory from a copy, or move "
        f"it away to start from the beginning.{reasons}"
    )


def read_arrays(
    root: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct], as_numpy: bool
) -> dict[str, Any]:
    """Read the arrays of the given paths, as NumPy or onto the shardings given."""

    def how(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if as_numpy:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding)

    tree = nested(abstract)
    with jax.transfer_guard("allow"), ocp.PyTreeCheckpointer() as reader:
        restored = reader.restore(
            root / "state",
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=jax.tree.map(how, tree), partial_restore=True
            ),
        )
    return by_path(restored)


def read_extra(root: epath.Path) -> dict[str, Any]:
    """The JSON object saved beside the state."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(root / "extra", args=ocp.args.JsonRestore())
