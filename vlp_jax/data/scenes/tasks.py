"""Downstream tasks on scenes: sources of questions, of pairs with statements, and of hypotheses.

    ScenesVQA("train", level="hard")                           # unbounded
    ScenesNLVR2("train", level="hard", num_records=10_000)     # a fixed subset of 20,000 pictures
    ScenesEntailment("test", level="hard")                     # 2,000 examples

An example is a pure function of (seed, split, level, record) and every record has one. Its
pictures are those of ``Scenes`` of the same seed, split and level: record r of VQA and entailment
shows picture r, record r of NLVR2 the pictures 2r and 2r + 1, which no other record shows. The few
pictures that nothing can be asked about are passed over for others of the same split that come
after all records one would use. No picture is in two splits, for its key names the split.
"""

import abc
import collections
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlp_jax.data.batch import MAX_ANSWERS
from vlp_jax.data.scenes import words
from vlp_jax.data.scenes.draws import Draw, stream, stream_key, uniforms
from vlp_jax.data.scenes.source import Scenes
from vlp_jax.data.scenes.task_texts import ENTAILMENT_LABELS, TASK_ANSWERS, TASK_WORDS, Text, Writer
from vlp_jax.data.scenes.world import COLOURS, SHAPES, SIZES, SPLITS, TEXTURES, Scene

CHANCE_SAMPLE = 4000  # records that chance is measured on

_PICTURES = 2**63  # of each split; picture numbers are int64
_SPARE = 2**53  # pictures from here on stand in for those that nothing can be asked about
_MAX_SPARES = 500
_EXAMPLES_KEPT = 8192  # two evaluation sets; some 3 KB each
_FIRST_PURPOSE = 100  # the streams of ``Scenes`` are below


class Example(NamedTuple):
    """One record.

    Attributes:
        pictures: their numbers, as ``Scenes`` counts them.
        scenes: what they show.
        text: question, statement or hypothesis.
        template: its kind.
        target: index of the right class.
    """

    pictures: tuple[int, ...]
    scenes: tuple[Scene, ...]
    text: str
    template: str
    target: int


