"""What the sources of downstream tasks share: pictures, one text an example, and a target.

Annotations come as a JSON list of our own that holds all splits, or as their publisher's files,
one for each split; the name of such a file is given with ``{split}`` in the split's place.
"""

import abc
import collections
import functools
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlp_jax.data.decode import MAX_PIXELS, MAX_SIDE
from vlp_jax.data.files import (
    check_missing,
    empty_split,
    find_annotations,
    read_image,
    read_json_lines,
    read_json_list,
    text_fault,
)
from vlp_jax.data.tasks.columns import Columns

SPLIT = "{split}"


class Example(NamedTuple):
    """An example as annotated.

    Attributes:
        images: for each of its pictures, the paths below the root where the file may lie.
        split: that it belongs to.
        text: question, sentence or hypothesis.
        target: what is right about it, as the task needs it; None: its annotators disagree.
        groups: its value of each metadata column that is kept.
    """

    images: tuple[tuple[str, ...], ...]
    split: str
    text: Any
    target: Any
    groups: tuple[str, ...] = ()


def find_examples(
    root: pathlib.Path, split: str, names: Sequence[str], published: Mapping[str, str], key: str
) -> tuple[pathlib.Path, str]:
    """The first annotation file that exists, and the one of ``names`` that it goes by.

    Args:
        root: the folder.
        split: whose file it is.
        names: of the files looked for, absolute or relative to ``root``; those with ``{split}``
            are published ones.
        published: our name of a split -> its publisher's.
        key: config key of ``root``, for messages.

    Raises:
        FileNotFoundError: there is no such folder or no such file.
        ValueError: the split is not published and there is no list.
    """
    lists = [name for name in names if SPLIT not in name]
    is_listed = any((root / name).is_file() for name in lists)
    if root.is_dir() and not is_listed and split not in published:
        raise ValueError(
            f"{key}={root}: unknown split {split!r}; published are {', '.join(published)}"
        )
    of_split = [name.replace(SPLIT, published.get(split, split)) for name in names]
    file = find_annotations(root, of_split, key)
    return file, next(name for name, own in zip(names, of_split, strict=True) if root / own == file)


def read_list(file: pathlib.Path, published: Collection[str]) -> list[tuple[str, Any]]:
    """The entries of a list of our own, each with its place for messages.

    Args:
        file: the list.
        published: what publishers call the splits; such a name in the file's is a hint that it is
            a published one.

    Raises:
        ValueError: the file is no list, or not JSON.
    """
    fault = "not a list of examples"
    remedy = f"{fault}; write it as [{{...}}, {{...}}]"
    part = max((own for own in published if own in file.name), key=len, default="")
    hint = f"; name a published file with {SPLIT} in place of the split, as in "
    of_objects = f"{fault}{hint}{file.name.replace(part, SPLIT)}" if part else remedy
    items = read_json_list(file, remedy, of_objects)
    return [(f"{file}: entry {number}", item) for number, item in enumerate(items)]


