"""What a search for units to skip has chosen, why, and what it saves: one page.

    python -m tools.skip_report runs/search
    python -m tools.skip_report runs/search --out=FOLDER --repeats=50

Writes ``skip_report.html``, which needs nothing else, and ``skip_report.json`` with all numbers, to
WORKDIR or FOLDER, and prints a short table. The page has the units of every stack, kept or skipped,
with the harm of their absence and what they take of the forward FLOPs; the preferences over the
search; loss and metrics of the choices of 0, 1, ... units; and the full network beside the pruned
one: parameters, forward FLOPs by formula, and milliseconds of a forward pass, measured here.

Both networks are tuned and without switches: ``full`` has every unit, ``pruned`` lacks those that
are skipped and has an adapter in the place of each. A pass is the loss of the run's objectives on
random inputs of the run's sizes, its longest texts, without dropout; medians over --repeats, the
two in turns. It is measured for 1 and 64 examples on the accelerator, if there is one, and for 1 on
the CPU.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich
import rich.table
from absl import logging
from ml_collections import ConfigDict

from tools.latency import forward_pass, forward_times
from tools.searched import SearchRun, read_search, restored
from tools.skip_page import NETWORKS, table, write
from vlp_jax.infra.command import argument_parser, bad_input, fail
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.manifest import DamagedCheckpointError
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.models.tuning import split_unit
from vlp_jax.objectives.base import Objective
from vlp_jax.train.setup import Setup
from vlp_jax.train.state import TrainState
from vlp_jax.transfer.units import pruned

REPEATS = 20
ACCELERATOR_ROWS, CPU_ROWS = (1, 64), (1,)
_MEASURED = "measured: "  # begins the line of the process that measures on the CPU


def numbers_of(
    run: SearchRun, setup: Setup, state: TrainState, latency: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the page shows, ready for JSON.

    Args:
        run: of ``searched.read_search``.
        setup: of ``searched.restored``.
        state: of the same.
        latency: see ``latency_here``, by device: ``accelerator`` and ``cpu``.

    Returns:
        - ``workdir``, ``method``, ``reward``, ``split``, ``step``, ``skipped`` and ``flops_saved``;
        - ``units``: of each ``unit``, ``stack``, ``layer``, ``part``, ``kept``, ``harm``, of it
          ``expected`` before losses were compared, ``error`` (None: not known) and
          ``flops_share``;
        - ``parameters`` and ``forward_flops`` (of an example) of ``full`` and ``pruned``;
        - ``latency``;
        - ``by_count`` of ``search.json``;
        - ``history``: ``preference`` and ``harm`` of each unit, lists of step and value.
    """
    found = run.found
    errors = found.get("error", [None] * len(found["units"]))
    expected = found.get("expected", [0.0] * len(found["units"]))
    told = zip(found["units"], found["costs"], found["harm"], expected, errors, strict=True)
    networks = {name: _network(setup, state, run, name) for name in NETWORKS}
    lengths = setup.budget.text_lengths
    return {
        "workdir": str(run.workdir),
        **{key: found[key] for key in ("method", "reward", "split", "step", "skipped")},
        "flops_saved": found["flops_saved"],
        "units": [
            {
                "unit": unit,
                **_place(unit),
                "kept": unit not in found["skipped"],
                "harm": harm,
                "expected": before,
                "error": error,
                "flops_share": cost,
            }
            for unit, cost, harm, before, error in told
        ],
        "parameters": {
            name: sum(leaf.size for leaf in jax.tree.leaves(params))
            for name, (_, params) in networks.items()
        },
        "forward_flops": {
            name: setup.program.forward_flops(lengths, objectives=objectives)
            for name, (objectives, _) in networks.items()
        },
        "latency": dict(latency),
        "by_count": found["by_count"],
        "history": _history(run),
    }


