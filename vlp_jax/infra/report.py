"""One self-contained page about a run: `report.html`.

The page is made from what lies in the workdir and needs nothing else: no network, no server, no
plotting library. It knows nothing of the field. Metrics are grouped by the parts of their names
(``train/``, ``speed/``, ``memory/``, ``compile/``; any other first part is an evaluator), and the
last word that tells what is measured (loss, accuracy, gap, ...) decides which lines share a chart.

Files it reads, each of them optional as long as one of the first three is there:

- ``config.json``: the configuration, a nested dict.
- ``metrics.jsonl``: see `vlp_jax.infra.metrics`.
- ``run.json``: facts of the run. The keys ``name``, ``status``, ``step``, ``total_steps``,
  ``start``, ``end`` (ISO 8601), ``device``, ``device_count``, ``command`` and ``versions`` have
  their place on the page; any other scalar is listed, any other dict or list of rows becomes a
  table under its key.
- ``artifacts/``: tables, galleries and curves, see `vlp_jax.infra.artifacts`.
"""

import base64
import dataclasses
import datetime
import json
import math
import os
import re
import shlex
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from vlp_jax.infra import artifacts, charts, metrics, units
from vlp_jax.infra.charts import Bar, Chart, Series

REPORT_FILE = "report.html"
CONFIG_FILE = "config.json"
RUN_FILE = "run.json"

# First parts of metric names that the train loop writes; any other is an evaluator. Those of
# ``data`` (the fingerprint of a batch) are for comparing runs, and nothing to look at.
LOOP_GROUPS = ("train", "data", "speed", "memory", "compile")
# Words whose metrics share one chart per group; others are drawn alone, as their scales differ.
SHARED_WORDS = ("gap", "accuracy", "loss", "perplexity", "precision", "recall")
# Words drawn in the chart of another as a reference: an entropy is a loss that needs no model.
REFERENCES: Mapping[str, str] = {"entropy": "loss"}
REFERENCE_COLOUR = 5  # grey
TOTAL = "total"  # what a loss without a name of its own is called
# The order of charts: these words first, then as logged.
CHART_ORDER: Mapping[str, tuple[str, ...]] = {
    "train": ("loss", "accuracy", "norm"),
    "evaluator": SHARED_WORDS,
}
# Names on the first screen, the loss before the evaluators and the others after them.
HEADLINES: Mapping[str, str] = {
    "train/loss": "Training loss",
    "speed/samples_per_second": "Throughput",
    "speed/mfu": "Model FLOPs utilisation",
    "memory/peak_bytes": "Peak memory",
}
EVALUATOR_HEADLINES = 3  # headline numbers per evaluator

# Words of names that read better written out, or in capitals.
SPELLINGS: Mapping[str, str] = {
    "bytes": "memory",
    "ema": "EMA",
    "flops": "FLOPs",
    "grad": "gradient",
    "mfu": "MFU",
    "param": "parameter",
    "tflops": "throughput",
}

# Keys of run.json with a place of their own on the page.
PLACED_FACTS = frozenset(
    {"name", "status", "step", "total_steps", "start", "end", "device", "device_count"}
    | {"device_kind", "command", "versions", "compile_seconds"}
)

INLINE_FACTS = 6  # a dict of at most as many scalars is told in one line

History = dict[str, list[tuple[float, float]]]


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


def write_report(workdir: Path) -> Path:
    """Writes ``workdir/report.html`` from what the run has left so far.

    A piece that is missing or damaged leaves a short note on the page in its place.

    Args:
        workdir: folder of a run, finished or not.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: ``workdir`` holds no run.
    """
    names = (CONFIG_FILE, metrics.METRICS_FILE, RUN_FILE)
    if not any((workdir / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{workdir} is no run: it holds none of {', '.join(names)}; "
            "give the folder that was passed to the trainer as --workdir"
        )
    page = _render(workdir)
    path = workdir / REPORT_FILE
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)
    return path


