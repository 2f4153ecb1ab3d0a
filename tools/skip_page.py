"""The page of ``tools.skip_report``: its sections, and the table for the terminal."""

import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import rich
import rich.table

from tools.searched import SearchRun
from vlp_jax.infra import charts, units
from vlp_jax.infra.charts import Chart, Series
from vlp_jax.infra.files import write_text
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.report import write_page
from vlp_jax.infra.report.from_facts import as_pairs, flat_config
from vlp_jax.infra.report.views import BarsView, Headline, Section, TableView, table_view
from vlp_jax.infra.report.words import as_title

PAGE, NUMBERS = "skip_report.html", "skip_report.json"
NETWORKS = ("full", "pruned")
_CHOICE_KEYS = ("skipped", "flops_saved")  # of by_count; the others are figures


def write(numbers: Mapping[str, Any], run: SearchRun, out: pathlib.Path) -> pathlib.Path:
    """Write page and numbers; gives the path of the page.

    Args:
        numbers: of ``numbers_of``.
        run: of the search.
        out: folder, made if absent.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / NUMBERS, json.dumps(numbers, indent=1) + "\n")
    facts = device_facts()
    return write_page(
        out / PAGE,
        f"{run.facts.get('name') or run.workdir.resolve().name}: units skipped",
        [
            _chosen_section(numbers),
            _saved_section(numbers),
            _learned_section(numbers),
            _count_section(numbers),
        ],
        subtitle=(
            f"search by {numbers['method']}, reward {numbers['reward']}",
            f"{numbers['step']:,} updates, compared on {numbers['split']}",
        ),
        headlines=_headlines(numbers),
        config=flat_config(run.config),
        command=shlex.join(["python", "-m", "tools.skip_report", str(run.workdir)]),
        versions=as_pairs(facts["versions"]),
    )


def _headlines(numbers: Mapping[str, Any]) -> list[Headline]:
    parameters, counts = numbers["parameters"], [one["loss"] for one in numbers["by_count"]]
    fewer = 1 - parameters["pruned"] / parameters["full"]
    line = charts.sparkline(list(enumerate(counts)))
    found = [
        Headline("Units skipped", f"{len(numbers['skipped'])}", f"of {len(numbers['units'])}", ""),
        Headline("Forward FLOPs saved", f"{100 * _saved(numbers['forward_flops']):.1f}", "%", ""),
        Headline("Parameters saved", f"{100 * fewer:.1f}", "%", ""),
    ]
    for row in _latency_rows(numbers):
        if row[3]:
            label = f"Time saved, {row[0]}, {row[1]}"
            share = f"{100 * (1 - row[3] / row[2]):.1f}".replace("-", "−")
            found.append(Headline(label, share, "%", ""))
    return [*found, Headline("Loss by units skipped", f"{min(counts):.4f}", "at best", line)]


def _chosen_section(numbers: Mapping[str, Any]) -> Section:
    """The pattern, and every unit."""
    kept = "Harm: what a unit's absence adds to the loss, as the search has estimated it."
    if numbers["reward"] == "paper":
        kept = "Harm: minus the preference of the paper's bandit, which has no error."
    elif numbers["method"] == "random":
        kept = "Harm: a rank drawn by the seed, for the choice is random."
    elif numbers["method"] == "similarity":
        kept = "Harm: 1 less the cosine of what enters and what leaves a unit."
    elif numbers["method"] == "greedy":
        kept = "Harm: what a unit's absence alone adds to the loss."
    elif any(one["expected"] for one in numbers["units"]):
        kept += " Of it expected: by how much a unit changes what it reads (search.prior)."
    worst = [(one["unit"], one["harm"]) for one in numbers["units"]]
    return Section(
        "chosen",
        "What was chosen",
        notes=(f"Skipped: {', '.join(numbers['skipped'])}.", kept),
        bars=(BarsView("Harm of each unit", charts.bars("harm", worst)),),
        tables=(_pattern(numbers), *_stack_tables(numbers)),
    )


def _pattern(numbers: Mapping[str, Any]) -> TableView:
    """Stacks by layers: what is kept and what is not."""
    rows: dict[tuple[str, str], dict[int, bool]] = {}
    for one in numbers["units"]:
        rows.setdefault((one["stack"], one["part"]), {})[one["layer"]] = one["kept"]
    layers = sorted({layer for row in rows.values() for layer in row})
    signs = {True: "■ kept", False: "□ skipped", None: "·"}
    return table_view(
        "Pattern: stacks by layers",
        ("stack", *(f"{layer}" for layer in layers)),
        [
            (
                stack if part == "block" else f"{stack}, {part}",
                *(signs[row.get(layer)] for layer in layers),
            )
            for (stack, part), row in rows.items()
        ],
    )


def _stack_tables(numbers: Mapping[str, Any]) -> list[TableView]:
    stacks = dict.fromkeys(one["stack"] for one in numbers["units"])
    return [
        table_view(
            stack,
            ("unit", "", "harm", "of it expected", "standard error", "flops_share"),
            [
                (
                    one["unit"].removeprefix(stack).lstrip("_/"),
                    "kept" if one["kept"] else "skipped",
                    f"{one['harm']:+.4f}".replace("-", "−"),
                    f"{one['expected']:+.4f}" if one["expected"] else "–",
                    "–" if one["error"] is None else f"{one['error']:.4f}",
                    float(one["flops_share"]),
                )
                for one in numbers["units"]
                if one["stack"] == stack
            ],
        )
        for stack in stacks
    ]


def _saved_section(numbers: Mapping[str, Any]) -> Section:
    """Full beside pruned."""
    rows: list[tuple[str, ...]] = []
    for key, label in (("parameters", "parameters"), ("forward_flops", "forward FLOPs, example")):
        of = numbers[key]
        rows.append((label, *(f"{of[name]:,.0f}" for name in NETWORKS), f"{-_saved(of):+.1%}"))
    for device, count, full, less in _latency_rows(numbers):
        change = f"{less / full - 1:+.1%}" if less else "–"
        rows.append((f"ms, {device}, {count}", _ms(full), _ms(less), change))
    notes = ["Both networks are tuned; neither has switches."]
    for device, measured in numbers["latency"].items():
        if "absent" in measured:
            notes.append(f"Not measured on an accelerator: {measured['absent']}.")
        else:
            lengths = ", ".join(f"{n} tokens" for n in measured["text_length"].values())
            notes.append(
                f"Forward pass on the {device} ({measured['device']}): median of "
                f"{measured['repeats']} passes of each in turns, {lengths}."
            )
    bars = tuple(
        BarsView(f"Forward pass, {device}, {count}", _bars_ms(full, less))
        for device, count, full, less in _latency_rows(numbers)
        if less
    )
    rows = [tuple(cell.replace("-", "−") for cell in row) for row in rows]
    table = table_view("", ("", *NETWORKS, "change"), rows)
    return Section("saved", "What it saves", notes=tuple(notes), bars=bars, tables=(table,))


def _bars_ms(full: float, less: float) -> tuple[charts.Bar, ...]:
    """Milliseconds, which seconds of the page's units would round."""
    most = max(full, less)
    given = zip(NETWORKS, (full, less), strict=True)
    return tuple(charts.Bar(name, f"{_ms(ms)} ms", 100 * ms / most, False) for name, ms in given)


