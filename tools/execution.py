"""Jobs of a study done by several processes, in the order in which they are listed.

    for record in execute(jobs, places, workers=12, known=read_archive(file), may_start=...): ...

A job waits for what it needs; where there is time for it no longer, or what it needs has failed, it
is left out.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tools.bases import checked_base, claim
from tools.columns import evaluate, train_to_end
from tools.compare.measure import final_metrics
from tools.compare.workers import VISIBLE_DEVICES
from tools.evaluate_quantized import evaluate_quantized
from tools.jobs import ROOT, Job, Places, Run, wanted_jobs
from tools.prune_weights import prune_weights
from vlp_jax.infra.compilation import enable_compile_cache, set_gpu_flags
from vlp_jax.infra.files import write_text
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.train.base import SHOWN_DIGITS
from vlp_jax.train.costs import COSTS
from vlp_jax.train.facts import DECISIONS_SECONDS, TRAINING_SECONDS
from vlp_jax.train.searching import SEARCH_FILE

_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_SHARE = 0.9  # of a GPU's memory, that all processes have together


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
            key: places.texts if key.endswith(ROOT) else value
            for key, value in job.task.overrides.items()
        }
        task = dataclasses.replace(job.task, overrides=placed)
        score = evaluate(workdir, task, job.settings)
        found: dict[str, Any] = {"values": None if score is None else list(score.values)}
    elif job.run.eight:
        found = _in_eight_bits(job.run, places)
    else:
        if job.run.parent is not None:  # before any time is spent
            claim(workdir, checked_base(job.run, places))
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
        found |= {"root": job.run.root.key, "base": checked_base(job.run, places)}
    seconds = round(time.perf_counter() - began, 1)
    machine = {**device_facts(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    return {"job": job.key, "name": job.name, **found, "seconds": seconds, "machine": machine}


def _origin(run: Run, places: Places) -> pathlib.Path | None:
    """What a run starts from: its parent, or what is left of that once it is cut; None: nothing."""
    if run.parent is None:
        return None
    if run.cut is None:
        return places.workdir(run.parent)
    whole, (heads, mlp) = places.workdir(run.parent), run.cut
    base = checked_base(run, places)[:SHOWN_DIGITS]
    file = places.out / "cut" / f"{run.parent.key}-{base}-{heads:g}-{mlp:g}.safetensors"
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
    devices: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Do jobs, several at a time; yields what became of each as soon as it is done.

    A job that fails, or whose process dies, yields its ``error``, and what needs it is left out. Of
    runs that skip the same units, whichever searches have chosen them, and differ in nothing else,
    one is trained, and each that others need: the record of another is that of the first, and names
    it as ``same_as``.

    Args:
        jobs: in the order in which they are begun.
        places: of this machine.
        workers: processes.
        known: what an archive holds, by key; a run is trained all the same where a job needs it,
            but for a search, whose choice is in its record.
        may_start: whether there is time for a job; one for which there is none holds up no other.
        work: does one, in one of the processes.
        devices: indices of CUDA devices, over which the processes are spread; none: all of them see
            what this one sees.
    """
    waiting = wanted_jobs(jobs, known)
    done = {job.key for job in waiting if _is_there(job, places, known)}
    waiting = [job for job in waiting if job.key not in done]
    records = dict(known)
    trained = {_choice(job, records): job.key for job in reversed(jobs) if job.key in known}
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
                needed = any(other.needs == job.key for other in waiting)  # itself, not its record
                choice = "" if needed else _choice(job, records)
                if choice and choice in (_choice(other, records) for other, _ in running.values()):
                    continue  # what becomes of that one is waited for
                if choice and choice in trained:
                    waiting.remove(job)
                    first = trained[choice]
                    record = {"same_as": first, **records[first], "job": job.key}
                    if record["same_as"] == job.key:  # its own record is lost, not that of a copy
                        del record["same_as"]
                    yield record
                elif idle and may_start(job):
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
                    records[job.key] = record
                    trained.setdefault(_choice(job, records), job.key)
                yield record


def _choice(job: Job, records: Mapping[str, Any]) -> str:
    """Of runs that skip the same units and are alike otherwise; empty: not known, or of no run."""
    run = job.run
    if job.task is not None or run.search is None or run.eight:
        return ""
    found = records.get(run.search.key, {}).get("search")
    return "" if found is None else run.key_of_choice(found["skipped"])


def _is_there(job: Job, places: Places, known: Mapping[str, Any]) -> bool:
    """Whether what others need of a job is there without doing it.

    A base that is given; and what a search has chosen, which is written where they look for it:
    another search might choose otherwise than the one of the tables.
    """
    if not job.needs:
        return places.base is not None
    if "search" not in known.get(job.key, {}):
        return False
    workdir = places.workdir(job.run)
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / SEARCH_FILE, json.dumps(known[job.key]["search"]))
    return True


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
