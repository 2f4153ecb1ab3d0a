"""Score against FLOPs and against latency for every way of a study: one row of axes a task.

    python -m tools.pareto docs.results.pcetl --archive=docs/results/pcetl.jsonl --out=pareto.png

The argument names a module with ``study()`` (of another function: MODULE:FUNCTION), a
``tools.tuning_study.TuningStudy``. Points are means over --seeds with their standard error; costs
are relative to the base as it was pretrained (FLOPs), and to the study's first way, measured in
turns with it (latency, see ``tools.study_latency``; no axes where nothing is measured). The line
joins the ways that nothing cheaper beats. Scores far below those of most ways stand at the lower
edge, as numbers. Ways whose names begin with the same word have the same colour.
"""

import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.compare.plot import INK, MUTED, PALETTE, plain
from tools.jobs import read_archive
from tools.tuning_study import Point, named_tuning_study
from vlp_jax.infra.command import argument_parser, bad_input

Cost = Callable[[Point], float | None]
_MARKS = "os^Dv<>pP*Xhd+x1234"  # in turns among the ways of one colour
_ALONE = PALETTE[5]  # grey: of ways that have no relatives
_LEGEND = 0.18  # inches, of a line of the legend
_FAR = 3.0  # times as far below the median as the best is above it
_APART = 0.02  # what that is at least


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points nothing cheaper, or as cheap, beats: by increasing cost.

    Args:
        points: cost and score of each.
    """
    order = sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1]))
    found: list[int] = []
    for index in order:
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def lowest_shown(scores: Sequence[float]) -> float:
    """The score from which on axes begin, so that one that failed does not flatten all others.

    Args:
        scores: of all ways of a task.
    """
    middle, best = statistics.median(scores), max(scores)
    return max(min(scores), middle - _FAR * max(best - middle, _APART))


def styles(ways: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Way -> colour and mark: one colour for all whose names begin alike, grey for those alone."""
    words = [_first_word(way) for way in ways]
    several = [word for word in dict.fromkeys(words) if words.count(word) > 1]
    each = dict(zip(several, itertools.cycle(c for c in PALETTE if c != _ALONE)))
    marks = {colour: itertools.cycle(_MARKS) for colour in PALETTE}
    found = {}
    for way, word in zip(ways, words, strict=True):
        colour = each.get(word, _ALONE)
        found[way] = colour, next(marks[colour])
    if len({*found.values()}) < len(found):
        raise ValueError(f"more than {len(_MARKS)} ways are relatives; draw fewer")
    return found


def _first_word(way: str) -> str:
    return way.replace(",", " ").split()[0]


def draw(points: Sequence[Point], tasks: Sequence[str], path: pathlib.Path) -> None:
    """Draw every task against every cost that is known.

    Args:
        points: of a study.
        tasks: in the order of rows.
        path: of the PNG.

    Raises:
        ValueError: there is nothing to draw.
    """
    shown = [task for task in tasks if any(point.task == task for point in points)]
    if not shown:
        raise ValueError("the archive holds no run of the study; run tools.compare_stages first")
    rows = sorted({rows for point in points for rows in point.times}, key=int)
    costs: dict[str, Cost] = {"forward FLOPs, less the base's": lambda point: point.flops_share}
    for count in rows:
        costs[f"time of a pass of {count}, less full tuning's"] = _time(count)
    ways = list(dict.fromkeys(point.way for point in points))
    height = max(0.6 + 3.6 * len(shown), 0.3 + _LEGEND * len(ways))
    size = (4.6 * len(costs) + 2.2, height)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(shown), len(costs), squeeze=False, sharey="row")
    for axes_row, task in zip(grid, shown, strict=True):
        mine = [point for point in points if point.task == task]
        lowest = 100 * lowest_shown([point.score for point in mine])
        highest = 100 * max(point.score for point in mine)
        room = 0.08 * max(highest - lowest, 1.0)
        axes_row[0].set_ylim(lowest - 1.5 * room, highest + room)
        for axes, (label, cost) in zip(axes_row, costs.items(), strict=True):
            _panel(axes, mine, cost, ways)
            axes.set_xlabel(label, color=MUTED)
        axes_row[0].set_ylabel(f"{task}, score in %", color=INK)
    handles: dict[str, Any] = {}  # a way may lack some of the tasks
    for axes in grid[:, 0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    of_ways = [handles[way] for way in ways]
    figure.legend(of_ways, ways, loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _time(rows: str) -> Cost:
    return lambda point: point.times.get(rows)


def _panel(axes: Axes, points: Sequence[Point], cost: Cost, ways: Sequence[str]) -> None:
    """One task against one cost."""
    placed = [(100 * at, 100 * point.score) for point in points if (at := cost(point)) is not None]
    there = [point for point in points if cost(point) is not None]
    best = front(placed)
    axes.plot(
        [placed[n][0] for n in best],
        [placed[n][1] for n in best],
        color=MUTED,
        linewidth=1.0,
        drawstyle="steps-post",
        zorder=1,
    )
    style_of, bottom = styles(ways), axes.get_ylim()[0]
    for number, (point, (x, y)) in enumerate(zip(there, placed, strict=True)):
        values = [100 * one for one in point.scores.values()]
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        colour, mark = style_of[point.way]
        below = y < bottom
        axes.errorbar(
            x,
            bottom if below else y,
            yerr=0.0 if below else spread,
            color=colour,
            marker=mark,
            markersize=5,
            elinewidth=0.8,
            linestyle="none",
            label=point.way,
            clip_on=not below,
        )
        told = f"{y:.0f}" if below else point.way if number in best else ""
        axes.annotate(
            told, (x, max(y, bottom)), (3, 4), textcoords="offset points", fontsize=6, color=INK
        )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g} %")
    plain(axes)


def main(arguments: list[str] | None = None) -> None:
    """Draw the plot.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argument_parser("tools.pareto", __doc__)
    parser.add_argument("study", help="MODULE[:FUNCTION], as docs.results.pcetl")
    parser.add_argument("--archive", type=pathlib.Path, required=True, help="what was done")
    parser.add_argument("--seeds", type=int, default=6, help="of the runs, at most")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the PNG to write")
    given = parser.parse_args(arguments)
    with bad_input():
        if given.out.suffix != ".png":
            raise ValueError(f"--out={given.out}: name a file .png")
        study = named_tuning_study(given.study)
        points = study.points(read_archive(given.archive), range(given.seeds))
        draw(points, list(study.figures), given.out)
    print(given.out)


if __name__ == "__main__":
    main()
