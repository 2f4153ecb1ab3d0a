"""Images with one class each: a list of labels, or a folder for every class.

    ImageLabels("../shared/data", split="train")        # labels.json
    ImageLabels("/data/imagenet", split="val")          # val/<class>/*.JPEG

``labels.json`` is a list of ``{"image": path, "name": class, "split": name}``; other keys are not
read but by ``groups``. Without it, the folder of a split (``train``, ``val`` or ``validation``,
``test``) has one folder for every class. The classes of either are those of its training split, by
name.

The text of a picture is the name of its class, with spaces for ``_`` and ``-``: an objective that
reads texts is told the answer.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from vlp_jax.data.decode import MAX_PIXELS, MAX_SIDE
from vlp_jax.data.files import field, inside
from vlp_jax.data.tasks.annotated import Example, LabelledExamples, read_list
from vlp_jax.data.tasks.columns import Columns
from vlp_jax.infra.errors import ConfigError

LABELS_FILE = "labels.json"
_TRAIN = "train"
_FOLDERS: Mapping[str, tuple[str, ...]] = {"val": ("val", "validation", "valid")}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


class ImageLabels(LabelledExamples):
    """Pictures and the class of each: a ``Source`` of one split.

    Attributes:
        classes: names of the classes, sorted.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        annotations: str = "",
        *,
        groups: Sequence[str] = (),
        name: str = "ImageLabels",
        key: str = "data.root",
        missing_images: str = "error",
        max_side: int = MAX_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        """Reads the annotations, or lists the folders; opens no image.

        Args:
            root: the folder.
            split: ``train``, ``val`` or ``test``, or whatever a list names.
            annotations: the list, absolute or relative to ``root``; by default ``labels.json``
                where it is there, and folders of classes elsewhere.
            groups: metadata columns (keys of an entry of the list) by whose values scores are told.
            name: of the source.
            key: config key of ``root``, for messages.
            missing_images: ``error`` to refuse a list whose images are missing, ``skip`` to count
                them and go on without.
            max_side: longest side of an image, in pixels, that is decoded.
            max_pixels: largest width x height that is decoded.

        Raises:
            ConfigError: a column of ``groups`` is not there or tells no groups.
            FileNotFoundError: the root, the list or an image is missing.
            ValueError: the list is damaged, a split is empty or unknown, or holds a class that the
                training split has not.
        """
        folder = pathlib.Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"{key}={root}: no such folder")
        columns = Columns(groups, f"{key.rpartition('.')[0]}.groups")
        file = folder / (annotations or LABELS_FILE)
        if annotations or file.is_file():
            examples = _of_list(file, columns)
            known = {example.target for example in examples if example.split == _TRAIN}
        else:
            file = folder
            if groups:
                raise ConfigError(
                    f"{key.rpartition('.')[0]}.groups",
                    f"{folder} has folders of classes, and no columns",
                    "Set it to ()",
                )
            examples = _of_folders(folder, split, key)
            known = {path.name for path in _class_folders(folder, _TRAIN, key)}
        if not known:
            raise ValueError(f"{file}: no picture of split {_TRAIN!r}, whose classes are learned")
        self.classes = tuple(sorted(known))
        index = {class_name: number for number, class_name in enumerate(self.classes)}
        unknown = sorted({e.target for e in examples if e.split == split} - known)
        if unknown:
            raise ValueError(
                f"{file}: split {split!r} has class {unknown[0]!r}, which no training picture has; "
                "remove its pictures, or add some to the training split"
            )
        examples = [example._replace(target=index.get(example.target)) for example in examples]
        super().__init__(
            folder,
            examples,
            split,
            file,
            name=name,
            what="class name",
            missing_images=missing_images,
            columns=columns,
            max_side=max_side,
            max_pixels=max_pixels,
        )

    def labels(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """``class``: int32 [n]."""
        return {"class": np.asarray(self._targets, np.int32)[records]}


def _of_list(file: pathlib.Path, columns: Columns) -> list[Example]:
    """All entries of a list; the target is the name of the class."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found")
    examples = []
    for where, item in read_list(file, ()):
        class_name = field(item, "name", str, where)
        if not class_name:
            raise ValueError(f"{where}: the name of its class is empty")
        examples.append(
            Example(
                ((inside(field(item, "image", str, where), where),),),
                field(item, "split", str, where),
                _spoken(class_name),
                class_name,
                columns.values(item, where),
            )
        )
    return examples


def _of_folders(root: pathlib.Path, split: str, key: str) -> list[Example]:
    """All pictures of a split."""
    return [
        Example(((path.relative_to(root).as_posix(),),), split, _spoken(folder.name), folder.name)
        for folder in _class_folders(root, split, key)
        for path in pictures_below(folder)
    ]


def _class_folders(root: pathlib.Path, split: str, key: str) -> list[pathlib.Path]:
    """The folder of every class of a split; what is in them is not looked at."""
    folder = split_folder(root, split)
    if folder is None:
        raise FileNotFoundError(
            f"{key}={root}: neither {LABELS_FILE} nor a folder {split!r} with a folder for each "
            "class"
        )
    return sorted(path for path in folder.iterdir() if path.is_dir())


def pictures_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """All pictures in a folder and in those below it, by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def split_folder(root: pathlib.Path, split: str) -> pathlib.Path | None:
    """The folder of a split, by one of its usual names; None: there is none."""
    names = _FOLDERS.get(split, (split,))
    return next((root / name for name in names if (root / name).is_dir()), None)


def _spoken(name: str) -> str:
    """The name of a class as words."""
    return " ".join(name.replace("_", " ").replace("-", " ").split()) or name
