"""The plan: what is in global batch t, a pure function of the seed and of t.

    plan = Plan([PlannedSource(source, captions, weight=1.0)], batch_size=256, seed=0,
                edges=(8, 12, 16, 24), image_size=224)
    plan.batch(t)      # PlannedBatch: source, record, caption, length, position, ... int [B]
    plan.bucket(t)     # Bucket(text_length=12, image_size=224)
    plan.buckets()     # all that can occur

Vectorised NumPy, not a chain of loader transforms: position -> mixture -> a permutation per
(seed, source, epoch) -> record and caption. Windows of at least 32 batches are sorted by the
edge that each text is padded to and cut into exactly that many batches; no other way to cut them
needs less padding. Guarded examples (``data.guarded``) come last, in batches of their own but for
one at most. The order of the batches and of the rows in them is permuted again. Nothing
depends on the number of hosts, devices or workers, or on what ran before.
"""

import collections
import dataclasses
import math
import threading
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.planned import (
    PlannedBatch,
    PlannedSource,
    check_batch,
    host_rows,
    padded_to,
)

MIN_WINDOW_BATCHES = 32
DEFAULT_WINDOW_BATCHES = 64
# Every run of this many positions holds the same number of each source's examples. Weights that
# are halves, thirds, fifths, eighths, ninths, tenths or whole percents come out exactly.
MIXTURE_BLOCK = 3600
MAX_SUBSTITUTES = 64  # where so many records cannot be read, the source is gone

# What a random stream is for; the first number of its spawn key.
_MIXTURE, _RECORDS, _CAPTIONS, _BATCHES, _ROWS, _SUBSTITUTES = range(6)

T = TypeVar("T")


