"""Chains of runs, each of which starts from the one before, and what their ends score.

A study gives every cell a chain of configs (docs/results/momo.py). Chains that
begin alike share their beginning (``tools.jobs``).
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ml_collections import ConfigDict

from tools.columns import (
    COLUMNS,
    Score,
    Settings,
    Task,
    averages,
    common,
    header_of,
    rows_of,
)
from tools.compare.configs import with_overrides
from tools.compare.table import markdown_table
from tools.jobs import Job, Run


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        cells: name -> the configs of its chain; the first is the base.
        tasks: in which the end of every chain is scored.
        throughout: cells of which every stage is.
        settings: of the scoring, whose ``out`` and ``seeds`` are filled in.
        early: columns in which the stages before the last are scored.
        against: name in the table -> the one that it is compared with; by default the base.
    """

    cells: Mapping[str, Sequence[ConfigDict]]
    tasks: Sequence[Task]
    throughout: Sequence[str]
    settings: Settings
    early: Sequence[str] = COLUMNS
    against: Mapping[str, str] = dataclasses.field(default_factory=dict)
    one_base: ClassVar[bool] = False  # each chain has a beginning of its own

    def chain(self, cell: str, seed: int) -> list[Run]:
        """The runs of a cell, in their order."""
        runs: list[Run] = []
        for config in self.cells[cell]:
            runs.append(Run(with_overrides(config, {"seed": seed}), runs[-1] if runs else None))
        return runs

    def scored(self, cell: str, seed: int) -> list[tuple[str, Run, list[Task]]]:
        """The runs of a cell that are scored, with their names in the table, and in which tasks."""
        *before, last = self.chain(cell, seed)
        found = [(cell, last, list(self.tasks))]
        if cell in self.throughout:
            tasks = [task for task in self.tasks if task.column in self.early]
            found = [(f"{cell}, {run.config.name}", run, tasks) for run in before] + found
        return found

    def jobs(self, cells: Sequence[str], seeds: Sequence[int], settings: Settings) -> "list[Job]":
        """All that is to be done, each once: seed after seed, of each cell after cell.

        Args:
            cells: of the study.
            seeds: of the chains; what is fine-tuned from one has its seed.
            settings: those of the study, with where and by how many it is done.
        """
        jobs: dict[str, Job] = {}
        for seed in seeds:
            settings = dataclasses.replace(settings, seeds=(seed,))
            for cell in cells:
                trained = [Job(run, None, settings) for run in self.chain(cell, seed)]
                scored = [
                    Job(run, task, settings)
                    for _, run, tasks in self.scored(cell, seed)
                    for task in tasks
                ]
                for job in (*trained, *scored):
                    jobs.setdefault(job.key, job)
        return list(jobs.values())

    def tables(self, known: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
        """Scores, how far they are from those they are compared with, and losses, in Markdown."""
        scores = scores_of(self, known, seeds)
        rows = rows_of({name: joined(found) for name, found in scores.items()}, self.tasks)
        text = markdown_table(header_of(self.tasks), rows) + "\n"
        if apart := differences(self, scores):
            header = ["run", "less", "seeds", *(column.upper() for column in COLUMNS)]
            text += "\n" + markdown_table(header, apart) + "\n"
        evaluators, losses = losses_of(self, known, seeds)
        return text + "\n" + markdown_table(["loss", *evaluators], losses) + "\n"


def scores_of(
    study: Study, known: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, dict[int, dict[str, Score]]]:
    """Name in the table -> seed that has been scored in all of its tasks -> task -> one value.

    Args:
        study: what is compared.
        known: what an archive holds.
        seeds: of the chains.
    """
    found: dict[str, dict[int, dict[str, Score]]] = {}
    for cell in study.cells:
        for seed in seeds:
            settings = dataclasses.replace(study.settings, seeds=(seed,))
            for name, run, tasks in study.scored(cell, seed):
                records = [known.get(Job(run, task, settings).key) for task in tasks]
                if None not in records:
                    found.setdefault(name, {})[seed] = {
                        task.name: Score(tuple(record["values"]))
                        for task, record in zip(tasks, records, strict=True)
                        if record is not None and record["values"] is not None
                    }
    return found


def joined(scores: Mapping[int, Mapping[str, Score]]) -> dict[str, Score]:
    """Task -> its values with all of these seeds."""
    return {
        task: Score(tuple(value for found in scores.values() for value in found[task].values))
        for task in next(iter(scores.values()))
    }


def losses_of(
    study: Study, known: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    """Losses on held-out records at the end of every run that has a row: mean and deviation.

    Args:
        study: what is compared.
        known: what an archive holds.
        seeds: of the chains; those are told of which a run has been trained.

    Returns:
        Names of the evaluators, and a row for each run: its name, and what it has of each.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for cell in study.cells:
        for seed in seeds:
            for name, run, _ in study.scored(cell, seed):
                for key, loss in known.get(run.key, {}).get("metrics", {}).items():
                    evaluator, _, figure = key.partition("/")
                    if evaluator.startswith("heldout") and figure == "loss":
                        found.setdefault(name, {}).setdefault(evaluator, []).append(loss)
    names = sorted({evaluator for losses in found.values() for evaluator in losses})
    return names, [
        [run, *(_loss(losses.get(n, ())) for n in names)] for run, losses in found.items()
    ]


def _loss(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def differences(
    study: Study, scores: Mapping[str, Mapping[int, Mapping[str, Score]]]
) -> list[list[str]]:
    """Of every run, how far its averages are from those of the one that it is compared with.

    Over the seeds and the tasks that both have; in points: the mean, and its standard error.

    Args:
        study: what is compared.
        scores: of ``scores_of``.

    Returns:
        Rows: a run, the one it is compared with, of how many seeds, and an entry a column.
    """
    rows = []
    for name, mine in scores.items():
        base = study.against.get(name, next(iter(study.cells)))
        seeds = [seed for seed in mine if seed in scores.get(base, {})]
        if name != base and seeds:
            pair = {run: joined({n: scores[run][n] for n in seeds}) for run in (name, base)}
            compared = common(pair, study.tasks)
            here, there = (averages(found, compared) for found in pair.values())
            apart = [_told(here.get(column), there.get(column)) for column in COLUMNS]
            rows.append([name, base, str(len(seeds)), *apart])
    return rows


def _told(here: Score | None, there: Score | None) -> str:
    if here is None or there is None:
        return "–"
    apart = [100 * (a - b) for a, b in zip(here.values, there.values, strict=True)]
    mean = f"{statistics.fmean(apart):+.1f}"
    if len(apart) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(apart) / len(apart) ** 0.5:.1f}"
