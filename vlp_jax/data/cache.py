"""Every picture of a finite source rendered or decoded once, into memory or into files."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import EXTRA_FIELDS, batch_spec
from vlp_jax.data.making import found_or_made, in_order
from vlp_jax.data.source import BadExample, Identified, ManyCaptions, ManyTargets, Source
from vlp_jax.data.worse_labels import WorseLabels

_CHUNK = 256  # records that one worker makes at a time
_VERSION = 2

_Faults = dict[int, tuple[str, str]]  # kind and place of the fault of each damaged record


class _Bad(NamedTuple):
    """Faults met when the picture was asked for, and when the extra fields were."""

    image: _Faults
    extras: _Faults


class ImageCache:
    """A source that serves the pictures and extra fields of another from arrays made in advance.

    The arrays live in memory, or in files that are mapped into memory: the pictures in
    ``NAME.npy``, each extra field in ``NAME.FIELD.npy``, and their description in ``NAME.json``.
    Files that describe the same records are used as they are; any others are made anew. They
    appear only once they are complete, and of several processes that miss them one makes them
    while the others wait.

    Args:
        source: a source with a finite number of records.
        size: side of the pictures in pixels; no other size is served.
        path: ``NAME.npy``, or None to keep everything in memory.
        workers: processes that make pictures; 0 makes them in this one.
        identity: all that the records depend on besides ``size`` and their number; read from
            ``source.identity`` if None. Needed only with ``path``.

    Attributes:
        path: as given.
        identity: as given, or the source's; None if neither is there.

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
        self.path = None if path is None else pathlib.Path(path)
        self.identity = identity
        if identity is None and isinstance(source, Identified):
            self.identity = source.identity
        if self.path is None:
            self._arrays = {
                name: np.empty(spec.shape, spec.dtype)
                for name, spec in _specs(source, self.num_records, size).items()
            }
            self._bad = self._fill(self._arrays, workers)
            return
        if self.path.suffix != ".npy":
            raise ValueError(f"{key}: the path of a cache must end in .npy; got {self.path}")
        if self.identity is None:
            raise ValueError(
                f"{key}.cache: the source has no identity by which its file could be "
                "recognised; give ImageCache one, or cache in memory"
            )
        path = self.path
        self._bad = found_or_made(path, lambda: self._find(path), lambda: self._make(path, workers))
        self._map(path)

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
        self._check(record, size, self._bad.image)
        return np.array(self._arrays["image"][record])

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """The record's row of every extra field, copies.

        Raises:
            BadExample, IndexError, ValueError: as ``image``.
        """
        self._check(record, size, self._bad.extras)
        return {name: np.array(self._arrays[name][record]) for name in self.extra_fields}

    def damaged(self, records: np.ndarray, with_extras: bool) -> np.ndarray:
        """Whether ``image``, or ``extras`` if asked, raises: int64 [n] -> bool [n]."""
        bad = {*self._bad.image, *(self._bad.extras if with_extras else ())}
        return np.isin(records, np.fromiter(bad, np.int64, len(bad)))

    def rows(self, records: np.ndarray, size: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """``image`` and extra fields of many records at once; see ``source.ManyRows``.

        Raises:
            IndexError: a record beyond the last.
            ValueError: another size was cached.
        """
        self._check_size(size)
        return {name: np.take(self._arrays[name], records, axis=0) for name in names}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Extra fields, but for pictures, of many records; see ``source.ManyTargets``.

        Raises:
            ValueError: a record is damaged, and the source cannot tell what is right of it.
        """
        names = [name for name in self.extra_fields if EXTRA_FIELDS[name].shape[1:2] != ("H",)]
        found = self.rows(records, self.size, names)
        # The arrays have nothing where a second picture is damaged; the record has a label still.
        gone = np.flatnonzero(np.isin(records, list(self._bad.extras)))
        if len(gone):
            if not isinstance(self.source, ManyTargets):
                raise ValueError(
                    f"data.sources.{self.name}: {len(gone)} records are damaged, and the source "
                    "does not list their labels"
                )
            for name, values in self.source.targets(np.asarray(records)[gone]).items():
                found[name][gone] = values
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files are mapped again by the process that receives the copy, not sent to it.
        state = self.__dict__.copy()
        if self.path is not None:
            del state["_arrays"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self._map(self.path)

    def _check(self, record: int, size: int, bad: _Faults) -> None:
        self._check_size(size)
        if not 0 <= record < self.num_records:
            raise IndexError(f"{self.name}: record {record} of {self.num_records}")
        if record in bad:
            raise BadExample(*bad[record])

    def _check_size(self, size: int) -> None:
        if size != self.size:
            raise ValueError(
                f"data.sources.{self.name} is cached at {self.size} px; asked for {size} px. "
                "Make the cache at that size, or use the source without one"
            )

    @property
    def _description(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "identity": self.identity,
            "size": self.size,
            "num_records": self.num_records,
            "extra_fields": list(self.extra_fields),
        }

    def _files(self, path: pathlib.Path) -> dict[str, pathlib.Path]:
        """The file of each array."""
        extra = {name: path.with_stem(f"{path.stem}.{name}") for name in self.extra_fields}
        return {"image": path, **extra}

    def _find(self, path: pathlib.Path) -> _Bad | None:
        """The faults noted beside complete files of the same records, None if there are none."""
        found = _read_description(path)
        wanted = self._description
        if not all(file.is_file() for file in self._files(path).values()):
            return None
        if found is None or {name: found.get(name) for name in wanted} != wanted:
            return None
        return _Bad(
            *(
                {int(record): (kind, where) for record, (kind, where) in found["bad"][what].items()}
                for what in _Bad._fields
            )
        )

    def _make(self, path: pathlib.Path, workers: int) -> _Bad:
        logging.info("making %s: %d pictures of %d px", path, self.num_records, self.size)
        specs = _specs(self.source, self.num_records, self.size)
        files = self._files(path)
        partial = {name: _partial(file) for name, file in files.items()}
        description = _partial(_beside(path))
        try:
            arrays = {
                name: np.lib.format.open_memmap(partial[name], "w+", spec.dtype, spec.shape)
                for name, spec in specs.items()
            }
            bad = self._fill(arrays, workers)
            for array in arrays.values():
                array.flush()
            # The description goes first and comes last, so that it never tells of other pictures.
            _beside(path).unlink(missing_ok=True)
            for name, file in files.items():
                partial[name].replace(file)
            description.write_text(json.dumps({**self._description, "bad": bad._asdict()}))
            description.replace(_beside(path))
            return bad
        finally:
            for file in (*partial.values(), description):
                file.unlink(missing_ok=True)

    def _map(self, path: pathlib.Path) -> None:
        specs = _specs(self.source, self.num_records, self.size)
        self._arrays = {}
        for name, file in self._files(path).items():
            # A plain view: slices of the class that NumPy maps files with take longer to make.
            array = np.asarray(np.load(file, mmap_mode="r"))
            if array.shape != specs[name].shape or array.dtype != specs[name].dtype:
                raise ValueError(f"{file} does not hold what {_beside(path)} says; delete both")
            self._arrays[name] = array

    def _fill(self, arrays: Mapping[str, np.ndarray], workers: int) -> _Bad:
        """Writes every record into the arrays; returns the faults met."""
        bad = _Bad({}, {})
        start = 0
        chunks = (
            (self.source, start, min(start + _CHUNK, self.num_records), self.size)
            for start in range(0, self.num_records, _CHUNK)
        )
        for made, met in in_order(_make_chunk, chunks, workers):
            stop = start + len(made["image"])
            for name, values in made.items():
                arrays[name][start:stop] = values
            bad.image.update(met.image)
            bad.extras.update(met.extras)
            start = stop
        return bad


def uncached(source: Source) -> Source:
    """The source that a cache keeps the pictures of, or the source itself, record by record."""
    if isinstance(source, WorseLabels):
        return source.over(uncached(source.source))
    return source.source if isinstance(source, ImageCache) else source


def original(source: Source) -> Source:
    """The source that was read or made; the records of ``source`` may be some of its records."""
    while isinstance(source, ImageCache | WorseLabels):
        source = source.source
    return source


def kept_file(source: Source) -> pathlib.Path | None:
    """What files beside the pictures of a source are named after; None: these are in no file."""
    if isinstance(source, WorseLabels):
        pictures = kept_file(source.source)
        if pictures is None:
            return None
        # The pictures are those of all runs; what is said of them is kept for each kind of run.
        digest = hashlib.sha256(str(source.identity).encode()).hexdigest()
        return pictures.with_stem(f"{pictures.stem}.{digest[:12]}")
    return source.path if isinstance(source, ImageCache) else None


def _specs(source: Source, num_records: int, size: int) -> dict[str, Any]:
    """Shape and dtype of each array for so many records."""
    return batch_spec(Bucket(1, size), num_records, ("image", *source.extra_fields))


def _make_chunk(
    source: Source, start: int, stop: int, size: int
) -> tuple[dict[str, np.ndarray], _Bad]:
    """The rows of some records; what is damaged is zero."""
    specs = _specs(source, stop - start, size)
    made = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
    bad = _Bad({}, {})
    for row, record in enumerate(range(start, stop)):
        try:
            made["image"][row] = source.image(record, size)
        except BadExample as fault:
            bad.image[record] = (fault.kind, fault.where)
        if not source.extra_fields:
            continue
        try:
            extras = source.extras(record, size)
        except BadExample as fault:
            bad.extras[record] = (fault.kind, fault.where)
            continue
        for name in source.extra_fields:
            made[name][row] = extras[name]
    return made, bad


def _beside(path: pathlib.Path) -> pathlib.Path:
    """The file that describes a cache."""
    return path.with_suffix(".json")


def _partial(file: pathlib.Path) -> pathlib.Path:
    """Where a file grows; only one process makes it at a time."""
    return file.with_name(f"{file.name}.partial")


def _read_description(path: pathlib.Path) -> dict[str, Any] | None:
    """What a cache holds, None if there is no complete one."""
    if not _beside(path).is_file():
        return None
    try:
        return json.loads(_beside(path).read_text())
    except ValueError as error:
        raise ValueError(f"{_beside(path)} is not JSON ({error}); delete it and {path}") from error
