"""Checkpoints: saved in the background, verified before use, restored onto any topology.

Orbax writes and reads the arrays. This module adds what a long run needs on top:

- a manifest (``infra/manifest.py``) beside every checkpoint, with the shape of each array and the
  size and CRC-32 of each file. It is written before Orbax renames the finished directory into
  place, so a directory with a step's name and without a manifest was damaged, not interrupted.
  (Orbax alone notices truncated files, but restores flipped bits without a word.)
- a damaged checkpoint is named in a warning, and the one before it is used;
- a state that does not fit the checkpoint is refused by the paths and shapes that differ;
- leaves that lie elsewhere can be left out, and are put back by what knows where they are;
- ``infra/checkpoint_reader.py`` reads parameters without knowing the state they were saved in.

Arrays are stored under their path in the state (``params/text/dense/kernel``), as nested dicts, so
a checkpoint outlives the Python classes of the state. Layout of a checkpoint directory::

    1200/state/          arrays (Orbax, OCDBT)
    1200/extra/          JSON given to ``save``: config, tokenizer, facts
    1200/manifest.json   what there is, for verification
    damaged-1300/        set aside on resume; safe to delete
"""

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from vlp_jax.infra.checkpoint_reader import (
    Elsewhere,
    Restored,
    all_damaged,
    first_sound,
    nothing_elsewhere,
    read_arrays,
    read_extra,
    steps_of,
)
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.manifest import (
    BestMode,
    CheckpointMismatchError,
    DamagedCheckpointError,
    Manifest,
    checksums,
    read_manifest,
    score,
    verify,
    write_manifest,
)
from vlp_jax.infra.sharding import by_path, nested

