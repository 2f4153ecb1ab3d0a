"""Compares configs at equal training time on this machine, or searches config keys.

    python -m tools.compare configs/A.py configs/B.py:ARG --budget_seconds=120 --seeds=3 \\
        --finetune=configs/transfer/vqa.py --metric=test/accuracy --tune_metric=val/accuracy \\
        --rates=x0.5,x1,x2 --out=OUT

trains every config with the whole budget and with shares of it, each run with a schedule of its
own, and writes OUT/compare.md, compare.png and compare.json. Finished cells are kept in OUT: the
same command with --max_seconds=300 does a few minutes' work at a time, and the table grows;
with --archive=FILE it grows on another machine of the same kind, too.
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
from typing import Any, get_args

from absl import logging

from tools.compare.archive import pack, unpack
from tools.compare.cells import Cells
from tools.compare.comparison import DEFAULT_FRACTIONS, calibrate, check_settings, compare
from tools.compare.configs import CommandError, load_all, parse_value
from tools.compare.measure import Trainer
from tools.compare.metrics import Metric
from tools.compare.prepare import prepare
from tools.compare.records import Machine, describe
from tools.compare.rows import Settings
from tools.compare.search import Axis, calibrate_candidates, search
from tools.compare.table import comparison_page, search_page
from tools.compare.workers import VISIBLE_DEVICES, Role, run_phases
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.infra.preemption import ExitCode, PreemptionGuard

_OWN_RATE = "x1"
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
    options = _parser().parse_args(arguments)
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
        _assignments(options, "set"),
        _assignments(options, "set_finetune"),
    )
    settings = _settings(options, overrides, tuning_overrides)
    axes = [Axis.parse(text) for text in options.search]
    if axes and (options.fractions or options.rates != _OWN_RATE):
        raise CommandError(
            "--search takes neither --fractions nor --rates: --halving sets the budgets, and "
            "--search=schedule.peak:... searches rates"
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
        if options.workers > 1 and not options.role:
            outcome = _run_workers(options, settings, devices, arguments, deadline, guard)
            if outcome is ExitCode.BAD_INPUT:
                return outcome
            deadline = -math.inf  # what is there now is the table
        if devices and not options.role:  # workers have been told theirs
            os.environ[VISIBLE_DEVICES] = devices[0]
        set_gpu_flags()
        trainer = Trainer()

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
        else:
            name, facts = COMPARISON, compare(settings, cells, _say)
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
            "and none of this machine is there; write its page again by --report_only, or give "
            "another --out"
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

    return run_phases(
        command,
        workers=options.workers,
        devices=devices,
        folder=options.out,
        requested=lambda: guard.requested,
        complain=lambda text: print(f"error: {text}", file=sys.stderr, flush=True),
    )


def _ended(outcome: ExitCode, cells: Cells, guard: PreemptionGuard) -> ExitCode:
    """The exit code: that of the workers where it is no success."""
    if outcome is not ExitCode.OK:
        return outcome
    if cells.crashed:
        return ExitCode.FAILED
    return ExitCode.PREEMPTED if cells.interrupted or guard.requested else ExitCode.OK


def _settings(
    options: argparse.Namespace,
    overrides: Mapping[str, Any],
    tuning_overrides: Mapping[str, Any],
) -> Settings:
    if not options.configs or options.budget_seconds is None or not options.metric:
        raise CommandError("CONFIG..., --budget_seconds and --metric are needed; see --help")
    configs = load_all(options.configs, overrides)
    metrics = tuple(Metric.parse(text) for text in options.metric.split(","))
    tune_metric = _tune_metric(options.tune_metric, metrics)
    if not tune_metric.sign or not any(metric.sign for metric in metrics):
        raise CommandError("--metric: of one that is shown only, none is the best; drop :show")
    labels = [named.label for named in configs]
    baselines = tuple(options.baseline) or (labels[0],)
    for label in baselines:
        if label not in labels:
            raise CommandError(f"--baseline={label} is no config; use one of {labels}")
    fractions = _fractions(options.fractions)
    if options.tune_fraction not in fractions:
        raise CommandError(
            f"--tune_fraction={options.tune_fraction:.4g} is none of the budgets; use one of "
            f"{', '.join(f'{fraction:.4g}' for fraction in fractions)}"
        )
    return Settings(
        configs=configs,
        budget_seconds=options.budget_seconds,
        fractions=fractions,
        tune_fraction=options.tune_fraction,
        seeds=options.seeds,
        rates=tuple(options.rates.split(",")),
        metrics=metrics,
        tune_metric=tune_metric,
        finetunes=load_all(options.finetune, tuning_overrides),
        baselines=baselines,
        max_input_wait=options.max_input_wait,
        scratch=options.scratch,
    )


def _tune_metric(text: str | None, metrics: Sequence[Metric]) -> Metric:
    """What --tune_metric names; which way it is better, --metric may say alone.

    Raises:
        CommandError: the two contradict each other.
    """
    if not text:
        return metrics[0]
    asked = Metric.parse(text)
    for metric in metrics:
        if metric.name == asked.name and metric.sign not in (0, asked.sign):
            if text != asked.name:
                raise CommandError(f"--tune_metric={text}: --metric says {metric.mode} of it")
            return metric
    return asked


def _fractions(text: str) -> tuple[float, ...]:
    """Increasing shares of the budget from "1,1/1.5,0.4".

    Raises:
        CommandError: one is no number, not in (0, 1], or 1 is missing.
    """
    if not text:
        return DEFAULT_FRACTIONS
    try:
        fractions = sorted({_fraction(part) for part in text.split(",")})
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"--fractions={text}: {error}") from None
    if not fractions[0] > 0 or fractions[-1] != 1:
        raise CommandError(f"--fractions={text}: give shares above 0, the largest of them 1")
    return tuple(fractions)


def _fraction(text: str) -> float:
    """0.4 from "1/2.5".

    Raises:
        ArgumentTypeError: it is no number.
    """
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give such as 1/2.5") from None


def _assignments(options: argparse.Namespace, flag: str) -> dict[str, Any]:
    """The values of a repeated KEY=VALUE flag.

    Raises:
        CommandError: one has no value.
    """
    values = {}
    for text in getattr(options, flag):
        key, equals, value = text.partition("=")
        if not equals:
            raise CommandError(f"--{flag}={text} has no value; write --{flag}=KEY=VALUE")
        values[key] = parse_value(value)
    return values


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


def _positive(kind: type[int] | type[float]) -> Any:
    def convert(text: str) -> int | float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return convert


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("configs", nargs="*", metavar="CONFIG", help="config file, or FILE:ARG")
    add("--out", type=Path, required=True, help="folder of cells and tables; kept and extended")
    add("--budget_seconds", type=_positive(float), help="whole budget in seconds of training")
    add(
        "--metric",
        help="figures to compare by, with commas; NAME:min where less is better, NAME:show for one "
        "that is only shown at each budget, such as a control",
    )
    add("--tune_metric", help="figure that chooses rates, or ranks a search; the first --metric")
    add("--seeds", type=_positive(int), default=1, help="runs of each, seeds 0 to N-1")
    add("--fractions", default="", help="shares of the budget; by default 1,1/1.5,1/2.5,1/4")
    add(
        "--rates",
        default=_OWN_RATE,
        help="grid of peak rates for every config: 1e-3, or x0.5 of own",
    )
    add(
        "--tune_fraction",
        type=_fraction,
        default=1.0,
        help="the share of the budget, one of --fractions, at which rates are compared; the whole",
    )
    add(
        "--finetune",
        action="append",
        default=[],
        metavar="CONFIG",
        help="fine-tune each run by this config (repeatable) and take the metrics from there",
    )
    add("--scratch", action="store_true", help="run --finetune without pretraining too")
    add(
        "--baseline",
        action="append",
        default=[],
        metavar="LABEL",
        help="the config to compare with; repeatable: the best of them; by default the first",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="key of every CONFIG, or LABEL/KEY of one; evals.NAME=None drops an evaluator; "
        "repeatable",
    )
    add(
        "--set_finetune",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="key of every --finetune config, such as total_steps=500, or of one, such as "
        "vqa/total_steps=500; repeatable",
    )
    add(
        "--workers",
        type=_positive(int),
        default=1,
        help="processes that train cells at the same time",
    )
    add("--devices", default="", help="indices of CUDA devices for the workers, such as 0,1")
    # What a process that --workers has started does; it writes no table.
    add("--role", choices=get_args(Role), default="", help=argparse.SUPPRESS)
    add(
        "--max_seconds",
        type=float,
        default=math.inf,
        help="start no run after so many seconds of this invocation; 0: only write the table",
    )
    add(
        "--max_input_wait",
        type=float,
        default=0.03,
        help="reject configs whose update, measured alone, waits for input for a larger share",
    )
    add(
        "--calibration_steps",
        type=_positive(int),
        default=256,
        help="least updates of the run that measures the cost of one; made 6 whole windows "
        "(data.window_batches), of which the second half counts",
    )
    add("--keep_checkpoints", action="store_true", help="keep the final state of every cell")
    add(
        "--search",
        action="append",
        default=[],
        metavar="KEY:VALUES",
        help="search KEY:A,B,C or KEY:log:LOW:HIGH (or lin, int); repeatable",
    )
    add("--halving", type=int, default=3, help="factor between the rungs of a search")
    add("--trials", type=_positive(int), default=9, help="candidates, where a range is searched")
    add(
        "--archive",
        type=Path,
        metavar="FILE",
        help="what finished cells came to, such as cells.jsonl.gz: cells that are there are not "
        "trained, and those finished here are added",
    )
    add("--report_only", action="store_true", help="write page and plot again from the JSON in OUT")
    return parser


if __name__ == "__main__":
    sys.exit(main())
