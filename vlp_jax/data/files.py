"""What readers of annotation files share: JSON, tables, fields, paths, texts and missing images."""

import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vlp_jax.data.decode import decode_image
from vlp_jax.data.source import BadExample
from vlp_jax.data.tokenizer import normalise_caption

FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images")  # what its pictures are unpacked to
_IMAGE_ENDS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_GZIP = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_KINDS = {
    str: "text",
    object: "text",  # whatever its type: what is no text is counted (``text_fault``)
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a whole number",
    float: "a decimal number",
    type(None): "null",
}


def read_json(file: pathlib.Path) -> Any:
    """The content of a JSON file; bytes that are not UTF-8 come out as lone surrogates.

    So only the texts that hold such bytes are lost (``text_fault`` finds them), not the file. A
    byte-order mark before the JSON is passed over.

    Raises:
        ValueError: the file is empty, compressed, not UTF-8 at all or not JSON; the message names
            the place.
    """
    return _parse(_read_text(file), file)


def read_json_list(file: pathlib.Path, otherwise: str, of_objects: str) -> list[Any]:
    """The values of a JSON list, read as ``read_json`` does.

    Args:
        file: that holds it.
        otherwise: the fault and the remedy, where the file holds no list.
        of_objects: the same, where it holds an object or several.

    Raises:
        ValueError: the file holds something else, or cannot be read as JSON.
    """
    text = _read_text(file)
    start = text.lstrip()[:1]
    if start != "[":
        raise ValueError(f"{file}: {of_objects if start == '{' else otherwise}")
    return _parse(text, file)


def read_json_lines(file: pathlib.Path) -> list[tuple[str, Any]]:
    """The values of a file that has one JSON value a line, each with its place for messages.

    Raises:
        ValueError: a line is not JSON, and the message names it, or the file is empty, compressed
            or not UTF-8 at all.
    """
    lines = enumerate(_read_text(file).split("\n"), 1)
    return [(f"{file}:{n}", _parse(line, file, n)) for n, line in lines if line.strip()]


def read_table(file: pathlib.Path) -> list[list[str]]:
    """The rows of a file of columns with tabs between them; lines with nothing in them are none.

    Quotation marks are letters like others, and only a line feed ends a row: sentences may hold
    what Unicode counts as the end of a line.

    Raises:
        ValueError: the file is empty, compressed or not UTF-8 at all.
    """
    lines = (line.removesuffix("\r") for line in _read_text(file).split("\n"))
    return [line.split("\t") for line in lines if line]


def field(item: Any, name: str, kind: type, where: str) -> Any:
    """The field of an entry.

    Args:
        item: the entry.
        name: of the field.
        kind: type that its value must have; ``object`` for a text that is checked later.
        where: names the entry in messages.

    Raises:
        ValueError: the entry is no object, or has no such field of that type.
    """
    if isinstance(item, dict) and name in item:
        if isinstance(item[name], kind):
            return item[name]
        found = _KINDS[type(item[name])]
        raise ValueError(f"{where}: field {name!r} is {found}, not {_KINDS[kind]}")
    fault = "" if isinstance(item, dict) else f", but is {_KINDS[type(item)]}, not an object"
    raise ValueError(f"{where}: needs a field {name!r} ({_KINDS[kind]}){fault}")


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


def empty_split(file: pathlib.Path, split: str, present: Iterable[str], name: str) -> ValueError:
    """The error for a split without examples.

    Args:
        file: the annotations.
        split: that was asked for.
        present: the splits of the examples.
        name: of the source.
    """
    others = sorted(set(present))
    remedy = f"put examples of split {split!r} into the file"
    if others:
        remedy += (
            f", or choose another split by data.sources.{name}.split (for an evaluation: "
            "evals.NAME.split)"
        )
    return ValueError(
        f"{file}: split {split!r} is empty; present: {', '.join(others) or 'none'}; {remedy}"
    )


def image_candidates(filename: str, *folders: str) -> tuple[str, ...]:
    """Where people keep an image of a published set, most specific place first.

    Args:
        filename: of the image.
        folders: that its publisher put it in, by any of these names.

    Returns:
        Paths relative to the root: ``<folder>/`` and ``images/<folder>/`` for each folder,
        ``images/`` and ``./``.
    """
    places = [place for folder in folders for place in (folder, os.path.join("images", folder))]
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
        similar = _similar_file(root, missing[0])
        raise FileNotFoundError(
            f"{file}: {len(missing)} of {total} images are missing, the first: {looked}"
            f"{f' (there is {similar})' if similar else ''}; add the files, or set "
            'missing_images="skip" to go on without them'
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
    data = file.read_bytes()
    if data.startswith(_GZIP):
        raise ValueError(f"{file}: is compressed (gzip); unpack it first, as by gzip -dc")
    if data.startswith(_UTF16) or b"\0" in data[:2]:  # a JSON text holds no null
        raise ValueError(f"{file}: is UTF-16 text; write it again as UTF-8")
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if not text or text.isspace():
        raise ValueError(f"{file}: is empty; fetch or write it again")
    return text


def _similar_file(root: pathlib.Path, candidates: Sequence[str]) -> pathlib.Path | None:
    """What a missing image is there as, after a look at one folder; None: nothing like it.

    Its name may differ in case, Unicode form, slashes or ending, and that of a folder that it is in
    likewise, but for the ending. Of the candidates, the first whose folder exists is looked for.
    """
    paths = [path.replace("\\", "/") for path in candidates]
    path = next((path for path in paths if (root / path).parent.is_dir()), paths[0])
    folder, parts = root, list(pathlib.PurePosixPath(path).parts)
    while parts and (folder / parts[0]).exists():
        folder /= parts.pop(0)
    if not parts:
        return folder if folder.is_file() else None
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    is_last = len(parts) == 1
    wanted = {_same_name(parts[0]), _same_name("/".join(parts))}
    for name in names:
        found = folder / name
        if _same_name(name) in wanted and (found.is_file() or (found.is_dir() and not is_last)):
            return found
    stem = _same_name(os.path.splitext(parts[0])[0])
    for name in names if is_last else ():
        found = folder / name
        own, end = os.path.splitext(name)
        if _same_name(own) == stem and end.lower() in _IMAGE_ENDS and found.is_file():
            return found
    return None


def _same_name(name: str) -> str:
    """Equal for names that differ in case, Unicode form or slashes."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").casefold())


def _parse(text: str, file: pathlib.Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}:{first_line + error.lineno - 1}:{error.colno}"
        raise ValueError(f"{place}: not JSON: {error.msg}; fetch or write it again") from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deeply to be annotations") from error
