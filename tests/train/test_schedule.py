"""Durations in every unit, and the learning rate at its key steps."""

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.config import default_config
from vlp_jax.train.schedule import Budget, duration, learning_rate, to_steps

BUDGET = Budget(batch_size=64, examples_per_epoch=1000, total_steps=400)


def section(**values: float) -> ConfigDict:
    return ConfigDict({**duration("every"), **{f"every_{k}": v for k, v in values.items()}})


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, None),
        ({"steps": 7}, 7),
        ({"steps": 0}, 0),
        ({"steps": 0, "percent": 5.0}, 0),
        ({"steps": 0, "epochs": 2.0}, 31),
        ({"examples": 6400.0}, 100),
        ({"epochs": 2.0}, 31),  # 2000 / 64, rounded
        ({"percent": 5.0}, 20),
        ({"steps": 7, "percent": 5.0}, 7),
        ({"epochs": 2.0, "percent": 5.0}, 31),
    ],
)
def test_units_and_their_precedence(values: dict[str, float], steps: int | None) -> None:
    assert to_steps(section(**values), "log", "every", BUDGET) == steps


@pytest.mark.parametrize(
    ("values", "budget", "message"),
    [
        ({"steps": -1}, BUDGET, r"config.log.every_steps: -1 is negative"),
        ({"epochs": 1.0}, Budget(64, None, 400), r"config.log.every_epochs: .*unbounded.*_steps"),
        (
            {"steps": 7, "epochs": 1.0},
            BUDGET,
            r"config.log.every_epochs: log.every_steps=7 is given as well.*every_steps=0",
        ),
        ({"percent": 1.0}, Budget(64, 1000), r"config.log.every_percent: .*not known"),
    ],
)
def test_bad_durations_name_the_key(values: dict[str, float], budget: Budget, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_steps(section(**values), "log", "every", budget)


def test_duration_of_the_run_has_no_section() -> None:
    config = default_config()
    config.total_epochs = 1.0
    with pytest.raises(ConfigError, match=r"config.total_epochs: "):
        to_steps(config, "", "total", Budget(64, None))


def rates(at: list[int], **changes: object) -> list[float]:
    config = default_config().schedule
    config.update({"peak": 2.0, "warmup_percent": 5.0, **changes})
    rate = learning_rate(config, BUDGET)
    return [float(rate(jnp.int32(step))) for step in at]


def test_warmup_starts_above_zero_and_ends_at_the_peak() -> None:
    assert rates([0, 9, 19, 20]) == pytest.approx([0.1, 1.0, 2.0, 2.0])


def test_no_warmup() -> None:
    assert rates([0], warmup_steps=0) == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("decay", "halfway"), [("linear", 1.0), ("cosine", 1.0), ("constant", 2.0)]
)
def test_decay_at_half_and_end(decay: str, halfway: float) -> None:
    end = 2.0 if decay == "constant" else 0.0
    assert rates([210, 400, 500], decay=decay) == pytest.approx([halfway, end, end], abs=1e-6)


def test_cosine_is_flat_at_both_ends() -> None:
    start, end = rates([30, 390], decay="cosine")
    assert start > rates([30])[0]
    assert end < rates([390])[0]


def test_rsqrt() -> None:
    assert rates([19, 80, 320], decay="rsqrt") == pytest.approx([2.0, 1.0, 0.5])


def test_final_factor() -> None:
    assert rates([20, 400], final_factor=0.1) == pytest.approx([2.0, 0.2])


def test_cooldown_ends_a_constant_schedule_linearly() -> None:
    values = rates([300, 350, 400], decay="constant", cooldown_steps=100)
    assert values == pytest.approx([2.0, 1.0, 0.0])


def test_bad_schedules_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"config.schedule.decay: 'step' is unknown"):
        rates([0], decay="step")
    with pytest.raises(ConfigError, match=r"config.schedule.warmup: 300 .* 200 of cool-down"):
        rates([0], warmup_steps=300, cooldown_steps=200)