_NAMED_DIFFERENCES = 5
_NONE_THERE, _ALL_DAMAGED = -1, -2

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: the latest and the best are kept.

    Every process of the run makes the same calls. ``with Checkpoints(...)`` waits for the last save
    on leaving.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: BestMode = "max",
    ) -> None:
        """Open the directory, create it if need be, and delete what an interrupted save left.

        Args:
            directory: where the checkpoints are; a local path or a bucket that all processes see.
            keep_latest: how many of the newest checkpoints stay; two or more survive a damaged one.
            keep_best: how many of the best by ``best_metric`` stay as well.
            best_metric: name of the ranking metric; None keeps the latest only.
            best_mode: "max" if more of it is better, "min" if less is.

        Raises:
            ConfigError: a value above makes no sense.
        """
        if keep_latest < 1:
            raise ConfigError(
                "checkpoint.keep_latest", f"{keep_latest} would keep nothing", "Use 1 or more"
            )
        if best_mode not in ("max", "min"):
            raise ConfigError("checkpoint.best_mode", f"{best_mode!r}", "Use 'max' or 'min'")
        self.directory = epath.Path(directory).resolve()
        self._best_metric = best_metric
        self._best_mode: BestMode = best_mode
        self._scores = self._read_scores()
        self._saving: tuple[int, dict[str, float], dict[str, tuple[list[int], str]]] | None = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(keep_latest), _Best(self._scores, keep_best)]
                ),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
        without: Collection[str] = (),
    ) -> bool:
        """Copy the state off the device and write it in the background.

        The buffers of ``state`` may be donated as soon as this returns. It first waits for the save
        before it, and raises what that one failed with.

        Args:
            step: the step of the state.
            state: a pytree of arrays (typed PRNG keys included).
            metrics: evaluated for this very state. Without the one that ranks checkpoints, this one
                is no candidate for the best; a warning says so where there are others.
            extra: a JSON object stored beside the state.
            without: paths in the state that are not stored, for ``restore_latest`` is given them.

        Returns:
            False if there was already a checkpoint of this step; it is left as it is.
        """
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if metrics and self._best_metric is not None and self._best_metric not in metrics:
            logger.warning(
                "config.checkpoint.best_metric: %r is not among the metrics of step %d (%s), whose "
                "checkpoint is no candidate for the best",
                self._best_metric,
                step,
                ", ".join(sorted(metrics)),
            )
        self.wait()
        if step in self._manager.all_steps():
            return False
        arrays = {path: leaf for path, leaf in by_path(state).items() if path not in without}
        self._scores[step] = score(metrics, self._best_metric, self._best_mode)
        self._saving = (
            step,
            metrics,
            {path: (list(leaf.shape), str(leaf.dtype)) for path, leaf in arrays.items()},
        )
        # Orbax copies to the host implicitly; a training loop forbids that to its own code.
        with jax.transfer_guard("allow"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(nested(arrays)),
                    extra=ocp.args.JsonSave(dict(extra or {})),
                ),
            )
        return True

    def rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a checkpoint that was saved before it was evaluated.

        Args:
            step: of a checkpoint that is there.
            metrics: evaluated for its state.
        """
        self.wait()
        root = self.directory / str(step)
        values = {name: float(value) for name, value in metrics.items()}
        self._scores[step] = score(values, self._best_metric, self._best_mode)
        if jax.process_index() == 0:
            manifest = dataclasses.replace(
                read_manifest(root),
                metrics=values,
                best_metric=self._best_metric,
                best_mode=self._best_mode,
            )
            write_manifest(root, manifest)

    def restore_latest(
        self, abstract_state: Any, elsewhere: Elsewhere = nothing_elsewhere
    ) -> Restored | None:
        """Restore the newest sound checkpoint, on whatever devices the abstract state names.

        Newer checkpoints that are damaged are named in a warning and renamed to ``damaged-STEP``,
        so that the run can save at their steps again.

        Args:
            abstract_state: the state as ``jax.ShapeDtypeStruct`` leaves with shardings (arrays do
                as well). Leaves without a sharding go to the first local device.
            elsewhere: gives the leaves that the checkpoint leaves out; what it raises is passed on.

        Returns:
            The state, or None if there is no checkpoint.

        Raises:
            DamagedCheckpointError: there are checkpoints, and all of them are damaged.
            CheckpointMismatchError: the state has other paths, shapes or dtypes.
        """
        self.wait()
        step = self._newest_sound_step()
        if step is None:
            return None
        self._manager.reload()
        return _restore(self.directory / str(step), step, abstract_state, elsewhere)

    def size(self) -> int:
        """Bytes of the files of the newest checkpoint, of which there is one."""
        self.wait()
        files = read_manifest(self.directory / str(steps_of(self.directory)[0])).files
        return sum(size for size, _ in files.values())

    @property
    def latest_path(self) -> epath.Path | None:
        """The newest committed checkpoint, for messages; None if there is none."""
        steps = steps_of(self.directory)
        return self.directory / str(steps[0]) if steps else None

    def wait(self) -> None:
        """Block until the last save is on disk; raises what it failed with."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save and release the threads."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _newest_sound_step(self) -> int | None:
        """Verify from the newest to the oldest on the first process; all processes learn it."""
        step = _NONE_THERE
        damaged: list[DamagedCheckpointError] = []
        if jax.process_index() == 0:
            steps = steps_of(self.directory)
            sound, damaged = first_sound(self.directory, steps)
            if sound is not None:
                step = sound[0]
                for newer in steps[: steps.index(step)]:
                    _set_aside(self.directory / str(newer))
            elif damaged:
                step = _ALL_DAMAGED
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int64(step)))
        if step == _ALL_DAMAGED:
            raise all_damaged(self.directory, damaged)
        return None if step == _NONE_THERE else step

    def _read_scores(self) -> dict[int, float]:
        """Scores of the checkpoints that are there, by the metric this run ranks them with."""
        scores = {}
        for step in steps_of(self.directory):
            try:
                manifest = read_manifest(self.directory / str(step))
            except DamagedCheckpointError:
                continue  # named when a restore meets it
            scores[step] = score(manifest.metrics, self._best_metric, self._best_mode)
        return scores

    def _write_manifest(self) -> None:
        """Called by Orbax's thread when all files are written and the rename is still to come."""
        if jax.process_index() != 0:
            return
        assert self._saving is not None
        step, metrics, arrays = self._saving
        # Buckets have no atomic rename: there, Orbax writes in place and commits by a marker file.
        candidates = [self.directory / str(step), *self.directory.glob(f"{step}.orbax-*")]
        (root,) = [path for path in candidates if path.exists()]
        names = sorted(
            (folder / name).relative_to(root).as_posix()
            for item in ("state", "extra")
            for folder, _, files in (root / item).walk()
            for name in files
        )
        manifest = Manifest(
            step=step,
            metrics=metrics,
            best_metric=self._best_metric,
            best_mode=self._best_mode,
            arrays=arrays,
            files=checksums(root, names),
        )
        write_manifest(root, manifest)