def _learned_section(numbers: Mapping[str, Any]) -> Section:
    """Preferences and harms over the search."""
    history = numbers["history"]
    if not history:
        note = f"The method {numbers['method']} learns nothing as the search goes."
        return Section("learned", "How it came about", notes=(note,))
    drawn = [
        _learned_chart(numbers, kind, stack, part)
        for kind in history
        for stack, part in _groups(numbers)
    ]
    notes = (
        "The higher its preference, the rather a unit is skipped. Dashed: what is kept at last.",
    )
    return Section("learned", "How it came about", notes=notes, charts=tuple(drawn))


def _groups(numbers: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Stacks with their units, as many at a time as there are colours."""
    found: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for stack in dict.fromkeys(one["stack"] for one in numbers["units"]):
        mine = [one for one in numbers["units"] if one["stack"] == stack]
        parts = range(0, len(mine), charts.COLOURS)
        found += [(stack, mine[start : start + charts.COLOURS]) for start in parts]
    return found


def _learned_chart(
    numbers: Mapping[str, Any], kind: str, stack: str, members: Sequence[Mapping[str, Any]]
) -> Chart:
    series = [
        Series(
            one["unit"].removeprefix(stack).lstrip("_/"),
            numbers["history"][kind][one["unit"]],
            colour,
            dashed=one["kept"],
        )
        for colour, one in enumerate(members)
    ]
    return charts.line_chart(f"{as_title(kind)}: {stack}", kind, series)


def _count_section(numbers: Mapping[str, Any]) -> Section:
    """Figures of the choices of 0, 1, ... units."""
    rows = numbers["by_count"]
    names = [name for name in rows[0] if name not in _CHOICE_KEYS]
    drawn = [
        charts.line_chart(
            as_title(name),
            name,
            [Series("", [(float(n), row[name]) for n, row in enumerate(rows)])],
            x_label="units skipped",
        )
        for name in names
    ]
    table = table_view(
        "",
        ("units", "skipped last", "flops_share", *names),
        [
            (
                len(row["skipped"]),
                _last(rows, number),
                float(row["flops_saved"]),
                *(float(row[name]) for name in names),
            )
            for number, row in enumerate(rows)
        ],
    )
    note = (
        f"Of the network of the search, on its last batches of {numbers['split']}; units in the "
        "order in which they would be skipped."
    )
    return Section(
        "count", "By number of units", notes=(note,), charts=tuple(drawn), tables=(table,)
    )


def _last(rows: Sequence[Mapping[str, Any]], number: int) -> str:
    """What a choice skips beyond the one before it."""
    before = rows[number - 1]["skipped"] if number else []
    return ", ".join(unit for unit in rows[number]["skipped"] if unit not in before) or "–"


def _latency_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """Device, batch, and milliseconds of full and pruned; 0 where there is no such device."""
    found = []
    for device, measured in numbers["latency"].items():
        if "absent" in measured:
            found.append((device, "not measured", 0.0, 0.0))
            continue
        for count, of in measured["ms"].items():
            found.append((device, f"batch {count}", of["full"], of["pruned"]))
    return found


def _saved(of: Mapping[str, float]) -> float:
    return 1.0 - of["pruned"] / of["full"]


def _ms(value: float) -> str:
    return units.format_number(float(f"{value:.4g}")) if value else "–"


def table(numbers: Mapping[str, Any]) -> rich.table.Table:
    """Full beside pruned, for the terminal."""
    title = f"skipped: {', '.join(numbers['skipped'])}"
    shown = rich.table.Table("", title=title, caption=_caption(numbers))
    for head in (*NETWORKS, "change"):
        shown.add_column(head, justify="right")
    for key in ("parameters", "forward_flops"):
        of = numbers[key]
        shown.add_row(
            key.replace("_", " "),
            *(f"{of[name]:,.0f}" for name in NETWORKS),
            f"{-100 * _saved(of):+.1f} %",
        )
    for device, count, full, less in _latency_rows(numbers):
        change = f"{100 * (less / full - 1):+.1f} %" if less else "–"
        shown.add_row(f"ms, {device}, {count}", _ms(full), _ms(less), change)
    losses = [numbers["by_count"][n]["loss"] for n in (0, len(numbers["skipped"]))]
    change = f"{losses[1] - losses[0]:+.4f}"
    shown.add_row("loss in the search", *(f"{loss:.4f}" for loss in losses), change)
    return shown


def _caption(numbers: Mapping[str, Any]) -> str | None:
    absent = numbers["latency"]["accelerator"].get("absent")
    return f"no accelerator: {absent}" if absent else None