def latency_here(
    run: SearchRun, setup: Setup, state: TrainState, rows: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Milliseconds of a forward pass on the first device of this process.

    Args:
        run: of ``searched.read_search``.
        setup: of ``searched.restored``.
        state: of the same.
        rows: examples of a batch, each measured.
        repeats: passes that count.

    Returns:
        ``device``, ``text_length`` by batch, ``repeats``, and ``ms``: rows (as text) -> network ->
        milliseconds.
    """
    bucket = setup.plan.buckets()[-1]
    bucket = bucket if not setup.plan.take_turns else tuple(setup.plan.bucket(0))
    networks = {name: _network(setup, state, run, name) for name in NETWORKS}
    extras, device = state.extras["objectives"], jax.local_devices()[0]
    measured = {}
    for count in rows:
        passes = {
            name: forward_pass(setup.program, objectives, params, extras, bucket, count, device)
            for name, (objectives, params) in networks.items()
        }
        measured[str(count)] = forward_times(passes, repeats)
    cpu = device.platform == "cpu"
    return {
        "device": (platform.processor() or platform.machine()) if cpu else device.device_kind,
        "text_length": {name: sizes.text_length for name, sizes in bucket},
        "repeats": repeats,
        "ms": measured,
    }


def _network(
    setup: Setup, state: TrainState, run: SearchRun, name: str
) -> tuple[Sequence[Objective], Any]:
    """Objectives and parameters of the full or of the pruned network, without switches."""
    skipped = tuple(run.found["skipped"]) if name == "pruned" else ()
    tuning = ConfigDict(setup.config.model.tuning.to_dict())
    tuning.update(skip=(*tuning.skip, *skipped), gated=())
    return setup.program.objectives_with(tuning), pruned(state.params, skipped)


def _place(unit: str) -> dict[str, Any]:
    """Where a unit is: its stack, its layer there and its part of the block."""
    block, part = split_unit(unit)
    place = re.fullmatch(r"(.*?)_?(\d+)", block)
    stack, layer = (block, 0) if place is None else (place[1], int(place[2]))
    return {"stack": stack.removesuffix("_block"), "layer": layer, "part": part}


def _history(run: SearchRun) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What was logged of every unit; empty where the method learns nothing as the run goes."""
    records = read_metrics(run.workdir)
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for kind in ("preference", "harm"):
        for unit in run.found["units"]:
            key = f"search/{kind}/{unit}"
            points = [(int(r["step"]), r[key]) for r in records if key in r]
            if points:
                found.setdefault(kind, {})[unit] = points
    return found


def _latency(given: argparse.Namespace, run: SearchRun, setup: Setup, state: TrainState) -> Any:
    """By device; on the CPU by a process of its own where this one has an accelerator."""
    if not _has_accelerator():
        here = latency_here(run, setup, state, CPU_ROWS, given.repeats)
        return {"accelerator": {"absent": "this machine has none"}, "cpu": here}
    # Models choose their kernels by the default backend, which is one for all of a process.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # those of the accelerator
    command = [sys.executable, "-m", "tools.skip_report", str(run.workdir), "--measure_cpu"]
    command += [f"--repeats={given.repeats}", f"--base={given.base}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MEASURED)]
    if done.returncode or not lines:
        raise RuntimeError(f"measuring on the CPU has failed:\n{done.stderr[-2000:]}")
    return {
        "accelerator": latency_here(run, setup, state, ACCELERATOR_ROWS, given.repeats),
        "cpu": json.loads(lines[-1].removeprefix(_MEASURED)),
    }


def _has_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def main(arguments: list[str] | None = None) -> ExitCode:
    """Measure, write the page, and print the table.

    Args:
        arguments: the command line without the program; that of the process by default.

    Returns:
        ``OK``, or ``DAMAGED_CHECKPOINTS`` where there is nothing to measure.
    """
    parser = argument_parser("tools.skip_report", __doc__)
    parser.add_argument("workdir", type=pathlib.Path, help="of a finished search")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write to; by default WORKDIR")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="passes that are timed")
    parser.add_argument("--base", default="", help="of a run of tunables: its base, if moved")
    parser.add_argument("--measure_cpu", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    try:
        with bad_input({"init_base": "--base"}):
            if given.repeats < 1:
                raise ValueError(f"--repeats={given.repeats}: use 1 or more")
            run = read_search(given.workdir)
            with restored(run, given.base) as (setup, state):
                if given.measure_cpu:
                    here = latency_here(run, setup, state, CPU_ROWS, given.repeats)
                    print(f"{_MEASURED}{json.dumps(here)}")
                    return ExitCode.OK
                measured = _latency(given, run, setup, state)
                numbers = numbers_of(run, setup, state, measured)
            page = write(numbers, run, given.out or run.workdir)
    except DamagedCheckpointError as error:
        return fail(ExitCode.DAMAGED_CHECKPOINTS, error)
    rich.print(table(numbers))
    print(page)
    return ExitCode.OK


if __name__ == "__main__":
    set_gpu_flags()
    sys.exit(main())
