"""Training labels that are worse on purpose, for studies of robustness.

    config.data.sources.NAME.label_noise = 0.2   # the label of one record in five is another class
    config.data.sources.NAME.imbalance = 100.0   # the rarest class keeps one record in a hundred

Both are of the section's own split: other splits of the source, which evaluators and searches read,
stay as they are. Which records, and what becomes of them, follows from the source's identity (its
name where it has none) and from the record's number in the source, and from nothing else: hosts,
epochs and processes agree, a record that a long tail keeps is as noisy as without the tail, and
what a lower share or ratio leaves untouched is part of what a higher one does.

A long tail lists the labels of the whole split when the source is built: read from arrays where the
source has them or its pictures are cached (50,000 of them: 0.1 s), made elsewhere (of 50,000 scenes
at level ``hard``: 15 s for VQA, 23 s for NLVR2, 17 s for entailment).
"""

import copy
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from vlp_jax.data.batch import MAX_ANSWERS
from vlp_jax.data.scenes.draws import stream_key, uniforms
from vlp_jax.data.source import Identified, ManyCaptions, ManyRows, ManyTargets, Source
from vlp_jax.infra.errors import ConfigError

_RECORDS, _CLASSES = range(2)  # what the draws are for
_IS_NOISY, _OTHER, _IS_KEPT = range(3)  # which draw of a record decides
_CHUNK = 8192  # records whose draws are made at a time; a KB each
_FIELDS = ("label", "answer")  # extra fields that name classes

# What only some sources have: of the source as a whole, and functions of a record or of several.
_OF_SOURCE = ("pictures", "pairs", "task_words", "world")
_OF_RECORDS = ("answers_of", "damaged", "group", "labels", "question_id", "template")


class WorseLabels:
    """A source some of whose labels are wrong, or which is some records of another, or both.

    Wrong are the extra fields ``label``, or ``answer`` and ``answer_score``. What evaluators
    compare with (``answers_of``, ``labels``) stays right.

    Args:
        source: whose records they are; with a cache it keeps the right labels.
        noise: share of the records whose label is another class, 0 to 1.
        kept: records of ``source``, int64 and increasing, that are the records here; None: all.
        recipe: what ``kept`` was chosen by, for the identity.

    Attributes:
        source: as given.
        kept: as given.
    """

    def __init__(
        self,
        source: Source,
        noise: float = 0.0,
        kept: np.ndarray | None = None,
        recipe: str = "",
    ):
        self.kept = kept
        self._noise, self._recipe = noise, recipe
        self._key = _key(source, _RECORDS)
        self._wrap(source)

    def over(self, source: Source) -> "WorseLabels":
        """The same made worse of another source with the same records, as one without its cache."""
        if source is self.source:
            return self
        other = copy.copy(self)
        for name in (*_OF_SOURCE, *_OF_RECORDS, "rows"):
            vars(other).pop(name, None)
        other._wrap(source)
        return other

    @property
    def num_records(self) -> int | None:
        """Those that are kept."""
        return self.source.num_records if self.kept is None else len(self.kept)

    @property
    def identity(self) -> str | None:
        """All that the records depend on; None where the source cannot tell."""
        identity = self.source.identity if isinstance(self.source, Identified) else None
        return identity and f"{identity}{self._recipe}/label_noise={self._noise}"

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """Captions of each record: int64 [n] -> int64 [n]."""
        return self.source.num_captions(self._of_source(records))

    def caption(self, record: int, index: int) -> str:
        """Caption ``index`` of a record."""
        return self.source.caption(self._one_of_source(record), index)

    def captions(self, records: np.ndarray, indices: np.ndarray) -> list[str]:
        """Captions of many records at once, the source's own way where it has one."""
        records = self._of_source(records)
        if isinstance(self.source, ManyCaptions):
            return self.source.captions(records, indices)
        return [self.source.caption(int(r), int(i)) for r, i in zip(records, indices, strict=True)]

    def image(self, record: int, size: int) -> np.ndarray:
        """The picture: uint8 [size, size, 3] RGB.

        Raises:
            BadExample: from the source.
            IndexError: no such record.
        """
        return self.source.image(self._one_of_source(record), size)

    def image_key(self, record: int) -> tuple[str, ...]:
        """That of the source."""
        return self.source.image_key(self._one_of_source(record))

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """The record's row of every extra field.

        Raises:
            BadExample, IndexError: as ``image``.
        """
        record = self._one_of_source(record)
        right = {name: value[None] for name, value in self.source.extras(record, size).items()}
        made = self._made_worse(np.array([record]), right)
        return {name: values[0] for name, values in made.items()}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Labels of many records; see ``source.ManyTargets``."""
        records = self._of_source(records)
        right = _targets(self.source, records, f"data.sources.{self.name}")
        return self._made_worse(records, right)

    def word_classes(self) -> Mapping[str, str]:
        """Class of each word the source can name one for."""
        return self.source.word_classes()

    def _wrap(self, source: Source) -> None:
        self.source = source
        self.name = source.name
        self.extra_fields, self.classes = source.extra_fields, source.classes
        # Which protocols a source meets is told by its attributes: it has here those it has there.
        for name in _OF_SOURCE:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        for name in _OF_RECORDS:
            if hasattr(source, name):
                setattr(self, name, functools.partial(self._told, name))
        if isinstance(source, ManyRows):
            self.rows = self._rows

    def _told(self, name: str, records: Any, *arguments: Any, **named: Any) -> Any:
        """What a function of the source says of a record, or of many."""
        is_one = np.ndim(records) == 0
        own = self._one_of_source(records) if is_one else self._of_source(records)
        return getattr(self.source, name)(own, *arguments, **named)

    def _rows(self, records: np.ndarray, size: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """``image`` and extra fields of many records at once; see ``source.ManyRows``."""
        assert isinstance(self.source, ManyRows)
        records = self._of_source(records)
        return self._made_worse(records, self.source.rows(records, size, names))

    def _of_source(self, records: np.ndarray) -> np.ndarray:
        """Numbers that records have in the source: int64 [n] -> int64 [n]."""
        if self.kept is None:
            return records
        if len(records) and not 0 <= np.min(records) <= np.max(records) < len(self.kept):
            raise IndexError(f"{self.name}: records {records} of {len(self.kept)}")
        return self.kept[records]

    def _one_of_source(self, record: int) -> int:
        return record if self.kept is None else int(self._of_source(np.array([record]))[0])

    def _made_worse(
        self, records: np.ndarray, right: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Fields of records of the source, [n, ...] each, with other classes where they are noisy.

        Arrays of the source are not written to.
        """
        made = dict(right)
        if not self._noise:
            return made
        draws = _draws(self._key, records)
        noisy = draws[:, _IS_NOISY] < self._noise
        if "label" in made:
            other = _others(made["label"][:, None], draws[:, _OTHER], len(self.classes))
            made["label"] = np.where(noisy, other, made["label"])
        if "answer" in made:
            other = _others(made["answer"], draws[:, _OTHER], len(self.classes))
            alone = np.full_like(made["answer"], -1)
            alone[:, 0] = other
            made["answer"] = np.where(noisy[:, None], alone, made["answer"])
        if "answer_score" in made:
            certain = np.zeros_like(made["answer_score"])
            certain[:, 0] = 1.0
            made["answer_score"] = np.where(noisy[:, None], certain, made["answer_score"])
        return made


