"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases and the terminal.

A writer has two methods, ``write(step, values)`` and ``close()``, and the loop knows nothing else
of it. Only process 0 writes; `open_writer` gives every other process a `NullWriter`.
"""

import collections
import importlib.util
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import rich.console
import rich.progress
import rich.table
from tensorboardX import SummaryWriter

from vlp_jax.infra import units
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_id"

# What the terminal shows beside the progress bar, in this order, with a short name for each.
HEADLINES: Mapping[str, str] = {
    "train/loss": "loss",
    "speed/samples_per_second": "",
    "speed/mfu": "MFU",
    "memory/peak_bytes": "memory",
}


class MetricWriter(Protocol):
    """Takes scalars, keyed by path-like names such as ``train/loss``."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records ``values`` as of ``step``, the number of updates made so far."""

    def close(self) -> None:
        """Writes what is pending and releases what is held; nothing may be written after."""


class NullWriter:
    """Writes nothing: what every process but the first gets."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Drops ``values``."""

    def close(self) -> None:
        """Does nothing."""


class MultiWriter:
    """Passes everything on to several writers, in order."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self.writers = tuple(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes ``values`` to every writer."""
        for writer in self.writers:
            writer.write(step, values)

    def close(self) -> None:
        """Closes every writer."""
        for writer in self.writers:
            writer.close()


class JsonlWriter:
    """One strict JSON object per line, flushed line by line: ``{"step": 12, "train/loss": 1.5}``.

    Floats are written with all their digits (``repr``), so equal files mean equal bits. JSON has no
    non-finite numbers; they are written as the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which `read_metrics` (and ``float``) turns back.

    A killed run has written beyond its last checkpoint, possibly half a line. Opening with the
    step of that checkpoint drops what came after it, so that a resumed run leaves the same file
    as one that was never interrupted.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Opens ``path`` for appending.

        Args:
            path: the file; its folder is created.
            resume_step: the step restored from; lines of later steps are dropped. None starts
                a new run: whatever the file holds is dropped.

        Raises:
            ValueError: a line other than the last is no record of metrics.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _records(path)
        text = "".join(line for line, record in kept if record["step"] <= (resume_step or 0))
        # Renaming is atomic: a kill in between leaves the old file or the new one, never a part.
        fresh = path.with_name(path.name + ".new")
        with fresh.open("w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        self._file = path.open("a", encoding="ascii")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; ``values`` keep their order."""
        record: dict[str, int | float | str] = {"step": int(step)}
        record.update(strict(values))
        # One call with the newline in it, so that a kill tears at most the last line.
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard event files, through tensorboardX (no TensorFlow)."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        """Opens a new event file in ``folder``.

        Args:
            folder: where the event files of the run lie.
            resume_step: the step restored from; TensorBoard hides older events of later steps.
        """
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(logdir=str(folder), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        """Writes pending events and closes the file."""
        self._writer.close()


def check_wandb(project: str) -> None:
    """Refuse `log.wandb` where the package is absent.

    Raises:
        ConfigError: ``project`` is given and the package `wandb` is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "log.wandb",
            f"{project!r} needs the package wandb, which is not installed",
            "Run `pip install vlp_jax[wandb]`, or set it to '' to go without",
        )


