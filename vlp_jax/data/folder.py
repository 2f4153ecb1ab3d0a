"""A folder of JPEG and PNG files with their captions.

    Folder("../shared/data", split="train")                     # captions.json
    Folder("/data/coco", split="val")                           # dataset_coco.json (Karpathy)

``captions.json`` is a list of ``{"image": path, "split": name, "captions": [text, ...]}``, paths
relative to the folder. Karpathy's ``dataset_coco.json`` and ``dataset_flickr30k.json`` are read as
published; their ``train`` includes ``restval``, as is usual, and images are looked for under
``<root>/<filepath>/``, ``<root>/images/<filepath>/``, ``<root>/images/`` and ``<root>/``.
"""

import collections
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlp_jax.data.decode import MAX_PIXELS, MAX_SIDE, decode_image
from vlp_jax.data.source import BadExample, CaptionsOnly
from vlp_jax.data.tokenizer import normalise_caption

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
            max_side: longest side of an image, in pixels, that is decoded.
            max_pixels: largest width x height that is decoded.

        Raises:
            FileNotFoundError: the root, an annotation file or an image is missing.
            ValueError: the annotations are damaged, or the split is empty.
        """
        if missing_images not in ("error", "skip"):
            raise ValueError(f"missing_images={missing_images!r}: must be 'error' or 'skip'")
        self.name = name
        self.bad_captions: collections.Counter[str] = collections.Counter()
        self.num_missing = 0
        self._root = pathlib.Path(root)
        self._limits = {"max_side": max_side, "max_pixels": max_pixels}
        self._images: list[str] = []
        self._captions: list[tuple[str, ...]] = []

        file = _find_annotations(self._root, annotations, key)
        entries = _read_entries(file)
        mine = [entry for entry in entries if entry.split == split]
        if not mine:
            present = sorted({entry.split for entry in entries})
            raise ValueError(
                f"{file}: split {split!r} is empty; present: {', '.join(present) or 'none'}"
            )
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
        try:
            with open(path, "rb", buffering=0) as file:  # pathlib would take a tenth of the time
                data = file.read()
        except OSError as error:
            raise BadExample("unreadable file", f"{path} ({error.strerror})") from error
        return decode_image(data, size, path, **self._limits)

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
        if missing and missing_images == "error":
            looked = ", ".join(str(self._root / path) for path in missing[0].candidates)
            raise FileNotFoundError(
                f"{file}: {len(missing)} of {len(entries)} images are missing, the first: "
                f'{looked}; add the files, or set missing_images="skip" to go on without them'
            )

    def _is_good(self, caption: Any) -> bool:
        """Counts the caption if it cannot be used."""
        if not isinstance(caption, str):
            self.bad_captions["caption is not text"] += 1
        elif not _is_unicode(caption):
            self.bad_captions["caption is not valid UTF-8"] += 1
        elif not normalise_caption(caption):
            self.bad_captions["empty caption"] += 1
        else:
            return True
        return False


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which stand for bytes that are not UTF-8 or for bad escapes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_annotations(
    root: pathlib.Path, annotations: str | os.PathLike[str] | None, key: str
) -> pathlib.Path:
    if not root.is_dir():
        raise FileNotFoundError(
            f"{key}={root}: no such folder; point it at a folder with images and one of "
            f"{', '.join(ANNOTATION_FILES)}"
        )
    names = ANNOTATION_FILES if annotations is None else (annotations,)
    files = [root / name for name in names]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{key}={root}: no annotation file; looked for {', '.join(map(str, files))}"
        )
    return file


def _read_entries(file: pathlib.Path) -> list[_Entry]:
    """All entries of an annotation file of either format."""
    # Bytes that are not UTF-8 come out as lone surrogates, and only their captions are lost.
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}:{error.lineno}:{error.colno}: not JSON: {error.msg}; fetch or write it again"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deeply to be annotations") from error
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        items, read = content["images"], _karpathy_entry
    elif isinstance(content, list):
        items, read = content, _own_entry
    else:
        raise ValueError(
            f'{file}: neither a list of {{"image", "split", "captions"}} nor Karpathy\'s '
            '{"images": [...]}'
        )
    return [read(item, f"{file}: entry {number}") for number, item in enumerate(items)]


def _own_entry(item: Any, where: str) -> _Entry:
    image = _field(item, "image", str, where)
    captions = _field(item, "captions", list, where)
    return _Entry((_inside(image, where),), _field(item, "split", str, where), captions)


def _karpathy_entry(item: Any, where: str) -> _Entry:
    filename = _inside(_field(item, "filename", str, where), where)
    folders = ["images", "."]
    if "filepath" in item:
        filepath = _inside(_field(item, "filepath", str, where), where)
        folders = [filepath, os.path.join("images", filepath), *folders]
    split = _field(item, "split", str, where)
    sentences = _field(item, "sentences", list, where)
    return _Entry(
        tuple(os.path.normpath(os.path.join(folder, filename)) for folder in folders),
        "train" if split == "restval" else split,
        [_field(sentence, "raw", object, f"{where}: a sentence") for sentence in sentences],
    )


def _field(item: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(item, dict) or not isinstance(item.get(name), kind) or name not in item:
        raise ValueError(f"{where}: needs a field {name!r} ({kind.__name__})")
    return item[name]


def _inside(path: str, where: str) -> str:
    """The path, if it stays inside the folder whatever it is joined to.

    Raises:
        ValueError: it is absolute, climbs, or is no file name.
    """
    parts = pathlib.PurePosixPath(path.replace("\\", "/")).parts
    if not parts or os.path.isabs(path) or ".." in parts or "\0" in path:
        raise ValueError(f"{where}: {path!r} is not a path inside the folder")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {path!r} is not a file name") from error
    return path
