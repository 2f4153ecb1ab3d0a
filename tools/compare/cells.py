"""Finished cells, kept in a folder, and the one way to get another.

A cell is one training run. What it is, is the digest of its complete config and the machine; so
cells of several invocations come together in one table, and a cell of an edited config or of
another machine can never be mixed in: it has another name, and the table says how many such cells
were left out. Layout::

    OUT/calibration/NAME.json        seconds of an update, measured once for each cost
    OUT/cells/NAME/                  workdir of the run: config, metrics, report, log.txt
    OUT/cells/NAME/result.json       what it cost and scored; there only when it has finished
    OUT/compile_cache/               compiled programs, shared by all
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ml_collections import ConfigDict

from tools.compare.configs import NamedConfig, Overrides, cost_digest, digest
from vlp_jax.infra.files import write_text
from vlp_jax.infra.metrics import strict

RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
CHECKPOINT_FOLDER = "checkpoints"
SAVE_SECONDS = 120.0

Machine = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a finished run cost and scored.

    Attributes:
        status: "finished", or "stopped" where the trainer gave up on a run that had diverged.
        reason: why it was stopped.
        steps: updates.
        samples: examples trained on.
        seconds: of training: without compiling, evaluating and saving.
        input_wait_seconds: of these, how long the updates waited for input.
        compile_seconds: of all buckets.
        flops_per_sample: model FLOPs of one example in an update.
        metrics: figures of its evaluators at the end.
    """

    status: Literal["finished", "stopped"]
    reason: str
    steps: int
    samples: int
    seconds: float
    input_wait_seconds: float
    compile_seconds: float
    flops_per_sample: float
    metrics: Mapping[str, float]

    @property
    def input_wait_fraction(self) -> float:
        """Share of the training time that was spent waiting for input."""
        return self.input_wait_seconds / self.seconds if self.seconds else 0.0


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
    finetuning: Mapping[str, Measurement] = dataclasses.field(default_factory=dict)


class Runner(Protocol):
    """Trains: ``measure.Trainer``, or a stand-in of the tests."""

    machine: Machine
    versions: Mapping[str, str]
    commit: str

    def step_seconds(self, config: ConfigDict, workdir: Path) -> float | None:
        """Measure the cost of an update by a short run; None: asked to stop."""
        ...

    def run(self, config: ConfigDict, workdir: Path) -> Measurement | None:
        """Train a config to its end, or go on where it was interrupted; None: asked to stop."""
        ...


