"""What is kept of a run: what an update costs, what was trained, and what it scored."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ml_collections import ConfigDict

from vlp_jax.infra.metrics import strict

Machine = Mapping[str, Any]

SCRATCH = "from scratch"  # label of what is fine-tuned without pretraining


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The cost of an update, measured by a run that has the device to itself.

    It is the only clock of a comparison: a cell's seconds are its updates times ``seconds``, so
    that they do not depend on what else the device does meanwhile. Every interval holds whole
    windows of the plan and so the same mixture of buckets; they differ by noise alone.

    On an accelerator the clock is the device's own: between two updates of a small model it waits
    for the host, longer on one host than on another, and that wait says nothing of an objective.

    Attributes:
        median_ms: of an update, over the intervals.
        min_ms: in the fastest interval.
        max_ms: in the slowest.
        intervals: how many were measured, after as many that were not.
        interval_steps: updates of each.
        input_wait_fraction: share of the measured time that the updates waited for input.
        compile_seconds: of all buckets, the first time.
        device_ms: of an update, how long the device was busy with it, by the trace of an interval;
            None on a CPU.
    """

    median_ms: float
    min_ms: float
    max_ms: float
    intervals: int
    interval_steps: int
    input_wait_fraction: float
    compile_seconds: float
    device_ms: float | None = None

    @property
    def seconds(self) -> float:
        """Of an update: of the device where that is known, else the median."""
        return (self.median_ms if self.device_ms is None else self.device_ms) / 1e3


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of examples and its score.

    Attributes:
        evaluator: that scored it.
        attribute: by which the groups are made, such as ``colour``.
        value: of the attribute.
        examples: how many were scored.
        accuracy: of them, a fraction of one.
    """

    evaluator: str
    attribute: str
    value: str
    examples: int
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a finished run trained and scored.

    The ``wall`` figures are what the run itself logged, for information: with several runs on a
    device they say how it was shared and not what an update costs.

    Attributes:
        status: "finished", or "stopped" where the trainer gave up on a run that had diverged.
        reason: why it was stopped.
        steps: updates.
        samples: examples trained on.
        wall_seconds: of training: without compiling, evaluating and saving.
        wall_input_wait_seconds: of these, how long the updates waited for input.
        compile_seconds: of all buckets; small where the compilation cache had them.
        flops_per_sample: model FLOPs of one example in an update.
        metrics: figures of its evaluators at the end.
        groups: scores by group, of the evaluators that know groups.
        spent: updates of whole images that would have cost as much; None: as many as ``steps``.
    """

    status: Literal["finished", "stopped"]
    reason: str
    steps: int
    samples: int
    wall_seconds: float
    wall_input_wait_seconds: float
    compile_seconds: float
    flops_per_sample: float
    metrics: Mapping[str, float]
    groups: tuple[Group, ...] = ()
    spent: float | None = None

    def seconds(self, calibration: Calibration) -> float:
        """Of training: updates times the cost of one, those of compressed images by their share."""
        return (self.steps if self.spent is None else self.spent) * calibration.seconds


@dataclasses.dataclass(frozen=True)
class Result:
    """A measurement and where it comes from.

    Attributes:
        name: of the cell's folder.
        label: of the config.
        digest: of the config.
        machine: what it ran on.
        versions: of the packages that compute.
        commit: of the code.
        measurement: of the run.
        seconds: of training: updates times the calibrated seconds of one; None for a fine-tuning
            run, which has no calibration.
        finetuning: label of the fine-tuning config -> its measurement; empty in ``result.json``,
            as each fine-tuning run is a cell of its own.
    """

    name: str
    label: str
    digest: str
    machine: Machine
    versions: Mapping[str, str]
    commit: str
    measurement: Measurement
    seconds: float | None
    finetuning: Mapping[str, Measurement] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        facts = dataclasses.asdict(self)
        del facts["finetuning"]
        facts["measurement"]["metrics"] = strict(self.measurement.metrics)
        return facts

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Result":
        """Read the content of ``result.json``."""
        measured = dict(facts["measurement"])
        measured["metrics"] = {name: float(value) for name, value in measured["metrics"].items()}
        measured["groups"] = tuple(Group(**group) for group in measured["groups"])
        return cls(**(facts | {"measurement": Measurement(**measured)}))


class Runner(Protocol):
    """Trains: ``measure.Trainer``, or a stand-in of the tests."""

    machine: Machine
    versions: Mapping[str, str]
    commit: str

    def calibrate(self, config: ConfigDict, workdir: Path) -> Calibration | None:
        """Measure the cost of an update by a short run; None: asked to stop."""
        ...

    def run(self, config: ConfigDict, workdir: Path) -> Measurement | None:
        """Train a config to its end, or go on where it was interrupted; None: asked to stop."""
        ...


def describe(machine: Machine) -> str:
    """A machine in words."""
    kind = machine.get("cpu") or machine["device_kind"]
    return f"{machine['device_count']} × {kind}"
