"""What the readers of annotation files share: JSON, fields, paths, texts and missing images."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax.data.decode import decode_image
from vlp_jax.data.source import BadExample
from vlp_jax.data.tokenizer import normalise_caption


def read_json(file: pathlib.Path) -> Any:
    """The content of a JSON file; bytes that are not UTF-8 come out as lone surrogates.

    So only the texts that hold such bytes are lost (``text_fault`` finds them), not the file.

    Raises:
        ValueError: the file is not JSON; the message names the place.
    """
    return _parse(_read_text(file), file)


def read_json_lines(file: pathlib.Path) -> list[tuple[str, Any]]:
    """The values of a file that has one JSON value a line, each with its place for messages.

    Raises:
        ValueError: a line is not JSON; the message names it.
    """
    lines = enumerate(_read_text(file).split("\n"), 1)
    return [(f"{file}:{n}", _parse(line, file, n)) for n, line in lines if line.strip()]


def field(item: Any, name: str, kind: type, where: str) -> Any:
    """The field of an entry.

    Args:
        item: the entry.
        name: of the field.
        kind: type that its value must have.
        where: names the entry in messages.

    Raises:
        ValueError: the entry is no object, or has no such field of that type.
    """
    if not isinstance(item, dict) or name not in item or not isinstance(item[name], kind):
        raise ValueError(f"{where}: needs a field {name!r} ({kind.__name__})")
    return item[name]


def find_annotations(
    root: pathlib.Path, names: Sequence[str | os.PathLike[str]], key: str
) -> pathlib.Path:
    """The first of the annotation files that exists.

    Args:
        root: the folder.
        names: of the files looked for, absolute or relative to ``root``.
        key: config key of ``root``, for messages.

    Raises:
        FileNotFoundError: there is no such folder, or none of the files.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{key}={root}: no such folder; point it at a folder with images and one of "
            f"{', '.join(map(str, names))}"
        )
    files = [root / name for name in names]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{key}={root}: no annotation file; looked for {', '.join(map(str, files))}"
    )


def image_candidates(filename: str, folder: str) -> tuple[str, ...]:
    """Where people keep an image of a published set, most specific place first.

    Args:
        filename: of the image.
        folder: that its publisher put it in; "" for none.

    Returns:
        Paths relative to the root: ``<folder>/``, ``images/<folder>/``, ``images/`` and ``./``.
    """
    places = (folder, os.path.join("images", folder)) if folder else ()
    return tuple(
        os.path.normpath(os.path.join(place, filename)) for place in (*places, "images", "")
    )


def inside(path: str, where: str) -> str:
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


def text_fault(text: Any, what: str) -> str | None:
    """Why a text cannot be used, None if it can.

    Args:
        text: as annotated.
        what: it is (``caption``, ``question``, ...).
    """
    if not isinstance(text, str):
        return f"{what} is not text"
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: bytes that are not UTF-8, or bad escapes
        return f"{what} is not valid UTF-8"
    return None if normalise_caption(text) else f"empty {what}"


def check_missing(
    missing: Sequence[Sequence[str]],
    total: int,
    root: pathlib.Path,
    file: pathlib.Path,
    missing_images: str,
) -> None:
    """Refuses annotations of images that are not there, unless they are to be skipped.

    Args:
        missing: for each missing image, the paths below ``root`` where it was looked for.
        total: images that the annotations name.
        root: the folder.
        file: the annotations.
        missing_images: ``error`` or ``skip``.

    Raises:
        ValueError: ``missing_images`` is neither.
        FileNotFoundError: images are missing and are not to be skipped.
    """
    if missing_images not in ("error", "skip"):
        raise ValueError(f"missing_images={missing_images!r}: must be 'error' or 'skip'")
    if missing and missing_images == "error":
        looked = ", ".join(str(root / path) for path in missing[0])
        raise FileNotFoundError(
            f"{file}: {len(missing)} of {total} images are missing, the first: "
            f'{looked}; add the files, or set missing_images="skip" to go on without them'
        )


def read_image(path: str, size: int, *, max_side: int, max_pixels: int) -> np.ndarray:
    """The picture in a file, short side resized and centre cropped: uint8 [size, size, 3].

    Raises:
        BadExample: the file is damaged, too large or gone.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # pathlib would take a tenth of the time
            data = file.read()
    except OSError as error:
        raise BadExample("unreadable file", f"{path} ({error.strerror})") from error
    return decode_image(data, size, path, max_side=max_side, max_pixels=max_pixels)


def _read_text(file: pathlib.Path) -> str:
    return file.read_bytes().decode("utf-8", "surrogateescape")


def _parse(text: str, file: pathlib.Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}:{first_line + error.lineno - 1}:{error.colno}"
        raise ValueError(f"{place}: not JSON: {error.msg}; fetch or write it again") from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deeply to be annotations") from error
