"""Score against seconds, samples and FLOPs: one row of axes a metric, one line a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vlp_jax.infra import units

AXES = {"seconds": "seconds of training", "samples": "samples", "flops": "model FLOPs"}
# The colours of the report, c0 to c7 of vlp_jax/infra/report/page.css.
PALETTE = ("#2a62a6", "#c4621b", "#2c8158", "#8b4fa3", "#b23b4e", "#6d7178", "#0f8390", "#94730d")
# Inches: the line before an entry of the legend with its gaps, and a wide character of the entry.
_KEY, _CHARACTER = 0.7, 0.085
INK, MUTED, RULE = "#1c1e22", "#5f6570", "#e5e2dc"


def draw(facts: Mapping[str, Any], path: Path) -> None:
    """Draw the curves with a band of one standard deviation, and the baseline's score.

    Metrics that are only shown have no axes.

    Args:
        facts: content of ``compare.json``.
        path: of the PNG.
    """
    modes = facts["settings"]["metrics"]
    metrics = [metric for metric in facts["curves"] if modes[metric] != "show"]
    width = 4.4 * len(AXES)
    figure = Figure(figsize=(width, 0.5 + 3.3 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(AXES), squeeze=False, sharey="row")
    for axes_row, metric in zip(grid, metrics, strict=True):
        times = facts["time_to_score"].get(metric)
        for axes, cost in zip(axes_row, AXES, strict=True):
            for index, (label, points) in enumerate(facts["curves"][metric].items()):
                _line(axes, label, points, cost, PALETTE[index % len(PALETTE)])
            if times:
                axes.axhline(
                    times["score"],
                    color=MUTED,
                    linewidth=0.8,
                    linestyle=(0, (4, 3)),
                    label="score to reach",
                )
            _style(axes, metric, AXES[cost])
        _mark_budgets(axes_row[0], facts["settings"])
        axes_row[0].set_ylabel(metric, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        fitting = int(width / (_KEY + _CHARACTER * max(map(len, labels))))
        columns = max(1, min(fitting, len(labels)))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=160)


def _line(axes: Axes, label: str, points: list[Mapping[str, Any]], cost: str, colour: str) -> None:
    if not points:
        return
    costs = [point[cost] for point in points]
    means = [point["mean"] for point in points]
    spread = [point["deviation"] or 0.0 for point in points]
    axes.plot(costs, means, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.fill_between(
        costs,
        [mean - half for mean, half in zip(means, spread, strict=True)],
        [mean + half for mean, half in zip(means, spread, strict=True)],
        color=colour,
        alpha=0.16,
        linewidth=0,
    )


def _style(axes: Axes, metric: str, x_label: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if units.unit_of(metric) == "percent":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.set_xlabel(x_label, color=MUTED)
    plain(axes)


def plain(axes: Axes) -> None:
    """The look that all plots share: a faint grid behind, and no frame."""
    axes.tick_params(colors=MUTED, labelsize=8, which="both")
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)


def _mark_budgets(axes: Axes, settings: Mapping[str, Any]) -> None:
    """Ticks of an axis of seconds where the budgets are."""
    budgets = [fraction * settings["budget_seconds"] for fraction in settings["fractions"]]
    axes.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
    axes.minorticks_off()


def _short(value: float) -> str:
    """A tick label: 20, 5k, 1M, 2e15."""
    for scale, suffix in ((1e12, ""), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{suffix}" if suffix else f"{value:.0e}".replace("e+", "e")
    return f"{value:g}"
