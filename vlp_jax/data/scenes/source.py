"""The scenes world as a data source."""

from collections.abc import Mapping

import numpy as np

from vlp_jax.data.scenes import facts, language, render, statements, words
from vlp_jax.data.scenes.draws import Draw, stream, stream_key, uniforms
from vlp_jax.data.scenes.language import NUM_CAPTIONS, Caption
from vlp_jax.data.scenes.questions import Asker, Question
from vlp_jax.data.scenes.statements import LABELS, Hypothesis, Statement
from vlp_jax.data.scenes.task_texts import TASK_WORDS
from vlp_jax.data.scenes.words import VOCABULARY
from vlp_jax.data.scenes.world import LEVELS, SPLITS, Object, Scene, World
from vlp_jax.data.source import CaptionsOnly

EVALUATION_RECORDS = 2000  # default size of every split but train
MIN_SIZE, MAX_SIZE = 16, 512

# Part of the identity of kept files: raise it when a record shows or says something else.
VERSION = 2

_SEARCH = 1000  # records tried for a statement; a handful do unless a split is tiny
_UNBOUNDED = 2**53  # statements about an unbounded split are about records below this

_PURPOSES = ("scene", "questions", "pair", "entailment", *map(str, range(NUM_CAPTIONS)))


class Scenes(CaptionsOnly):
    """Image-text records that are pure functions of (seed, split, record).

    Args:
        split: ``train``, ``val``, ``test`` or ``compositional``; the colour-shape pairs of the
            last (``world.HELD_OUT``) occur in none of the others.
        seed: another seed, another world of the same kind.
        level: a key of ``world.LEVELS``.
        num_records: size of the split. None: unbounded for train, 2,000 for the others.
        name: the source's name in the config, for logs and error messages.

    Raises:
        ValueError: an argument is out of range; the message names the config key.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        level: str = "full",
        num_records: int | None = None,
        name: str = "scenes",
    ):
        key = f"data.sources.{name}"
        if split not in SPLITS:
            raise ValueError(f"{key}.split must be one of {', '.join(SPLITS)}; got {split!r}")
        if level not in LEVELS:
            raise ValueError(f"{key}.level must be one of {', '.join(LEVELS)}; got {level!r}")
        if seed < 0:
            raise ValueError(f"{key}.seed must be 0 or more; got {seed}")
        if num_records is not None and num_records < 1:
            raise ValueError(
                f"{key}.num_records must be at least 1, or None for the default; got {num_records}"
            )
        self.name = name
        self.split, self.seed, self.level = split, seed, LEVELS[level]
        self.num_records = num_records
        if num_records is None and split != "train":
            self.num_records = EVALUATION_RECORDS
        self.identity = f"scenes-{VERSION}/{level}/{split}/{seed}"
        self._world = World(self.level, split)
        self._asker = Asker(self.level, self._world.pairs)
        words_of_seed = (seed & 0xFFFFFFFF, seed >> 32, SPLITS.index(split))
        self._keys = {purpose: stream_key(*words_of_seed, i) for i, purpose in enumerate(_PURPOSES)}

    @property
    def task_words(self) -> tuple[str, ...]:
        """Words of questions, statements and hypotheses; none where captions are not rich."""
        return (*VOCABULARY, *TASK_WORDS) if self.level.rich else ()

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """Five for each record: int64 [n] -> int64 [n]."""
        return np.full(len(records), NUM_CAPTIONS, np.int64)

    def caption(self, record: int, index: int) -> str:
        """Caption ``index`` of a record, lower case."""
        return self.describe(record, index).text

    def captions(self, records: np.ndarray, indices: np.ndarray) -> list[str]:
        """Captions of many records at once, in half the time of one call for each or less.

        Args:
            records: int64 [n].
            indices: int64 [n], the caption of each record.
        """
        records, indices = np.asarray(records, np.int64), np.asarray(indices, np.int64)
        for index in np.unique(indices):
            self._check_caption(int(index))
        unique, inverse = np.unique(records, return_inverse=True)
        scenes = self.scenes(unique)
        texts = [""] * len(records)
        for index in range(NUM_CAPTIONS):
            rows = np.flatnonzero(indices == index)
            draws = uniforms(self._keys[str(index)], records[rows])
            for i, row in enumerate(rows.tolist()):
                scene = scenes[inverse[row]]
                texts[row] = self._describe(scene, int(records[row]), index, draws[i]).text
        return texts

    def image(self, record: int, size: int) -> np.ndarray:
        """The picture: uint8 [size, size, 3] RGB."""
        return render.render(self.scene(record), _checked_size(size))

    @property
    def world(self) -> str:
        """Version, level, split and seed."""
        return self.identity

    def image_key(self, record: int) -> tuple[str, ...]:
        """The world and the record in it."""
        return (f"{self.world}/{record}",)

    def word_classes(self) -> Mapping[str, str]:
        """Class of every word: colour, shape, size, texture, relation, count or function."""
        return words.word_classes()

    def scene(self, record: int) -> Scene:
        """What the picture of a record shows."""
        return self._sample(record)

    def scenes(self, records: np.ndarray) -> list[Scene]:
        """What the pictures of many records show, int64 [n], in less time than one by one."""
        draws = uniforms(self._keys["scene"], records)
        return [
            self._sample(record, first)
            for record, first in zip(records.tolist(), draws, strict=True)
        ]

    def describe(self, record: int, index: int) -> Caption:
        """Caption ``index`` of a record with the facts it states.

        Raises:
            IndexError: the index is not in 0..4.
        """
        self._check_caption(index)
        return self._describe(self.scene(record), record, index)

    def masks(self, record: int, size: int) -> np.ndarray:
        """The visible part of each object, large objects first: bool [objects, size, size]."""
        return render.masks(self.scene(record), _checked_size(size))

    def labels(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Attributes of the largest object and the number of objects.

        Args:
            records: int64 [n].

        Returns:
            int32 [n] under ``shape``, ``colour``, ``size``, ``texture`` (indices of the class
            tuples of ``world``) and ``count`` (1 to 5).
        """
        rows = []
        for record in np.asarray(records).tolist():
            scene = self.scene(record)
            largest = scene.objects[0]
            rows.append((*largest[:4], len(scene.objects)))
        names = (*Object._fields[:4], "count")
        return dict(zip(names, np.array(rows, np.int32).reshape(-1, 5).T, strict=True))

    def questions(self, record: int) -> list[Question]:
        """One to ten questions about a record, at most one of each template."""
        return self._asker.ask(self.scene(record), stream(self._keys["questions"], record))

    def pair(self, index: int) -> Statement:
        """Statement ``index`` about two records of the split; one in two is true.

        Raises:
            ValueError: the split is too small to find two records that differ.
        """
        draw = stream(self._keys["pair"], index)
        truth = draw() < 0.5
        for _ in range(_SEARCH):
            first, second = self._any_record(draw), self._any_record(draw)
            if first == second:
                continue
            scenes = (self.scene(first), self.scene(second))
            text = statements.compare(scenes, truth, self.level, draw)
            if text is not None:
                return Statement((first, second), text, truth)
        raise self._too_small()

    def entailment(self, index: int) -> Hypothesis:
        """Hypothesis ``index`` about a record of the split; the three labels are balanced.

        Raises:
            ValueError: the split is too small to find something that a picture does not show.
        """
        draw = stream(self._keys["entailment"], index)
        label = LABELS[int(draw() * len(LABELS))]
        for _ in range(_SEARCH):
            record = self._any_record(draw)
            # A neutral hypothesis is one about another picture, so its words are alike.
            about = self._any_record(draw) if label == "neutral" else record
            truth = draw() < 0.5 if label == "neutral" else label == "entailment"
            supposed = statements.suppose(self.scene(about), truth, self.level, draw)
            if supposed is None:
                continue
            text, phrases = supposed
            shown = all(facts.matching(self.scene(record), phrase) for phrase in phrases)
            if shown == (label != "neutral"):
                return Hypothesis(record, text, label)
        raise self._too_small()

    def _too_small(self) -> ValueError:
        return ValueError(
            f"data.sources.{self.name}.num_records = {self.num_records} is too small to find "
            "pictures that differ; use 100 or more"
        )

    def _any_record(self, draw: Draw) -> int:
        return int(draw() * (self.num_records or _UNBOUNDED))

    def _sample(self, record: int, first: np.ndarray | None = None) -> Scene:
        self._check_record(record)
        return self._world.sample(stream(self._keys["scene"], record, first))

    def _describe(
        self, scene: Scene, record: int, index: int, first: np.ndarray | None = None
    ) -> Caption:
        draw = stream(self._keys[str(index)], record, first)
        return language.describe(scene, index, self.level, draw)

    def _check_caption(self, index: int) -> None:
        if not 0 <= index < NUM_CAPTIONS:
            raise IndexError(f"{self.name}: captions are 0..{NUM_CAPTIONS - 1}; asked for {index}")

    def _check_record(self, record: int) -> None:
        if record < 0 or (self.num_records is not None and record >= self.num_records):
            raise IndexError(
                f"{self.name}: record {record} is outside the {self.split} split of "
                f"{self.num_records or 'unbounded'} records; see data.sources.{self.name}"
            )


def _checked_size(size: int) -> int:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"scenes are drawn at {MIN_SIZE} to {MAX_SIZE} px; asked for {size}")
    return size
