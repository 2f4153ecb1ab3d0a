"""A study of ways to tune a base for tasks: what each costs and scores, beside one another.

A study names its ways (docs/results/pcetl.py); each is a run for every task and seed, from the
base of the task and, where units are skipped, with the units that another run has chosen. Jobs are
those of ``tools.jobs``; how long passes take is measured by ``tools.study_latency``.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.columns import Settings
from tools.compare.table import markdown_table
from tools.jobs import Job, Run, named_study

_ALONE = 4  # times as many processes render the pictures of a run that others wait for

Known = Mapping[str, Mapping[str, Any]]  # records of an archive by the key of their job


def latency_key(run: str) -> str:
    """Of the record of a run's latency, from the key of the run."""
    return f"{run}/latency"


@dataclasses.dataclass(frozen=True)
class Point:
    """What a way costs and scores in a task, means over the seeds that are done.

    Attributes:
        way: its name.
        task: of the study.
        scores: seed -> score.
        trained: parameters that are, beside those that every way trains.
        forward_flops: of an example.
        flops_share: as many more than those of the base, as a share of these.
        update_ms: median milliseconds of an update; None: not known.
        times: rows of a pass -> as much longer as it takes than that of the study's first way, as a
            share of this; empty: not measured.
    """

    way: str
    task: str
    scores: Mapping[int, float]
    trained: float
    forward_flops: float
    flops_share: float
    update_ms: float | None
    times: Mapping[str, float]

    @property
    def score(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.scores.values())


@dataclasses.dataclass(frozen=True)
class TuningStudy:
    """What is compared.

    Attributes:
        ways: name -> task and seed -> the run that tunes in this way; None: the task has none.
        figures: task -> of the run's metrics, whose mean is the score.
        settings: of the jobs.
        less: names of ways whose scores every other's are compared with.
        one_base: whether a base that is trained again must come to the same parameters.
    """

    ways: Mapping[str, Callable[[str, int], Run | None]]
    figures: Mapping[str, Sequence[str]]
    settings: Settings
    less: Sequence[str]
    one_base: bool = True
    _made: dict[tuple[str, str, int], Run | None] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def run(self, way: str, task: str, seed: int) -> Run | None:
        """What tunes in a way; None: the task has none."""
        if (made := (way, task, seed)) not in self._made:  # a config takes some milliseconds
            self._made[made] = self.ways[way](task, seed)
        return self._made[made]

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
                run = self.run(way, task, seed)
                for one in _in_order(run):
                    alone = one.parent is None  # all others wait for it, and leave it the machine
                    helpers = settings.helpers * (_ALONE if alone else 1)
                    own = dataclasses.replace(settings, helpers=helpers)
                    jobs.setdefault(one.key, Job(one, None, own))
        return list(jobs.values())

    def points(self, known: Known, seeds: Sequence[int]) -> list[Point]:
        """Of every way and task of which something is done."""
        found = []
        for task, figures in self.figures.items():
            for way in self.ways:
                runs = {seed: run for seed in seeds if (run := self.run(way, task, seed))}
                done = {seed: known[run.key] for seed, run in runs.items() if run.key in known}
                if done:
                    keys = (latency_key(runs[seed].key) for seed in done)
                    passes = [known[key] for key in keys if key in known]
                    found.append(_point(way, task, figures, done, passes))
        return found

    def scores(self, known: Known, seeds: Sequence[int]) -> dict[str, dict[str, dict[int, float]]]:
        """Way -> task -> seed -> score, of the runs that are done."""
        found: dict[str, dict[str, dict[int, float]]] = {way: {} for way in self.ways}
        for point in self.points(known, seeds):
            found[point.way][point.task] = dict(point.scores)
        return {way: tasks for way, tasks in found.items() if tasks}

    def tables(self, known: Known, seeds: Sequence[int]) -> str:
        """Costs and scores of each task, how far apart scores are, and what was chosen."""
        points, tables = self.points(known, seeds), []
        for task in self.figures:
            mine = [point for point in points if point.task == task]
            rows = sorted({rows for point in mine for rows in point.times}, key=int)
            header = [task, "trained", "GFLOPs", "FLOPs"]
            header += [*(f"time, {count}" for count in rows), "ms/update", "score"]
            if mine:
                tables.append(markdown_table(header, [_row(point, rows) for point in mine]))
        scores = self.scores(known, seeds)
        for base in self.less:
            apart = [
                [way, *self._apart(found, scores[base])]
                for way, found in scores.items()
                if base in scores and way != base
            ]
            if apart:
                tables.append(
                    markdown_table([f"less {base}", *self.figures, *self._mean_header], apart)
                )
        tables += [self._overlaps(known, seeds), self._chosen(known, seeds)]
        return "\n\n".join(table for table in tables if table) + "\n"

    @property
    def _mean_header(self) -> list[str]:
        return ["mean"] if len(self.figures) > 1 else []

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
        each = [_error(list(of.values())) for of in differences.values()]
        return each + [_error(means)] * len(self._mean_header)

    def _choices(self, known: Known, seeds: Sequence[int]) -> dict[str, dict[str, dict[int, Any]]]:
        """Way -> task -> seed -> the record of its search and that of what followed, or None.

        A search that several ways follow is told of the first.
        """
        found: dict[str, dict[str, dict[int, Any]]] = {}
        told: set[str] = set()
        for way in self.ways:
            for task in self.figures:
                for seed in seeds:
                    run = self.run(way, task, seed)
                    searched = run and run.search and known.get(run.search.key)
                    if not run or not searched or "search" not in searched:
                        continue
                    assert run.search is not None
                    if run.search.key not in told:
                        told.add(run.search.key)
                        mine = found.setdefault(way, {}).setdefault(task, {})
                        mine[seed] = searched, known.get(run.key)
        return found

    def _overlaps(self, known: Known, seeds: Sequence[int]) -> str:
        """How alike the sets are that a search chooses, and what it takes of the time.

        Sets are compared over seeds, and with those of the ways that scores are compared with, seed
        by seed; where none of these searches, with those of the first way that does.
        """
        choices, rows = self._choices(known, seeds), []
        sets = {
            (way, task): {seed: {*found["search"]["skipped"]} for seed, (found, _) in of.items()}
            for way, tasks in choices.items()
            for task, of in tasks.items()
        }
        others = [way for way in self.less if way in choices] or list(choices)[:1]
        for (way, task), mine in sets.items():
            among = [_overlap(a, b) for a, b in itertools.combinations(mine.values(), 2)]
            row = [way, task, str(len(mine)), _percent(among)]
            for other in others:
                theirs = sets.get((other, task), {}) if other != way else {}
                row.append(_percent([_overlap(mine[s], theirs[s]) for s in mine if s in theirs]))
            pairs = choices[way][task].values()
            row.append(_percent([share for pair in pairs if (share := _time_share(*pair))]))
            rows.append(row)
        against = [f"with {other}" for other in others]
        header = ["search", "task", "seeds", "overlap", *against, "of the tuning's time"]
        return markdown_table(header, rows) if rows else ""

    def _chosen(self, known: Known, seeds: Sequence[int]) -> str:
        """Which units each search has chosen."""
        rows = []
        for way, tasks in self._choices(known, seeds).items():
            for task, of in tasks.items():
                for seed, (searched, _) in of.items():
                    found = searched["search"]
                    saved, units = f"{100 * found['flops_saved']:.1f} %", found["skipped"]
                    rows.append([way, task, str(seed), saved, ", ".join(units)])
        return markdown_table(["way", "task", "seed", "saved", "skipped"], rows) if rows else ""


