"""Stages end where a held-out curve flattens, and a run that is resumed goes on in its stage."""

import math
import shutil
from typing import Any

import pytest
from two_batches import logged, run_config

from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare
from vlp_jax.train.stages import Stages

SECTION = {
    "stages.batches": ("pairs", "text", "pairs+text"),
    "stages.metrics": ("held/loss", "held/loss"),
    "stages.patience": 1,
    "stages.min_change": 0.9,  # what no evaluation reaches: a stage ends with its second
}


def staged_config(**overrides: Any) -> Any:
    config = run_config(**SECTION)
    with config.unlocked():
        config.evals.held = {
            "type": "heldout",
            "source": "scenes",
            "objective": "ar",
            "num_examples": 16,
            "num_draws": 1,
            "every_steps": 2,
        }
    config.update_from_flattened_dict(overrides)
    return config


def told(stages: Stages, values: list[float]) -> list[int]:
    state, numbers = stages.init(), []
    for value in values:
        state = stages.observe(state, {"held/loss": value, "other": 0.0})
        numbers.append(int(state["number"]))
    return numbers


def test_a_stage_ends_when_its_curve_is_flat():
    stages = Stages((("a",), ("b",), ("a", "b")), ("held/loss", "held/loss"), 2, 0.01)
    falling = [2.0, 1.5, 1.2, 1.0]
    assert told(stages, falling) == [0, 0, 0, 0]
    assert told(stages, [*falling, 0.995, 0.999, 3.0]) == [0, 0, 0, 0, 0, 1, 1]
    # The next stage begins its curve anew, whatever was reached before; the last has no end.
    flat = [0.995, 0.999, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert told(stages, [*falling, *flat]) == [0] * 5 + [1, 1, 1, 2, 2, 2, 2]
    state = stages.init()
    assert stages.observe(state, {"other": 1.0}) == state
    assert math.isinf(float(state["lowest"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(prepare(staged_config(), workdir))
    return workdir


def losses(workdir: Any) -> dict[int, float]:
    return {int(record["step"]): record["train/loss"] for record in logged(workdir)}


@pytest.mark.slow
def test_a_run_reads_what_its_stage_reads(whole):
    records = logged(whole)
    read = [
        {key.split("/")[2] for key in record if key.startswith("train/batch/")}
        for record in records
    ]
    assert read == [{"pairs"}] * 4 + [{"text"}] * 4 + [{"pairs", "text"}] * 4
    assert [record["data/stage"] for record in records] == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_stage(whole, tmp_path):
    """From the checkpoint in the middle of the second stage: as if it had not been stopped."""
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "12")
    train(prepare(staged_config(), parts))
    assert losses(parts) == losses(whole)
    assert sorted(losses(parts)) == list(range(1, 13))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stages.batches", ("pairs", "words", "text"), r"'words' is no batch of this run"),
        ("stages.batches", ("pairs", "pairs", "pairs"), r"no stage reads the batch 'text'"),
        ("stages.metrics", ("held/loss",), r"1 figures end 3 stages"),
        ("stages.metrics", ("held/loss", "x/y"), r"learns from 'x/y', which no evaluator"),
        ("stages.patience", 0, r"stages\.patience: 0"),
        ("stages.batches", (), r"stages\.metrics: end stages that are not given"),
    ],
)
def test_bad_sections_are_named(tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        prepare(staged_config(**{key: value}), tmp_path)