class _ScenesTask(abc.ABC):
    """What the tasks share.

    Args:
        split: ``train``, ``val``, ``test`` or ``compositional``.
        seed: of the world, as for ``Scenes``.
        level: a key of ``world.LEVELS``.
        num_records: examples of the split. None: unbounded for train, 2,000 for the others.
        name: the source's name in the config, for logs and error messages.

    Attributes:
        identity: all that the records depend on besides their number.

    Raises:
        ValueError: an argument is out of range; the message names the config key.
    """

    extra_fields: tuple[str, ...] = ("label",)
    classes: tuple[str, ...]
    kind: str  # of the task
    pictures_per_record = 1

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        level: str = "hard",
        num_records: int | None = None,
        name: str = "scenes",
    ):
        self.num_records = Scenes(split, seed, level, num_records, name).num_records
        self._world = Scenes(split, seed, level, _PICTURES, name)
        self._writer = Writer(self._world.level, split)
        self.name = name
        self.identity = f"{self._world.identity}/{self.kind}"
        purpose = _FIRST_PURPOSE + ("vqa", "nlvr2", "entailment").index(self.kind)
        self._key = stream_key(seed & 0xFFFFFFFF, seed >> 32, SPLITS.index(split), purpose)
        self._class_of = {text: index for index, text in enumerate(self.classes)}

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """One text for each record: int64 [n] -> int64 [n]."""
        return np.ones(len(records), np.int64)

    def caption(self, record: int, index: int) -> str:
        """The question, statement or hypothesis of a record, lower case; ``index`` is 0."""
        self._check_caption(index)
        return self._example(record).text

    def captions(self, records: np.ndarray, indices: np.ndarray) -> list[str]:
        """The texts of many records, in less time than one by one.

        Args:
            records: int64 [n].
            indices: int64 [n], all 0.
        """
        for index in np.unique(indices):
            self._check_caption(int(index))
        return [example.text for example in self.examples(np.asarray(records, np.int64))]

    def image(self, record: int, size: int) -> np.ndarray:
        """The picture, the first of two: uint8 [size, size, 3] RGB."""
        return self._picture(record, 0, size)

    @property
    def world(self) -> str:
        """That of ``Scenes``."""
        return self._world.world

    def image_key(self, record: int) -> tuple[str, ...]:
        """What ``Scenes`` calls the picture or pictures."""
        return tuple(
            key
            for number in self._example(record).pictures
            for key in self._world.image_key(number)
        )

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``label`` int32 []."""
        del size
        return {"label": np.asarray(self._example(record).target, np.int32)}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """``label`` int32 [n] of many records, int64 [n], in less time than one by one."""
        return {"label": self._targets(records)}

    def template(self, record: int) -> str:
        """The kind of the record's text."""
        return self._example(record).template

    def group(self, record: int) -> dict[str, str]:
        """Number of objects in the picture, the first of two, and attributes of the largest."""
        objects = self._example(record).scenes[0].objects
        largest = objects[0]
        return {
            "objects": str(len(objects)),
            "shape": SHAPES[largest.shape],
            "colour": COLOURS[largest.colour],
            "size": SIZES[largest.size],
            "texture": TEXTURES[largest.texture],
        }

    def chance(self, sample: int = CHANCE_SAMPLE) -> float:
        """Accuracy of whoever knows how frequent each class is given the kind of text.

        Measured on the first ``sample`` records: the most frequent classes of one half of them,
        held against the other half, both ways; no less than one in the number of classes.
        """
        examples = self.examples(np.arange(min(sample, self.num_records or sample)))
        halves = [examples[0::2], examples[1::2]]
        hits = sum(_majority_hits(a, b) for a, b in (halves, halves[::-1]))
        return max(hits / len(examples), 1 / len(self.classes))

    def word_classes(self) -> Mapping[str, str]:
        """Class of every word: colour, shape, size, texture, relation, count or function."""
        return {**words.word_classes(), **dict.fromkeys(TASK_WORDS, "function")}

    @abc.abstractmethod
    def _write(self, scenes: Sequence[Scene], draw: Draw) -> Text | None:
        """The text about the pictures of a record, None if they have nothing to say."""

    def _picture(self, record: int, index: int, size: int) -> np.ndarray:
        return self._world.image(self._example(record).pictures[index], size)

    def _targets(self, records: np.ndarray) -> np.ndarray:
        """The right class of each record: int64 [n] -> int32 [n]."""
        targets = [
            example.target
            for start in range(0, len(records), _EXAMPLES_KEPT)
            for example in self.examples(records[start : start + _EXAMPLES_KEPT])
        ]
        return np.array(targets, np.int32)

    def _example(self, record: int) -> Example:
        return _kept_example(self, record)

    def examples(self, records: np.ndarray) -> list[Example]:
        """All there is to know of many records, int64 [n], but for the pixels."""
        self._check_records(records)
        count = self.pictures_per_record
        numbers = _picture_numbers(records, count, attempt=0)
        scenes = self._world.scenes(numbers.ravel())
        draws = uniforms(self._key, numbers[:, 0])
        examples = []
        for row, record in enumerate(records.tolist()):
            shown = tuple(scenes[row * count : (row + 1) * count])
            pictures = tuple(numbers[row].tolist())
            text = self._write(shown, stream(self._key, pictures[0], draws[row]))
            if text is None:
                examples.append(self._substitute(record))
            else:
                examples.append(self._complete(pictures, shown, text))
        return examples

    def _substitute(self, record: int) -> Example:
        """An example about other pictures, of a record whose own have nothing to say."""
        for attempt in range(1, _MAX_SPARES):
            numbers = _picture_numbers(
                np.array([record], np.int64), self.pictures_per_record, attempt
            )[0]
            shown = tuple(self._world.scenes(numbers))
            pictures = tuple(numbers.tolist())
            text = self._write(shown, stream(self._key, pictures[0]))
            if text is not None:
                return self._complete(pictures, shown, text)
        raise RuntimeError(
            f"data.sources.{self.name}: no picture of {self.identity} has anything to say for "
            f"record {record}"
        )

    def _complete(
        self, pictures: tuple[int, ...], scenes: tuple[Scene, ...], text: Text
    ) -> Example:
        return Example(pictures, scenes, text.text, text.template, self._class_of[text.target])

    def _check_records(self, records: np.ndarray) -> None:
        last = _PICTURES if self.num_records is None else self.num_records
        for record in records[(records < 0) | (records >= last)].tolist():
            raise IndexError(
                f"{self.name}: record {record} is outside the split of "
                f"{self.num_records or 'unbounded'} records; see data.sources.{self.name}"
            )

    def _check_caption(self, index: int) -> None:
        if index != 0:
            raise IndexError(f"{self.name}: a record has one text, 0; asked for {index}")


