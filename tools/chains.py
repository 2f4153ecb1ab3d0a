"""Chains of runs, each of which starts from the one before, and what their ends score.

A study gives every cell a chain of configs (docs/results/momo.py). Runs are known by what they
compute, so that chains that begin alike share their beginning, and what an archive holds is not
computed again. Jobs, a run to train or a task to score a run in, are done by several processes, in
the order in which they are listed as far as what they need is there.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tools.columns import (
    COLUMNS,
    Score,
    Settings,
    Task,
    averages,
    common,
    evaluate,
    header_of,
    rows_of,
    train_to_end,
)
from tools.compare.configs import digest, with_overrides
from tools.compare.measure import final_metrics
from tools.compare.table import markdown_table
from tools.evaluate_quantized import evaluate_quantized
from tools.prune_weights import prune_weights
from vlp_jax.infra.compilation import enable_compile_cache, set_gpu_flags
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.train.costs import COSTS
from vlp_jax.train.searching import SEARCH_FILE

_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_ROOT = ".root"  # keys of folders end in it
_SHARE = 0.9  # of a GPU's memory, that all processes have together


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a chain.

    Attributes:
        config: complete but for where it starts from.
        parent: the run before; None: it starts from scratch.
        search: the run, from the same parent, that has chosen what is skipped; None: nothing is.
        cut: shares of heads and of channels that the parent has lost before; None: none.
        eight: nothing is trained: the tests of the parent are made again, with eight bits a weight.
    """

    config: ConfigDict
    parent: "Run | None" = None
    search: "Run | None" = None
    cut: tuple[float, float] | None = None
    eight: bool = False

    @functools.cached_property
    def key(self) -> str:
        """What the run computes, in 16 hexadecimal digits."""
        before = [run.key for run in (self.parent, self.search) if run is not None]
        before += [f"cut {self.cut}"] if self.cut else []
        before += ["eight bits"] if self.eight else []
        return digest(self.config, " ".join(before))[:16]


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


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        run: what is trained, or scored.
        task: in which it is scored; None: it is trained.
        settings: of the scoring; ``helpers`` of the training too.
    """

    run: Run
    task: Task | None
    settings: Settings

    @property
    def key(self) -> str:
        """Of the job, for an archive: the run, and what is asked of it in which way."""
        return self.run.key if self.task is None else f"{self.run.key}/{_asked(self)}"

    @property
    def name(self) -> str:
        """Of the task or the stage: what jobs that take about as long have in common."""
        return str(self.run.config.name) if self.task is None else self.task.name

    @property
    def needs(self) -> str:
        """Key of the job that must be done before; empty: none."""
        if self.task is not None:
            return self.run.key
        before = self.run.search or self.run.parent  # a search has the same parent
        return "" if before is None else before.key


def _asked(job: Job) -> str:
    """A task and how it is asked, without where."""
    assert job.task is not None
    what = {**dataclasses.asdict(job.task), **dataclasses.asdict(job.settings)}
    for place in ("out", "seeds", "helpers"):
        del what[place]
    what["overrides"] = {k: v for k, v in what["overrides"].items() if not k.endswith(_ROOT)}
    text = json.dumps(what, sort_keys=True, default=list)
    return f"{job.task.name} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are on this machine.

    Attributes:
        out: folder of runs and of what they share.
        texts: folder of free texts, and of tasks of texts.
    """

    out: pathlib.Path
    texts: str

    def workdir(self, run: Run) -> pathlib.Path:
        """Of a run."""
        return self.out / "runs" / run.key


def do(job: Job, places: Places) -> dict[str, Any]:
    """Train a run, or score one; what an archive keeps of it.

    Args:
        job: what it needs is there.
        places: of this machine.

    Raises:
        ConfigError, ValueError, OSError: the run does not work, or data are missing.
    """
    workdir = places.workdir(job.run)
    began = time.perf_counter()
    if job.task is not None:
        placed = {
            key: places.texts if key.endswith(_ROOT) else value
            for key, value in job.task.overrides.items()
        }
        task = dataclasses.replace(job.task, overrides=placed)
        score = evaluate(workdir, task, job.settings)
        found: dict[str, Any] = {"values": None if score is None else list(score.values)}
    elif job.run.eight:
        found = _in_eight_bits(job.run, places)
    else:
        config = job.run.config.copy_and_resolve_references()
        config.init_from = str(_origin(job.run, places) or "")
        if job.run.search is not None:
            config.skip_from = str(places.workdir(job.run.search))
        config.compile_cache = str(places.out / "compile_cache")
        config.data.cache_dir = str(places.out / "data")
        config.data.cache_workers = job.settings.helpers
        for section in config.data.sources.values():
            if section.type == "texts":
                section.root = places.texts
        train_to_end(config, workdir)
        found = {"metrics": final_metrics(read_metrics(workdir))}
        found["costs"] = json.loads((workdir / RUN_FILE).read_text()).get(COSTS, [])
        if (workdir / SEARCH_FILE).exists():
            found["search"] = json.loads((workdir / SEARCH_FILE).read_text())
    seconds = round(time.perf_counter() - began, 1)
    facts = device_facts()
    return {"job": job.key, "name": job.name, **found, "seconds": seconds, "machine": facts}