class WandbWriter:
    """Weights & Biases; needs the extra ``wandb`` and is asked for by ``log.wandb``."""

    def __init__(
        self,
        workdir: Path,
        project: str,
        name: str,
        config: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        """Starts, or resumes, the W&B run of ``workdir``.

        Args:
            workdir: folder of the run; W&B keeps its files there.
            project: W&B project.
            name: W&B run name. What tells the run from others is a file in its workdir: two of one
                name are two runs, and a resumed one goes on.
            config: shown beside the curves.
            resumed: whether the run goes on; without that file it is an old one, told by its name.

        Raises:
            ConfigError: see ``check_wandb``.
        """
        check_wandb(project)
        import wandb

        identity = workdir / WANDB_FILE
        if not identity.exists():
            write_text(identity, name if resumed else uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity.read_text(),
            resume="allow",
            dir=str(workdir),
            config=dict(config or {}),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs ``values`` at ``step``."""
        self._run.log(dict(values), step=int(step))

    def close(self) -> None:
        """Uploads what is pending and ends the W&B run."""
        self._run.finish()


class Terminal:
    """A progress bar with ETA, samples/s, MFU, memory and loss; plain lines where there is no tty.

    What the train loop writes (``train/``, ``speed/``, ...) moves the bar; any other group
    (an evaluator's) is printed once, in full, above it.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: rich.console.Console | None = None,
        interval_seconds: float = 10.0,
    ) -> None:
        """Shows the bar at ``start_step``.

        Args:
            total_steps: steps of the whole run.
            start_step: the step restored from.
            console: where to draw; standard output by default.
            interval_seconds: without a tty, the least time between two progress lines; the first
                and the last step are always printed.
        """
        self.total_steps = total_steps
        self._console = console or rich.console.Console(file=sys.stdout, highlight=False)
        self._interval = interval_seconds
        self._last_line = -math.inf
        self._latest: dict[str, float] = {}
        # Recent (time, step), so that the ETA follows a change of bucket but not every jitter.
        self._pace = collections.deque([(time.monotonic(), start_step)], maxlen=20)
        self._bar: rich.progress.Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)
            self._bar.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar to ``step``, or prints the results of an evaluator."""
        results = {name: value for name, value in values.items() if not _is_progress(name)}
        if results:
            facts = [f"{name} {units.format_value(name, value)}" for name, value in results.items()]
            self.message("  ".join([f"step {step:,}", *facts]))
        if len(results) == len(values):
            return
        self._latest.update(values)
        if step > self._pace[-1][1]:
            self._pace.append((time.monotonic(), step))
        facts = [
            f"{label} {units.format_value(name, self._latest[name])}".strip()
            for name, label in HEADLINES.items()
            if name in self._latest
        ]
        if step < self.total_steps and len(self._pace) > 1:
            facts.append(f"ETA {units.format_seconds(self._seconds_left(step))}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description="  ".join(facts))
        elif step >= self.total_steps or time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            share = f"{100 * step // max(self.total_steps, 1)} %"
            self.message("  ".join([f"step {step:,}/{self.total_steps:,}  {share}", *facts]))

    def message(self, text: str) -> None:
        """Prints a line above the bar; ``text`` is plain, its brackets are no markup."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the cursor back."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, step: int) -> float:
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        return (self.total_steps - step) * (last_time - first_time) / (last_step - first_step)


def open_writer(
    workdir: Path,
    total_steps: int,
    *,
    primary: bool,
    resume_step: int | None = None,
    tensorboard: bool = True,
    wandb_project: str = "",
    config: Mapping[str, Any] | None = None,
) -> MetricWriter:
    """The writers of a run.

    Args:
        workdir: folder of the run.
        total_steps: steps of the whole run, for the progress bar.
        primary: whether this is process 0; the others get a `NullWriter`.
        resume_step: the step restored from; None for a new run.
        tensorboard: whether to write TensorBoard events (`log.tensorboard`).
        wandb_project: W&B project (`log.wandb`); empty for none.
        config: the run's config, for W&B.

    Raises:
        ConfigError: ``wandb_project`` is given and the package `wandb` is not installed.
        ValueError: `metrics.jsonl` is damaged, see `JsonlWriter`.
    """
    if not primary:
        return NullWriter()
    writers: list[MetricWriter] = []
    if wandb_project:
        resumed = resume_step is not None
        writers.append(WandbWriter(workdir, wandb_project, workdir.resolve().name, config, resumed))
    writers.append(JsonlWriter(workdir / METRICS_FILE, resume_step))
    if tensorboard:
        writers.append(TensorBoardWriter(workdir / TENSORBOARD_FOLDER, resume_step))
    writers.append(Terminal(total_steps, start_step=resume_step or 0))
    return MultiWriter(writers)


def results_table(values: Mapping[str, float]) -> rich.table.Table:
    """The last figures of every evaluator, one row each, for the end of a run.

    Args:
        values: name -> value; what the train loop itself writes is left out.
    """
    table = rich.table.Table("evaluator", "figure", rich.table.Column("value", justify="right"))
    for name, value in sorted(values.items()):
        if not _is_progress(name):
            evaluator, _, figure = name.partition("/")
            table.add_row(evaluator, figure, units.format_value(name, value))
    return table


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The records of ``workdir/metrics.jsonl``, oldest first; a torn last line is left out.

    Args:
        workdir: folder of the run.

    Returns:
        One dict per line with ``step`` (int) and the values (float); empty without the file.

    Raises:
        ValueError: a line other than the last is no record of metrics.
    """
    return [record for _, record in _records(workdir / METRICS_FILE)]


def _records(path: Path) -> list[tuple[str, dict[str, float]]]:
    """The lines of ``path`` with the record each holds, without a torn last line."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            values = {name: float(value) for name, value in record.items()}
            values["step"] = int(record["step"])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: no record of metrics ({line[:40]!r}...); "
                "remove this line to go on with the others"
            ) from error
        records.append((line.decode("ascii") + "\n", values))
    return records


def strict(values: Mapping[str, float]) -> dict[str, float | str]:
    """The values as strict JSON holds them: those that are not finite by name."""
    return {name: _strict(float(value)) for name, value in values.items()}


def _strict(value: float) -> float | str:
    """``value``, or its name where JSON has no number for it."""
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _is_progress(name: str) -> bool:
    return name.split("/", 1)[0] in ("train", "data", "speed", "memory", "compile", "search")
