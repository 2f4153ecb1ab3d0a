"""A trainer that pretends, and configs for it: shared by the tests of tools.compare."""

import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from tests.conftest import REPO
from tests.tiny_config import get_config
from tools.compare.cells import Cells
from tools.compare.configs import NamedConfig
from tools.compare.metrics import Metric
from tools.compare.records import Calibration, Measurement
from tools.compare.rows import Settings

METRIC = "reconstruction/base/accuracy"
STEP_SECONDS = 0.01
BUDGET = 10.0  # seconds


def named(label: str = "a", skill: float = 1.0, **changes: Any) -> NamedConfig:
    """A tiny config; the fake score rises with ``skill``, which sits in the decay of weights.

    Args:
        label: of the config.
        skill: the score at a given number of steps is that of ``skill`` times as many.
        changes: values by dotted key.
    """
    config = get_config()
    config.optim.weight_decay = skill
    config.update_from_flattened_dict(changes)
    return NamedConfig(label, f"{label}.py", config.lock())


def finetune(label: str = "vqa", steps: int = 100, evaluator: str = "") -> NamedConfig:
    """A config that can start from another run; its evaluator has the name of the config."""
    config, evaluator = get_config(), evaluator or label
    config.total_steps = steps
    config.adopt_model = True
    with config.unlocked():
        config.evals = {evaluator: {"type": "task", "every_steps": 5}}
    config.checkpoint.best_metric = f"{evaluator}/base/accuracy"
    return NamedConfig(label, f"{label}.py", config.lock())


def curve(steps: float) -> float:
    """Score after so many steps: linear in the logarithm, 0.6 at 1,000."""
    return 0.2 * math.log10(steps)


class FakeTrainer:
    """Scores follow ``curve``, best at a rate of 2e-3 and a little apart between seeds.

    Attributes:
        runs: (label, config) of every run, in order.
        step: seconds of an update as the runs log it; calibration reads ``STEP_SECONDS``.
        wait: share of the time that a calibration waits for input.
        stop_at: run number at which a signal comes.
        alter: changes the measurement of a run.
    """

    def __init__(self, device: str = "fast chip"):
        self.machine: Mapping[str, Any] = {"device_kind": device, "device_count": 1}
        self.versions = {"jax": "1"}
        self.commit = "abc"
        self.runs: list[tuple[pathlib.Path, ConfigDict]] = []
        self.calibrations: list[ConfigDict] = []
        self.step = STEP_SECONDS
        self.wait = 0.0
        self.stop_at: int | None = None
        self.alter: Callable[[ConfigDict, dict[str, Any]], dict[str, Any]] = lambda _, facts: facts

    def calibrate(self, config: ConfigDict, workdir: pathlib.Path) -> Calibration | None:
        self.calibrations.append(config)
        cost = 1e3 * STEP_SECONDS
        return Calibration(cost, 0.9 * cost, 1.2 * cost, 3, 32, self.wait, 7.0)

    def run(self, config: ConfigDict, workdir: pathlib.Path) -> Measurement | None:
        self.runs.append((workdir, config))
        if self.stop_at is not None and len(self.runs) > self.stop_at:
            return None
        (workdir / "checkpoints" / str(config.total_steps)).mkdir(parents=True)
        rate_loss = 0.05 * abs(math.log2(config.schedule.peak / 2e-3))
        score = curve(config.total_steps * config.optim.weight_decay) - rate_loss
        score += 0.001 * config.seed
        evaluator = next(iter(config.evals))
        facts = {
            "status": "finished",
            "reason": "",
            "steps": config.total_steps,
            "samples": config.total_steps * config.data.batch_size,
            "wall_seconds": config.total_steps * self.step,
            "wall_input_wait_seconds": 0.0,
            "compile_seconds": 3.0,
            "flops_per_sample": 1e6,
            "metrics": {f"{evaluator}/base/accuracy": score, f"{evaluator}/base/loss": 1 - score},
        }
        return Measurement(**self.alter(config, facts))


def settings(*configs: NamedConfig, **changes: Any) -> Settings:
    """A comparison with two seeds and two budgets, one of a hundredth."""
    defaults: dict[str, Any] = {
        "configs": configs,
        "budget_seconds": BUDGET,
        "fractions": (0.01, 1.0),
        "tune_fraction": 1.0,
        "seeds": 2,
        "rates": ("x1",),
        "metrics": (Metric(METRIC, 1),),
        "tune_metric": Metric(METRIC, 1),
        "finetunes": (),
        "baselines": (configs[0].label,),
        "max_input_wait": 0.03,
    }
    return Settings(**(defaults | changes))


def open_cells(
    folder: pathlib.Path, trainer: FakeTrainer, runs: float = math.inf, **options: Any
) -> Cells:
    """Cells of one invocation, which may start so many runs; calibrations come on top."""
    limit = len(trainer.runs) + runs
    return Cells(
        folder,
        trainer,
        lambda: len(trainer.runs) < limit,
        calibration_steps=64,
        say=lambda text: None,
        **options,
    )


def silent(text: str) -> None:
    """Says nothing."""


class Command:
    """Starts the comparison of two variants of the tiny config in subprocesses."""

    def __init__(self, folder: pathlib.Path):
        self.out = folder / "out"
        self.config = folder / "tiny.py"
        self.config.write_text(
            "from tests.tiny_config import get_config as tiny\n"
            "def get_config(arg=None):\n"
            "    config = tiny()\n"
            "    config.objectives.flm.corruption_rate = float(arg)\n"
            "    return config\n"
        )

    def start(self, *flags: str) -> subprocess.Popen[str]:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tools.compare"),
                *(f"{self.config}:0.1", f"{self.config}:0.5", f"--out={self.out}"),
                *("--budget_seconds=1", "--fractions=1,1/2", f"--metric={METRIC}"),
                # The machine of a test may do anything else at the same time.
                *("--max_input_wait=1", "--calibration_steps=16"),
                *flags,
            ],
            cwd=REPO,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    def facts(self) -> dict:
        return json.loads((self.out / "compare.json").read_text())
