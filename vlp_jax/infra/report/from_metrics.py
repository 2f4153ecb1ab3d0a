"""Headlines and sections made of metrics: training, evaluators, speed and memory."""

import math
from collections.abc import Mapping, Sequence

from vlp_jax.infra import charts, units
from vlp_jax.infra.charts import Chart, Series
from vlp_jax.infra.report.views import BarsView, Headline, Section, TableView, table_view
from vlp_jax.infra.report.words import as_anchor, as_title, as_words

# First parts of metric names that the train loop writes; any other is an evaluator. Those of
# ``data`` (the fingerprint of a batch) are for comparing runs, and nothing to look at.
LOOP_GROUPS = ("train", "data", "speed", "memory", "compile", "compression")
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

# Name of a metric -> its (step, value), steps ascending.
History = dict[str, list[tuple[float, float]]]


def headlines(history: History) -> tuple[Headline, ...]:
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
    return as_title(name if unclear or shared else rest)


def training_section(history: History) -> Section:
    """Charts of ``train/``, and what never changed in words."""
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


def compression_section(history: History) -> Section | None:
    """What updates encoded and cost over the run; None where they encoded whole images."""
    names = [name for name in history if name.startswith("compression/")]
    if not names:
        return None
    return Section(
        "compression",
        "Compression",
        notes=(
            "What the logged updates encoded of an image and cost, as a share of an update of "
            "whole images, and how much of the budget was spent.",
        ),
        charts=metric_charts("compression", names, history),
    )


def evaluator_sections(history: History) -> list[Section]:
    """A section for each evaluator, with charts, bars by class and a table of last values."""
    sections = []
    for group in _evaluator_groups(history):
        names = [name for name in history if name.split("/", 1)[0] == group]
        sections.append(
            Section(
                anchor=f"eval-{as_anchor(group)}",
                title=as_title(group),
                charts=metric_charts("evaluator", names, history),
                bars=_breakdowns(names, history),
                tables=_matrix(names, history),
            )
        )
    if not sections:
        note = "No evaluator has run yet."
        sections.append(Section("evaluation", "Evaluation", notes=(note,)))
    return sections


def speed_section(history: History) -> Section:
    """Charts of ``speed/`` and ``memory/``, and the compile time of each bucket."""
    names = [name for name in history if name.startswith(("speed/", "memory/"))]
    compiled = [name for name in history if name.startswith("compile/")]
    if not names and not compiled:
        note = "Neither speed nor memory was logged."
        return Section("speed", "Speed and memory", notes=(note,))
    drawn, constant = _split_constant(names, history)
    values = [(as_words(name.rsplit("/", 1)[-1]), history[name][-1][1]) for name in compiled]
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
            as_title(name.split("/", 1)[-1]),
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
        title = as_title(names[0].split("/", 1)[-1])
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
    return as_title(whole), labels


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
            (as_words(name.removeprefix(parent + "/")), history[name][-1][1]) for name in children
        ]
        parts.sort(key=lambda part: part[1], reverse=True)
        values = [("overall", history[parent][-1][1]), *parts]
        title = f"{as_title(parent.split('/', 1)[-1])} by class, step {history[parent][-1][0]:,}"
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
        rows.append((as_words(case), *values))
    last_step = max(history[name][-1][0] for name in cells.values())
    return (table_view(f"Last values, step {last_step:,}", ("", *measures), rows),)