class AnnotatedImages:
    """Base of the sources: the examples of a split, their pictures and texts.

    Examples whose text is empty or not valid UTF-8 are left out and counted, and so are those that
    have no target.

    Attributes:
        name: names the source in messages and metrics.
        num_records: examples of the split.
        bad_captions: examples left out for their text or annotation, by kind.
        num_missing: images of the split whose file is missing (with ``missing_images="skip"``).
    """

    def __init__(
        self,
        root: pathlib.Path,
        examples: Sequence[Example],
        split: str,
        file: pathlib.Path,
        *,
        name: str,
        what: str,
        missing_images: str,
        columns: Columns,
        max_side: int = MAX_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        """Keeps the examples of the split and checks that their images are there; opens none.

        Args:
            root: the folder.
            examples: of this split and maybe of others.
            split: the one to keep.
            file: the annotations, for messages.
            name: of the source.
            what: the text of an example is called, for counts.
            missing_images: ``error`` to refuse annotations whose images are missing, ``skip`` to
                count them and go on without their examples.
            columns: that the ``groups`` of the examples are of.
            max_side: longest side of an image, in pixels, that is decoded.
            max_pixels: largest width x height that is decoded.

        Raises:
            ConfigError: the split has no such column.
            FileNotFoundError: an image is missing.
            ValueError: the split is empty.
        """
        self.name = name
        self.bad_captions: collections.Counter[str] = collections.Counter()
        self._root = root
        self._limits = {"max_side": max_side, "max_pixels": max_pixels}
        self._columns = columns.names

        mine = [example for example in examples if example.split == split]
        if not mine:
            raise empty_split(file, split, (example.split for example in examples), name)
        columns.check([example.groups for example in mine], f"{file}, split {split!r},")
        wanted = dict.fromkeys(image for example in mine for image in example.images)
        found = {image: self._find(image) for image in wanted}
        missing = [image for image, path in found.items() if path is None]
        check_missing(missing, len(found), root, file, missing_images)
        self.num_missing = len(missing)

        self._pictures: list[tuple[str, ...]] = []
        self._texts: list[str] = []
        self._targets: list[Any] = []
        self._groups: list[tuple[str, ...]] = []
        for example in mine:
            pictures = tuple(path for image in example.images if (path := found[image]))
            if len(pictures) == len(example.images) and self._is_good(example, what):
                self._pictures.append(pictures)
                self._texts.append(example.text)
                self._targets.append(example.target)
                self._groups.append(example.groups)
        self.num_records: int = len(self._texts)
        if not self.num_records:
            raise ValueError(
                f"{file}: split {split!r} has no usable example: {len(missing)} of {len(found)} "
                f"images missing, texts left out: {dict(self.bad_captions)}"
            )

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """One for each record: int64 [n] -> int64 [n]."""
        return np.ones(len(records), np.int64)

    def caption(self, record: int, index: int) -> str:
        """The text of a record, as written; ``index`` is 0."""
        if index != 0:
            raise IndexError(f"{self.name}: a record has one text, number 0; asked for {index}")
        return self._texts[record]

    def image(self, record: int, size: int) -> np.ndarray:
        """The (first) picture, short side resized and centre cropped: uint8 [size, size, 3].

        Raises:
            BadExample: the file is damaged, too large or gone.
        """
        return self._picture(record, 0, size)

    def image_key(self, record: int) -> tuple[str, ...]:
        """The paths of the image files."""
        return tuple(_real_path(os.path.join(self._root, path)) for path in self._pictures[record])

    def group(self, record: int) -> dict[str, str]:
        """The record's value of each metadata column that is kept."""
        return dict(zip(self._columns, self._groups[record], strict=True))

    def word_classes(self) -> Mapping[str, str]:
        """Empty: nobody classed the words of people's sentences."""
        return {}

    def _picture(self, record: int, which: int, size: int) -> np.ndarray:
        path = os.path.join(self._root, self._pictures[record][which])
        return read_image(path, size, **self._limits)

    def _find(self, candidates: Sequence[str]) -> str | None:
        return next((path for path in candidates if (self._root / path).is_file()), None)

    def _is_good(self, example: Example, what: str) -> bool:
        """Counts the example if it cannot be used."""
        fault = text_fault(example.text, what)
        if fault is None and example.target is None:
            fault = "no gold label"
        if fault is not None:
            self.bad_captions[fault] += 1
        return fault is None


class LabelledExamples(AnnotatedImages):
    """Base of the sources whose target is a class.

    Attributes:
        classes: what the targets index.
    """

    extra_fields: tuple[str, ...] = ("label",)
    classes: tuple[str, ...]

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``label``: int32 []."""
        del size
        return {"label": np.asarray(self._targets[record], np.int32)}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """``label`` int32 [n] of many records, int64 [n]."""
        return {"label": np.asarray(self._targets, np.int32)[records]}


class LabelledSentences(LabelledExamples, abc.ABC):
    """Pictures and sentences about them, each with a label: a ``Source`` of one split.

    A subclass names its files and classes and says how their entries are read.

    Attributes:
        files: names of the annotation files looked for, as ``find_examples`` takes them.
        published: our name of a split -> its publisher's.
    """

    files: tuple[str, ...]
    published: Mapping[str, str]

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        annotations: str = "",
        *,
        groups: Sequence[str] = (),
        name: str = "",
        key: str = "data.root",
        missing_images: str = "error",
        max_side: int = MAX_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        """Reads the annotations and checks that every image is there; opens none.

        Args:
            root: the folder.
            split: ``train``, ``val`` or ``test``, or whatever a list names.
            annotations: the file, absolute or relative to ``root``: a list, or published JSON
                lines with ``{split}`` in place of the split; by default the first of ``files``
                that exists.
            groups: metadata columns (keys of an entry) by whose values scores are told.
            name: of the source; by default that of its class.
            key: config key of ``root``, for messages.
            missing_images: ``error`` to refuse annotations whose images are missing, ``skip`` to
                count them and go on without their sentences.
            max_side: longest side of an image, in pixels, that is decoded.
            max_pixels: largest width x height that is decoded.

        Raises:
            ConfigError: a column of ``groups`` is not there or tells no groups.
            FileNotFoundError: the root, the annotations or an image is missing.
            ValueError: the annotations are damaged, or the split is empty or unknown.
        """
        folder = pathlib.Path(root)
        names = (annotations,) if annotations else self.files
        file, found = find_examples(folder, split, names, self.published, key)
        columns = Columns(groups, f"{key.rpartition('.')[0]}.groups")
        if SPLIT in found:
            entries = read_json_lines(file)
            examples = [self.published_entry(item, split, where) for where, item in entries]
        else:
            entries = read_list(file, self.published.values())
            examples = [self.own_entry(item, where) for where, item in entries]
        examples = [
            example._replace(groups=columns.values(item, where))
            for example, (where, item) in zip(examples, entries, strict=True)
        ]
        super().__init__(
            folder,
            examples,
            split,
            file,
            name=name or type(self).__name__,
            what="sentence",
            missing_images=missing_images,
            columns=columns,
            max_side=max_side,
            max_pixels=max_pixels,
        )

    @staticmethod
    @abc.abstractmethod
    def own_entry(item: Any, where: str) -> Example:
        """An entry of a list; ``where`` names it in messages."""

    @staticmethod
    @abc.abstractmethod
    def published_entry(item: Any, split: str, where: str) -> Example:
        """A published line of the split; ``where`` names it in messages."""


@functools.lru_cache(maxsize=1 << 18)
def _real_path(path: str) -> str:
    """Cached, for a picture has many examples and links take time to follow."""
    return os.path.realpath(path)