def with_worse_labels(
    source: Source, path: str, label_noise: float = 0.0, imbalance: float = 1.0
) -> Source:
    """A source with noisy labels, or with a long tail of rare classes, or with both.

    Args:
        source: of the training split; the source itself is returned if nothing is asked for.
        path: dotted name of its section.
        label_noise: share of the records whose label is another class, drawn uniformly among those
            that are wrong.
        imbalance: ratio of the shares that the first and the last class keep of their records, in
            an order of the classes that the source's identity gives. The class of a question is its
            best answer; those that have none are all kept.

    Raises:
        ConfigError: a value is out of range, or the source has no labels, or too few classes; or a
            long tail is asked of an unbounded source.
    """
    _check_number(f"{path}.label_noise", label_noise, 0.0, 1.0, "Use a share from 0 to 1")
    _check_number(f"{path}.imbalance", imbalance, 1.0, math.inf, "Use a ratio of 1 or more")
    kept, recipe = None, ""
    if imbalance > 1:
        key = f"{path}.imbalance"
        _check_classes(source, key)
        kept, recipe = _long_tail(source, key, imbalance), f"/imbalance={float(imbalance)}"
    if label_noise:
        key = f"{path}.label_noise"
        _check_classes(source, key)
        _check_others(source, key)
    if kept is None and not label_noise:
        return source
    return WorseLabels(source, float(label_noise), kept, recipe)


def with_its_captions(source: Source) -> Source:
    """The source whose captions those of a source are: noise of labels changes none."""
    if isinstance(source, WorseLabels) and source.kept is None:
        return source.source
    return source


def _check_number(key: str, value: Any, low: float, high: float, remedy: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low <= value <= high and math.isfinite(value)):
        raise ConfigError(key, f"{value!r} is out of range", remedy)