def _point(
    way: str,
    task: str,
    figures: Sequence[str],
    done: Mapping[int, Mapping[str, Any]],
    passes: Sequence[Mapping[str, Any]],
) -> Point:
    """From the records of its runs, by seed, and of their latency."""
    costs = [record["costs"][0] for record in done.values()]
    seconds = [cost["update_seconds"] for cost in costs if cost["update_seconds"]]
    rows = passes[0]["ms"] if passes else ()
    return Point(
        way,
        task,
        {
            seed: statistics.fmean(record["metrics"][figure] for figure in figures)
            for seed, record in done.items()
        },
        statistics.fmean(cost["without_heads_parameters"] for cost in costs),
        statistics.fmean(cost["forward_flops"] for cost in costs),
        statistics.fmean(cost["extra_share"] for cost in costs),
        1e3 * statistics.median(seconds) if seconds else None,
        {
            n: statistics.fmean(one["ms"][n] / one["first_ms"][n] - 1 for one in passes)
            for n in rows
        },
    )


def _row(point: Point, rows: Sequence[str]) -> list[str]:
    """Of the table of a task."""
    times = (point.times.get(count) for count in rows)
    return [
        point.way,
        f"{point.trained / 1e6:.2f}M",
        f"{point.forward_flops / 1e9:.3f}",
        f"{100 * point.flops_share:+.1f} %",
        *("–" if time is None else f"{100 * time:+.1f} %" for time in times),
        "–" if point.update_ms is None else f"{point.update_ms:.1f}",
        _spread([100 * score for score in point.scores.values()]),
    ]


def _overlap(one: set[str], other: set[str]) -> float:
    """What two sets share of what is in either; of two empty ones, all."""
    return len(one & other) / len(one | other) if one | other else 1.0


def _time_share(search: Mapping[str, Any], follows: Mapping[str, Any] | None) -> float | None:
    """Updates and decisions of a search, as a share of the updates of what follows it."""
    took, then = search.get("run"), follows and follows.get("run")
    if not took or not then:
        return None
    spent = took["training_seconds"] + took["decisions_seconds"]
    return float(spent / then["training_seconds"])


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(shares):.0f} %" if shares else "–"


def named_tuning_study(argument: str) -> TuningStudy:
    """See ``tools.jobs.named_study``.

    Raises:
        ValueError: there is no such study, or it is one of something else.
    """
    study = named_study(argument)
    if not isinstance(study, TuningStudy):
        raise ValueError(f"{argument} compares no ways to tune; name a study that does")
    return study


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
