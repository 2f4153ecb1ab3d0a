"""Runs of a study and tasks to score them in, done by several processes.

A run is known by what it computes, its config and the runs that it needs, so that runs that begin
alike share their beginning, and what an archive holds is not computed again. Jobs, a run to train
or a task to score a run in, are done in the order in which they are listed as far as what they need
is there.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tools.columns import (
    Settings,
    Task,
    evaluate,
    train_to_end,
)
from tools.compare.configs import digest
from tools.compare.measure import final_metrics
from tools.compare.workers import VISIBLE_DEVICES
from tools.evaluate_quantized import evaluate_quantized
from tools.prune_weights import prune_weights
from vlp_jax.infra.compilation import enable_compile_cache, set_gpu_flags
from vlp_jax.infra.files import write_text
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.train.base import fingerprint
from vlp_jax.train.costs import COSTS
from vlp_jax.train.facts import DECISIONS_SECONDS, TRAINING_SECONDS
from vlp_jax.train.initial import read_origin
from vlp_jax.train.searching import SEARCH_FILE

_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_ROOT = ".root"  # keys of folders end in it
_BASE_FILE = "base.sha256"  # of a workdir: of the parameters that its chain begins with
_SHARE = 0.9  # of a GPU's memory, that all processes have together
_SHOWN = 12  # digits of a SHA-256 that an error shows


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

    @property
    def root(self) -> "Run":
        """The first of its chain, which starts from scratch."""
        return self if self.parent is None else self.parent.root


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
        if self.task is not None:
            return self.task.name
        return f"{self.run.config.name}{', int8' if self.run.eight else ''}"

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
        base: workdir or parameter file in the place of every run that starts from scratch; None:
            these are trained.
        bases: key of a run that starts from scratch -> SHA-256 of the parameters that it must end
            with, for others have started from these; of those that are absent any will do.
    """

    out: pathlib.Path
    texts: str
    base: pathlib.Path | None = None
    bases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def workdir(self, run: Run) -> pathlib.Path:
        """Of a run, or what is in its place."""
        if self.base is not None and run.parent is None:
            return self.base
        return self.out / "runs" / run.key

    def checked_base(self, run: Run) -> str:
        """SHA-256 of the parameters that the chain of a run begins with.

        Args:
            run: whose root is trained, or given.

        Raises:
            ConfigError, ValueError, OSError: these are not those that others have started from, or
                there are none.
        """
        workdir = self.workdir(run.root)
        found, asked = _fingerprint(workdir), self.bases.get(run.root.key)
        if asked not in (None, found):
            raise ValueError(
                f"{workdir} has parameters with SHA-256 {found[:_SHOWN]}, and what the archive "
                f"holds was made from {asked[:_SHOWN]}: train the base as that one was (XLA_FLAGS, "
                "kind and number of devices) in another --out, or give another archive and --out"
            )
        return found


@functools.cache
def _fingerprint(workdir: pathlib.Path) -> str:
    """Of the parameters of a run that is over, or of a file."""
    facts = workdir / RUN_FILE
    if facts.exists() and (status := json.loads(facts.read_text())["status"]) != "finished":
        raise ValueError(f"the run in {workdir} is {status}; finish it before it is tuned")
    return fingerprint(read_origin(workdir).arrays)


def known_bases(jobs: Sequence[Job], known: Mapping[str, Any]) -> dict[str, str]:
    """Key of a run that starts from scratch -> SHA-256 of what others have started from.

    It is empty where some have, and no record tells from what.

    Args:
        jobs: of a study.
        known: what an archive holds, by key.

    Raises:
        ValueError: they have started from several.
    """
    found: dict[str, str] = {}
    roots = {job.run.root.key for job in jobs}
    for key, record in known.items():
        if (told := record.get("base")) and record["root"] in roots:
            first = found.setdefault(record["root"], told)
            if told != first:
                raise ValueError(
                    f"runs of the archive from {record['root']} have begun with other parameters "
                    f"(SHA-256 {told[:_SHOWN]} in {key}, else {first[:_SHOWN]}); keep one kind"
                )
    for job in jobs:
        if job.task is None and job.key in known and "base" not in known[job.key]:
            found.setdefault(job.run.root.key, "")
    return found