def _check_classes(source: Source, key: str) -> None:
    if not any(name in source.extra_fields for name in _FIELDS):
        raise ConfigError(key, f"the source {source.name!r} has no labels", "Remove it")
    if len(source.classes) < 2:
        raise ConfigError(key, f"the source {source.name!r} has not two classes", "Remove it")


def _check_others(source: Source, key: str) -> None:
    """Refuse questions all of whose answers are right."""
    if "answer" not in source.extra_fields or len(source.classes) > MAX_ANSWERS:
        return
    answers = _targets(source, np.arange(_bound(source, key)), key)["answer"]
    if full := int(((answers >= 0).sum(axis=1) >= len(source.classes)).sum()):
        raise ConfigError(
            key,
            f"all of the {len(source.classes)} answers are accepted for {full} questions, so that "
            "none is wrong",
            "Remove it, or use a longer answer list",
        )


def _bound(source: Source, key: str) -> int:
    """How many records there are.

    Raises:
        ConfigError: there is no end of them.
    """
    if source.num_records is None:
        raise ConfigError(
            key,
            f"the source {source.name!r} is unbounded, so that its labels cannot be listed",
            f"Set {key.rpartition('.')[0]}.num_records, or remove it",
        )
    return source.num_records


def _long_tail(source: Source, key: str, ratio: float) -> np.ndarray:
    """Records that are kept, int64 and increasing."""
    records = np.arange(_bound(source, key))
    found = _classes(_targets(source, records, key))
    occurring, counts = np.unique(found[found >= 0], return_counts=True)
    if len(occurring) < 2:
        raise ConfigError(key, f"no two classes occur in the source {source.name!r}", "Remove it")
    order = np.argsort(_draws(_key(source, _CLASSES), occurring)[:, 0])
    rank = np.argsort(order)
    share = np.ones(len(source.classes) + 1)  # the last: of records without a class
    share[occurring] = ratio ** (-rank / (len(occurring) - 1))
    draws = _draws(_key(source, _RECORDS), records)[:, _IS_KEPT]
    kept = records[draws < share[found]]
    left = np.bincount(found[kept] + 1, minlength=len(share))[1:][occurring]
    logging.info(
        "%s=%s keeps %d of %d records; the classes had %d to %d and have %d to %d, %d of %d none",
        key, ratio, len(kept), len(records), counts.min(), counts.max(), left.min(), left.max(),
        (left == 0).sum(), len(left),
    )  # fmt: skip
    return kept


def _targets(source: Source, records: np.ndarray, key: str) -> dict[str, np.ndarray]:
    """See ``source.ManyTargets``; ``key`` is of the config, for the message."""
    if not isinstance(source, ManyTargets):
        raise ConfigError(
            key,
            f"the source {source.name!r} cannot list its labels",
            "Give its class `targets`, see data.source.ManyTargets",
        )
    return source.targets(records)


def _classes(targets: Mapping[str, np.ndarray]) -> np.ndarray:
    """The class of each record, of a question its best answer, -1 without one: int [n]."""
    if "label" in targets:
        return targets["label"]
    best = np.where(targets["answer"] >= 0, targets["answer_score"], -1.0).argmax(axis=1)
    return np.take_along_axis(targets["answer"], best[:, None], axis=1)[:, 0]


def _others(right: np.ndarray, draws: np.ndarray, num_classes: int) -> np.ndarray:
    """A class that is not right.

    Args:
        right: int32 [n, k], classes that are, all different, and -1 for none.
        draws: float64 [n] in [0, 1).
        num_classes: that there are, more than are right.

    Returns:
        int32 [n], uniform among the others.
    """
    others = num_classes - (right >= 0).sum(axis=1)
    drawn: np.ndarray = (draws * others).astype(right.dtype)
    for next_right in np.sort(right, axis=1).T:  # counted among the others; now among all
        drawn += (next_right >= 0) & (drawn >= next_right)
    return drawn


def _draws(key: int, records: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) of each record: int64 [n] -> float64 [n, 3]."""
    draws = np.empty((len(records), 3))
    for start in range(0, len(records), _CHUNK):  # many more are made than are used
        draws[start : start + _CHUNK] = uniforms(key, records[start : start + _CHUNK])[:, :3]
    return draws


def _key(source: Source, purpose: int) -> int:
    """Of the draws about a source."""
    identity = source.identity if isinstance(source, Identified) else None
    digest = hashlib.sha256((identity or source.name).encode()).digest()
    return stream_key(int.from_bytes(digest[:8], "big"), purpose)
