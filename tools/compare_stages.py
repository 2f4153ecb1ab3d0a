"""Train the chains of a study and score them in three columns.

    python -m tools.compare_stages docs.results.momo --archive=docs/results/momo.jsonl --out=OUT
    python -m tools.compare_stages docs.results.momo --archive=... --max_seconds=0  (tables alone)

The argument names a module with ``study()``, see docs/results/momo.py and docs/results/pcetl.py (of
another function: MODULE:FUNCTION). What --archive holds is not done again, so that a study can be
given several times for a while, on several machines; --cells and --seeds say which part, --first
which cells of it come before the others, with all seeds. With --max_seconds nothing is begun that,
by the longest of its kind in --archive, would not be over by then, together with the quickest of
what needs it where it has no score of its own. --train_bases trains what chains begin with, also
where the archive holds it, and nothing else; with --base that is tuned in its place. What a study
compares around one base is not continued around another, so keep it (tools.export_weights): a GPU
that adds up in any order does not train the same one twice. Nothing else that lies in --out is
needed later. Several processes share a GPU (--workers), or are spread over several (--devices=0,1).
Prints the study's tables and writes them to OUT/table.md.

Exit codes are those of vlp_jax.infra.preemption: 1 where a job has failed, whose error is told.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from tools.bases import bases_to_keep, check_given
from tools.execution import execute
from tools.jobs import (
    Job,
    Places,
    expected_seconds,
    listed_jobs,
    named_study,
    read_archive,
    wanted_jobs,
)
from vlp_jax.infra.command import bad_input, parse_flags
from vlp_jax.infra.files import write_text
from vlp_jax.infra.preemption import ExitCode

_CELLS = flags.DEFINE_list(
    "cells", None, "names of cells, in quotes where they have commas; by default all"
)
_FIRST = flags.DEFINE_list("first", [], "names of those cells whose every chain comes first")
_SEEDS = flags.DEFINE_integer("seeds", 3, "chains of each cell", lower_bound=1)
_BASE = flags.DEFINE_string(
    "base", "", "workdir or parameter file in the place of runs that start from scratch"
)
_TRAIN_BASES = flags.DEFINE_bool(
    "train_bases", False, "train what chains begin with, known or not, and nothing else"
)
_OUT = flags.DEFINE_string("out", "runs/stages", "folder of runs")
_ARCHIVE = flags.DEFINE_string("archive", None, "file of what was done", required=True)
_TEXTS = flags.DEFINE_string("texts", "../shared/data/text", "folder of texts")
_WORKERS = flags.DEFINE_integer("workers", 1, "processes", lower_bound=1)
_DEVICES = flags.DEFINE_list("devices", [], "CUDA devices that processes are spread over: 0,1")
_SECONDS = flags.DEFINE_float("max_seconds", None, "nothing is begun that may take longer")


def main(argv: Sequence[str]) -> None:
    """Do what the archive does not hold, and write the tables."""
    if len(argv) != 2:
        raise app.UsageError("name a module: python -m tools.compare_stages docs.results.momo")
    began = time.monotonic()
    logging.set_verbosity(logging.ERROR)
    with bad_input():
        study = named_study(argv[1])
        if not pathlib.Path(_TEXTS.value).is_dir():
            raise ValueError(f"--texts: {_TEXTS.value} does not exist; name a folder of texts")
        if len(_DEVICES.value) > _WORKERS.value:
            raise ValueError(f"--workers={_WORKERS.value}: fewer than --devices; give one for each")
        base = pathlib.Path(_BASE.value).absolute() if _BASE.value else None
        if base is not None and _TRAIN_BASES.value:
            raise ValueError("--base and --train_bases: give one of them")
        if base is not None and not base.exists():
            raise ValueError(f"--base: {base} does not exist; name a workdir or a parameter file")
        archive, out = pathlib.Path(_ARCHIVE.value), pathlib.Path(_OUT.value).absolute()
        archived, seeds = read_archive(archive), range(_SEEDS.value)
        settings = dataclasses.replace(study.settings, helpers=(os.cpu_count() or 1) // 4, out=out)
        cells = _CELLS.value or list(study.cells)
        jobs = listed_jobs(study, cells, _FIRST.value, seeds, settings, _TRAIN_BASES.value)
        known = {} if _TRAIN_BASES.value else archived
        limit = float("inf") if _SECONDS.value is None else _SECONDS.value
        wanted = wanted_jobs(jobs, known) if limit and study.one_base else []
        texts = str(pathlib.Path(_TEXTS.value).absolute())
        places = Places(out, texts, base, bases_to_keep(wanted, archived))
        if base is not None:
            check_given(wanted, places)
    failed = 0
    for folder in (out, archive.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if limit:
        longest: dict[str, float] = {}
        for record in archived.values():
            _note(longest, record)

        def may_start(job: Job) -> bool:
            """Whether something would be had of it in time."""
            return time.monotonic() - began + expected_seconds(job, jobs, known, longest) < limit

        for record in execute(
            jobs, places, _WORKERS.value, known, may_start, devices=_DEVICES.value
        ):
            if "error" in record:
                failed += 1
            else:
                _note(longest, record)
            line = json.dumps(record)
            print(f"{time.monotonic() - began:.0f} s {line[:200]}", flush=True)
            with archive.open("a") as file:
                file.write(line + "\n")
    tables = study.tables(read_archive(archive), seeds)
    write_text(out / "table.md", tables)
    print(tables)
    if failed:
        sys.exit(ExitCode.FAILED)


def _note(longest: dict[str, float], record: Mapping[str, Any]) -> None:
    """Of what takes about as long, by its name, the most seconds; of latencies none are told."""
    if "seconds" in record:
        name = record["name"]
        longest[name] = max(record["seconds"], longest.get(name, 0.0))


if __name__ == "__main__":
    # What this process reads is no work for an accelerator, which those that it starts take whole.
    jax.config.update("jax_platforms", "cpu")
    app.run(main, flags_parser=parse_flags)