def check_bases(jobs: Sequence[Job], known: Mapping[str, Any], places: Places) -> None:
    """See that what is to be done begins with what others have started from, as far as it is there.

    Args:
        jobs: of a study whose ways are compared around one base.
        known: what an archive holds, by key.
        places: of this machine, with the bases of the archive.

    Raises:
        ConfigError, ValueError, OSError: it does not, or cannot be told.
    """
    roots = {job.run.root.key: job.run.root for job in _wanted(jobs, known)}
    if places.base is not None and len(roots) > 1:
        raise ValueError(
            f"--base would be in the place of {len(roots)} bases ({', '.join(roots)}); ask for "
            "cells that start from the same one (--cells)"
        )
    for key, root in roots.items():
        if places.bases.get(key) == "":
            raise ValueError(
                f"the archive does not tell from which parameters its runs from {key} have "
                "started, so that none can be added; give another archive and --out"
            )
        if places.base is not None:
            places.checked_base(root)


def do(job: Job, places: Places) -> dict[str, Any]:
    """Train a run, or score one; what an archive keeps of it.

    Args:
        job: what it needs is there.
        places: of this machine.

    Raises:
        ConfigError, ValueError, OSError: the run does not work, data are missing, or its chain
            begins with other parameters than those of the archive or of its workdir.
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
        if job.run.parent is not None:  # before any time is spent
            _claim(workdir, places.checked_base(job.run))
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
        facts = json.loads((workdir / RUN_FILE).read_text())
        found["costs"] = facts.get(COSTS, [])
        found["run"] = {key: facts.get(key) for key in (TRAINING_SECONDS, DECISIONS_SECONDS)}
        if (workdir / SEARCH_FILE).exists():
            found["search"] = json.loads((workdir / SEARCH_FILE).read_text())
    if job.task is None:
        found |= {"root": job.run.root.key, "base": places.checked_base(job.run)}
    seconds = round(time.perf_counter() - began, 1)
    machine = {**device_facts(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    return {"job": job.key, "name": job.name, **found, "seconds": seconds, "machine": machine}


def _claim(workdir: pathlib.Path, base: str) -> None:
    """Note what a run begins with, for what is there is gone on with, whatever that is."""
    file = workdir / _BASE_FILE
    if not file.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(file, base + "\n")
    elif (before := file.read_text().strip()) != base:
        raise ValueError(
            f"{workdir} was begun from parameters with SHA-256 {before[:_SHOWN]}, and the base is "
            f"now {base[:_SHOWN]}; give another --out"
        )


def _origin(run: Run, places: Places) -> pathlib.Path | None:
    """What a run starts from: its parent, or what is left of that once it is cut; None: nothing."""
    if run.parent is None:
        return None
    if run.cut is None:
        return places.workdir(run.parent)
    whole, (heads, mlp) = places.workdir(run.parent), run.cut
    name = f"{run.parent.key}-{places.checked_base(run)[:_SHOWN]}-{heads:g}-{mlp:g}.safetensors"
    file = places.out / "cut" / name
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


def listed_jobs(
    study: Any,
    cells: Sequence[str],
    first: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    only_bases: bool = False,
) -> list[Job]:
    """What is to be done for cells of a study, each once, in the order in which it is begun.

    Args:
        study: with ``cells``, and ``jobs`` of some of them.
        cells: names.
        first: those of them that come before the others, with all seeds.
        seeds: of the runs.
        settings: of the jobs.
        only_bases: whether all are left out but the runs that start from scratch.

    Raises:
        ValueError: there are no such cells.
    """
    for flag, names, among in (("cells", cells, study.cells), ("first", first, cells)):
        if unknown := [name for name in names if name not in among]:
            raise ValueError(f"--{flag}: {unknown[0]!r} is none of {', '.join(among)}")
    ordered = [*study.jobs(first, seeds, settings), *study.jobs(cells, seeds, settings)]
    jobs = {job.key: job for job in ordered}.values()
    return [job for job in jobs if not (only_bases and job.needs)]


def execute(
    jobs: Sequence[Job],
    places: Places,
    workers: int,
    known: Mapping[str, Any],
    may_start: Callable[[Job], bool],
    work: Callable[[Job, Places], dict[str, Any]] = do,
    devices: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Do jobs, several at a time; yields what became of each as soon as it is done.

    A job that fails, or whose process dies, yields its ``error``, and what needs it is left out.

    Args:
        jobs: in the order in which they are begun.
        places: of this machine.
        workers: processes.
        known: what an archive holds, by key; a run is trained all the same where a job needs it.
        may_start: whether there is time for a job; one for which there is none holds up no other.
        work: does one, in one of the processes.
        devices: indices of CUDA devices, over which the processes are spread; none: all of them see
            what this one sees.
    """
    waiting = _wanted(jobs, known)
    done: set[str] = set()
    if places.base is not None:
        done = {job.key for job in waiting if job.task is None and job.run.parent is None}
        waiting = [job for job in waiting if job.key not in done]
    if workers > 1:
        os.environ.setdefault(_MEMORY, f"{_SHARE * max(1, len(devices)) / workers:.3f}")
    context = multiprocessing.get_context("spawn")  # a process that has begun JAX cannot be forked
    running: dict[concurrent.futures.Future[dict[str, Any]], tuple[Job, int]] = {}
    with contextlib.ExitStack() as stack:

        def begin(number: int) -> concurrent.futures.ProcessPoolExecutor:
            # A pool breaks as a whole, so that each process has one of its own.
            device = devices[number % len(devices)] if devices else ""
            return stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(
                    1, context, initializer=_begin, initargs=(places.out, device)
                )
            )

        def submit(number: int, job: Job) -> concurrent.futures.Future[dict[str, Any]]:
            try:
                return pools[number].submit(_attempt, work, job, places)
            except concurrent.futures.BrokenExecutor:  # its process has died
                pools[number] = begin(number)
                return pools[number].submit(_attempt, work, job, places)

        pools = [begin(number) for number in range(workers)]
        idle = set(range(workers))
        while True:
            for job in [job for job in waiting if not job.needs or job.needs in done]:
                if idle and may_start(job):
                    waiting.remove(job)
                    idle.remove(number := min(idle))
                    running[submit(number, job)] = job, number
            if not running:
                return
            ended, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in ended:
                job, number = running.pop(future)
                idle.add(number)
                try:
                    record = future.result()
                except concurrent.futures.BrokenExecutor:
                    error = "its process died, as where memory is short; see what it has printed"
                    record = {"job": job.key, "error": error}
                if "error" not in record:
                    done.add(job.key)
                yield record