@dataclasses.dataclass
class _Best:
    """Preservation policy of Orbax: keep the ``count`` checkpoints of highest score."""

    scores: Mapping[int, float]
    count: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One flag per checkpoint; of equal scores the later one stays."""
        ranked = [c.step for c in checkpoints if self.scores.get(c.step, -math.inf) > -math.inf]
        ranked.sort(key=lambda step: (self.scores[step], step), reverse=True)
        best = set(ranked[: self.count])
        return [checkpoint.step in best for checkpoint in checkpoints]


def _set_aside(path: epath.Path) -> None:
    """Rename a damaged checkpoint, replacing an earlier one of the same step."""
    aside = path.parent / f"damaged-{path.name}"
    if aside.exists():
        aside.rmtree()
    path.rename(aside)


def restore_step(
    directory: epath.PathLike,
    step: int,
    abstract_state: Any,
    elsewhere: Elsewhere = nothing_elsewhere,
) -> Restored:
    """Restore one checkpoint of a run that may be going on: nothing is renamed or deleted.

    Args:
        directory: the checkpoints of a run.
        step: of the checkpoint.
        abstract_state: see ``Checkpoints.restore_latest``.
        elsewhere: see there.

    Raises:
        FileNotFoundError: there is none of this step.
        DamagedCheckpointError: it is damaged.
        CheckpointMismatchError: the state has other paths, shapes or dtypes.
    """
    root = epath.Path(directory).resolve() / str(step)
    if not root.is_dir():
        raise FileNotFoundError(f"{directory} has no checkpoint of step {step}")
    verify(root)
    return _restore(root, step, abstract_state, elsewhere)


def _restore(root: epath.Path, step: int, abstract_state: Any, elsewhere: Elsewhere) -> Restored:
    """Restore a verified checkpoint into the structure and onto the devices of a state."""
    arrays, extra = by_path(abstract_state), read_extra(root)
    given = elsewhere(str(root), extra)
    told = {path: (list(array.shape), str(array.dtype)) for path, array in given.items()}
    _check_match(root, read_manifest(root).arrays | told, arrays)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here
        )
        for path, leaf in arrays.items()
    }
    held = {path: leaf for path, leaf in abstract.items() if path not in given}
    restored = read_arrays(root, held, as_numpy=False)
    restored |= {path: jax.device_put(a, abstract[path].sharding) for path, a in given.items()}
    structure = jax.tree.structure(abstract_state)
    state = jax.tree.unflatten(structure, [restored[path] for path in arrays])
    return Restored(state, step, extra)


def _check_match(
    root: epath.Path, saved: Mapping[str, tuple[list[int], str]], wanted: Mapping[str, Any]
) -> None:
    """Refuse other paths, shapes or dtypes, naming the first few."""

    def text(spec: tuple[Sequence[int], str] | None) -> str:
        return "nothing" if spec is None else f"{spec[1]}{list(spec[0])}"

    there = {path: (tuple(shape), dtype) for path, (shape, dtype) in saved.items()}
    here = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in wanted.items()}
    differing = [
        path for path in [*here, *(set(there) - set(here))] if there.get(path) != here.get(path)
    ]
    if not differing:
        return
    lines = "".join(
        f"\n  {path}: {text(there.get(path))} in the checkpoint, {text(here.get(path))} in this run"
        for path in sorted(differing)[:_NAMED_DIFFERENCES]
    )
    raise CheckpointMismatchError(
        f"checkpoint {root} does not fit this run's state; {len(differing)} arrays differ:{lines}\n"
        "Resume with the config that the run was started with, or choose a new workdir."
    )
