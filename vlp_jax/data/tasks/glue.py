"""GLUE: nine tasks of language understanding, read from the files as they are published.

    GLUE("/data/glue", split="train", task="mrpc")       # /data/glue/MRPC
    GLUE("/data/glue/MNLI", split="test", task="mnli")   # dev_matched.tsv
    GLUE("/data/glue/MNLI", split="test_mismatched", task="mnli")
    GLUE("../shared/data/text", split="val", task="sst2")

The benchmark (Wang et al. 2018) is a folder for each task with ``train.tsv``, ``dev.tsv`` (MNLI:
``dev_matched.tsv`` and ``dev_mismatched.tsv``) and ``test.tsv``. The labels of the last are secret.
That a score may be reported on sentences that selected nothing, ``test`` here is the published dev
file, ``val`` a share of the training file (``held_out_percent``), and ``train`` the rest of it;
MNLI's second dev file, of other kinds of text than its training file, is ``test_mismatched``.
Which share that is depends on the first sentence of a line alone: lines that have it in common,
such as the three hypotheses about a premise of MNLI, are on the same side.

A line is a row of columns with tabs between them and a header above. Nothing is quoted: a quotation
mark is a letter like others. CoLA's files have no header, and MRPC may also be the file that
Microsoft publishes, ``msr_paraphrase_train.txt``, with GLUE's ``dev_ids.tsv`` beside it, which says
which pairs are of the dev set. Of SST-2, files named ``sst2_train.tsv`` and
``sst2_validation.tsv`` are found too.
"""

import collections
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vlp_jax.data.files import read_table, text_fault
from vlp_jax.data.source import PAIR_SEPARATOR
from vlp_jax.infra.errors import ConfigError, instead_of

_TRAINING = ("train", "val")  # splits of the training file
SPLITS = (*_TRAINING, "test")
MAX_SCORE = 5.0  # of STS-B: the two sentences mean the same
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # among them the separator of pairs
_MRPC_FILE, _MRPC_DEV_IDS = "msr_paraphrase_train.txt", "dev_ids.tsv"
_MRPC_IDS = ("#1 ID", "#2 ID")
_SECRET = "the labels of the official test files are secret, so nothing can be scored on them"


class _Layout(NamedTuple):
    """How the files of a task are written.

    Attributes:
        folder: that holds them.
        sentences: names of the columns of the sentence, or of the two.
        label: name of the column of the label.
        labels: what is written there for each class; () for a score.
        classes: names of the classes.
        train: names of the training file.
        dev: names of the dev file.
        more: further splits, with names of their files.
        header: names of all columns, where the files do not begin with them.
    """

    folder: str
    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")
    classes: tuple[str, ...] = ("not_entailment", "entailment")
    train: tuple[str, ...] = ("train.tsv",)
    dev: tuple[str, ...] = ("dev.tsv",)
    more: Mapping[str, tuple[str, ...]] = {}
    header: tuple[str, ...] = ()


