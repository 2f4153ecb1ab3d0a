"""The comparison, or the search, in Markdown: from the JSON beside it and nothing else."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.compare.metrics import MODES
from tools.compare.records import SCRATCH, describe
from vlp_jax.infra import units

Facts = Mapping[str, Any]

NONE = "–"
# Below this share of its own cost the baseline has its score before its end.
_WHOLE = 0.995

_SECONDS_TEXT = (
    "Seconds are updates times the time of an update measured alone: a short run that has the "
    "device to itself measures it over intervals that all hold the same mixture of lengths, after "
    "as long a warm-up, without compiling, evaluating and saving. Where `of the device` is given "
    "it is the time: how long the device is busy with an update, by the trace of an interval; what "
    "is missing to `ms an update`, the median, it waits for the host. How many updates a budget "
    "buys follows from it, and so do the seconds of every cell, whatever else the device does "
    "while the cell is trained. What the cells logged themselves is given for information; it is "
    "larger where several share the device."
)
_SCRATCH_TEXT = (
    "The same fine-tuning from fresh parameters, and from what each config has learned in its "
    "whole budget: mean ± standard deviation over seeds (how many), and in brackets how many "
    "standard deviations that is better than from scratch, by the root mean square of both "
    "deviations. Geometry and kind of tokenizer are those of pretraining; a tokenizer that is no "
    "file is trained on the text of the task."
)
_GROUPS_TEXT = (
    "Accuracy by group after the whole budget of {budget:g} s, mean ± standard deviation over "
    "seeds. The worst gap is that between the best and the worst group of an attribute, in "
    "points, over groups that the evaluator finds large enough."
)


def comparison_page(facts: Facts, picture: str | None) -> str:
    """A page about a comparison, to be committed as it is.

    Args:
        facts: content of ``compare.json``.
        picture: file name of the plot beside the page, if there is one.
    """
    parts = [
        f"# {', '.join(facts['settings']['configs'])}: score against training time",
        _conditions(facts),
        _problems(facts),
    ]
    for metric, times in facts["time_to_score"].items():
        parts += [f"## Time to the score of {times['baseline']}: {metric}", _times(metric, times)]
    if picture:
        parts.append(f"![Score against seconds, samples and FLOPs]({picture})")
    for metric, curves in facts["curves"].items():
        parts += [f"## Score at each budget: {metric}", _curves(metric, curves, facts)]
    if facts["scratch"]:
        parts += ["## What pretraining is worth", _SCRATCH_TEXT, _scratch(facts)]
    if facts["groups"]:
        parts.append("## Scores by group")
        parts.append(_GROUPS_TEXT.format(budget=facts["settings"]["budget_seconds"]))
    for evaluator, rows in facts["groups"].items():
        parts += [f"### {evaluator}", _groups(rows)]
    parts += [
        "## Cost",
        _cost(facts),
        "## Learning rates",
        _rates(facts),
        "## Cells",
        _cells(facts["rows"], facts["settings"]["metrics"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def search_page(facts: Facts) -> str:
    """A page about a search.

    Args:
        facts: content of ``search.json``.
    """
    metric = facts["settings"]["tune_metric"]
    title = _direction(metric, facts["settings"]["tune_mode"])
    parts = [f"# Search by successive halving: {title}", _conditions(facts), _problems(facts)]
    for label, found in facts["search"].items():
        parts.append(f"## {label}")
        if found["best"] is not None:
            words = ", ".join(f"`{key}={value}`" for key, value in found["best"].items())
            parts.append(f"Best: {words}.")
        elif found["complete"]:
            parts.append("No candidate of the last rung counts.")
        else:
            parts.append("Not finished: run the command again.")
        parts.append(_rungs(metric, found["rungs"]))
    parts += ["## Cost", _SECONDS_TEXT]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and the others are right-aligned."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _conditions(facts: Facts) -> str:
    settings, rows = facts["settings"], _all_rows(facts)
    versions = sorted({_words(row["versions"]) for row in rows})
    commits = sorted({row["commit"] for row in rows})
    configs = {**settings["configs"], **settings["finetunes"]}
    lines = [
        f"`{facts['command']}`",
        "",
        f"- machine: {describe(facts['machine'])}, {_words(facts['machine'])}",
        *(f"- versions: {text}" for text in versions),
        f"- commit: {', '.join(commits) or NONE} (+: with changes)",
        f"- written: {facts['written']}",
        f"- configs: {', '.join(f'{label} = `{source}`' for label, source in configs.items())}",
        f"- keys set: {_words(facts['overrides']) or 'none'}",
        *(
            f"- keys set for fine-tuning: {_words(overrides)}"
            for overrides in [facts["finetune_overrides"]]
            if overrides
        ),
        f"- whole budget: {settings['budget_seconds']:g} s of training, without compiling, "
        "evaluating, saving and fine-tuning; every run has a schedule of its own that comes to "
        "its end",
        *(
            f"- configs that are no baseline: up to {share:.3g} of the whole budget"
            for share in [settings["others_until"]]
            if share < 1
        ),
        "- clock: updates times the time of an update measured alone, see Cost",
        f"- metrics: {', '.join(_direction(*metric) for metric in settings['metrics'].items())}",
        f"- seeds: {settings['seeds']}",
    ]
    for label, teachers in settings["teachers"].items():
        lines.append(
            f"- note: {label} learns from evaluations ({', '.join(teachers)}) while it trains; "
            "their time is not in its seconds"
        )
    if len(versions) > 1 or len(commits) > 1:
        lines.append("- note: the cells are of several versions or commits, see the list of cells")
    return "\n".join(lines)


def _problems(facts: Facts) -> str:
    """What a reader must know before the figures."""
    rows, lines = _all_rows(facts), []
    if facts.get("planned", len(rows)) > len(rows):
        lines.append(
            f"{len(rows)} of {facts['planned']} cells are there; run the command again for more"
        )
    for label, reason in facts.get("rejected", {}).items():
        part = ", and it is no baseline" if label in facts["settings"]["baselines"] else ""
        lines.append(f"{label} is rejected, none of its cells counts{part}: {reason}")
    stopped = sum(row["status"] == "stopped" for row in rows)
    if stopped:
        lines.append(f"{stopped} cells are stopped and enter no mean, see the list of cells")
    settings = facts["settings"]
    searched = "search" in facts or len(settings["rates"]) > 1
    if searched and settings["tuned_on_test"]:
        lines.append(
            f"{settings['tune_metric']} has chosen and is of a test split, so that scores there "
            "flatter; choose by one of the validation split (--tune_metric)"
        )
    lines += [f"left out: {reason}" for reason in facts["left_out"]]
    return "\n".join(f"- **{text}**" for text in lines)


def _times(metric: str, times: Facts) -> str:
    rows = []
    for label, by_cost in times["configs"].items():
        seconds = by_cost["seconds"]
        share = seconds["share"]
        rows.append(
            [
                label,
                str(seconds["seeds"]),
                _share(seconds),
                _interval(seconds),
                NONE if seconds["reached"] is None else f"{100 * seconds['reached']:.0f} %",
                NONE if share is None else f"{'≥ ' * seconds['at_most']}{1 / share:.2f} ×",
                _share(by_cost["samples"]),
                _share(by_cost["flops"]),
            ]
        )
    columns = ["config", "seeds", "share of seconds", "90 % interval", "reached in", "faster"]
    own = times["configs"][times["baseline"]]["seconds"]
    saturated = (
        f"**{times['baseline']} itself reaches this score in {_share(own)} of its time: with a "
        "score that hardly rises any more, less time proves nothing. Compare the shares with its "
        "own.**\n\n"
    )
    return (
        f"The score to reach is that of {times['baseline']} after its whole budget, "
        f"{units.format_value(metric, times['score'])} in the mean of its seeds. Between budgets "
        "the mean score is interpolated, linear in the logarithm of the cost, and the first time "
        "it reaches that score counts; beyond the budgets nothing is assumed, and ≤ is the "
        "smallest of them. Seeds: that count at the largest budget. Share: of what the whole "
        "budget of the baseline costs; faster: its inverse for seconds. The interval is from a "
        "bootstrap over the seeds of both, too narrow where they are few; reached in: this share "
        "of its draws.\n\n"
        + (saturated if own["share"] < _WHOLE else "")
        + markdown_table([*columns, "share of samples", "share of FLOPs"], rows)
    )


def _direction(name: str, mode: str) -> str:
    words = {"max": "more is better", "min": "less is better", "show": "shown only"}
    return f"{name} ({words[mode]})"


def _share(cost: Facts) -> str:
    if cost["share"] is None:
        if not cost["is_whole"]:
            return "not yet"
        return f"not in {100 * cost['largest']:.0f} %" if cost["is_shorter"] else "not reached"
    return f"{'≤ ' if cost['at_most'] else ''}{100 * cost['share']:.0f} %"


def _interval(cost: Facts) -> str:
    if cost["reached"] is None:
        return f"{NONE} (one seed)"
    smallest = cost["smallest"]
    ends = [
        _share({**cost, "share": cost[end], "at_most": cost[end] == smallest})
        for end in ("low", "high")
    ]
    return f"{ends[0]} to {ends[1]}" if ends[0] != ends[1] else ends[0]


def _curves(metric: str, curves: Facts, facts: Facts) -> str:
    fractions = facts["settings"]["fractions"]
    budget = facts["settings"]["budget_seconds"]
    rows = []
    for label, points in curves.items():
        at = {point["fraction"]: point for point in points}
        rows.append([label, *(_point(metric, at.get(fraction)) for fraction in fractions)])
    columns = [f"{fraction * budget:.3g} s ({fraction:.3g})" for fraction in fractions]
    return "Mean ± standard deviation over seeds (how many).\n\n" + markdown_table(
        ["config", *columns], rows
    )


def _point(metric: str, point: Facts | None) -> str:
    return NONE if point is None else f"{_mean(metric, point)} ({len(point['seeds'])})"


def _mean(name: str, figure: Facts | None) -> str:
    """Mean ± standard deviation of a figure of this name."""
    if figure is None:
        return NONE
    mean = units.format_value(name, figure["mean"])
    spread = "" if figure["deviation"] is None else f" ± {_spread(name, figure['deviation'])}"
    return f"{mean}{spread}"


def _spread(metric: str, value: float) -> str:
    """A deviation in the unit of its mean."""
    scale = {"percent": 100, "points": 1}.get(units.unit_of(metric))
    if scale:
        return f"{scale * value:.1f}"
    return units.format_number(value)


def _scratch(facts: Facts) -> str:
    lines = []
    for metric, scratch in facts["scratch"].items():
        sign = MODES[facts["settings"]["metrics"][metric]]
        line = [metric, _point(metric, scratch)]
        for points in facts["curves"][metric].values():
            whole = next((point for point in points if point["fraction"] == 1), None)
            text = _point(metric, whole)
            if (
                sign
                and whole
                and whole["deviation"] is not None
                and scratch["deviation"] is not None
            ):
                spread = math.hypot(whole["deviation"], scratch["deviation"]) / math.sqrt(2)
                gain = sign * (whole["mean"] - scratch["mean"])
                text += f" [{gain / spread:+.1f}]".replace("-", "−") if spread else ""
            line.append(text)
        lines.append(line)
    return markdown_table(["metric", SCRATCH, *facts["settings"]["configs"]], lines)


def _groups(rows: Sequence[Facts]) -> str:
    labels = list(dict.fromkeys(label for row in rows for label in row["configs"]))
    lines = []
    for row in rows:
        is_gap = row["value"] is None
        name = "gap" if is_gap else "accuracy"
        lines.append(
            [
                row["attribute"],
                "worst gap" if is_gap else row["value"],
                "" if is_gap else f"{row['examples']:,}",
                *(_mean(name, row["configs"].get(label)) for label in labels),
            ]
        )
    return markdown_table(["by", "group", "examples", *labels], lines)


def _cost(facts: Facts) -> str:
    """What an update costs: alone, and as the cells of a config logged it."""
    lines = []
    for label, calibration in facts["calibrations"].items():
        if calibration is not None:
            rows = [row for row in facts["rows"] if row["config"] == label and row["steps"]]
            low, high = calibration["min_ms"], calibration["max_ms"]
            lines.append(
                [
                    label,
                    f"{calibration['median_ms']:.2f}",
                    f"{low:.2f} to {high:.2f} ({calibration['intervals']})",
                    f"{calibration['device_ms']:.2f}" if calibration["device_ms"] else NONE,
                    f"{100 * calibration['input_wait_fraction']:.2f} %",
                    f"{calibration['compile_seconds']:.1f}",
                    *_cost_of_cells(calibration, rows),
                ]
            )
    columns = [
        "config",
        "ms an update",
        "min to max (intervals)",
        "of the device",
        "input wait",
        "compile s (first)",
    ]
    columns += ["samples/s", "GFLOPs a sample", "ms logged by cells", "fine-tuning s a cell"]
    return f"{_SECONDS_TEXT}\n\n" + markdown_table(columns, lines)


def _cost_of_cells(calibration: Facts, rows: Sequence[Facts]) -> list[str]:
    """The columns of the cost table that only cells can fill."""
    if not rows:
        return [NONE] * 4
    steps, samples, flops = (sum(row[key] for row in rows) for key in ("steps", "samples", "flops"))
    return [
        f"{1e3 * samples / steps / calibration['median_ms']:,.0f}",
        f"{flops / samples / 1e9:.4g}",
        f"{statistics.median(1e3 * row['wall_seconds'] / row['steps'] for row in rows):.2f}",
        f"{statistics.median(row['finetune_seconds'] for row in rows):.1f}",
    ]


def _rates(facts: Facts) -> str:
    settings = facts["settings"]
    fraction, metric = settings["tune_fraction"], settings["tune_metric"]
    best = _direction(metric, settings["tune_mode"])
    lines = []
    for label, rates in facts["rates"].items():
        tried = {
            row["rate"]: row
            for row in facts["rows"]
            if (row["config"], row["fraction"], row["seed"]) == (label, fraction, 0)
        }
        lines += [_rate(label, rate, rates, tried.get(rate), metric) for rate in rates["grid"]]
    return (
        f"The same grid ({', '.join(settings['rates'])}; x: times the config's own) for each "
        f"config, by seed 0 at {fraction:.3g} of the budget; the best by {best} is used at all "
        "budgets. The run that was chosen is one of the mean at that budget, which it lifts a "
        "little, the more the larger the grid and the spread; at other budgets another rate may "
        "be the best.\n\n" + markdown_table(["config", "rate", metric, ""], lines)
    )


def _rate(label: str, rate: float, rates: Facts, row: Facts | None, metric: str) -> list[str]:
    if row is None:
        score = NONE
    elif metric in row["scores"]:
        score = units.format_value(metric, row["scores"][metric])
    else:
        score = row["status"]
    note = ""
    if rate == rates["chosen"]:
        grid = rates["grid"]
        at_edge = len(grid) > 1 and rate in (min(grid), max(grid))
        note = "used; at the edge of the grid" if at_edge else "used"
    return [label, f"{rate:.4g}", score, note]


def _cells(rows: Sequence[Facts], metrics: Iterable[str]) -> str:
    metrics = list(metrics)
    lines = [
        [
            row["config"],
            f"{row['fraction']:.3g}",
            f"{row['rate']:.4g}",
            str(row["seed"]),
            f"{row['steps']:,}",
            f"{row['samples']:,}",
            f"{row['seconds']:.1f}",
            f"{row['flops'] / 1e12:.4g}",
            f"{row['wall_seconds']:.1f}",
            f"{100 * row['wall_input_wait_fraction']:.2f} %",
            f"{row['compile_seconds']:.1f}",
            *(
                units.format_value(name, row["scores"][name]) if name in row["scores"] else NONE
                for name in metrics
            ),
            row["status"] + (f": {row['reason']}" if row["reason"] else ""),
            row["commit"],
        ]
        for row in sorted(rows, key=lambda r: (r["config"], r["fraction"], r["rate"], r["seed"]))
    ]
    columns = ["config", "budget", "rate", "seed", "updates", "samples", "seconds", "TFLOPs"]
    return markdown_table(
        [*columns, "logged s", "logged wait", "compile s", *metrics, "status", "commit"], lines
    )


def _rungs(metric: str, rungs: Sequence[Facts]) -> str:
    keys = list(rungs[0]["trials"][0]["candidate"]) if rungs else []
    lines = []
    for rung in rungs:
        for trial in rung["trials"]:
            rows = trial["rows"]
            scores = [row["scores"][metric] for row in rows if row["status"] == "counted"]
            faults = [row for row in rows if row["reason"]]
            reasons = [f"{row['status']}: {row['reason']}" for row in faults]
            if trial["rejected"]:
                reasons = [f"rejected: {trial['rejected']}"]
            costs = [1e3 * row["seconds"] / row["steps"] for row in rows if row["steps"]]
            values = [trial["candidate"][key] for key in keys]
            lines.append(
                [
                    f"{rung['fraction']:.3g}",
                    *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values),
                    units.format_value(metric, statistics.fmean(scores)) if scores else NONE,
                    f"{len(scores)} of {len(rows)}",
                    f"{costs[0]:.2f}" if costs else NONE,
                    "; ".join(reasons),
                ]
            )
    if not lines:
        return ""
    return markdown_table(["budget", *keys, metric, "seeds", "ms an update", ""], lines)


def _all_rows(facts: Facts) -> list[Facts]:
    """The rows of a comparison, or of all trials of a search."""
    if "rows" in facts:
        return list(facts["rows"])
    return [
        row
        for found in facts["search"].values()
        for rung in found["rungs"]
        for trial in rung["trials"]
        for row in trial["rows"]
    ]


def _words(facts: Facts) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())
