"""Compares configs at equal training time on this machine, or searches config keys.

    python -m tools.compare configs/A.py configs/B.py:ARG --budget_seconds=120 --seeds=3 \\
        --finetune=configs/transfer/vqa.py --metric=test/accuracy --tune_metric=val/accuracy \\
        --rates=x0.5,x1,x2 --out=OUT

trains every config with the whole budget and with shares of it (with --others_until=1/2.5 only
baselines with more than that share), each run with a schedule of its own, and writes
OUT/compare.md, compare.png and compare.json. Finished cells are kept in OUT: the same command with
--max_seconds=300 does a few minutes' work at a time, and the table grows; with --archive=FILE it
grows on another machine of the same kind, too. --max_seconds=0 only writes the table, of whichever
machine has measured the cells.
With --scratch every --finetune config is trained without pretraining too.

A metric is called as its evaluator calls it; with the label of a --finetune config in front, such
as vqa/test/accuracy, where several have it. Rates and searched keys are chosen by --tune_metric:
give a figure of the validation split where --metric is one of the test split, or one of the
pretraining run. Rates are compared at the whole budget (--tune_fraction: at a share of it) and
fine-tuned only as far as --tune_metric takes it; the best one is used at all budgets.

    python -m tools.compare configs/A.py --budget_seconds=120 --metric=reconstruction/accuracy \\
        --search=optim.b2:0.95,0.98,0.99 --search=schedule.peak:log:1e-4:1e-2 --out=runs/search

searches config keys by successive halving and writes OUT/search.md and search.json.

Seconds are updates times the time of an update measured alone, by a short run that has the device
to itself; on accelerators the time for which the device is busy. So cells may share a device:
--workers=4 compiles programs, four at a time, calibrates one config after the other, and trains
four cells at a time (--devices=0,1: over these GPUs).
"""

import argparse
import datetime
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from tools.compare.archive import pack, unpack
from tools.compare.cells import Cells
from tools.compare.command_line import OWN_RATE, assignments, parser, read_settings
from tools.compare.comparison import calibrate, check_settings, compare
from tools.compare.configs import CommandError
from tools.compare.elsewhere import measured_by
from tools.compare.measure import Trainer
from tools.compare.prepare import prepare
from tools.compare.records import Machine, Runner, describe
from tools.compare.rows import Settings
from tools.compare.search import Axis, calibrate_candidates, rejected_candidates, search
from tools.compare.table import comparison_page, search_page
from tools.compare.workers import VISIBLE_DEVICES, Role, run_phases
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.infra.preemption import ExitCode, PreemptionGuard

COMPARISON, SEARCH, PICTURE = "compare", "search", "compare.png"