_TWO = ("sentence1", "sentence2")
_ENTAILMENT = ("not_entailment", "entailment")
_NLI = ("contradiction", "neutral", "entailment")  # in the order of `VisualEntailment`
_LAYOUTS: Mapping[str, _Layout] = {
    "cola": _Layout(
        "CoLA",
        ("sentence",),
        "label",
        classes=("unacceptable", "acceptable"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": _Layout(
        "SST-2",
        ("sentence",),
        "label",
        classes=("negative", "positive"),
        train=("train.tsv", "sst2_train.tsv"),
        dev=("dev.tsv", "sst2_validation.tsv"),
    ),
    "mrpc": _Layout(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        classes=("not_equivalent", "equivalent"),
        train=("train.tsv", _MRPC_FILE),
        dev=("dev.tsv", _MRPC_FILE),
    ),
    "stsb": _Layout("STS-B", _TWO, "score", labels=(), classes=()),
    "qqp": _Layout(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        classes=("not_duplicate", "duplicate"),
    ),
    "mnli": _Layout(
        "MNLI",
        _TWO,
        "gold_label",
        _NLI,
        _NLI,
        dev=("dev_matched.tsv",),
        more={"test_mismatched": ("dev_mismatched.tsv",)},
    ),
    "qnli": _Layout("QNLI", ("question", "sentence"), "label", _ENTAILMENT, _ENTAILMENT),
    "rte": _Layout("RTE", _TWO, "label", _ENTAILMENT, _ENTAILMENT),
    "wnli": _Layout("WNLI", _TWO, "label", classes=_ENTAILMENT),
}
TASKS = tuple(_LAYOUTS)
# What ``label`` indexes in each task; () where there is a score instead.
CLASSES: Mapping[str, tuple[str, ...]] = {task: own.classes for task, own in _LAYOUTS.items()}
NUM_SENTENCES: Mapping[str, int] = {task: len(own.sentences) for task, own in _LAYOUTS.items()}


class GLUE:
    """Sentences, or pairs of them, and their label: a ``Source`` of one split, without pictures.

    Lines that cannot be used are left out and counted. Control characters in a sentence are spaces
    here, so that what separates the sentences of a pair is in none of them.

    Attributes:
        name: names the source in messages and metrics.
        task: of ``TASKS``.
        num_records: examples of the split.
        classes: what ``label`` indexes; () for STS-B, whose ``target`` is a score. Where there are
            two, the second is the positive one of F1.
        extra_fields: ``label``, or ``target`` for STS-B.
        pairs: whether a caption is two sentences (``source.Paired``).
        bad_captions: lines of the file, of whatever split, that were left out, by kind.
    """

    pictures = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str,
        *,
        held_out_percent: float = 10.0,
        name: str = "glue",
        key: str = "data.root",
    ):
        """Reads one file.

        Args:
            root: the folder of the task, the folder that holds it, or one file with labels, which
                has a ``train`` and a ``val`` and no ``test``.
            split: ``train``, ``val`` or ``test``, of MNLI also ``test_mismatched``; see the top of
                this module.
            task: one of ``TASKS``.
            held_out_percent: about how many of a hundred lines of the training file are ``val``.
            name: of the source.
            key: config key of ``root``, for messages.

        Raises:
            ConfigError: the task or the split is unknown, or a file alone has no such split, or
                the percentage is none.
            FileNotFoundError: there is no such folder or no such file.
            ValueError: the file lacks a column, as a file without labels does, or no line of the
                split can be used.
        """
        section = key.rpartition(".")[0]
        _check_arguments(section, split, task, held_out_percent)
        self.name, self.task = name, task
        self.bad_captions: collections.Counter[str] = collections.Counter()
        self._layout = _LAYOUTS[task]
        self.classes = self._layout.classes
        self.extra_fields: tuple[str, ...] = ("label",) if self.classes else ("target",)
        self.pairs = len(self._layout.sentences) == 2

        file = _find_file(pathlib.Path(root), split, self._layout, key)
        rows = self._rows(file, split, f"{section}.task")
        examples = list(self._examples(rows))
        if split in _TRAINING:
            wanted = split == "val"
            examples = [e for e in examples if _is_held_out(e[0][0], held_out_percent) == wanted]
        if not examples:
            remedy = "fetch it again"
            if split in _TRAINING and not self.bad_captions:
                remedy = f"change {section}.held_out_percent={held_out_percent}"
            raise ValueError(
                f"{file}: split {split!r} has no usable example, lines left out: "
                f"{dict(self.bad_captions)}; {remedy}, or set {section}.task if these are no files "
                f"of {task!r}"
            )
        self._texts = [PAIR_SEPARATOR.join(sentences) for sentences, _ in examples]
        dtype = np.int32 if self.classes else np.float32
        self._targets = np.asarray([target for _, target in examples], dtype)
        self.num_records: int = len(self._texts)

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """One for each record: int64 [n] -> int64 [n]."""
        return np.ones(len(records), np.int64)

    def caption(self, record: int, index: int) -> str:
        """The sentence of a record, or the two with ``PAIR_SEPARATOR`` between; ``index`` is 0."""
        if index != 0:
            raise IndexError(f"{self.name}: a record has one text, number 0; asked for {index}")
        return self._texts[record]

    def image(self, record: int, size: int) -> np.ndarray:
        """There is none.

        Raises:
            ValueError: always.
        """
        del record, size
        raise self._no_pictures()

    def image_key(self, record: int) -> tuple[str, ...]:
        """There is none.

        Raises:
            ValueError: always.
        """
        del record
        raise self._no_pictures()

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``label`` int32 [], or for STS-B ``target`` float32 [], a score from 0 to 5."""
        del size
        return {self.extra_fields[0]: np.asarray(self._targets[record])}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """``label`` int32 [n], or for STS-B ``target`` float32 [n], of records, int64 [n]."""
        return {self.extra_fields[0]: self._targets[records]}

    def word_classes(self) -> Mapping[str, str]:
        """Empty: nobody classed the words of people's sentences."""
        return {}

    def _no_pictures(self) -> ValueError:
        return ValueError(
            f"data.sources.{self.name}: GLUE is text and has no pictures; use objectives and "
            "evaluators that read none, and leave out `cache`"
        )

    def _rows(self, file: pathlib.Path, split: str, task_key: str) -> Iterator[list[str]]:
        """The columns of sentences and label of each line that has all columns.

        Raises:
            ValueError: the file lacks a column.
        """
        header, *rows = read_table(file)
        wanted = [*self._layout.sentences, self._layout.label]
        dev_ids = None
        if file.name == _MRPC_FILE:
            dev_ids = _read_dev_ids(file)
            wanted += _MRPC_IDS
        if self._layout.header and not set(header).intersection(self._layout.sentences):
            rows.insert(0, header)
            header = list(self._layout.header)
        for column in wanted:
            if column not in header:
                remedy = f"take the published file, or set {task_key}"
                if column == self._layout.label:
                    remedy = f"{_SECRET}; take train.tsv or the dev file"
                there = ", ".join(header)
                raise ValueError(f"{file}: has no column {column!r} (it has {there}); {remedy}")
        places = [header.index(column) for column in wanted]
        dev_pairs = 0
        for row in rows:
            if len(row) != len(header):
                self.bad_captions["wrong number of columns"] += 1
                continue
            cells = [row[place] for place in places]
            pair = tuple(cell.strip() for cell in cells[3:])  # () but in Microsoft's file
            is_dev = split not in _TRAINING if dev_ids is None else pair in dev_ids
            dev_pairs += is_dev
            if is_dev == (split not in _TRAINING):
                yield cells
        if dev_ids is not None and not dev_pairs:
            raise ValueError(
                f"{file}: has none of the pairs that {_MRPC_DEV_IDS} lists, so the dev set cannot "
                "be kept out of training; fetch both files again"
            )

    def _examples(self, rows: Iterator[list[str]]) -> Iterator[tuple[list[str], float]]:
        """Sentences and target of each row that has both."""
        count = len(self._layout.sentences)
        for row in rows:
            sentences = [_CONTROL.sub(" ", cell).strip() for cell in row[:count]]
            target = self._target(row[count].strip())
            fault = next(filter(None, (text_fault(text, "sentence") for text in sentences)), None)
            if fault is None and target is None:
                fault = "unknown label" if self.classes else "unknown score"
            if fault is not None:
                self.bad_captions[fault] += 1
            elif target is not None:
                yield sentences, target

    def _target(self, written: str) -> float | None:
        """The class or score that a label says; None: it says neither."""
        if self.classes:
            labels = self._layout.labels
            return labels.index(written) if written in labels else None
        try:
            score = float(written)
        except ValueError:
            return None
        return score if 0.0 <= score <= MAX_SCORE else None


