"""A trainer that pretends, and configs for it: shared by the tests of tools.compare."""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from tests.tiny_config import get_config
from tools.compare.cells import Cells, Measurement
from tools.compare.comparison import Metric, Settings
from tools.compare.configs import NamedConfig

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


def finetune(label: str = "vqa") -> NamedConfig:
    """A config that can start from another run."""
    config = get_config()
    with config.unlocked():
        config.evals = {label: {"type": "task", "every_steps": 5}}
    config.checkpoint.best_metric = f"{label}/base/accuracy"
    return NamedConfig(label, f"{label}.py", config.lock())


def curve(steps: float) -> float:
    """Score after so many steps: linear in the logarithm, 0.6 at 1,000."""
    return 0.2 * math.log10(steps)


class FakeTrainer:
    """Scores follow ``curve``, best at a rate of 2e-3 and a little apart between seeds.

    Attributes:
        runs: (label, config) of every run, in order.
        step: seconds of an update as the runs have it; calibration reads ``STEP_SECONDS``.
        wait: share of the time that runs wait for input.
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

    def step_seconds(self, config: ConfigDict, workdir: pathlib.Path) -> float | None:
        self.calibrations.append(config)
        return STEP_SECONDS

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
            "seconds": config.total_steps * self.step,
            "input_wait_seconds": config.total_steps * self.step * self.wait,
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
        "seeds": 2,
        "rates": ("x1",),
        "metrics": (Metric(METRIC, 1),),
        "tune_metric": Metric(METRIC, 1),
        "finetunes": (),
        "baselines": (configs[0].label,),
        "max_input_wait": 0.03,
    }
    return Settings(**(defaults | changes))


def open_cells(folder: pathlib.Path, trainer: FakeTrainer, runs: float = math.inf) -> Cells:
    """Cells of one invocation, which may start so many runs; calibrations come on top."""
    limit = len(trainer.runs) + runs
    return Cells(
        folder,
        trainer,
        lambda: len(trainer.runs) < limit,
        max_input_wait=0.03,
        calibration_steps=64,
        say=lambda text: None,
    )


def silent(text: str) -> None:
    """Says nothing."""
