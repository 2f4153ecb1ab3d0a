"""The source contract: random access to images and their captions by record number."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

PAIR_SEPARATOR = "\x1f"  # between the two sentences of a caption of a source with ``pairs``


class BadExample(Exception):
    """A record that cannot be used; it is counted, logged once per kind and replaced.

    Attributes:
        kind: short name shared by all faults of one kind, e.g. ``truncated image``.
        where: the file or record, for the log.
    """

    def __init__(self, kind: str, where: str):
        super().__init__(f"{kind}: {where}")
        self.kind = kind
        self.where = where


class NothingReadable(ValueError):
    """Neither a record nor any that could stand in for it can be read; the message names them."""


class Source(Protocol):
    """Records 0 <= r < num_records, each an image with one or more captions.

    A source is a pure function of its arguments: the same record gives the same bytes in every
    process. It must be picklable, since loader workers receive a copy.
    """

    name: str
    extra_fields: tuple[str, ...]  # keys of ``batch.EXTRA_FIELDS`` that ``extras`` gives
    classes: tuple[str, ...]  # what ``label`` and ``answer`` index; () without them

    @property
    def num_records(self) -> int | None:
        """Records there are; None: unbounded, every int64 >= 0 is a record."""
        ...

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """Captions of each record: int64 [n] -> int64 [n], all >= 1."""
        ...

    def caption(self, record: int, index: int) -> str:
        """Caption ``index`` of a record, as written by its author."""
        ...

    def image(self, record: int, size: int) -> np.ndarray:
        """The picture as uint8 [size, size, 3] RGB.

        Raises:
            BadExample: the picture is damaged, too large, or not readable.
        """
        ...

    def image_key(self, record: int) -> tuple[str, ...]:
        """What tells the record's picture (or pictures) from others, across splits and sources."""
        ...

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """The record's row of every extra field; a picture in it is uint8 [size, size, 3].

        Raises:
            BadExample: as ``image``.
        """
        ...

    def word_classes(self) -> Mapping[str, str]:
        """Class of each word the source can name one for (``red`` -> ``colour``); may be empty."""
        ...


def has_pictures(source: Source | type) -> bool:
    """Whether the records of a source are pictures; one of texts alone says ``pictures = False``.

    Args:
        source: or its class.
    """
    return bool(getattr(source, "pictures", True))


class CaptionsOnly:
    """What a source inherits whose records are an image and captions and nothing else."""

    extra_fields: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """Nothing."""
        del record, size
        return {}


@runtime_checkable
class ManyCaptions(Protocol):
    """A source that writes many captions in less time than one by one; optional."""

    def captions(self, records: np.ndarray, indices: np.ndarray) -> list[str]:
        """``caption`` of each record and index, int64 [n] both."""
        ...


@runtime_checkable
class ManyRows(Protocol):
    """A source that reads many records in less time than one by one; optional."""

    def damaged(self, records: np.ndarray, with_extras: bool) -> np.ndarray:
        """Whether ``image``, or ``extras`` if asked, raises: int64 [n] -> bool [n]."""
        ...

    def rows(self, records: np.ndarray, size: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """``image`` and extra fields of records that are not damaged.

        Args:
            records: int64 [n].
            size: side of the pictures in pixels.
            names: ``image`` and keys of ``extra_fields``.

        Returns:
            Arrays [n, ...] that the caller may write to.
        """
        ...


@runtime_checkable
class ManyTargets(Protocol):
    """A source that tells what is right of many records without reading a picture; optional."""

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Extra fields, but for pictures, of records: int64 [n] -> arrays [n, ...]."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A source that files made from it can be recognised by."""

    @property
    def identity(self) -> str | None:
        """All that its records depend on besides their number; None: it cannot tell."""
        ...


@runtime_checkable
class Generated(Protocol):
    """A source whose pictures are made by rule, not listed."""

    @property
    def world(self) -> str:
        """Whence its pictures are: sources of two worlds share none."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """A source that knows classes of its records, for probes of an image tower."""

    def labels(self, records: np.ndarray) -> Mapping[str, np.ndarray]:
        """Name -> class of each record, int32 [n]: int64 [n]."""
        ...


@runtime_checkable
class Worded(Protocol):
    """A source of captions that knows words which texts of its tasks have and captions may lack."""

    @property
    def task_words(self) -> tuple[str, ...]:
        """Words that a tokenizer trained on the captions shall have whole."""
        ...


@runtime_checkable
class Paired(Protocol):
    """A source whose captions may be two sentences, with ``PAIR_SEPARATOR`` between them.

    Elsewhere that character is white space: captions from just any file cannot pose as pairs. A
    source that says ``pairs`` sees to it that its sentences hold none.
    """

    pairs: bool  # False: each caption is one text


@runtime_checkable
class Answered(Protocol):
    """A source of questions."""

    def answers_of(self, record: int) -> tuple[str, ...]:
        """What each annotator answered."""
        ...


@runtime_checkable
class Questioned(Protocol):
    """A source whose questions have numbers of their own, by which the official servers go."""

    def question_id(self, record: int) -> int:
        """The number of the record's question."""
        ...


@runtime_checkable
class Templated(Protocol):
    """A source whose texts are of known kinds."""

    def template(self, record: int) -> str:
        """The kind of the record's text."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A source that knows groups of its records, for tables of scores by group."""

    def group(self, record: int) -> Mapping[str, str]:
        """Attribute -> the record's value of it."""
        ...
