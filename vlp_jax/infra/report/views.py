"""What the template draws, and how tables and gallery cards become it."""

import base64
import dataclasses
import math
import struct
from collections.abc import Sequence

from vlp_jax.infra import artifacts, units
from vlp_jax.infra.charts import Bar, Chart
from vlp_jax.infra.report.words import as_title


@dataclasses.dataclass(frozen=True)
class Headline:
    """A number of the first screen, with its unit apart and a small picture of its past."""

    label: str
    number: str
    unit: str
    sparkline: str


@dataclasses.dataclass(frozen=True)
class CellView:
    """A table cell as shown; ``share`` is the width of a bar in percent, if it has one."""

    text: str
    numeric: bool
    highlight: bool = False
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class TableView:
    """A table as shown."""

    title: str
    columns: tuple[CellView, ...]
    rows: tuple[tuple[CellView, ...], ...]


@dataclasses.dataclass(frozen=True)
class BarsView:
    """Labelled bars under a heading."""

    title: str
    bars: tuple[Bar, ...]


@dataclasses.dataclass(frozen=True)
class ImageView:
    """A picture as a data address, with its size in pixels."""

    source: str
    caption: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class CardView:
    """A gallery card as shown."""

    title: str
    images: tuple[ImageView, ...]
    spans: tuple[artifacts.Span, ...]
    table: TableView


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out.

    Attributes:
        anchor: identity within the page.
        title: heading.
        notes: sentences below the heading.
        charts: line charts, two abreast where there is room.
        bars: labelled bars, beside the charts.
        tables: tables below them.
        cards: gallery cards.
        facts: (name, value) pairs.
    """

    anchor: str
    title: str
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    bars: tuple[BarsView, ...] = ()
    tables: tuple[TableView, ...] = ()
    cards: tuple[CardView, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


def table_view(
    title: str,
    columns: Sequence[str],
    rows: Sequence[artifacts.Row],
    highlight: str = "",
    *,
    with_bars: bool = False,
) -> TableView:
    """A table as shown: numbers with the unit of their column, aligned on equal digits."""
    count = max([len(columns), *map(len, rows)], default=0)
    names = [*columns, *[""] * (count - len(columns))]
    numeric = [
        any(isinstance(row[index], (int, float)) for row in rows if index < len(row))
        for index in range(count)
    ]
    texts = [_column_texts(name, [row[index] for row in rows]) for index, name in enumerate(names)]
    shares = [
        [_share(name, row[index]) if with_bars else None for row in rows]
        for index, name in enumerate(names)
    ]
    return TableView(
        title=title,
        columns=tuple(
            CellView(as_title(name), numeric[index], bool(name) and name == highlight)
            for index, name in enumerate(names)
        )
        if any(columns)
        else (),
        rows=tuple(
            tuple(
                CellView(
                    texts[index][row],
                    numeric[index],
                    bool(names[index]) and names[index] == highlight,
                    shares[index][row],
                )
                for index in range(count)
            )
            for row in range(len(rows))
        ),
    )


def card_view(card: artifacts.Card) -> CardView:
    """A gallery card as shown, its probabilities with bars."""
    return CardView(
        title=card.title,
        images=tuple(map(_image, card.images)),
        spans=card.spans,
        table=table_view("", card.columns, card.rows, with_bars=True),
    )


def _image(picture: artifacts.Picture) -> ImageView:
    # A PNG file starts with its signature (8 bytes), then length and name of the header (8 bytes),
    # then width and height.
    width, height = struct.unpack(">II", picture.png[16:24])
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode("ascii")
    return ImageView(source, picture.caption, width, height)


def _column_texts(name: str, cells: Sequence[artifacts.Cell]) -> list[str]:
    """The cells of one column; plain floats get equally many digits after the point."""
    floats = [abs(cell) for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    largest = max(floats, default=0.0)
    smallest = min((value for value in floats if value), default=0.0)
    aligned = not units.unit_of(name) and smallest >= 1e-2 and largest < 1e5
    digits = 1 if largest >= 100 else 3
    texts = []
    for cell in cells:
        if isinstance(cell, str):
            texts.append(cell)
        elif aligned and isinstance(cell, float) and math.isfinite(cell):
            texts.append(f"{cell:,.{digits}f}".replace("-", "−"))
        elif isinstance(cell, int):
            texts.append(f"{cell:,}".replace("-", "−"))
        else:
            texts.append(units.format_value(name, cell))
    return texts


def _share(name: str, cell: artifacts.Cell) -> float | None:
    """The width of a bar, for a fraction of one in a column whose name says so."""
    if isinstance(cell, float) and units.unit_of(name) == "percent" and 0 <= cell <= 1:
        return 100 * cell
    return None