def _origin(run: Run, places: Places) -> pathlib.Path | None:
    """What a run starts from: its parent, or what is left of that once it is cut; None: nothing."""
    if run.parent is None or run.cut is None:
        return None if run.parent is None else places.workdir(run.parent)
    whole, (heads, mlp) = places.workdir(run.parent), run.cut
    file = places.out / "cut" / f"{run.parent.key}-{heads:g}-{mlp:g}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_name(f"{os.getpid()}-{file.name}")  # others may be making it as well
        prune_weights(whole, made, heads, mlp, blocks="all", overwrite=True)
        made.replace(file)
    return file


def _in_eight_bits(run: Run, places: Places) -> dict[str, Any]:
    """What an archive keeps of a run that is tested with eight bits a weight."""
    assert run.parent is not None
    workdir = places.workdir(run.parent)
    compared = evaluate_quantized(workdir, "best")
    costs = json.loads((workdir / RUN_FILE).read_text())[COSTS]
    bytes_of = dict(zip(("float32", "int8"), compared.parameters, strict=True))
    metrics = {name: eight for name, (_, eight) in compared.figures.items()}
    return {"metrics": metrics, "costs": costs, "bytes": bytes_of}


def execute(
    jobs: Sequence[Job],
    places: Places,
    workers: int,
    known: Mapping[str, Any],
    may_start: Callable[[Job], bool],
    work: Callable[[Job, Places], dict[str, Any]] = do,
) -> Iterator[dict[str, Any]]:
    """Do jobs, several at a time; yields what became of each as soon as it is done.

    A job that fails yields its ``error``, and what needs it is left out.

    Args:
        jobs: in the order in which they are begun.
        places: of this machine.
        workers: processes.
        known: what an archive holds, by key; a run is trained all the same where a job needs it.
        may_start: whether there is time for a job; one for which there is none holds up no other.
        work: does one, in one of the processes.
    """
    waiting = _wanted(jobs, known)
    done: set[str] = set()
    if workers > 1:
        os.environ.setdefault(_MEMORY, f"{_SHARE / workers:.3f}")
    context = multiprocessing.get_context("spawn")  # a process that has begun JAX cannot be forked
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(places.out,)
    ) as pool:
        running: dict[concurrent.futures.Future[dict[str, Any]], Job] = {}
        while True:
            for job in [job for job in waiting if not job.needs or job.needs in done]:
                if len(running) < workers and may_start(job):
                    waiting.remove(job)
                    running[pool.submit(_attempt, work, job, places)] = job
            if not running:
                return
            ended, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in ended:
                job, record = running.pop(future), future.result()
                if "error" not in record:
                    done.add(job.key)
                yield record


def _begin(out: pathlib.Path) -> None:
    """Of a process that does jobs."""
    set_gpu_flags()
    enable_compile_cache(out / "compile_cache")


def _attempt(
    work: Callable[[Job, Places], dict[str, Any]], job: Job, places: Places
) -> dict[str, Any]:
    """Do a job; of an error its words, for not every error can be sent to another process."""
    try:
        return work(job, places)
    except (Exception, SystemExit) as error:
        return {"job": job.key, "error": f"{type(error).__name__}: {error}"}


def _wanted(jobs: Sequence[Job], known: Mapping[str, Any]) -> list[Job]:
    """Those that are not known, and what they need."""
    wanted: set[str] = set()
    for job in reversed(jobs):
        if job.key not in known or job.key in wanted:
            wanted |= {job.key, job.needs}
    return [job for job in jobs if job.key in wanted]


def read_archive(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What has been done, by key; of a job that was done twice, the first.

    Args:
        file: of a JSON object a line; where there is none, nothing has.

    Raises:
        ValueError: a line is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: {error}; remove the line") from error
        if "error" not in record:
            found.setdefault(record["job"], record)
    return found


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
