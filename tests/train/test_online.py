"""An online schedule: decided by the run's gradients, kept in its state, the same after a stop."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.tiny_config import get_config
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.bucket_schedule import Resolved
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare

BUCKETS, COSTS = ("p16@16", "whole"), (0.25, 1.0)
DECISIONS = 3


def config() -> ConfigDict:
    config = get_config()
    config.total_steps = 24
    config.evals = {}
    config.objectives = {"itc": {"embedding_dim": 8}}  # compiles fast
    config.checkpoint.best_metric = ""
    config.checkpoint.every_steps = 5
    config.checkpoint.keep_latest = 99
    section = config.compression
    section.schedule = "online"
    section.buckets = BUCKETS
    section.costs = COSTS
    section.decisions = DECISIONS
    section.overhead_percent = 90.0  # of 24 updates, so that four batches are compared
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("online") / "whole"
    assert train(prepare(config(), workdir)) == ExitCode.OK
    return workdir


def decisions(workdir: pathlib.Path) -> dict[int, int]:
    return {
        int(record["step"]): int(record["compression/decided"])
        for record in read_metrics(workdir)
        if "compression/decided" in record
    }


def test_parts_of_the_budget_begin_where_their_decisions_fall():
    held = Resolved(((), (), ()), (0.25, 0.5, 1.0), None, decisions=4)
    first = held.over(100, 0)
    assert first.total_steps == 400  # all in the cheapest
    assert first.decided_at == (0, 100, 200, 300)
    later = held.over(100, 0, (0, 1))
    assert later.decided_at == (0, 100, 150, 200)
    assert later.total_steps == 250
    np.testing.assert_array_equal(later.index, [0] * 100 + [1] * 150)
    last = held.over(100, 0, (0, 1, 1, 2))
    np.testing.assert_array_equal(last.index[:200], later.index[:200])  # the past stays
    assert last.total_steps == 100 + 50 + 50 + 25
    assert last.spent[-1] == pytest.approx(100)


@pytest.mark.slow
def test_a_run_decides_as_it_goes_and_ends_with_its_budget(whole):
    made = decisions(whole)
    assert len(made) == DECISIONS
    choices = list(made.values())
    assert choices == sorted(choices)
    program = prepare(config(), whole).program
    expected = program.compression.over(24, 0, choices)
    assert list(made) == list(expected.decided_at)
    facts = json.loads((whole / "run.json").read_text())
    assert facts["step"] == facts["total_steps"] == expected.total_steps
    assert facts["compile_seconds"]["decisions"] > 0
    assert 0 < facts["decisions_share_of_time"] < 1
    record = next(r for r in read_metrics(whole) if "compression/decided" in r)
    assert record["compression/probe_seconds"] > 0
    errors = [record[f"compression/mse/{name}"] for name in BUCKETS]
    assert np.argmin(errors) == choices[0]
    # Rates follow what was decided: the last is that of a budget nearly spent.
    rates = [r["train/learning_rate"] for r in read_metrics(whole) if "train/loss" in r]
    assert len(rates) == expected.total_steps
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.slow
def test_a_run_that_was_stopped_decides_the_same(whole, tmp_path):
    """Bit for bit, from the last checkpoint before a decision that is not the first."""
    steps = sorted(int(p.name) for p in (whole / "checkpoints").iterdir())
    expected = load_params(whole / "checkpoints", "latest")
    second = sorted(decisions(whole))[1]
    kept = max(step for step in steps if step <= second)
    workdir = tmp_path / "again"
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("metrics.jsonl"))
    for step in steps:
        if step > kept:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    assert train(prepare(config(), workdir)) == ExitCode.OK
    again = load_params(workdir / "checkpoints", "latest")
    assert again.step == expected.step
    jax.tree.map(np.testing.assert_array_equal, again.state, expected.state)
    # One that falls on the checkpoint's own step was made after it, and is made again.
    later = {step: choice for step, choice in decisions(whole).items() if step >= kept}
    assert decisions(workdir) == later
    assert len(later) >= 2


def test_decisions_take_as_many_batches_as_their_share_of_the_budget_allows(tmp_path):
    settings = config()
    settings.total_steps = 4_000
    settings.compression.decisions = 10
    settings.compression.overhead_percent = 5.0
    decider = prepare(settings, tmp_path / "run").decider
    # 5 % of 4,000 in ten decisions: 20 updates each; a batch costs 1 (whole) + 0.25.
    assert decider.batches == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"overhead_percent": 5.0}, "compression.decisions: 3 of them may take 0.4 updates"),
        ({"decisions": 0}, "compression.decisions: 0"),
        ({"overhead_percent": 0.0}, "compression.overhead_percent: 0.0"),
        ({"costs": (1.5, 1.0)}, "compression.buckets: their costs .* do not rise"),
        ({"shares": (1.0, 1.0)}, "compression.shares: are not read by 'online'"),
    ],
)
def test_bad_input_names_the_key(tmp_path, overrides, message):
    settings = config()
    settings.compression.update(overrides)
    with pytest.raises(ConfigError, match=message):
        prepare(settings, tmp_path / "run")
