"""Trains a cell by the trainer itself, and reads what it cost and scored from its metrics."""

import collections
import contextlib
import dataclasses
import gc
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tools.compare.cells import LOG_FILE
from tools.compare.configs import CommandError, with_overrides
from tools.compare.records import Calibration, Group, Machine, Measurement
from tools.profile_table import device_busy_ms
from vlp_jax.infra.artifacts import ARTIFACTS_FOLDER, Table, load
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.profiling import PROFILE_FOLDER
from vlp_jax.infra.report.from_metrics import LOOP_GROUPS
from vlp_jax.train.loop import RunStopped, train
from vlp_jax.train.setup import Setup, prepare

REPO = Path(__file__).resolve().parents[2]

_RATE = "speed/samples_per_second"
_WAIT = "speed/input_wait_fraction"
_COMPILE = "compile/seconds/"
# First parts of the names of figures that the train loop writes; all others are of evaluators.
# The artefacts of evaluators that know groups, and their columns.
_GROUPS = "_groups"
_GROUP_COLUMNS = ("group", "value", "examples", "accuracy")


class Trainer:
    """Runs configs in this process, one after the other.

    Attributes:
        machine: what tells this machine from others that are faster or slower.
        versions: of the packages that compute.
        commit: of this checkout.
    """

    def __init__(self) -> None:
        facts = device_facts()
        self.versions: Mapping[str, str] = facts.pop("versions")
        self.machine: Machine = facts | _cpu(facts["platform"])
        self.commit = _commit()

    def calibrate(self, config: ConfigDict, workdir: Path) -> Calibration | None:
        """Measure the cost of an update by a run of ``NamedConfig.calibration``.

        Its second half counts. The first holds the first use of every bucket, and the clocks of a
        device at rest; of that half, the second interval is traced for what the device does.

        Returns:
            The cost, or None where a signal asked to stop.

        Raises:
            CommandError: as ``run``.
        """
        traced = self.machine["platform"] != "cpu"
        if traced:
            interval = config.log.every_steps
            window = {"profile.start_step": interval, "profile.num_steps": interval}
            config = with_overrides(config, window)
        setup = self._train(config, workdir)
        if setup is None:
            return None
        records = read_metrics(workdir)
        found = calibration(
            training_intervals(records, setup.budget.batch_size),
            setup.total_steps,
            compile_seconds(records),
        )
        if traced:
            busy = device_busy_ms(setup.workdir / PROFILE_FOLDER)
            found = dataclasses.replace(found, device_ms=busy)
        return found

    def run(self, config: ConfigDict, workdir: Path) -> Measurement | None:
        """Train a config to its end, or go on where it was interrupted.

        Args:
            config: of a whole run.
            workdir: of the run; what it prints goes to ``log.txt`` there.

        Returns:
            What it cost and scored, or None where a signal asked to stop.

        Raises:
            CommandError: a fault of the config or the data, as ``train.setup.prepare`` tells it, or
                too many damaged examples.
        """
        reason = ""
        try:
            setup = self._train(config, workdir)
        except RunStopped as error:
            if error.code is not ExitCode.TOO_MANY_BAD_UPDATES:  # the data can be mended
                raise CommandError(f"{config.name}: {error}") from error
            reason = str(error)
            setup = prepare(config, workdir)
        if setup is None:
            return None
        records = read_metrics(workdir)
        batch_size = setup.budget.batch_size
        intervals = training_intervals(records, batch_size)
        steps = max((end for end, *_ in intervals), default=0)
        return Measurement(
            status="stopped" if reason else "finished",
            reason=reason,
            steps=steps,
            samples=steps * batch_size,
            wall_seconds=sum(seconds for _, _, seconds, _ in intervals),
            wall_input_wait_seconds=sum(waited for *_, waited in intervals),
            compile_seconds=compile_seconds(records),
            flops_per_sample=_flops_per_sample(setup),
            metrics=final_metrics(records),
            groups=group_scores(workdir),
            spent=_spent(setup, steps),
        )

    def _train(self, config: ConfigDict, workdir: Path) -> Setup | None:
        """Train; None where a signal asked to stop."""
        workdir.mkdir(parents=True, exist_ok=True)
        # The run before holds its state and its programs in cycles. JAX's caches are left alone:
        # they let go of what was collected, and keep the small programs that every run needs.
        gc.collect()
        with (workdir / LOG_FILE).open("a") as log, contextlib.redirect_stdout(log):
            try:
                setup = prepare(config, workdir)
            except (ValueError, OSError) as error:
                raise CommandError(f"{config.name}: {error}") from error
            code = train(setup)
        return None if code == ExitCode.PREEMPTED else setup