class Cells:
    """The cells of a folder.

    Attributes:
        folder: OUT.
        runner: trains what is not there yet.
        interrupted: the process was asked to stop; no cell is started any more.
    """

    def __init__(
        self,
        folder: Path,
        runner: Runner,
        may_start: Callable[[], bool],
        *,
        max_input_wait: float,
        calibration_steps: int,
        keep_checkpoints: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Open the folder; it is made when needed.

        Args:
            folder: OUT.
            runner: trains.
            may_start: whether there is time to start another cell.
            max_input_wait: share of the training time; a run above it is not fine-tuned.
            calibration_steps: length of the runs that measure the cost of an update.
            keep_checkpoints: keep the final states of finished cells.
            say: takes a line about what is being done.
        """
        self.folder = folder
        self.runner = runner
        self.interrupted = False
        self._may_start = may_start
        self._max_input_wait = max_input_wait
        self._calibration_steps = calibration_steps
        self._keep_checkpoints = keep_checkpoints
        self._say = say
        self._used: set[str] = set()

    def step_seconds(self, named: NamedConfig, overrides: Overrides) -> float | None:
        """Seconds of an update, measured once and then kept; None: not measured, and no time to.

        The length of a run follows from it, so it is kept for good: delete the file to measure
        again, and with it go all cells of that config.
        """
        config = named.calibration(steps=self._calibration_steps, overrides=overrides)
        file = self.folder / "calibration" / f"{self._name(cost_digest(config))}.json"
        if not file.exists():
            if not self._can_start():
                return None
            file.parent.mkdir(parents=True, exist_ok=True)
            workdir = file.with_suffix("")
            self._share_compile_cache(config)
            seconds = self.runner.step_seconds(config, workdir)
            shutil.rmtree(workdir, ignore_errors=True)
            if seconds is None:
                self.interrupted = True
                return None
            self._say(f"{named.label}: an update takes {1e3 * seconds:.2f} ms")
            facts = {"label": named.label, "seconds": seconds, "machine": dict(self.runner.machine)}
            write_text(file, json.dumps(facts, indent=2) + "\n")
        return float(json.loads(file.read_text())["seconds"])

    def obtain(
        self,
        named: NamedConfig,
        *,
        budget_seconds: float,
        seed: int,
        overrides: Overrides,
        finetunes: Sequence[NamedConfig] = (),
    ) -> Result | None:
        """A cell: as it was kept, or trained now.

        Args:
            named: its config.
            budget_seconds: training seconds to fill.
            seed: of the run.
            overrides: values by dotted key.
            finetunes: each is run from the cell's checkpoint.

        Returns:
            The result, or None where it is not complete and no other run may be started.
        """
        step_seconds = self.step_seconds(named, overrides)
        if step_seconds is None:
            return None
        config = named.run(
            steps=max(1, round(budget_seconds / step_seconds)),
            seed=seed,
            step_seconds=step_seconds,
            save_seconds=SAVE_SECONDS,
            overrides=overrides,
        )
        identity = digest(config)
        workdir = self._workdir(identity)
        tuning = {
            tune.label: tune.finetuning(seed=seed, init_from=workdir.resolve())
            for tune in finetunes
        }
        identities = {label: digest(config, identity) for label, config in tuning.items()}
        done = {label: self._load(identities[label]) for label in tuning}
        result = self._load(identity)
        if (
            result is not None
            and self._worth_tuning(result)
            and None in done.values()
            and not _has_checkpoint(workdir)
        ):
            self._say(f"{named.label}: to be fine-tuned and its checkpoint is gone, trained again")
            (workdir / RESULT_FILE).unlink()
            result = None
        if result is None:
            result = self._train(named.label, config, identity)
        if result is None or not self._worth_tuning(result):
            return result
        for label, tune_config in tuning.items():
            done[label] = done[label] or self._train(label, tune_config, identities[label])
            if done[label] is None:
                return None
            self._remove_checkpoints(self._workdir(identities[label]))
        self._remove_checkpoints(workdir)
        finetuning = {label: tuned.measurement for label, tuned in done.items() if tuned}
        return dataclasses.replace(result, finetuning=finetuning)

    def left_out(self) -> list[str]:
        """Finished cells of the folder that nobody asked for, counted by why they do not count."""
        reasons: Counter[str] = Counter()
        for file in sorted((self.folder / "cells").glob(f"*/{RESULT_FILE}")):
            if file.parent.name in self._used:
                continue
            machine = json.loads(file.read_text())["machine"]
            if machine != dict(self.runner.machine):
                reasons[f"of another machine ({describe(machine)})"] += 1
            else:
                reasons["of other settings: another command, or a config changed since"] += 1
        return [f"{count} {reason}" for reason, count in reasons.items()]

    def _train(self, label: str, config: ConfigDict, identity: str) -> Result | None:
        if not self._can_start():
            return None
        workdir = self._workdir(identity)
        workdir.mkdir(parents=True, exist_ok=True)
        self._share_compile_cache(config)
        self._say(f"{label}: seed {config.seed}, log in {workdir / LOG_FILE}")
        measured = self.runner.run(config, workdir)
        if measured is None:
            self.interrupted = True
            return None
        runner = self.runner
        result = Result(
            workdir.name, label, identity, runner.machine, runner.versions, runner.commit, measured
        )
        text = json.dumps(_to_json(result), indent=2, allow_nan=False)
        write_text(workdir / RESULT_FILE, text + "\n")
        return result

    def _load(self, identity: str) -> Result | None:
        file = self._workdir(identity) / RESULT_FILE
        self._used.add(file.parent.name)
        return _from_json(json.loads(file.read_text())) if file.exists() else None

    def _can_start(self) -> bool:
        return not self.interrupted and self._may_start()

    def _worth_tuning(self, result: Result) -> bool:
        measured = result.measurement
        return (
            measured.status == "finished" and measured.input_wait_fraction <= self._max_input_wait
        )

    def _share_compile_cache(self, config: ConfigDict) -> None:
        if not config.compile_cache:
            config.compile_cache = str((self.folder / "compile_cache").resolve())

    def _remove_checkpoints(self, workdir: Path) -> None:
        if not self._keep_checkpoints:
            shutil.rmtree(workdir / CHECKPOINT_FOLDER, ignore_errors=True)

    def _workdir(self, identity: str) -> Path:
        return self.folder / "cells" / self._name(identity)

    def _name(self, identity: str) -> str:
        machine = json.dumps(dict(self.runner.machine), sort_keys=True)
        return hashlib.sha256(f"{identity} {machine}".encode()).hexdigest()[:16]


def describe(machine: Machine) -> str:
    """A machine in words."""
    kind = machine.get("cpu") or machine["device_kind"]
    return f"{machine['device_count']} × {kind}"


def _has_checkpoint(workdir: Path) -> bool:
    return any(path.name.isdecimal() for path in (workdir / CHECKPOINT_FOLDER).glob("*"))


def _to_json(result: Result) -> dict[str, Any]:
    facts = dataclasses.asdict(result)
    del facts["finetuning"]
    facts["measurement"]["metrics"] = strict(result.measurement.metrics)
    return facts


def _from_json(facts: dict[str, Any]) -> Result:
    measured = facts["measurement"]
    measured["metrics"] = {name: float(value) for name, value in measured["metrics"].items()}
    return Result(**(facts | {"measurement": Measurement(**measured)}))
