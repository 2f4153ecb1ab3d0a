"""A signal in the middle of an evaluation: nothing waits for its end, and nothing is lost."""

import os
import pathlib
import signal
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.tiny_config import get_config
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.objectives.base import Params
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare

TOTAL = 4


class Scripted:
    """An evaluator whose figures the parameters give, and that a signal may reach half-way."""

    figures = ("0.3/loss", "base/accuracy")

    def __init__(self, signal_at: int | None = None) -> None:
        self.signal_at = signal_at
        self.ran: list[int] = []

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        self.ran.append(step)
        yield "0.3/loss", float(np.float32(jax.tree.leaves(params)[0].sum()))
        if step == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        yield "base/accuracy", -float(step)  # the first evaluation is the best


def config() -> ConfigDict:
    """A run whose evaluator moves the next update (a bandit learns from it), ranks checkpoints and
    has the last word on the best."""
    config = get_config()
    config.total_steps = TOTAL
    config.checkpoint.every_steps = 2
    config.checkpoint.best_metric = "reconstruction/base/accuracy"
    with config.unlocked():
        rate = {"kind": "bandit", "arms": (0.0, 0.5), "metric": "reconstruction/0.3/loss"}
        config.objectives.flm = {"corruption_rate": rate}
        config.evals.reconstruction.every_steps = 2
        config.evals.last = {**config.evals.reconstruction, "on": "best"}
        del config.evals.last["every_steps"]
    return config


def run(
    config: ConfigDict, workdir: pathlib.Path, *, regular: Scripted, last: Scripted
) -> ExitCode:
    setup = prepare(config, workdir)
    setup.evaluators.update(reconstruction=regular, last=last)
    return train(setup)


def learned(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    timed = ("speed/", "memory/", "compile/", "step")
    return {
        (int(record["step"]), name): value
        for record in read_metrics(workdir)
        for name, value in record.items()
        if not name.startswith(timed)
    }


@pytest.mark.slow
def test_an_evaluation_cut_short_is_done_again(tmp_path):
    """Cut short in the middle of the run, at its end, and at the best checkpoint."""
    settings = config()
    regular, last = Scripted(), Scripted()
    whole = tmp_path / "whole"
    assert run(settings, whole, regular=regular, last=last) == ExitCode.OK
    assert (regular.ran, last.ran) == ([2, TOTAL], [2])

    workdir = tmp_path / "cut"
    for step, expected in ((2, [2]), (TOTAL, [2, TOTAL])):
        regular = Scripted(signal_at=step)
        code = run(settings, workdir, regular=regular, last=Scripted())
        assert (code, regular.ran) == (ExitCode.PREEMPTED, expected)
        assert load_params(workdir / "checkpoints").step == step
        assert (step, "reconstruction/base/accuracy") not in learned(workdir)
    regular, last = Scripted(), Scripted(signal_at=2)
    code = run(settings, workdir, regular=regular, last=last)
    assert (code, regular.ran) == (ExitCode.PREEMPTED, [TOTAL])
    assert last.ran == [2], "a checkpoint that was saved before it was evaluated may be the best"
    regular, last = Scripted(), Scripted()
    assert run(settings, workdir, regular=regular, last=last) == ExitCode.OK
    assert last.ran == [2]

    assert learned(workdir) == learned(whole)
    expected, found = (
        jax.tree.leaves(load_params(folder / "checkpoints", TOTAL).state)
        for folder in (whole, workdir)
    )
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))