class Plan:
    """Global training batch t for every t >= 0, a pure function of (seed, t).

    Attributes:
        sources: the mixture.
        batch_size: rows B of a global batch.
        seed: of everything that is drawn.
        edges: increasing text lengths that batches are padded to.
        image_size: side of the image in pixels.
        window_batches: batches sorted together; more of them pad less, for fewer batches then
            straddle an edge, but are planned at one go, which an unbounded source takes time for.
        stream: name of the batch, from which its draws follow, where a run has several. The order
            of a window's batches is that of all of them alike: long texts of one batch meet those
            of the others.
    """

    replaces_damaged = True

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        batch_size: int,
        seed: int,
        edges: Sequence[int],
        image_size: int,
        window_batches: int = DEFAULT_WINDOW_BATCHES,
        stream: str = "",
    ):
        """Checks the mixture; plans nothing yet.

        Raises:
            ValueError: a number is out of range; the message names its config key.
        """
        check_batch(sources, batch_size, edges)
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        if window_batches < MIN_WINDOW_BATCHES:
            raise ValueError(
                f"data.window_batches={window_batches}: must be at least {MIN_WINDOW_BATCHES}, "
                "or sorting by length leaves batches of mixed lengths"
            )
        self.sources = tuple(sources)
        self.batch_size = batch_size
        self.seed = seed
        self.edges = tuple(edges)
        self.image_size = image_size
        self.window_batches = window_batches
        self.stream = stream
        self._block_counts = _block_counts(self.sources)
        self._windows: _Memo[_Window] = _Memo(4)
        self._permutations: _Memo[np.ndarray] = _Memo(4)

    def batch(self, t: int) -> PlannedBatch:
        """Global batch t: every row's source, record, caption and position.

        Raises:
            IndexError: t is negative.
        """
        window, index = self._window(t), t % self.window_batches
        batch_size = self.batch_size
        return PlannedBatch(
            source=window.source[index],
            record=window.record[index],
            caption=window.caption[index],
            length=window.length[index],
            position=np.arange(t * batch_size, (t + 1) * batch_size),
            valid=np.ones(batch_size, np.bool_),
            bucket=self.bucket(t),
        )

    def substitutes(self, t: int, row: int) -> np.ndarray:
        """(record, caption) to try in turn if ``row`` of global batch t is damaged.

        Drawn from the window's rows of the same source whose text fits the batch's bucket: of the
        batch itself a source of little weight may have but one row. Records that are in the batch
        already come last, for objectives that contrast rows take it amiss to see one twice.

        Returns:
            int64 [n, 2], n at most ``MAX_SUBSTITUTES``.
        """
        window, index = self._window(t), t % self.window_batches
        same_source = window.source == window.source[index, row]
        fits = same_source & (window.length <= window.edge[index])
        fits &= window.record != window.record[index, row]
        pairs = np.stack([window.record[fits], window.caption[fits]], axis=1)
        pairs = self._rng(_SUBSTITUTES, t, row).permutation(pairs)
        in_batch = np.isin(pairs[:, 0], window.record[index, same_source[index]])
        return pairs[np.argsort(in_batch, kind="stable")][:MAX_SUBSTITUTES]

    def rows(self, t: int, host: int, hosts: int) -> PlannedBatch:
        """Host ``host``'s contiguous rows of global batch t."""
        return self.batch(t).rows(host_rows(self.batch_size, host, hosts))

    def bucket(self, t: int) -> Bucket:
        """The bucket of global batch t."""
        window, index = self._window(t), t % self.window_batches
        return Bucket(int(window.edge[index]), self.image_size, guarded=bool(window.guarded[index]))

    def buckets(self) -> tuple[Bucket, ...]:
        """Every size that can occur, by increasing text length; any may be guarded."""
        return _buckets(self.edges, self.sources, self.image_size)

    @property
    def examples_per_epoch(self) -> int | None:
        """Images of all sources together; None if one is unbounded."""
        sizes = [planned.source.num_records for planned in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def guarded_share(self) -> float:
        """Share of the batches that hold a guarded example, as is to be expected."""
        total = sum(planned.weight for planned in self.sources)
        share = sum(
            planned.weight / total * len(planned.guarded) / planned.source.num_records
            for planned in self.sources
            if planned.source.num_records
        )
        rows = share * self.window_batches * self.batch_size
        return min(rows, math.ceil(rows / self.batch_size)) / self.window_batches

    @property
    def mean_text_length(self) -> float:
        """Mean tokens of a text of the mixture, special ones included."""
        weights = np.asarray([planned.weight for planned in self.sources], np.float64)
        means = []
        for planned in self.sources:
            histogram = planned.captions.histogram()
            means.append((histogram * np.arange(len(histogram))).sum() / histogram.sum())
        return float((weights * means).sum() / weights.sum())

    def padding_waste(self, num_batches: int) -> float:
        """Share of text tokens that are padding in the first ``num_batches`` batches."""
        used = padded = 0
        for t in range(num_batches):
            batch = self.batch(t)
            used += int(batch.length.sum())
            padded += len(batch) * batch.bucket.text_length
        return 1.0 - used / padded

    def _window(self, t: int) -> "_Window":
        if t < 0:
            raise IndexError(f"there is no batch {t}: steps count from 0")
        number = t // self.window_batches
        return self._windows.get(number, lambda: self._plan_window(number))

    def _plan_window(self, number: int) -> "_Window":
        rows = self.window_batches * self.batch_size
        source, record, caption = self._examples(np.arange(number * rows, (number + 1) * rows))
        length, guarded = np.empty(rows, np.int32), np.zeros(rows, np.bool_)
        for index, planned in enumerate(self.sources):
            mine = np.flatnonzero(source == index)
            if mine.size:
                length[mine] = planned.captions.lengths(record[mine], caption[mine])
                guarded[mine] = np.isin(record[mine], planned.guarded)
        # By edge and not by length, which pads as little and leaves lengths mixed in a batch; and
        # stable, so that the records of a small source come back as late as they can.
        edge = np.searchsorted(self.edges, length)
        batches = np.lexsort((edge, guarded)).reshape(self.window_batches, self.batch_size)
        batches = self._rng(_BATCHES, number).permutation(batches)
        batches = self._rng(_ROWS, number).permuted(batches, axis=1)
        return _Window(
            source=source[batches],
            record=record[batches],
            caption=caption[batches],
            length=length[batches],
            edge=padded_to(self.edges, length[batches].max(axis=1)),
            guarded=np.asarray(guarded[batches].any(axis=1)),
        )

    def _examples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions in the stream -> source, record and caption, all int64 [n]."""
        source, running = self._mixture(positions)
        record, caption = np.empty_like(positions), np.empty_like(positions)
        for index in range(len(self.sources)):
            mine = np.flatnonzero(source == index)
            record[mine], caption[mine] = self._draw(index, running[mine])
        return source, record, caption

    def _mixture(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions -> the source of each, and how many of that source came before it."""
        source, running = np.zeros_like(positions), positions.copy()
        if len(self.sources) == 1:
            return source, running
        blocks, place = np.divmod(positions, MIXTURE_BLOCK)
        for block in np.unique(blocks):
            order = self._rng(_MIXTURE, block).permutation(
                np.repeat(np.arange(len(self.sources)), self._block_counts)
            )
            rank = np.empty_like(order)
            rank[np.argsort(order, kind="stable")] = np.concatenate(
                [np.arange(count) for count in self._block_counts]
            )
            here = np.flatnonzero(blocks == block)
            source[here] = order[place[here]]
            running[here] = block * self._block_counts[source[here]] + rank[place[here]]
        return source, running

    def _draw(self, index: int, running: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The running-th examples of a source -> record and caption, int64 [n] each.

        A finite source is read in a new order every epoch, and a record's captions in turn from a
        random first one, so that each is seen once before any is repeated. The records of an
        unbounded source are read in order and never again.
        """
        source = self.sources[index].source
        if source.num_records is None:
            epoch, record = np.zeros_like(running), running
        else:
            epoch, place = np.divmod(running, source.num_records)
            record = np.empty_like(running)
            for number in np.unique(epoch):
                here = np.flatnonzero(epoch == number)
                record[here] = self._permutation(index, int(number))[place[here]]
        first = _hash(record, self._rng(_CAPTIONS, index))
        turns = first + epoch.astype(np.uint64)
        caption = turns % source.num_captions(record).astype(np.uint64)
        return record, caption.astype(np.int64)

    def _permutation(self, index: int, epoch: int) -> np.ndarray:
        size = self.sources[index].source.num_records
        assert size is not None, "an unbounded source has no order to permute"
        return self._permutations.get(
            (index, epoch), lambda: self._rng(_RECORDS, index, epoch).permutation(size)
        )

    def _rng(self, *key: int) -> np.random.Generator:
        # The seed and the key are separate words of the entropy: epoch 1 of seed 0 is not epoch 0
        # of seed 1, and sources of one size differ.
        if self.stream and key[0] != _BATCHES:
            key = (zlib.crc32(self.stream.encode()), *key)
        return np.random.default_rng(
            np.random.SeedSequence(self.seed, spawn_key=tuple(map(int, key)))
        )


@dataclasses.dataclass(frozen=True)
class _Window:
    """The batches of a window, in the order they are read: arrays [W, B]; edge and guarded [W]."""

    source: np.ndarray
    record: np.ndarray
    caption: np.ndarray
    length: np.ndarray
    edge: np.ndarray
    guarded: np.ndarray


class _Memo(Generic[T]):
    """The latest values by key; safe among threads, and pickled empty."""

    def __init__(self, size: int):
        self._size = size
        self._values: collections.OrderedDict[Hashable, T] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key; threads that need one window make it once.

        Who needs a value that is there does not wait for one that is being made.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        with self._making:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            value = make()
            with self._lock:
                self._values[key] = value
                if len(self._values) > self._size:
                    self._values.popitem(last=False)
            return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Memo, (self._size,)


def _block_counts(sources: Sequence[PlannedSource]) -> np.ndarray:
    """Examples of each source in a block: weights in proportion, largest remainder; int64 [S]."""
    weights = np.asarray([planned.weight for planned in sources], np.float64)
    shares = weights / weights.sum() * MIXTURE_BLOCK
    counts = np.floor(shares + 1e-6).astype(np.int64)
    missing = MIXTURE_BLOCK - counts.sum()
    counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    for planned, count in zip(sources, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"data.sources.{planned.source.name}.weight={planned.weight}: less than one "
                f"example in {MIXTURE_BLOCK}; raise it or remove the source"
            )
    return counts


def _buckets(
    edges: Sequence[int], sources: Sequence[PlannedSource], image_size: int
) -> tuple[Bucket, ...]:
    last = int(np.searchsorted(edges, max(planned.captions.longest for planned in sources)))
    return tuple(Bucket(edge, image_size) for edge in edges[: last + 1])


def _hash(numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random function of int64 [n] to uint64 [n], chosen by ``rng``.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014) over a keyed number: random access
    without a table of one entry per record.
    """
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= rng.integers(0, 1 << 64, dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    # Room above, so that adding an epoch never wraps and the turns stay in order.
    return (x ^ (x >> np.uint64(31))) >> np.uint64(16)