def _render(workdir: Path) -> str:
    problems: list[str] = []
    run = _read_json(workdir / RUN_FILE, problems)
    config = _read_json(workdir / CONFIG_FILE, problems)
    history = _read_history(workdir, problems)
    sections = [
        _training(history),
        *_evaluators(history),
        *_artifacts(workdir, problems),
        _speed(history),
        _facts(run),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = Path(__file__).parent
    return environment.get_template("report_template.html").render(
        name=str(run.get("name") or workdir.resolve().name),
        status=str(run.get("status") or ""),
        subtitle=_subtitle(run, history),
        problems=problems,
        headlines=_headlines(history),
        sections=sections,
        config=_flatten(config),
        command=_command(run),
        versions=_pairs(run.get("versions")),
        extent=charts.EXTENT,
        style=markupsafe.Markup((here / "report.css").read_text(encoding="utf-8")),
        script=markupsafe.Markup((here / "report.js").read_text(encoding="utf-8")),
    )


# Reading


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in ``path``; empty, with a line in ``problems``, if there is none."""
    if not path.is_file():
        problems.append(f"{path.name} is missing, so what it tells is left out.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} is damaged ({error}), so what it tells is left out.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no object, so what it tells is left out.")
        return {}
    return content


def _read_history(workdir: Path, problems: list[str]) -> History:
    """The points (step, value) of every metric, in the order in which they first appear."""
    try:
        records = metrics.read_metrics(workdir)
    except ValueError as error:
        problems.append(f"The curves are left out: {error}.")
        return {}
    values: dict[str, dict[float, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step":
                values.setdefault(name, {})[record["step"]] = value
    return {name: sorted(points.items()) for name, points in values.items()}


# The first screen


def _subtitle(run: Mapping[str, Any], history: History) -> tuple[str, ...]:
    parts = []
    device = run.get("device") or run.get("device_kind")
    if device:
        count = run.get("device_count") or 1
        parts.append(f"{count} × {device}" if count != 1 else str(device))
    last_steps = [points[-1][0] for points in history.values()]
    if isinstance(run.get("step"), int):
        last_steps.append(run["step"])
    if last_steps:
        total = run.get("total_steps")
        of_total = f" of {total:,}" if isinstance(total, int) else ""
        parts.append(f"step {max(last_steps):,}{of_total}")
    start, end = _time(run.get("start")), _time(run.get("end"))
    if start and end and (start.tzinfo is None) == (end.tzinfo is None):
        parts.append(units.format_seconds((end - start).total_seconds()))
    moment = end or start
    if moment:
        parts.append(f"{'ended' if end else 'started'} {moment:%-d %B %Y, %H:%M}")
    return tuple(parts)


def _time(text: object) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None


def _headlines(history: History) -> tuple[Headline, ...]:
    """Loss, the shallowest numbers of each evaluator, then speed and memory."""
    first, *others = HEADLINES
    names = [first]
    for group in _evaluator_groups(history):
        members = [
            name
            for name in history
            if name.split("/", 1)[0] == group and units.unit_word(name) not in REFERENCES
        ]
        if not members:
            continue
        ranked = sorted(members, key=lambda name: (name.count("/"), _rank("evaluator", name)))
        shallow = [name for name in ranked if name.count("/") == ranked[0].count("/")]
        names += shallow[:EVALUATOR_HEADLINES]
    names += others
    shown = [name for name in names if name in history]
    return tuple(
        _headline(name, HEADLINES.get(name) or _headline_label(name, shown), history[name])
        for name in shown
    )


def _headline(name: str, label: str, points: charts.Points) -> Headline:
    number, _, unit = units.format_value(name, points[-1][1]).partition(" ")
    if units.unit_of(name) == "seconds":
        number, unit = f"{number} {unit}", ""
    return Headline(label, number, unit, charts.sparkline(points))


def _headline_label(name: str, shown: Sequence[str]) -> str:
    """What an evaluator's metric is called, with the evaluator's name where that is not clear."""
    rest = name.partition("/")[2]
    unclear = rest in ("", units.unit_word(name))
    shared = sum(other.partition("/")[2] == rest for other in shown) > 1
    return _words(name if unclear or shared else rest)


# Sections made of metrics


def _training(history: History) -> Section:
    names = [name for name in history if name.startswith("train/")]
    if not names:
        return Section("training", "Training", notes=("No training metrics were logged.",))
    drawn, constant = _split_constant(names, history)
    return Section(
        "training",
        "Training",
        charts=metric_charts("train", drawn, history),
        facts=_constant_facts(constant, history),
    )


def _evaluators(history: History) -> list[Section]:
    sections = []
    for group in _evaluator_groups(history):
        names = [name for name in history if name.split("/", 1)[0] == group]
        sections.append(
            Section(
                anchor=f"eval-{_anchor(group)}",
                title=_words(group),
                charts=metric_charts("evaluator", names, history),
                bars=_breakdowns(names, history),
                tables=_matrix(names, history),
            )
        )
    if not sections:
        note = "No evaluator has run yet."
        sections.append(Section("evaluation", "Evaluation", notes=(note,)))
    return sections


def _speed(history: History) -> Section:
    names = [name for name in history if name.startswith(("speed/", "memory/"))]
    compiled = [name for name in history if name.startswith("compile/")]
    if not names and not compiled:
        note = "Neither speed nor memory was logged."
        return Section("speed", "Speed and memory", notes=(note,))
    drawn, constant = _split_constant(names, history)
    values = [(_lower_words(name.rsplit("/", 1)[-1]), history[name][-1][1]) for name in compiled]
    title = "Compilation per bucket"
    return Section(
        "speed",
        "Speed and memory",
        charts=metric_charts("speed", drawn, history),
        bars=(BarsView(title, charts.bars(compiled[0], values)),) if compiled else (),
        facts=_constant_facts(constant, history),
    )


def _evaluator_groups(history: History) -> list[str]:
    groups = dict.fromkeys(name.split("/", 1)[0] for name in history)
    return [group for group in groups if group not in LOOP_GROUPS]


def _split_constant(names: Sequence[str], history: History) -> tuple[list[str], list[str]]:
    """Metrics worth a line, and those that never changed and are told in words."""
    constant = [
        name
        for name in names
        if len(history[name]) > 1 and len({value for _, value in history[name]}) == 1
    ]
    return [name for name in names if name not in constant], constant


def _constant_facts(names: Sequence[str], history: History) -> tuple[tuple[str, str], ...]:
    return tuple(
        (
            _words(name.split("/", 1)[-1]),
            f"{units.format_value(name, history[name][0][1])} throughout",
        )
        for name in names
    )


def metric_charts(order: str, names: Sequence[str], history: History) -> tuple[Chart, ...]:
    """The charts of one group of metrics; those with the same shared word are one chart."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        if any(math.isfinite(value) for _, value in history[name]):
            word = REFERENCES.get(units.unit_word(name), units.unit_word(name))
            grouped.setdefault(word if word in SHARED_WORDS else name, []).append(name)
    ordered = sorted(
        grouped.values(), key=lambda members: min(_rank(order, name) for name in members)
    )
    return tuple(_chart(members, history) for members in ordered)


def _rank(order: str, name: str) -> int:
    words = CHART_ORDER.get(order, ())
    word = units.unit_word(name)
    return words.index(word) if word in words else len(words)


def _chart(names: Sequence[str], history: History) -> Chart:
    """One chart; a metric named like another plus ``_suffix`` is its dashed variant."""
    if len(names) == 1:
        title = _words(names[0].split("/", 1)[-1])
        return charts.line_chart(title, names[0], [Series("", history[names[0]])])
    # Wholes before their parts, references last, whatever the order in which they were logged.
    names = sorted(names, key=lambda name: (units.unit_word(name) in REFERENCES, name.count("/")))
    word = units.unit_word(names[0])
    title, labels = _title_and_labels(names, word)
    colours: dict[str, int] = {}
    series: list[Series] = []
    for name, label in zip(names, labels, strict=True):
        original = next((other for other in names if name.startswith(other + "_")), name)
        colour = colours.setdefault(original, len(colours))
        reference = units.unit_word(name) != word
        if series and series[0].label == TOTAL and series[0].points == history[name]:
            continue  # the only loss of a run is its total
        series.append(
            Series(
                label,
                history[name],
                REFERENCE_COLOUR if reference else colour,
                dashed=reference or original != name,
            )
        )
    return charts.line_chart(title, names[0], series)


def _title_and_labels(names: Sequence[str], word: str) -> tuple[str, list[str]]:
    """What the metrics of a chart have in common, and what tells them apart."""
    parts_of = [name.split("/")[1:] or [name] for name in names]
    measured = {part for parts in parts_of for part in parts if units.unit_word(part) == word}
    whole = measured.pop() if len(measured) == 1 else word
    labels = []
    for parts in parts_of:
        rest = ["" if part == whole else _without_word(part, word) for part in parts]
        labels.append(" · ".join(filter(None, rest)) or (TOTAL if word == "loss" else "overall"))
    return _words(whole), labels


def _without_word(part: str, word: str) -> str:
    """``part`` as words, without the word that all lines of the chart have in common."""
    return " ".join(piece for piece in part.split("_") if piece != word)


def _breakdowns(names: Sequence[str], history: History) -> tuple[BarsView, ...]:
    """Bars for metrics that are split by class: ``a/gap`` with ``a/gap/colour``, ``a/gap/size``."""
    views = []
    for parent in names:
        children = [name for name in names if name.startswith(parent + "/")]
        if not children:
            continue
        parts = [
            (_lower_words(name.removeprefix(parent + "/")), history[name][-1][1])
            for name in children
        ]
        parts.sort(key=lambda part: part[1], reverse=True)
        values = [("overall", history[parent][-1][1]), *parts]
        title = f"{_words(parent.split('/', 1)[-1])} by class, step {history[parent][-1][0]:,}"
        views.append(BarsView(title, charts.bars(parent, values)))
    return tuple(views)


def _matrix(names: Sequence[str], history: History) -> tuple[TableView, ...]:
    """Last values of ``group/case/measure`` as a table of cases by measures."""
    cells: dict[tuple[str, str], str] = {}
    for name in names:
        *parts, measure = name.split("/")[1:] or [name]
        if parts and units.unit_word(measure):
            cells["/".join(parts), measure] = name
    if len(cells) < 2:
        return ()
    cases = dict.fromkeys(case for case, _ in cells)
    measures = sorted(
        dict.fromkeys(measure for _, measure in cells), key=lambda name: _rank("evaluator", name)
    )
    rows = []
    for case in cases:
        named = (cells.get((case, measure)) for measure in measures)
        values = (history[name][-1][1] if name else "–" for name in named)
        rows.append((_lower_words(case), *values))
    last_step = max(history[name][-1][0] for name in cells.values())
    return (_table(f"Last values, step {last_step:,}", ("", *measures), rows),)


# Sections made of artefacts


def _artifacts(workdir: Path, problems: list[str]) -> list[Section]:
    root = workdir / artifacts.ARTIFACTS_FOLDER
    sections = []
    for path in sorted(root.rglob(artifacts.ARTIFACT_FILE)):
        name = path.parent.relative_to(root).as_posix()
        try:
            artifact = artifacts.load(path.parent)
        except ValueError as error:
            problems.append(f"The artefact {name} is left out: {error}.")
            continue
        sections.append(_artifact(f"artifact-{_anchor(name)}", artifact))
    # Pictures first: they say most at a glance.
    return sorted(sections, key=lambda section: not section.cards)


def _artifact(anchor: str, artifact: artifacts.Artifact) -> Section:
    made = f"Step {artifact.step:,}." if artifact.step else ""
    notes = tuple(filter(None, (f"{artifact.note} {made}".strip(),)))
    if isinstance(artifact, artifacts.Gallery):
        cards = tuple(map(_card, artifact.cards))
        return Section(anchor, artifact.title, notes=notes, cards=cards)
    if isinstance(artifact, artifacts.Table):
        table = _table("", artifact.columns, artifact.rows, artifact.highlight)
        return Section(anchor, artifact.title, notes=notes, tables=(table,))
    series = []
    for colour, (label, points) in enumerate(artifact.series.items()):
        drawable = [(x, y) for x, y in points if math.isfinite(x)]
        if any(math.isfinite(y) for _, y in drawable):
            series.append(Series(label, drawable, colour))
    if not series:
        return Section(anchor, artifact.title, notes=(*notes, "This plot has no points."))
    chart = charts.line_chart(_words(artifact.y_label), artifact.y_label, series, artifact.x_label)
    return Section(anchor, artifact.title, notes=notes, charts=(chart,))


def _card(card: artifacts.Card) -> CardView:
    return CardView(
        title=card.title,
        images=tuple(map(_image, card.images)),
        spans=card.spans,
        table=_table("", card.columns, card.rows, with_bars=True),
    )


def _image(picture: artifacts.Picture) -> ImageView:
    # A PNG file starts with its signature (8 bytes), then length and name of the header (8 bytes),
    # then width and height.
    width, height = struct.unpack(">II", picture.png[16:24])
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode("ascii")
    return ImageView(source, picture.caption, width, height)


# Facts


def _facts(run: Mapping[str, Any]) -> Section:
    """What run.json tells beyond what has its place elsewhere."""
    others = {key: value for key, value in run.items() if key not in PLACED_FACTS}
    facts, tables = [], []
    for key, value in others.items():
        if isinstance(value, dict) and len(value) > INLINE_FACTS:
            rows = [(str(item), _plain(number)) for item, number in value.items()]
            tables.append(_table(_words(key), ("", "value"), rows))
        elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            tables.append(_fact_table(key, value))
        elif value not in ("", None, [], {}):
            facts.append((_words(key), _fact(key, value)))
    notes = () if facts or tables else ("No facts about the run were recorded.",)
    return Section("run", "Model and data", notes=notes, tables=tuple(tables), facts=tuple(facts))


def _fact_table(key: str, rows: Sequence[Any]) -> TableView:
    """A list of dicts, or of lists of which the first may be a header, as a table."""
    if all(isinstance(row, dict) for row in rows):
        columns = tuple(dict.fromkeys(str(name) for row in rows for name in row))
        cells = tuple(tuple(_plain(row.get(name, "–")) for name in columns) for row in rows)
        return _table(_words(key), columns, cells)
    lists = [row if isinstance(row, list) else [row] for row in rows]
    width = max(map(len, lists))
    padded = [tuple(_plain(cell) for cell in row) + ("",) * (width - len(row)) for row in lists]
    if all(isinstance(cell, str) for cell in padded[0]):
        return _table(_words(key), tuple(map(str, padded[0])), tuple(padded[1:]))
    return _table(_words(key), ("",) * width, tuple(padded))


def _plain(value: Any) -> artifacts.Cell:
    """``value`` as a table cell; what is no scalar as JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False)


def _fact(key: str, value: Any) -> str:
    cell = _plain(value)
    return cell if isinstance(cell, str) else units.format_value(key, cell)


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        return ()
    return tuple((str(key), str(_plain(item))) for key, item in value.items())


def _command(run: Mapping[str, Any]) -> str:
    command = run.get("command") or ""
    if isinstance(command, list):
        return shlex.join(map(str, command))
    return str(command)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> tuple[tuple[str, str], ...]:
    """Dotted keys and their values as JSON, in the order of the file."""
    pairs: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return tuple(pairs)


# Tables and words


def _table(
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
            CellView(_words(name), numeric[index], bool(name) and name == highlight)
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


def _lower_words(name: str) -> str:
    """A name as words: ``grad_norm`` as ``gradient norm``, ``speed/mfu`` as ``speed · MFU``."""
    words = name.replace("/", " · ").replace("_", " ").split(" ")
    return " ".join(SPELLINGS.get(word, word) for word in words)


def _words(name: str) -> str:
    """`_lower_words` with a capital first letter."""
    words = _lower_words(name)
    return words[:1].upper() + words[1:]


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
