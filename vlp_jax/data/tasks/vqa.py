"""Visual question answering: VQA v2 as published, and lists of questions.

    VQA("/data/vqa_v2", split="train")                              # VQA v2
    VQA("../shared/data", split="train", num_answers=500)           # vqa.json
    VQA("../shared/data", split="val", questions="easy_vqa.json")

``vqa.json`` is a list of ``{"image": path, "question": text, "answers": [text, ...],
"split": name}`` with one answer or those of up to ten annotators (``answers.accuracy``).

VQA v2 (Goyal et al. 2017) is a file of questions and one of annotations for each of ``train2014``
and ``val2014``; its own test set has no public answers. That a score may be reported on pictures
that selected nothing, ``test`` here is all of ``val2014``, ``val`` the questions about one in
twenty pictures of ``train2014``, and ``train`` the rest of it. Images are those of COCO, looked
for in ``<part>/`` with or without ``images/`` before it, in ``images/`` and in the root.
"""

import os
import pathlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from vlp_jax.data.batch import MAX_ANSWERS
from vlp_jax.data.decode import MAX_PIXELS, MAX_SIDE
from vlp_jax.data.files import field, find_annotations, image_candidates, inside, read_json
from vlp_jax.data.tasks.annotated import (
    SPLIT,
    AnnotatedImages,
    Example,
    find_examples,
    read_list,
)
from vlp_jax.data.tasks.answers import (
    accepted_answers,
    check_coverage,
    most_common_answers,
    normalise_answer,
    read_answers,
)
from vlp_jax.data.tasks.columns import Columns
from vlp_jax.infra.errors import ConfigError

_QUESTIONS = ("vqa.json", "v2_OpenEnded_mscoco_{split}_questions.json")
_ANNOTATIONS = "v2_mscoco_{split}_annotations.json"
_PARTS = {"train": "train2014", "val": "train2014", "test": "val2014"}
_HELD_OUT = 20  # one in so many pictures of train2014 is of the split val


class _Target(NamedTuple):
    question_id: int
    answers: tuple[str, ...]  # as the annotators wrote them


class VQA(AnnotatedImages):
    """Pictures and questions about them: a ``Source`` of one split.

    The answer list (``classes``) always comes from the train split, or from a file. ``answer``
    holds the indices of the accepted answers that are in it, ``answer_score`` their soft scores
    (``answers.accepted_answers``).
    """

    extra_fields: tuple[str, ...] = ("answer", "answer_score")
    classes: tuple[str, ...]

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        questions: str = "",
        annotations: str = "",
        *,
        num_answers: int = 3129,
        answers: str = "",
        min_coverage: float = 0.9,
        groups: Sequence[str] = (),
        name: str = "vqa",
        key: str = "data.root",
        missing_images: str = "error",
        max_side: int = MAX_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        """Reads questions and answers and checks that every image is there; opens none.

        Args:
            root: the folder.
            split: ``train``, ``val`` or ``test``, or whatever a list names.
            questions: the file, absolute or relative to ``root``: a list, or published questions
                with ``{split}`` for ``train2014`` or ``val2014``. By default ``vqa.json`` if it
                exists, else VQA v2's names.
            annotations: published annotations, likewise; by default VQA v2's. Not for lists.
            num_answers: length of the answer list that is made of the answers that are the most
                common one to most train questions; 3,129 is usual for VQA v2.
            answers: a JSON list of answers, absolute or relative to ``root``, to use instead.
            min_coverage: share of the train questions of which the answer list must have an
                accepted answer.
            groups: metadata columns by whose values scores are told: keys of a list's entries, or
                of published questions and annotations (VQA v2: ``answer_type``,
                ``question_type``).
            name: of the source.
            key: config key of ``root``, for messages.
            missing_images: ``error`` to refuse questions whose images are missing, ``skip`` to
                count them and go on without their questions.
            max_side: longest side of an image, in pixels, that is decoded.
            max_pixels: largest width x height that is decoded.

        Raises:
            ConfigError: the answer list misses answers, or is none; a column of ``groups`` is not
                there or tells no groups.
            FileNotFoundError: the root, a file or an image is missing.
            ValueError: a file is damaged, or the split is empty or unknown.
        """
        section = key.rpartition(".")[0]
        if num_answers < 1:
            raise ConfigError(
                f"{section}.num_answers", f"{num_answers} answers are no list", "Use 1 or more"
            )
        folder = pathlib.Path(root)
        columns = Columns(groups, f"{section}.groups")
        file, examples = _read_questions(folder, split, questions, annotations, key, columns)
        super().__init__(
            folder,
            examples,
            split,
            file,
            name=name,
            what="question",
            missing_images=missing_images,
            columns=columns,
            max_side=max_side,
            max_pixels=max_pixels,
        )
        train = [accepted_answers(e.target.answers) for e in examples if e.split == "train"]
        if not train:
            raise ValueError(
                f"{file}: split 'train' is empty; answer lists are made from it or checked on it"
            )
        if answers:
            list_key = f"{section}.answers"
            self.classes = read_answers(folder / answers, list_key)
        else:
            list_key = f"{section}.num_answers"
            self.classes = most_common_answers(train, num_answers)
        check_coverage(self.classes, train, min_coverage, list_key)
        self._class_of = {normalise_answer(text): i for i, text in enumerate(self.classes)}

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``answer`` int32 [10], then -1, and ``answer_score`` float32 [10], then 0."""
        del size
        answer = np.full(MAX_ANSWERS, -1, np.int32)
        score = np.zeros(MAX_ANSWERS, np.float32)
        accepted = accepted_answers(self.answers_of(record))
        known = [text for text in accepted if text in self._class_of]
        answer[: len(known)] = [self._class_of[text] for text in known]
        score[: len(known)] = [accepted[text] for text in known]
        return {"answer": answer, "answer_score": score}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """``answer`` int32 [n, 10] and ``answer_score`` float32 [n, 10] of many records."""
        rows = [self.extras(record, 0) for record in np.asarray(records).tolist()]
        return {
            "answer": np.array([row["answer"] for row in rows], np.int32).reshape(-1, MAX_ANSWERS),
            "answer_score": np.array([row["answer_score"] for row in rows], np.float32).reshape(
                -1, MAX_ANSWERS
            ),
        }

    def answers_of(self, record: int) -> tuple[str, ...]:
        """The annotators' answers as written, which the official metric compares with."""
        return self._targets[record].answers

    def question_id(self, record: int) -> int:
        """The published number of the question, or its place in the list."""
        return self._targets[record].question_id


