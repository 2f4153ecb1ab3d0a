"""Several processes of one command on one folder, so that a large device is kept busy.

A small model's cell is mostly start-up: tracing, loading compiled programs, evaluating, and
fine-tuning, while the device idles. Since seconds come from calibrations and not from the cells
themselves (see ``records.Calibration``), cells may overlap:

1. Workers compile all programs and fill the caches of data (see ``prepare``).
2. One process has the device to itself and measures what is not calibrated yet.
3. Workers train cells, each of which one of them claims (see ``claims``), until nothing is left.
4. The parent, which has touched no device before, writes the table.

Every worker has ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` unless the environment says otherwise: by
default JAX takes three quarters of a GPU's memory as it starts, and the second worker would find
none left.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tools.compare.cells import CELLS_FOLDER, PREPARED_FOLDER
from tools.compare.claims import read_claims
from vlp_jax.infra.preemption import ExitCode

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
KEEP_SECONDS = 30.0
_POLL_SECONDS = 0.2
_LAST_LINES = 15
# The worst of several outcomes comes first.
_BY_WEIGHT = (ExitCode.FAILED, ExitCode.BAD_INPUT, ExitCode.PREEMPTED, ExitCode.OK)

Role = Literal["prepare", "calibrate", "train"]
Environment = Mapping[str, str]  # what differs from that of this process


def run_phases(
    command: Callable[[Role], Sequence[str]],
    *,
    workers: int,
    devices: Sequence[str],
    folder: Path,
    requested: Callable[[], bool],
    complain: Callable[[str], None],
    keep: Callable[[], None],
) -> ExitCode:
    """Compile in several processes, calibrate in one, then train in several.

    Args:
        command: the command line of a process that is to do one of these.
        workers: processes that compile and train.
        devices: indices of CUDA devices, over which the workers are spread; calibrations run on
            the first. Without any, every process sees what this one does.
        folder: OUT.
        requested: whether a signal asks to stop; it is passed on.
        complain: takes a text about a process that has crashed.
        keep: called every ``KEEP_SECONDS``, to put what is there where it outlives the machine.

    Returns:
        The worst of what the processes came to.
    """

    def run(role: Role, environments: Sequence[Environment]) -> ExitCode:
        processes = [_start(command(role), environment) for environment in environments]
        _wait(processes, requested, keep)
        outcomes = [_outcome(process, requested()) for process in processes]
        for process, outcome in zip(processes, outcomes, strict=True):
            if outcome is ExitCode.FAILED:
                complain(crash_report(folder, process.pid, process.returncode))
        return min(outcomes, key=_BY_WEIGHT.index)

    visible = [{VISIBLE_DEVICES: device} for device in devices] or [{}]
    shared = {_PREALLOCATE: os.environ.get(_PREALLOCATE, "false")}
    several = [shared | visible[n % len(visible)] for n in range(workers)]
    outcome = run("prepare", several)
    if outcome is ExitCode.OK and not requested():
        outcome = run("calibrate", visible[:1])
    if outcome is ExitCode.OK and not requested():
        outcome = run("train", several)
    return outcome


def crash_report(folder: Path, pid: int, code: int) -> str:
    """What a process that has crashed was doing.

    Args:
        folder: OUT.
        pid: of the process.
        code: its exit code, negative where a signal has ended it.

    Returns:
        The cell that it had claimed, and the last lines of its log.
    """
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    claims = (read_claims(folder / below) for below in (CELLS_FOLDER, PREPARED_FOLDER))
    for cell, claim in itertools.chain.from_iterable(claims):
        if claim["pid"] == pid and "log" in claim:
            log = Path(claim["log"])
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            return "\n  ".join(
                [
                    f"worker {pid} {how} in cell {cell} ({claim['run']}); the end of {log}:",
                    *lines[-_LAST_LINES:],
                ]
            )
    return f"worker {pid} {how} outside of any cell; see what it printed above"


def _start(command: Sequence[str], environment: Environment) -> "subprocess.Popen[bytes]":
    # A session of its own: a terminal sends Ctrl-C to all processes of its session, and a worker
    # that gets it from there and from its parent takes the second for an order to end at once.
    return subprocess.Popen(
        [sys.executable, "-m", "tools.compare", *command],
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _wait(
    processes: Sequence["subprocess.Popen[bytes]"],
    requested: Callable[[], bool],
    keep: Callable[[], None],
) -> None:
    """Wait for all, and pass the request to stop on, once."""
    told, kept = False, time.monotonic()
    while alive := [process for process in processes if process.poll() is None]:
        if requested() and not told:
            for process in alive:
                process.terminate()
            told = True
        if time.monotonic() - kept >= KEEP_SECONDS:
            keep()
            kept = time.monotonic()
        time.sleep(_POLL_SECONDS)


def _outcome(process: "subprocess.Popen[bytes]", asked_to_stop: bool) -> ExitCode:
    code = process.returncode
    if asked_to_stop and code == -signal.SIGTERM:  # before it could listen
        return ExitCode.PREEMPTED
    return ExitCode(code) if code in _BY_WEIGHT else ExitCode.FAILED
