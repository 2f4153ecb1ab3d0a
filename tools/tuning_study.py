"""A study of ways to tune one base for tasks: what each costs and scores, beside one another.

A study names its ways (docs/results/pcetl.py); each is a run for every task and seed, from one base
and, where units are skipped, with the units that another run has chosen. Jobs are those of
``tools.chains``.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.columns import Settings
from tools.compare.table import markdown_table
from tools.jobs import Job, Run

_ALONE = 4  # times as many processes render the pictures of a run that others wait for

Known = Mapping[str, Mapping[str, Any]]  # records of an archive by the key of their job


@dataclasses.dataclass(frozen=True)
class TuningStudy:
    """What is compared.

    Attributes:
        ways: name -> task and seed -> the run that tunes in this way; None: the task has none.
        figures: task -> of the run's metrics, whose mean is the score.
        settings: of the jobs.
        less: names of ways whose scores every other's are compared with.
    """

    ways: Mapping[str, Callable[[str, int], Run | None]]
    figures: Mapping[str, Sequence[str]]
    settings: Settings
    less: Sequence[str]

    @property
    def cells(self) -> dict[str, tuple[str, str]]:
        """Name of a cell -> task and way."""
        return {f"{task}: {way}": (task, way) for way in self.ways for task in self.figures}

    def jobs(self, cells: Sequence[str], seeds: Sequence[int], settings: Settings) -> list[Job]:
        """All that is to be done, each once, seed after seed."""
        jobs: dict[str, Job] = {}
        for seed in seeds:
            for cell in cells:
                task, way = self.cells[cell]
                run = self.ways[way](task, seed)
                for one in _in_order(run):
                    alone = one.parent is None  # all others wait for it, and leave it the machine
                    helpers = settings.helpers * (_ALONE if alone else 1)
                    own = dataclasses.replace(settings, helpers=helpers)
                    jobs.setdefault(one.key, Job(one, None, own))
        return list(jobs.values())

    def scores(self, known: Known, seeds: Sequence[int]) -> dict[str, dict[str, dict[int, float]]]:
        """Way -> task -> seed -> score, of the runs that are done."""
        found: dict[str, dict[str, dict[int, float]]] = {}
        for way, of in self.ways.items():
            for task, figures in self.figures.items():
                for seed in seeds:
                    run = of(task, seed)
                    record = None if run is None else known.get(run.key)
                    if record is not None:
                        value = statistics.fmean(record["metrics"][figure] for figure in figures)
                        found.setdefault(way, {}).setdefault(task, {})[seed] = value
        return found

    def tables(self, known: Known, seeds: Sequence[int]) -> str:
        """Costs and scores, how far these are from those of ``less``, and what was chosen."""
        scores = self.scores(known, seeds)
        header = ["way", "trained", "GFLOPs", "FLOPs", "ms/update", *self.figures, "mean"]
        rows = [
            [way, *self._costs(known, way, seeds), *self._told(found)]
            for way, found in scores.items()
        ]
        text = markdown_table(header, rows) + "\n"
        for base in self.less:
            apart = [
                [way, *self._apart(found, scores[base])]
                for way, found in scores.items()
                if way != base and base in scores
            ]
            if apart:
                text += "\n" + markdown_table([f"less {base}", *self.figures, "mean"], apart) + "\n"
        return text + "\n" + self._chosen(known, seeds)

    def _costs(self, known: Known, way: str, seeds: Sequence[int]) -> list[str]:
        """Parameters beside the heads, forward FLOPs and their share, of the first run there is."""
        for task in self.figures:
            runs = (self.ways[way](task, seed) for seed in seeds)
            records = (known.get(run.key) for run in runs if run is not None)
            costs = [record["costs"][0] for record in records if record is not None]
            if costs:
                first, forward = costs[0], statistics.fmean(c["forward_flops"] for c in costs)
                seconds = [c["update_seconds"] for c in costs if c["update_seconds"]]
                share = statistics.fmean(c["extra_share"] for c in costs)
                return [
                    f"{first['without_heads_parameters'] / 1e6:.2f}M",
                    f"{forward / 1e9:.3f}",
                    f"{100 * share:+.1f} %",
                    f"{1e3 * statistics.median(seconds):.1f}" if seconds else "–",
                ]
        return ["–"] * 4

    def _told(self, found: Mapping[str, Mapping[int, float]]) -> list[str]:
        each = [_spread([100 * x for x in found.get(task, {}).values()]) for task in self.figures]
        shared = set.intersection(*(set(found.get(task, ())) for task in self.figures))
        means = [
            100 * statistics.fmean(found[task][seed] for task in self.figures)
            for seed in sorted(shared)
        ]
        return [*each, _spread(means)]

    def _apart(
        self, found: Mapping[str, Mapping[int, float]], base: Mapping[str, Mapping[int, float]]
    ) -> list[str]:
        """Points, seed by seed: mean and standard error."""
        differences = {
            task: {
                seed: 100 * (value - base[task][seed])
                for seed, value in found.get(task, {}).items()
                if seed in base.get(task, {})
            }
            for task in self.figures
        }
        shared = set.intersection(*(set(of) for of in differences.values()))
        means = [
            statistics.fmean(of[seed] for of in differences.values()) for seed in sorted(shared)
        ]
        return [*(_error(list(of.values())) for of in differences.values()), _error(means)]

    def _chosen(self, known: Known, seeds: Sequence[int]) -> str:
        """Which units each search has chosen."""
        rows = []
        for way, of in self.ways.items():
            for task in self.figures:
                for seed in seeds:
                    run = of(task, seed)
                    record = known.get(run.search.key) if run and run.search else None
                    if record is not None and "search" in record:
                        found = record["search"]
                        share = f"{100 * found['flops_saved']:.1f} %"
                        rows.append([way, task, str(seed), share, ", ".join(found["skipped"])])
        header = ["way", "task", "seed", "saved", "skipped"]
        return markdown_table(header, rows) + "\n" if rows else ""


def _in_order(run: Run | None) -> list[Run]:
    """A run after all that it needs."""
    if run is None:
        return []
    return [*_in_order(run.parent), *_in_order(run.search), run]


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, and how many these are."""
    return _with(values, "", statistics.stdev)


def _error(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    return _with(values, "+", lambda each: statistics.stdev(each) / math.sqrt(len(each)))


def _with(values: Sequence[float], sign: str, apart: Callable[[Sequence[float]], float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):{sign}.1f}"
    spread = f" ± {apart(values):.1f}" if len(values) > 1 else ""
    return f"{mean}{spread} ({len(values)})"
