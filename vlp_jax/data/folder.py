"""A folder of JPEG and PNG files with their captions.

    Folder("../shared/data", split="train")                     # captions.json
    Folder("/data/coco", split="val")                           # dataset_coco.json (Karpathy)

``captions.json`` is a list of ``{"image": path, "split": name, "captions": [text, ...]}``, paths
relative to the folder; a picture may have several entries, such as one for each caption.
Karpathy's ``dataset_coco.json`` and ``dataset_flickr30k.json`` are read as published; their
``train`` includes ``restval``, as is usual (pictures of val2014, which VQA v2 and retrieval on the
whole val2014 may test on), unless ``restval`` is False, and images are looked for under
``<root>/<filepath>/``, ``<root>/images/<filepath>/``, ``<root>/images/`` and ``<root>/``; Flickr30k
names no ``filepath``, and comes as ``flickr30k-images`` or ``flickr30k_images``.
"""

import collections
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from vlp_jax.data.decode import MAX_PIXELS, MAX_SIDE
from vlp_jax.data.files import (
    FLICKR_FOLDERS,
    check_missing,
    empty_split,
    field,
    find_annotations,
    image_candidates,
    inside,
    read_image,
    read_json,
    text_fault,
)
from vlp_jax.data.source import CaptionsOnly

ANNOTATION_FILES = ("captions.json", "dataset_coco.json", "dataset_flickr30k.json")


class _Entry(NamedTuple):
    """An image as annotated: where it may lie, relative to the root, and its captions."""

    candidates: tuple[str, ...]
    split: str
    captions: Sequence[Any]


class Folder(CaptionsOnly):
    """Images of a folder and their captions: a ``Source`` of one split.

    Captions that are empty or not valid UTF-8 are left out and counted, and so are images that
    have no other.

    Attributes:
        name: names the source in messages and metrics.
        num_records: images of the split.
        bad_captions: captions left out, and images left without any, by kind.
        num_missing: images of the split whose file is missing (with ``missing_images="skip"``).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        annotations: str | os.PathLike[str] | None = None,
        *,
        name: str = "folder",
        key: str = "data.root",
        missing_images: str = "error",
        restval: bool = True,
        max_side: int = MAX_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        """Reads the annotations and checks that every image is there; opens none.

        Args:
            root: the folder.
            split: ``train``, ``val``, ``test`` or whatever the annotations name.
            annotations: the annotation file, absolute or relative to ``root``; by default the
                first of ``ANNOTATION_FILES`` that exists.
            name: of the source.
            key: config key of ``root``, for messages.
            missing_images: ``error`` to refuse annotations whose images are missing, ``skip`` to
                count them and go on.
            restval: whether ``restval`` of Karpathy's files belongs to ``train``.
            max_side: longest side of an image, in pixels, that is decoded.
            max_pixels: largest width x height that is decoded.

        Raises:
            FileNotFoundError: the root, an annotation file or an image is missing.
            ValueError: the annotations are damaged, a picture is in two splits, or the split is
                empty.
        """
        self.name = name
        self.bad_captions: collections.Counter[str] = collections.Counter()
        self.num_missing = 0
        self._root = pathlib.Path(root)
        self._limits = {"max_side": max_side, "max_pixels": max_pixels}
        self._images: list[str] = []
        self._captions: list[tuple[str, ...]] = []

        names = ANNOTATION_FILES if annotations is None else (annotations,)
        file = find_annotations(self._root, names, key)
        entries = _read_entries(file)
        own = {split, "restval"} if restval and split == "train" else {split}
        mine = [entry for entry in entries if entry.split in own]
        if not mine:
            raise empty_split(file, split, (entry.split for entry in entries), name)
        self._add(mine, file, missing_images)
        self.num_records: int = len(self._images)
        if not self.num_records:
            raise ValueError(
                f"{file}: split {split!r} has no usable image: {self.num_missing} of {len(mine)} "
                f"missing, captions left out: {dict(self.bad_captions)}"
            )
        self._counts = np.asarray([len(captions) for captions in self._captions], np.int64)

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """Captions of each record: int64 [n] -> int64 [n]."""
        return self._counts[records]

    def caption(self, record: int, index: int) -> str:
        """Caption ``index`` of a record, as written."""
        return self._captions[record][index]

    def path(self, record: int) -> pathlib.Path:
        """The image file of a record."""
        return self._root / self._images[record]

    def image_key(self, record: int) -> tuple[str, ...]:
        """The path of the image file."""
        return (str(self.path(record).resolve()),)

    def image(self, record: int, size: int) -> np.ndarray:
        """The picture, short side resized and centre cropped: uint8 [size, size, 3].

        Raises:
            BadExample: the file is damaged, too large or gone.
        """
        path = os.path.join(self._root, self._images[record])
        return read_image(path, size, **self._limits)

    def word_classes(self) -> Mapping[str, str]:
        """Empty: nobody classed the words of photographs' captions."""
        return {}

    def _add(self, entries: Sequence[_Entry], file: pathlib.Path, missing_images: str) -> None:
        missing = []
        for entry in entries:
            found = next((c for c in entry.candidates if (self._root / c).is_file()), None)
            if found is None:
                missing.append(entry)
                continue
            captions = tuple(text for text in entry.captions if self._is_good(text))
            if captions:
                self._images.append(found)
                self._captions.append(captions)
            else:
                self.bad_captions["image without captions"] += 1
        self.num_missing = len(missing)
        check_missing(
            [entry.candidates for entry in missing], len(entries), self._root, file, missing_images
        )

    def _is_good(self, caption: Any) -> bool:
        """Counts the caption if it cannot be used."""
        fault = text_fault(caption, "caption")
        if fault is not None:
            self.bad_captions[fault] += 1
        return fault is None