def _read_questions(
    root: pathlib.Path, split: str, questions: str, annotations: str, key: str, columns: Columns
) -> tuple[pathlib.Path, list[Example]]:
    """The file of the split's questions; the questions of the split, of train, maybe of others."""
    names = (questions,) if questions else _QUESTIONS
    file, name = find_examples(root, split, names, _PARTS, key)
    if SPLIT not in name:
        entries = enumerate(read_list(file, _PARTS.values()))
        return file, [_own_entry(item, number, where, columns) for number, (where, item) in entries]
    examples = []
    for part in sorted({_PARTS[split], _PARTS["train"]}):
        [asked, answered] = [
            find_annotations(root, [published.replace(SPLIT, part)], key)
            for published in (name, annotations or _ANNOTATIONS)
        ]
        examples += _published_part(asked, answered, part, columns)
    return file, examples


def _own_entry(item: Any, number: int, where: str, columns: Columns) -> Example:
    return Example(
        ((inside(field(item, "image", str, where), where),),),
        field(item, "split", str, where),
        field(item, "question", object, where),
        _Target(number, _checked(field(item, "answers", list, where), where)),
        columns.values(item, where),
    )


def _published_part(
    asked: pathlib.Path, answered: pathlib.Path, part: str, columns: Columns
) -> list[Example]:
    """The questions about ``train2014`` or ``val2014`` with their answers.

    Raises:
        ValueError: a file is damaged, a question is there twice or without an annotation, or its
            annotation twice or of another image.
    """
    answers: dict[int, tuple[str, ...]] = {}
    answered_images: dict[int, int] = {}
    metadata = {}
    for number, item in enumerate(field(read_json(answered), "annotations", list, str(answered))):
        where = f"{answered}: annotation {number}"
        given = field(item, "answers", list, where)
        question = field(item, "question_id", int, where)
        if question in answers:
            raise ValueError(f"{where}: question {question} has two annotations; remove one")
        if "image_id" in item:
            answered_images[question] = field(item, "image_id", int, where)
        answers[question] = _checked([field(one, "answer", object, where) for one in given], where)
        if columns.names:  # else they need not be kept
            metadata[question] = {name: item[name] for name in item if name != "answers"}
    questions = field(read_json(asked), "questions", list, str(asked))
    examples = []
    seen: set[int] = set()
    pictures: dict[int, tuple[str, ...]] = {}
    for number, item in enumerate(questions):
        where = f"{asked}: question {number}"
        question = field(item, "question_id", int, where)
        if question not in answers:
            raise ValueError(f"{answered}: no annotation of question {question} ({where})")
        if question in seen:
            raise ValueError(f"{where}: question {question} is listed twice; remove one")
        seen.add(question)
        image = field(item, "image_id", int, where)
        if (of_annotation := answered_images.get(question, image)) != image:
            raise ValueError(
                f"{where}: question {question} is about image_id {image}, its annotation in "
                f"{answered} about {of_annotation}; take both files of the same release"
            )
        if image not in pictures:  # shared by the questions about it, five on average
            pictures[image] = image_candidates(f"COCO_{part}_{image:012d}.jpg", part)
        split = _split_of(part, image)
        text = field(item, "question", object, where)
        target = _Target(question, answers[question])
        groups = columns.values({**item, **metadata.get(question, {})}, where)
        examples.append(Example((pictures[image],), split, text, target, groups))
    if unasked := len(answers) - len(seen):
        logging.warning(
            "%s: %d of %d annotations have no question in %s and are left out",
            answered,
            unasked,
            len(answers),
            asked,
        )
    return examples


def _split_of(part: str, image: int) -> str:
    if part == _PARTS["test"]:
        return "test"
    return "val" if zlib.crc32(str(image).encode()) % _HELD_OUT == 0 else "train"


def _checked(answers: list[Any], where: str) -> tuple[str, ...]:
    """The answers to a question, each kept once in memory for all questions."""
    if not 1 <= len(answers) <= MAX_ANSWERS or not all(isinstance(a, str) for a in answers):
        raise ValueError(f"{where}: 'answers' must be 1 to {MAX_ANSWERS} texts")
    return tuple(map(sys.intern, answers))
