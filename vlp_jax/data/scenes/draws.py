"""Counter-based random numbers: draw d of record r is a hash of (key, r, d) and of nothing else.

``numpy.random.Philox`` has the same property, but building one generator per record costs more
than sampling a scene; SplitMix64 over whole arrays of records costs almost nothing.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

Draw = Callable[[], float]  # each call gives the next number of a stream, in [0, 1)

BLOCK = 128  # draws made at a time; more than most scenes use

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_OFFSETS = np.arange(1, BLOCK + 1, dtype=np.uint64) * _GOLDEN


def stream_key(*words: int) -> int:
    """A 64-bit key for the non-negative ``words`` (seed, split, purpose, ...)."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def uniforms(key: int, records: np.ndarray, block: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1): int64 [n] records -> float64 [n, BLOCK].

    Blocks 0, 1, ... of one key and record continue each other (Steele et al. 2014, SplitMix64).
    """
    records = np.asarray(records, np.int64).astype(np.uint64)
    states = _mix(_mix(records * _GOLDEN + np.uint64(key)) + np.uint64(key))
    start = np.uint64(block * BLOCK * int(_GOLDEN) % 2**64)
    bits = _mix(states[:, None] + (_OFFSETS + start)[None, :])
    return (bits >> np.uint64(11)) * 2.0**-53


def stream(key: int, record: int, first: np.ndarray | None = None) -> Draw:
    """The endless stream of draws of one record.

    Args:
        key: from ``stream_key``.
        record: the record number.
        first: block 0 if the caller has computed it for many records at once, float64 [BLOCK].
    """
    if first is None:
        first = uniforms(key, np.array([record], np.int64))[0]
    return itertools.chain(first.tolist(), _later(key, record)).__next__


def _later(key: int, record: int) -> Iterator[float]:
    """The draws after block 0."""
    records = np.array([record], np.int64)
    for block in itertools.count(1):
        yield from uniforms(key, records, block)[0].tolist()


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, on uint64 arrays of any shape."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