def expected_seconds(
    job: Job, jobs: Sequence[Job], known: Mapping[str, Any], longest: Mapping[str, float]
) -> float:
    """How long it takes until something is had of a job.

    What is not scored, or has been done before, is done for others: with the quickest of these. If
    the time ran out in between, it would have to be done again on the next machine.

    Args:
        job: of ``jobs``.
        jobs: all that is asked for.
        known: what an archive holds, by key.
        longest: seconds by name, of jobs that are done; of others nothing is expected.
    """
    alone = longest.get(job.name, 0.0)
    if job.key not in known and (job.task is not None or job.run.config.evals):
        return alone
    others = [other for other in jobs if other.needs == job.key and other.key not in known]
    return alone + min((longest.get(other.name, 0.0) for other in others), default=0.0)


def _begin(out: pathlib.Path, device: str) -> None:
    """Of a process that does jobs, before it asks JAX for its devices."""
    if device:
        os.environ[VISIBLE_DEVICES] = device
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
    """Those that are not known, and what they need; of what chains begin with, only that."""
    wanted: set[str] = set()
    needed = {job.needs for job in jobs}
    for job in reversed(jobs):
        missing = job.key not in known and (job.needs or job.key not in needed)
        if missing or job.key in wanted:
            wanted |= {job.key, job.needs}
    return [job for job in jobs if job.key in wanted]


def named_study(argument: str) -> Any:
    """The study that MODULE or MODULE:FUNCTION gives, by default of its function ``study``.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = argument.partition(":")
    try:
        return getattr(importlib.import_module(module), name or "study")()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{argument}: {error}; name a module with study()") from error


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