def calibration(
    intervals: Iterable[tuple[int, int, float, float]], total_steps: int, compile_seconds: float
) -> Calibration:
    """The cost of an update from the second half of a run.

    Args:
        intervals: of ``training_intervals``.
        total_steps: of the run.
        compile_seconds: of the run.
    """
    late = [interval for interval in intervals if 2 * (interval[0] - interval[1]) >= total_steps]
    costs = [1e3 * seconds / steps for _, steps, seconds, _ in late]
    return Calibration(
        median_ms=statistics.median(costs),
        min_ms=min(costs),
        max_ms=max(costs),
        intervals=len(late),
        interval_steps=late[0][1],
        input_wait_fraction=sum(waited for *_, waited in late) / sum(s for _, _, s, _ in late),
        compile_seconds=compile_seconds,
    )


def training_intervals(
    records: Iterable[Mapping[str, float]], batch_size: int
) -> list[tuple[int, int, float, float]]:
    """What lies between two log lines of a run.

    The trainer's rate counts training alone: no compile, no evaluation, no save. A resumed run
    may have repeated the first updates of an interval; they are counted once, at the rate of those
    that were logged.

    Args:
        records: of ``metrics.jsonl``.
        batch_size: examples of an update.

    Returns:
        (last step, updates, seconds of training, seconds of these spent waiting for input).
    """
    intervals, before = [], 0
    for record in records:
        if _RATE in record:
            end = int(record["step"])
            seconds = (end - before) * batch_size / record[_RATE]
            intervals.append((end, end - before, seconds, seconds * record[_WAIT]))
            before = end
    return intervals


def compile_seconds(records: Iterable[Mapping[str, float]]) -> float:
    """Seconds that compiling all buckets took when the run first started."""
    for record in records:
        found = [value for name, value in record.items() if name.startswith(_COMPILE)]
        if found:
            return sum(found)
    return 0.0


def final_metrics(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The last figure of every evaluator."""
    latest: dict[str, float] = {}
    for record in records:
        latest |= {
            name: value
            for name, value in record.items()
            if name != "step" and name.partition("/")[0] not in LOOP_GROUPS
        }
    return latest


def group_scores(workdir: Path) -> tuple[Group, ...]:
    """Scores by group, from the tables that evaluators write beside their figures.

    A table named ``EVALUATOR_groups`` has a row for each group, see ``vlp_jax.evals.task``.

    Raises:
        ValueError: such a table is damaged.
    """
    groups = []
    for folder in sorted((workdir / ARTIFACTS_FOLDER).glob(f"*{_GROUPS}")):
        table = load(folder)
        if isinstance(table, Table):
            evaluator = folder.name.removesuffix(_GROUPS)
            columns = [table.columns.index(name) for name in _GROUP_COLUMNS]
            for row in table.rows:
                attribute, value, examples, accuracy = (row[column] for column in columns)
                groups.append(
                    Group(evaluator, str(attribute), str(value), int(examples), float(accuracy))
                )
    return tuple(groups)


def _flops_per_sample(setup: Setup) -> float:
    """Model FLOPs of a training example of mean text length; one window holds all lengths.

    Where images are compressed, the mean over the run's updates.
    """
    program = setup.program
    updates = range(min(setup.total_steps, setup.plan.window_batches))
    found: dict[str, list[float]] = {name: [] for name in program.batch_names}
    for t in updates:
        for name, batch in setup.plan.batches(t).items():
            found[name].append(float(batch.length.mean()))
    lengths = {name: float(np.mean(means)) for name, means in found.items() if means}
    # Which batches an update reads, with the sizes of one that does; several if they take turns.
    planned = [setup.plan.bucket(t) for t in updates]
    read = {tuple(dict(sizes)): sizes for sizes in planned}
    turns = collections.Counter(tuple(dict(sizes)) for sizes in planned)
    _, first, counts = np.unique(program.schedule.index, return_index=True, return_counts=True)
    flops, weights = [], []
    for names, sizes in read.items():
        for step, count in zip(first, counts, strict=True):
            flops.append(program.flops(lengths, program.bucket(sizes, int(step))))
            weights.append(count * turns[names] * program.examples(names))
    assert np.isfinite(flops).all()
    return float(np.average(flops, weights=weights))


def _spent(setup: Setup, steps: int) -> float | None:
    """What so many updates cost, in updates of whole images; None where all are such."""
    schedule = setup.program.schedule
    return float(schedule.spent[steps]) if schedule.compresses else None


def _cpu(backend: str) -> dict[str, str | int]:
    """The processor, where it is what computes."""
    if backend != "cpu":
        return {}
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count() or 1}


def _commit() -> str:
    """The commit of this checkout, ``+`` where files were changed since; "unknown" without git."""
    try:
        answers = [
            subprocess.run(
                ["git", "-C", str(REPO), *question], capture_output=True, text=True, check=True
            ).stdout.strip()
            for question in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answers[0] + ("+" if answers[1] else "")