def _check_arguments(section: str, split: str, task: str, held_out_percent: float) -> None:
    if task not in TASKS:
        raise ConfigError(
            f"{section}.task", f"{task!r} is no task of GLUE", instead_of(str(task).lower(), TASKS)
        )
    splits = (*SPLITS, *_LAYOUTS[task].more)
    if split not in splits:
        raise ConfigError(
            f"{section}.split", f"{split!r} is no split", f"Use one of {', '.join(splits)}"
        )
    if not 0.0 <= held_out_percent < 100.0:
        raise ConfigError(
            f"{section}.held_out_percent",
            f"{held_out_percent} percent leave no training set or are no share",
            "Use a number from 0 to below 100",
        )


def _find_file(root: pathlib.Path, split: str, layout: _Layout, key: str) -> pathlib.Path:
    """The file that holds the split.

    Raises:
        ConfigError: the root is a file, and the split none of the training file's.
        FileNotFoundError: there is no such folder, or no such file.
    """
    of_dev = {"test": layout.dev, **layout.more}
    names = of_dev.get(split, layout.train)
    if root.is_file():
        if split in of_dev:
            raise ConfigError(
                key,
                f"{root} is a file, whose lines are 'train' and 'val' and none of them {split!r}",
                f"Name the folder that holds {' or '.join(names)}",
            )
        return root
    if not root.is_dir():
        raise FileNotFoundError(
            f"{key}={root}: no such folder; point it at the folder of GLUE or at {layout.folder} "
            "in it"
        )
    folders = (root, root / layout.folder)
    files = [folder / name for folder in folders for name in names]
    for file in files:
        if file.is_file():
            return file
    looked = f"{key}={root}: looked for {', '.join(map(str, files))}"
    if split in of_dev:
        for secret in (path for folder in folders for path in sorted(folder.glob("test*.tsv"))):
            raise FileNotFoundError(
                f"{looked}; {secret} cannot take its place: {_SECRET}. Add the dev file"
            )
    raise FileNotFoundError(f"{looked}; unpack the files of {layout.folder} there")


def _read_dev_ids(file: pathlib.Path) -> set[tuple[str, ...]]:
    """The numbers of the pairs of ``msr_paraphrase_train.txt`` that are GLUE's dev set.

    Raises:
        FileNotFoundError: the list is not beside the file.
    """
    listed = file.with_name(_MRPC_DEV_IDS)
    if not listed.is_file():
        raise FileNotFoundError(
            f"{listed}: not found; it says which pairs of {file.name} are of the dev set. Fetch "
            "it, or use the files train.tsv and dev.tsv"
        )
    return {tuple(map(str.strip, row)) for row in read_table(listed)}


def _is_held_out(sentence: str, percent: float) -> bool:
    """A draw that depends on nothing but the sentence."""
    return zlib.crc32(sentence.encode()) < percent / 100 * 2**32
