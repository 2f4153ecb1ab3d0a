"""The loader: planned batches, read and decoded ahead of the step that needs them.

    with Loader(plan, start_step=0, stop_step=1000, host=0, hosts=1, workers=0, threads=4,
                prefetch=8) as loader:
        for batch in loader:          # HostBatch of step loader.step - 1
            ...
    loader.bad.counts                 # {"truncated image": 2}
    loader.bad.places()               # [("truncated image", "/data/a.jpg: ..."), ...]

Grain does the reading: a map over step numbers, sliced from the first, whose item is one host
batch. Its only state is the step, so a loader started at t gives what an uninterrupted one gives
from t on, whatever the number of hosts, workers or threads.
"""

import collections
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import grain
import numpy as np
from absl import flags

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import EXTRA_FIELDS, FIELDS, HostBatch, batch_spec
from vlp_jax.data.planned import BatchPlan, EncodedTexts, Packed, PlannedBatch, host_rows
from vlp_jax.data.source import BadExample, ManyRows, NothingReadable, Source
from vlp_jax.infra.errors import ConfigError

MAX_PLACES = 1_000  # of bad examples that are kept to be told

# Kind and place of every damaged record that was met while a batch was read.
_Met = list[tuple[str, str]]


class BadCounts:
    """Bad examples by kind, and where the first ones are; the first of each kind is logged.

    Attributes:
        counts: how many of each kind; an example that is met twice counts twice.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._places: dict[tuple[str, str], None] = {}  # a set that keeps its order

    def add(self, kind: str, where: str) -> None:
        """Counts one bad example; logs it if it is the first of its kind."""
        if kind not in self.counts:
            logging.warning("bad example, %s: %s (later ones are counted only)", kind, where)
        self.counts[kind] += 1
        if len(self._places) < MAX_PLACES:
            self._places[kind, where] = None

    def places(self) -> list[tuple[str, str]]:
        """Kind and place of the bad examples in the order met, each once; up to ``MAX_PLACES``."""
        return list(self._places)

    @classmethod
    def joined(cls, parts: Iterable["BadCounts"]) -> "BadCounts":
        """What several have counted."""
        whole = cls()
        for part in parts:
            whole.counts += part.counts
            whole._places |= part._places
        return whole

    @property
    def total(self) -> int:
        """Bad examples of all kinds."""
        return self.counts.total()


class Loader(Iterator[HostBatch]):
    """Host batches of the steps [start_step, stop_step), in order.

    A damaged record is replaced by another of the same source whose text fits the bucket (see
    ``Plan.substitutes``); a pure function of the plan, of t and of which files are damaged. The
    batch's ``replaced`` counts the damaged records passed over before a row was read. The damaged
    rows of an ``EvalPlan`` are not replaced, for its rows are to be seen once: they come black,
    with ``replaced`` at 1 and not ``valid``.

    Close the loader, or use it as a context manager: it holds threads and processes.

    Attributes:
        step: the step whose batch comes next; all there is to save.
        bad: bad examples met by this host's rows so far, by kind.
    """

    def __init__(
        self,
        plan: BatchPlan,
        start_step: int,
        stop_step: int,
        host: int = 0,
        hosts: int = 1,
        workers: int = 0,
        threads: int = 4,
        prefetch: int = 4,
        fields: Sequence[str] = tuple(FIELDS),
    ):
        """Starts reading ahead with the first batch that is asked for.

        Args:
            plan: what is in each batch.
            start_step: first step.
            stop_step: step after the last.
            host: number of this host.
            hosts: how many hosts there are; each reads its contiguous rows of the global batch.
            workers: processes to read in; 0 for this process. They are spawned, so the main
                script must be importable (``if __name__ == "__main__":``). Worth it for sources
                that compute in Python; decoding leaves the interpreter free to other threads.
            threads: threads a process, each of which reads one batch at a time; 0 to read in
                the calling thread, for debugging.
            prefetch: batches a process keeps ready or in the making.
            fields: names of the batch's arrays, see ``data.batch``.

        Raises:
            ConfigError: a number is out of range, or a source lacks a field; the message names the
                key.
        """
        host_rows(plan.batch_size, host, hosts)
        for planned in plan.sources:
            source = planned.source
            wanted = EXTRA_FIELDS.keys() & set(fields)
            if missing := sorted(wanted - set(source.extra_fields)):
                raise ConfigError(
                    f"data.sources.{source.name}",
                    f"gives no {', '.join(missing)}, which an objective of the run reads",
                    "Use a source made for the task, or remove the objective",
                )
        if workers < 0 or threads < 0:
            raise ConfigError(
                "data.workers", f"{workers} workers of {threads} threads", "Use 0 or more of each"
            )
        if threads and prefetch < threads:
            raise ConfigError(
                "data.prefetch",
                f"{prefetch} is less than data.threads={threads}, and every thread works on a "
                "batch of its own",
                f"Use {threads} or more",
            )
        if not 0 <= start_step <= stop_step:
            raise ConfigError(
                "total_steps",
                f"the run was restored at step {start_step}, beyond its end at {stop_step}",
                "Raise the length of the run or use another workdir",
            )
        self.step = start_step
        self.bad = BadCounts()
        reading = (
            grain.MapDataset.range(start_step, stop_step)
            .map(_Reader(plan, host, hosts, tuple(fields)))
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
                )
            )
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its own flags when it starts a worker
                flags.FLAGS.mark_as_parsed()
            reading = reading.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_start_worker
            )
        self._batches: grain.DatasetIterator | None = iter(reading)
        # Should the owner forget: Grain's own deletion raises once the interpreter shuts down.
        self._finalizer = weakref.finalize(self, self._batches.close)

    def __next__(self) -> HostBatch:
        """The batch of ``step``; with workers its arrays lie in memory shared with them.

        Raises:
            NothingReadable: a batch holds no readable record of a source.
            ValueError: the loader is closed.
        """
        if self._batches is None:
            raise ValueError("the loader is closed")
        batch, met = next(self._batches)
        # Grain's subclass frees shared memory when deleted; a plain view keeps it until then.
        batch = {name: array.view(np.ndarray) for name, array in batch.items()}
        for kind, where in met:
            self.bad.add(kind, where)
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends threads and worker processes; the loader cannot be read any more."""
        self._finalizer()
        self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class JointLoader(Iterator[dict[str, HostBatch]]):
    """Host batches of the names that an update reads; close it, or use it as a context manager.

    Attributes:
        loaders: of each named batch.
        step: the step whose batches come next.
    """

    def __init__(
        self,
        loaders: Mapping[str, Loader],
        names: Callable[[int], Iterable[str]],
        steps: range,
    ):
        """Opens nothing by itself.

        Args:
            loaders: of each named batch, at its first batch of ``steps``.
            names: step -> names of the batches that its update reads.
            steps: whose batches are read.
        """
        self.loaders = dict(loaders)
        self.step, self._stop, self._names = steps.start, steps.stop, names

    def __next__(self) -> dict[str, HostBatch]:
        """The batches of ``step``, by name; raises as ``Loader``."""
        if self.step >= self._stop:
            raise StopIteration
        batches = {name: next(self.loaders[name]) for name in self._names(self.step)}
        self.step += 1
        return batches

    @property
    def bad(self) -> BadCounts:
        """Bad examples met by this host's rows of all batches."""
        return BadCounts.joined(loader.bad for loader in self.loaders.values())

    def close(self) -> None:
        """Ends threads and worker processes."""
        for loader in self.loaders.values():
            loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Reader:
    """Step -> one host's batch and the bad examples met; what loader workers receive a copy of."""

    def __init__(self, plan: BatchPlan, host: int, hosts: int, fields: tuple[str, ...]):
        self._plan = plan
        self._fields = fields
        self._extra_fields = tuple(name for name in fields if name in EXTRA_FIELDS)
        self._image_fields = ("image",) if "image" in fields else ()
        self._rows = host_rows(plan.batch_size, host, hosts)

    def __call__(self, t: int) -> tuple[HostBatch, _Met]:
        t, plan = int(t), self._plan
        planned = plan.batch(t)
        mine, bucket = planned.rows(self._rows), planned.bucket
        specs = batch_spec(bucket, len(mine), self._fields)
        batch: HostBatch = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
        # Only ever folded into keys, so wrapping round after 2^31 examples does no harm.
        batch["position"][:] = mine.position & 0x7FFFFFFF
        batch["valid"][:] = mine.valid
        rows_of = [np.flatnonzero(mine.source == index) for index in range(len(plan.sources))]
        left = np.ones(len(mine), np.bool_)
        for planned_source, rows in zip(plan.sources, rows_of, strict=True):
            left[self._read_many(planned_source.source, mine, rows, batch)] = False
        record, caption = mine.record.copy(), mine.caption.copy()
        met: _Met = []
        for index in np.flatnonzero(left).tolist():
            already_met = len(met)
            record[index], caption[index] = self._read_image(
                t, planned, self._rows.start + index, batch, index, met
            )
            batch["replaced"][index] = len(met) - already_met
            if not plan.replaces_damaged:
                batch["valid"][index] &= len(met) == already_met
        for planned_source, rows in zip(plan.sources, rows_of, strict=True):
            ids, lengths = planned_source.captions.padded(
                record[rows], caption[rows], bucket.text_length
            )
            _put(batch, rows, {"text_ids": ids, "text_length": lengths})
            if "text_document" in self._fields:
                of = _documents(planned_source.captions, record[rows], caption[rows], bucket)
                _put(batch, rows, {"text_document": of})
        return batch, met

    def _read_many(
        self, source: Source, mine: PlannedBatch, rows: np.ndarray, batch: HostBatch
    ) -> np.ndarray:
        """Reads pictures and extra fields of a source that reads many records at once.

        Args:
            source: of the rows.
            mine: what is in this host's rows.
            rows: which of them are the source's, int64 [n].
            batch: this host's rows, written to.

        Returns:
            The rows that were read, int64: all but the damaged ones, or none.
        """
        if not isinstance(source, ManyRows):
            return rows[:0]
        rows = rows[~source.damaged(mine.record[rows], bool(self._extra_fields))]
        names = (*self._image_fields, *self._extra_fields)
        _put(batch, rows, source.rows(mine.record[rows], mine.bucket.image_size, names))
        return rows

    def _read_image(
        self, t: int, planned: PlannedBatch, row: int, batch: HostBatch, index: int, met: _Met
    ) -> tuple[int, int]:
        """Reads the picture and the extra fields of a row, or of its first readable substitute.

        Args:
            t: the step.
            planned: the global batch of step t.
            row: which of its rows is wanted.
            batch: this host's rows, written to; left as they are if nothing may stand in.
            index: which of them.
            met: damaged records are added to it.

        Returns:
            The record and caption that were read, or planned if nothing may stand in for them.

        Raises:
            NothingReadable: neither the row nor any substitute can be read.
        """
        source = self._plan.sources[planned.source[row]].source
        tried: set[int] = set()
        for record, caption in self._candidates(t, planned, row):
            if record in tried:
                continue
            tried.add(record)
            size = planned.bucket.image_size
            try:
                image = source.image(record, size) if self._image_fields else None
                extras = source.extras(record, size) if self._extra_fields else {}
            except BadExample as bad:
                met.append((bad.kind, bad.where))
                continue
            if image is not None:
                batch["image"][index] = image
            for name in self._extra_fields:
                batch[name][index] = extras[name]
            return record, caption
        if self._plan.replaces_damaged:
            raise NothingReadable(
                f"data.sources.{source.name}: {len(tried)} records tried for one row of step {t} "
                f"and none could be read, the last: {met[-1][0]}: {met[-1][1]}; check the files, "
                "or remove the source"
            )
        return int(planned.record[row]), int(planned.caption[row])

    def _candidates(self, t: int, planned: PlannedBatch, row: int) -> Iterator[tuple[int, int]]:
        yield int(planned.record[row]), int(planned.caption[row])
        yield from map(tuple, self._plan.substitutes(t, row).tolist())


def _documents(
    captions: EncodedTexts, records: np.ndarray, indices: np.ndarray, bucket: Bucket
) -> np.ndarray:
    """Which document each token is of: int32 [n, N]; a text that is not packed is the first."""
    if isinstance(captions, Packed):
        return captions.documents(records, indices, bucket.text_length)
    place = np.arange(bucket.text_length)[None]
    return (place < captions.lengths(records, indices)[:, None]).astype(np.int32)


def _put(batch: HostBatch, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
    """Writes some rows of a batch; values of all its rows take the place of its arrays."""
    for name, some in values.items():
        if len(some) == len(batch[name]):
            batch[name] = some
        else:
            batch[name][rows] = some


def _start_worker(worker: int, workers: int) -> None:
    """Leaves signals to the main process, and ends with it even if it is killed."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so does the end of a job: main saves, then ends
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