def main(arguments: Sequence[str] | None = None) -> ExitCode:
    """Do what the command line asks for.

    Args:
        arguments: the command line without the program; that of the process by default.

    Returns:
        ``OK``, ``BAD_INPUT`` with a message, ``PREEMPTED`` where a signal asked to stop, or
        ``FAILED`` where a worker has crashed; the table is written all the same.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser(__doc__).parse_args(arguments)
    # Libraries log every file they write; what a user must know is printed, or a warning.
    logging.set_verbosity(logging.WARNING)
    try:
        if options.report_only:
            write_pages(options.out)
            return ExitCode.OK
        return _run(options, arguments)
    except (CommandError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT


def write_pages(folder: Path) -> None:
    """Write the pages, and the plot if matplotlib is there, from the JSON in a folder.

    Raises:
        CommandError: the folder has neither ``compare.json`` nor ``search.json``, or one of another
            version of this command.
    """
    files = {name: folder / f"{name}.json" for name in (COMPARISON, SEARCH)}
    if not any(file.exists() for file in files.values()):
        raise CommandError(f"neither compare.json nor search.json in {folder}")
    try:
        _write_pages(folder, files)
    except KeyError as error:
        raise CommandError(
            f"{folder} holds what another version of this command has written, without {error}; "
            "repeat the command that wrote it, with --max_seconds=0"
        ) from error


def _write_pages(folder: Path, files: Mapping[str, Path]) -> None:
    if files[SEARCH].exists():
        _write(folder / f"{SEARCH}.md", search_page(json.loads(files[SEARCH].read_text())))
    if files[COMPARISON].exists():
        facts = json.loads(files[COMPARISON].read_text())
        drawn = any(any(curves.values()) for curves in facts["curves"].values())
        picture = PICTURE if drawn and _draw(facts, folder / PICTURE) else None
        _write(folder / f"{COMPARISON}.md", comparison_page(facts, picture))


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> ExitCode:
    deadline = time.monotonic() + options.max_seconds
    overrides, tuning_overrides = (
        assignments(options, "set"),
        assignments(options, "set_finetune"),
    )
    settings = read_settings(options, overrides, tuning_overrides)
    axes = [Axis.parse(text) for text in options.search]
    if axes and (options.fractions or options.others_until < 1 or options.rates != OWN_RATE):
        raise CommandError(
            "--search takes no --fractions, --others_until or --rates: --halving sets the budgets, "
            "and --search=schedule.peak:... searches rates"
        )
    devices = options.devices.split(",") if options.devices else []
    if len(devices) > options.workers:
        raise CommandError(f"--devices={options.devices}: give --workers={len(devices)} or more")
    if options.archive and not options.role:
        unpack(options.archive, options.out)
    parent = os.getppid()
    # The trainer has a guard of its own; this one is for signals between two runs.
    with PreemptionGuard() as guard:
        outcome = ExitCode.OK
        only_table = options.max_seconds <= 0 and not options.role
        if options.workers > 1 and not options.role and not only_table:
            outcome = _run_workers(options, settings, devices, arguments, deadline, guard)
            if outcome is ExitCode.BAD_INPUT:
                return outcome
            deadline = -math.inf  # what is there now is the table
        if devices and not options.role:  # workers have been told theirs
            os.environ[VISIBLE_DEVICES] = devices[0]
        set_gpu_flags()
        trainer: Runner = Trainer()
        if only_table:
            trainer = measured_by(options.out, trainer)

        def may_start() -> bool:
            # A worker whose parent has died leaves the rest to the next invocation.
            orphaned = bool(options.role) and os.getppid() != parent
            return not guard.requested and not orphaned and time.monotonic() < deadline

        cells = Cells(
            options.out,
            trainer,
            may_start,
            calibration_steps=options.calibration_steps,
            may_calibrate=options.role != "train",
            group=parent if options.role else None,
            keep_checkpoints=options.keep_checkpoints,
            say=_say,
        )
        facts: dict[str, Any]
        if options.role == "prepare":
            if not axes:  # a search compiles as many programs as it has candidates, or only one
                prepare(settings, cells)
            return _ended(outcome, cells, guard)
        if options.role == "calibrate":
            if axes:
                calibrate_candidates(settings, axes, options.halving, options.trials, cells)
            else:
                calibrate(settings, cells)
            return _ended(outcome, cells, guard)
        if axes:
            found = search(settings, axes, options.halving, options.trials, cells, _say)
            name, facts = SEARCH, {"settings": settings.to_json(), "search": found}
            rejected = rejected_candidates(found)
        else:
            name, facts = COMPARISON, compare(settings, cells, _say)
            rejected = facts["rejected"]
    if not options.role:
        facts |= {
            "command": shlex.join(["python", "-m", "tools.compare", *arguments]),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": dict(trainer.machine),
            "overrides": overrides,
            "finetune_overrides": tuning_overrides,
            "left_out": cells.left_out(),
        }
        options.out.mkdir(parents=True, exist_ok=True)
        _check_replaced(options.out / f"{name}.json", facts["machine"], cells)
        text = json.dumps(facts, indent=1, allow_nan=False)
        write_text(options.out / f"{name}.json", text + "\n")
        write_pages(options.out)
        if options.archive:
            pack(options.out, options.archive)
        for label, reason in rejected.items():
            _say(f"{label} is rejected, none of its cells counts: {reason}")
    return _ended(outcome, cells, guard)


def _check_replaced(file: Path, machine: Machine, cells: Cells) -> None:
    """Refuse to put an empty table in the place of another machine's.

    Raises:
        CommandError: ``file`` is of another machine, and this one has no cell to show.
    """
    before = json.loads(file.read_text())["machine"] if file.exists() else machine
    if before != machine and not cells.used:
        raise CommandError(
            f"{file} is of another machine ({describe(before)}), whose cells do not count here, "
            "and none of this machine is there; --max_seconds=0 writes it again, or give another "
            "--out"
        )


def _run_workers(
    options: argparse.Namespace,
    settings: Settings,
    devices: Sequence[str],
    arguments: Sequence[str],
    deadline: float,
    guard: PreemptionGuard,
) -> ExitCode:
    """Calibrate and train in processes of their own."""
    check_settings(settings)  # a fault is told once, and not by every worker

    def command(role: Role) -> list[str]:
        left = max(0.0, deadline - time.monotonic())
        return [*arguments, f"--role={role}", f"--max_seconds={left}"]

    def keep() -> None:
        # A machine that is taken away gives no time to write anything.
        if not options.archive:
            return
        try:
            pack(options.out, options.archive)
        except (OSError, CommandError) as error:  # no reason to end what trains
            print(f"--archive={options.archive}: {error}", file=sys.stderr, flush=True)

    return run_phases(
        command,
        workers=options.workers,
        devices=devices,
        folder=options.out,
        requested=lambda: guard.requested,
        complain=lambda text: print(f"error: {text}", file=sys.stderr, flush=True),
        keep=keep,
    )


def _ended(outcome: ExitCode, cells: Cells, guard: PreemptionGuard) -> ExitCode:
    """The exit code: that of the workers where it is no success."""
    if outcome is not ExitCode.OK:
        return outcome
    if cells.crashed:
        return ExitCode.FAILED
    return ExitCode.PREEMPTED if cells.interrupted or guard.requested else ExitCode.OK


def _draw(facts: Mapping[str, Any], path: Path) -> bool:
    """Draw the plot; False, with the remedy, where matplotlib is not installed."""
    try:
        from tools.compare.plot import draw
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print(
            "no plot: matplotlib is not installed here; where it is, "
            f"python -m tools.compare --report_only --out={path.parent}"
        )
        return False
    draw(facts, path)
    print(path)
    return True


def _write(path: Path, text: str) -> None:
    write_text(path, text)
    print(path)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
