"""Every picture of a finite source rendered or decoded once, into memory or into one file."""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from vlp_jax.data.captions import ManyCaptions
from vlp_jax.data.source import BadExample, Source

_CHUNK = 256  # records that one worker makes at a time
_VERSION = 1

# A chunk of pictures and, by record, the kind and place of each fault met in it.
_Made = tuple[np.ndarray, dict[int, tuple[str, str]]]


class ImageCache:
    """A source that serves the pictures of another from an array made in advance.

    The array lives in memory, or in a ``.npy`` file that is mapped into memory, with its
    description beside it in a ``.json`` file. A file that describes the same pictures is used as
    it is; any other is made anew. The file appears only once it is complete.

    Args:
        source: a source with a finite number of records.
        size: side of the pictures in pixels; no other size is served.
        path: the ``.npy`` file, or None to keep the pictures in memory.
        workers: processes that make pictures; 0 makes them in this one.
        identity: all that the pictures depend on besides ``size`` and their number; read from
            ``source.identity`` if None. Needed only with ``path``.

    Raises:
        ValueError: the source is unbounded, or ``path`` cannot be used.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        path: str | os.PathLike[str] | None = None,
        workers: int = 0,
        identity: str | None = None,
    ):
        key = f"data.sources.{source.name}"
        if source.num_records is None:
            raise ValueError(f"{key}.num_records must be set: an unbounded source has no cache")
        self.source = source
        self.name = source.name
        self.num_records: int = source.num_records
        self.extra_fields, self.classes = source.extra_fields, source.classes
        self.size = size
        self._path = None if path is None else pathlib.Path(path)
        self._bad: dict[int, tuple[str, str]] = {}
        if self._path is None:
            self._images = np.empty(self._shape, np.uint8)
            self._fill(self._images, workers)
            return
        if self._path.suffix != ".npy":
            raise ValueError(f"{key}.cache_path must end in .npy; got {self._path}")
        identity = identity or getattr(source, "identity", None)
        if identity is None:
            raise ValueError(
                f"{key}.cache_path: the source has no identity by which its file could be "
                "recognised; give ImageCache one, or cache in memory"
            )
        self._open_or_make(self._path, identity, workers)

    def captions(self, records: np.ndarray, indices: np.ndarray) -> list[str]:
        """Captions of many records at once, the source's own way where it has one."""
        if isinstance(self.source, ManyCaptions):
            return self.source.captions(records, indices)
        return [self.source.caption(int(r), int(i)) for r, i in zip(records, indices, strict=True)]

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """Captions of each record: int64 [n] -> int64 [n]."""
        return self.source.num_captions(records)

    def caption(self, record: int, index: int) -> str:
        """Caption ``index`` of a record."""
        return self.source.caption(record, index)

    def image_key(self, record: int) -> tuple[str, ...]:
        """That of the source."""
        return self.source.image_key(record)

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """Those of the source; only ``image`` is kept."""
        return self.source.extras(record, size)

    def word_classes(self) -> Mapping[str, str]:
        """Class of each word the source can name one for."""
        return self.source.word_classes()

    def image(self, record: int, size: int) -> np.ndarray:
        """The picture: uint8 [size, size, 3] RGB, a copy.

        Raises:
            BadExample: the source raised it when the cache was made.
            IndexError: no such record.
            ValueError: another size was cached.
        """
        if size != self.size:
            raise ValueError(
                f"data.sources.{self.name} is cached at {self.size} px; asked for {size} px. "
                "Make the cache at that size, or use the source without one"
            )
        if not 0 <= record < self.num_records:
            raise IndexError(f"{self.name}: record {record} of {self.num_records}")
        if record in self._bad:
            raise BadExample(*self._bad[record])
        return np.array(self._images[record])

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file is mapped again by the process that receives the copy, not sent to it.
        state = self.__dict__.copy()
        if self._path is not None:
            del state["_images"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._path is not None:
            self._images = np.load(self._path, mmap_mode="r")

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return (self.num_records, self.size, self.size, 3)

    def _open_or_make(self, path: pathlib.Path, identity: str, workers: int) -> None:
        description = {
            "version": _VERSION,
            "identity": identity,
            "size": self.size,
            "num_records": self.num_records,
        }
        found = _read_description(path)
        if found is not None and {k: found.get(k) for k in description} == description:
            self._bad = {int(record): tuple(fault) for record, fault in found["bad"].items()}
        else:
            logging.info("making %s: %d pictures of %d px", path, self.num_records, self.size)
            self._make(path, description, workers)
        self._images = np.load(path, mmap_mode="r")
        if self._images.shape != self._shape or self._images.dtype != np.uint8:
            raise ValueError(f"{path} does not hold what {_beside(path)} says; delete both")

    def _make(self, path: pathlib.Path, description: dict[str, Any], workers: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            images = np.lib.format.open_memmap(partial, "w+", np.uint8, self._shape)
            self._fill(images, workers)
            images.flush()
            # The description goes first and comes last, so that it never tells of other pictures.
            _beside(path).unlink(missing_ok=True)
            partial.replace(path)
            partial.write_text(json.dumps({**description, "bad": self._bad}))
            partial.replace(_beside(path))
        finally:
            partial.unlink(missing_ok=True)

    def _fill(self, images: np.ndarray, workers: int) -> None:
        starts = range(0, self.num_records, _CHUNK)
        for start, (made, bad) in zip(starts, self._chunks(starts, workers), strict=True):
            images[start : start + len(made)] = made
            self._bad |= bad

    def _chunks(self, starts: range, workers: int) -> Iterator[_Made]:
        if workers == 0:
            for start in starts:
                yield _make_chunk(self.source, start, self.num_records, self.size)
            return
        # Spawned, since a forked copy of a process that runs JAX may hang.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            jobs = [
                pool.submit(_make_chunk, self.source, start, self.num_records, self.size)
                for start in starts
            ]
            for job in jobs:
                yield job.result()


def _make_chunk(source: Source, start: int, num_records: int, size: int) -> _Made:
    """Pictures of up to ``_CHUNK`` records; those of damaged ones are black."""
    records = range(start, min(start + _CHUNK, num_records))
    images = np.zeros((len(records), size, size, 3), np.uint8)
    bad = {}
    for row, record in enumerate(records):
        try:
            images[row] = source.image(record, size)
        except BadExample as fault:
            bad[record] = (fault.kind, fault.where)
    return images, bad


def _beside(path: pathlib.Path) -> pathlib.Path:
    """The file that describes a cache."""
    return path.with_suffix(".json")


def _read_description(path: pathlib.Path) -> dict[str, Any] | None:
    """What a cache holds, None if there is no complete one."""
    if not path.is_file() or not _beside(path).is_file():
        return None
    try:
        return json.loads(_beside(path).read_text())
    except ValueError as error:
        raise ValueError(f"{_beside(path)} is not JSON ({error}); delete it and {path}") from error


def uncached(source: Source) -> Source:
    """The source that a cache keeps the pictures of, or the source itself."""
    return source.source if isinstance(source, ImageCache) else source