def _read_entries(file: pathlib.Path) -> list[_Entry]:
    """The images of an annotation file of either format."""
    content = read_json(file)
    if isinstance(content, list):
        return _joined([_own_entry(*placed) for placed in _placed(content, file)], file)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(
            f'{file}: neither a list of {{"image", "split", "captions"}} nor Karpathy\'s '
            '{"images": [...]}'
        )
    if "annotations" in content and not any(
        isinstance(item, dict) and "sentences" in item for item in content["images"]
    ):
        raise ValueError(
            f"{file}: COCO's own caption format, whose captions are apart from the images and "
            "without splits; put Karpathy's dataset_coco.json in its place"
        )
    return [_karpathy_entry(*placed) for placed in _placed(content["images"], file)]


def _placed(items: Sequence[Any], file: pathlib.Path) -> list[tuple[Any, str]]:
    """Each entry with its place for messages."""
    return [(item, f"{file}: entry {number}") for number, item in enumerate(items)]


def _joined(entries: Sequence[_Entry], file: pathlib.Path) -> list[_Entry]:
    """One entry for each picture, in the order of first appearance, with all its captions."""
    of_picture: dict[tuple[str, ...], list[tuple[int, _Entry]]] = {}
    for number, entry in enumerate(entries):
        picture = tuple(map(os.path.normpath, entry.candidates))
        of_picture.setdefault(picture, []).append((number, entry))
    joined = []
    for own in of_picture.values():
        first_number, first = own[0]
        for number, entry in own[1:]:
            if entry.split != first.split:
                raise ValueError(
                    f"{file}: {entry.candidates[0]!r} is in two splits, {first.split!r} (entry "
                    f"{first_number}) and {entry.split!r} (entry {number}); keep it in one of them"
                )
        captions = [text for _, entry in own for text in entry.captions]
        joined.append(first._replace(captions=captions))
    if len(joined) < len(entries):
        logging.info(
            "%s: %d entries joined with an earlier one of the same picture: %d entries, %d images",
            file,
            len(entries) - len(joined),
            len(entries),
            len(joined),
        )
    return joined


def _own_entry(item: Any, where: str) -> _Entry:
    image = field(item, "image", str, where)
    captions = field(item, "captions", list, where)
    return _Entry((inside(image, where),), field(item, "split", str, where), captions)


def _karpathy_entry(item: Any, where: str) -> _Entry:
    filename = inside(field(item, "filename", str, where), where)
    folders: tuple[str, ...] = FLICKR_FOLDERS
    if "filepath" in item:
        folders = (inside(field(item, "filepath", str, where), where),)
    split = field(item, "split", str, where)
    sentences = field(item, "sentences", list, where)
    return _Entry(
        image_candidates(filename, *folders),
        split,
        [field(sentence, "raw", object, f"{where}: a sentence") for sentence in sentences],
    )