class ScenesVQA(_ScenesTask):
    """Pictures and questions about them, each with one answer of score 1."""

    kind = "vqa"
    extra_fields = ("answer", "answer_score")
    classes = TASK_ANSWERS

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``answer`` int32 [10], then -1, and ``answer_score`` float32 [10], then 0."""
        del size
        answer = np.full(MAX_ANSWERS, -1, np.int32)
        score = np.zeros(MAX_ANSWERS, np.float32)
        answer[0], score[0] = self._example(record).target, 1.0
        return {"answer": answer, "answer_score": score}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """``answer`` int32 [n, 10] and ``answer_score`` float32 [n, 10] of many records."""
        answer = np.full((len(records), MAX_ANSWERS), -1, np.int32)
        score = np.zeros((len(records), MAX_ANSWERS), np.float32)
        answer[:, 0], score[:, 0] = self._targets(records), 1.0
        return {"answer": answer, "answer_score": score}

    def answers_of(self, record: int) -> tuple[str, ...]:
        """The one answer."""
        return (self.classes[self._example(record).target],)

    def _write(self, scenes: Sequence[Scene], draw: Draw) -> Text | None:
        return self._writer.question(scenes[0], draw)


class ScenesNLVR2(_ScenesTask):
    """Pairs of pictures and statements about both; 20,000 pictures are 10,000 records.

    ``image`` is the first picture, ``second_image`` the other; ``label`` is 1 where the statement
    is true.
    """

    kind = "nlvr2"
    extra_fields = ("second_image", "label")
    classes = ("false", "true")
    pictures_per_record = 2

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``second_image`` uint8 [size, size, 3] and ``label`` int32 []."""
        return {"second_image": self._picture(record, 1, size), **super().extras(record, size)}

    def _write(self, scenes: Sequence[Scene], draw: Draw) -> Text | None:
        return self._writer.statement(scenes[0], scenes[1], draw)


class ScenesEntailment(_ScenesTask):
    """Pictures and hypotheses that they entail, contradict, or neither; ``label`` says which."""

    kind = "entailment"
    classes = ENTAILMENT_LABELS

    def _write(self, scenes: Sequence[Scene], draw: Draw) -> Text | None:
        return self._writer.hypothesis(scenes[0], draw)


@functools.lru_cache(maxsize=_EXAMPLES_KEPT)
def _kept_example(task: _ScenesTask, record: int) -> Example:
    """One example, made once: a loader asks for its picture, text and label, each in turn, and an
    evaluator for template, groups and answers of a whole set.
    """
    return task.examples(np.array([record], np.int64))[0]


def _picture_numbers(records: np.ndarray, count: int, attempt: int) -> np.ndarray:
    """Numbers of the pictures of an attempt: int64 [n] -> int64 [n, count], none negative."""
    first = records.astype(np.uint64) * np.uint64(count) + np.uint64(attempt * _SPARE)
    numbers: np.ndarray = first[:, None] + np.arange(count, dtype=np.uint64)
    return (numbers & np.uint64(_PICTURES - 1)).astype(np.int64)


def _majority_hits(learnt: Sequence[Example], judged: Sequence[Example]) -> int:
    """How many classes of ``judged`` are the most frequent of their kind in ``learnt``."""
    counts: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for example in learnt:
        counts[example.template][example.target] += 1
    best = {template: counter.most_common(1)[0][0] for template, counter in counts.items()}
    return sum(best.get(example.template) == example.target for example in judged)
