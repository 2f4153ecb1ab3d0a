"""What an evaluator leaves for the report beside its numbers: tables, galleries and curves.

An artefact lives in ``workdir/artifacts/<name>/`` as strict JSON with its pictures beside it as PNG
files. Every text in it is plain text: the renderer escapes it, so captions and predictions may hold
anything. Numbers carry no unit; the renderer derives it from the name of their column (see
`vlp_jax.infra.units`): a column named ``probability`` holds fractions of one and is drawn as bars.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from PIL import Image

ARTIFACTS_FOLDER = "artifacts"
ARTIFACT_FILE = "artifact.json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PICTURE_NAME = re.compile(r"[0-9a-f]{16}\.png")

Cell = str | int | float
Row = tuple[Cell, ...]
SpanKind = Literal["plain", "hidden", "right", "wrong"]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with a caption.

    Attributes:
        png: the bytes of a PNG file.
        caption: a few words below it, also its alternative text.
    """

    png: bytes
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.png.startswith(PNG_SIGNATURE):
            raise ValueError("Picture.png must hold the bytes of a PNG file; see from_array")

    @classmethod
    def from_array(cls, pixels: np.ndarray, caption: str = "") -> Self:
        """Encodes ``pixels``, uint8 ``[H, W, 3]`` (RGB) or ``[H, W]`` (grey).

        Raises:
            ValueError: ``pixels`` has another dtype or shape.
        """
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or pixels.shape[2:]
            not in (
                (),
                (3,),
            )
        ):
            raise ValueError(
                f"a picture is uint8 [H, W, 3] or [H, W], got {pixels.dtype} {pixels.shape}"
            )
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
        return cls(buffer.getvalue(), caption)


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of text of one kind.

    Attributes:
        text: the words, with the space that follows or precedes them.
        kind: ``hidden`` was hidden from the model, ``right`` and ``wrong`` were hidden and
            predicted so; anything else is ``plain``.
        tooltip: shown on hovering, such as the prediction.
    """

    text: str
    kind: SpanKind = "plain"
    tooltip: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(SpanKind):
            raise ValueError(f"Span.kind is one of {get_args(SpanKind)}, got {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class Card:
    """One example of a gallery.

    Attributes:
        images: pictures side by side, such as the input and what was attended to.
        title: one short line.
        spans: a text whose parts are coloured by kind.
        columns: names of the columns of ``rows``; none for a table without a header.
        rows: a small table, such as hidden word, prediction, probability.
    """

    images: tuple[Picture, ...] = ()
    title: str = ""
    spans: tuple[Span, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        if self.columns:
            _check_rows(self.title, self.columns, self.rows)


@dataclasses.dataclass(frozen=True)
class _Artifact:
    """What every artefact has: a title, a note, the step it was made at, and a file format."""

    FORMAT: ClassVar[str]

    title: str

    def save(self, directory: Path) -> None:
        """Writes this artefact to ``directory``, replacing what was there.

        Pictures are named by their content and written first; renaming the JSON file then switches
        from the old artefact to the new one at once, and only then are old pictures removed.

        Args:
            directory: ``workdir/artifacts/<name>``; created with its parents.
        """
        directory.mkdir(parents=True, exist_ok=True)
        pictures: dict[str, bytes] = {}
        content = {"format": self.FORMAT, **_to_json(self, pictures)}
        for name, png in pictures.items():
            (directory / name).write_bytes(png)
        fresh = directory / (ARTIFACT_FILE + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(directory / ARTIFACT_FILE)
        for path in directory.glob("*.png"):
            if path.name not in pictures:
                path.unlink()


@dataclasses.dataclass(frozen=True)
class Table(_Artifact):
    """Rows of cells under named columns.

    Attributes:
        title: heading.
        columns: names, which also imply the units of the numbers below them.
        rows: one cell per column each.
        note: a sentence below the table.
        highlight: name of a column to emphasise; empty for none.
        step: updates made when it was written.
    """

    FORMAT: ClassVar[str] = "table"

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    highlight: str = ""
    step: int = 0

    def __post_init__(self) -> None:
        _check_rows(self.title, self.columns, self.rows)
        if self.highlight and self.highlight not in self.columns:
            raise ValueError(
                f"table {self.title!r}: highlight={self.highlight!r} is none of {self.columns}"
            )


@dataclasses.dataclass(frozen=True)
class Gallery(_Artifact):
    """Examples to look at, one card each.

    Attributes:
        title: heading.
        cards: the examples.
        note: a sentence below the heading, such as what the colours mean.
        step: updates made when it was written.
    """

    FORMAT: ClassVar[str] = "gallery"

    cards: tuple[Card, ...]
    note: str = ""
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Curve(_Artifact):
    """Lines in one plot.

    Attributes:
        title: heading.
        x_label: what x counts; implies its unit.
        y_label: what y counts; implies its unit.
        series: name of a line to its points (x, y), x ascending.
        note: a sentence below the plot.
        step: updates made when it was written.
    """

    FORMAT: ClassVar[str] = "curve"

    x_label: str
    y_label: str
    series: Mapping[str, tuple[tuple[float, float], ...]]
    note: str = ""
    step: int = 0


Artifact = Table | Gallery | Curve


def load(directory: Path) -> Artifact:
    """Reads the artefact in ``directory``.

    Raises:
        ValueError: `artifact.json` is no artefact, or names a picture that is not there.
    """
    path = directory / ARTIFACT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _READERS[content.pop("format")](content, directory)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{path} is no artefact ({error!r}): remove its folder, or evaluate again"
        ) from error


def load_all(workdir: Path) -> dict[str, Artifact]:
    """Every artefact of a run by name, in alphabetical order; empty without any.

    Raises:
        ValueError: one of them is damaged, see `load`.
    """
    root = workdir / ARTIFACTS_FOLDER
    return {
        path.parent.relative_to(root).as_posix(): load(path.parent)
        for path in sorted(root.rglob(ARTIFACT_FILE))
    }


def _check_rows(title: str, columns: tuple[str, ...], rows: tuple[Row, ...]) -> None:
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"{title!r}: a row has {len(row)} cells, but the columns are {columns}"
            )


def _to_json(value: Any, pictures: dict[str, bytes]) -> Any:
    """``value`` as strict JSON; PNG bytes move to ``pictures`` and leave their file name."""
    if isinstance(value, bytes):
        name = hashlib.sha256(value).hexdigest()[:16] + ".png"
        pictures[name] = value
        return name
    if isinstance(value, np.generic):
        value = value.item()
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _to_json(getattr(value, field.name), pictures) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item, pictures) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(item, pictures) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such numbers, and a bare string would come back as text.
        return {"float": str(value)}
    if isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"an artefact holds text and numbers, got {type(value).__name__}: {value!r}")


def _cell(value: Any) -> Cell:
    return float(value["float"]) if isinstance(value, dict) else value


def _rows(rows: list[list[Any]]) -> tuple[Row, ...]:
    return tuple(tuple(map(_cell, row)) for row in rows)


def _read_picture(content: dict[str, Any], directory: Path) -> Picture:
    name = content["png"]
    if not PICTURE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no picture of this artefact")
    return Picture((directory / name).read_bytes(), content["caption"])


def _read_card(content: dict[str, Any], directory: Path) -> Card:
    return Card(
        images=tuple(_read_picture(image, directory) for image in content["images"]),
        title=content["title"],
        spans=tuple(Span(**span) for span in content["spans"]),
        columns=tuple(content["columns"]),
        rows=_rows(content["rows"]),
    )


def _read_table(content: dict[str, Any], directory: Path) -> Table:
    columns, rows = tuple(content.pop("columns")), _rows(content.pop("rows"))
    return Table(columns=columns, rows=rows, **content)


def _read_gallery(content: dict[str, Any], directory: Path) -> Gallery:
    cards = tuple(_read_card(card, directory) for card in content.pop("cards"))
    return Gallery(cards=cards, **content)


def _read_curve(content: dict[str, Any], directory: Path) -> Curve:
    series = {
        name: tuple((float(_cell(x)), float(_cell(y))) for x, y in points)
        for name, points in content.pop("series").items()
    }
    return Curve(series=series, **content)


_READERS: Mapping[str, Callable[[dict[str, Any], Path], Artifact]] = {
    "table": _read_table,
    "gallery": _read_gallery,
    "curve": _read_curve,
}
