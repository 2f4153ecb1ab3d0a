"""Rules for the corruption rate of FLM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import compile_run, make_batch, objective_config

from vlp_jax.objectives.corruption import build_corruption

KEYS = jax.random.split(jax.random.key(0), 2000)


def rule(section):
    return build_corruption(section, "objectives.flm.corruption_rate")


def test_a_number_is_a_fixed_rate():
    np.testing.assert_array_equal(rule(0.3).rates({}, KEYS), np.float32(0.3))


def test_a_range_draws_for_each_text():
    rates = np.asarray(rule({"kind": "range", "low": 0.2, "high": 0.6}).rates({}, KEYS))
    assert rates.min() >= 0.2
    assert rates.max() <= 0.6
    assert rates.mean() == pytest.approx(0.4, abs=0.01)
    assert rates.std() == pytest.approx(0.4 / 12**0.5, abs=0.01)


def test_a_schedule_follows_its_points():
    subject = rule({"kind": "schedule", "points": ((0.0, 0.1), (0.5, 0.5), (1.0, 0.3))})
    seen = [float(subject.rates({}, KEYS, share)[0]) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(seen, [0.1, 0.3, 0.5, 0.4, 0.3], rtol=1e-6)
    assert subject.mean_rate == pytest.approx(0.35, abs=1e-3)


def test_a_bandit_tries_all_and_settles_on_the_fastest():
    subject = rule({"kind": "bandit", "arms": (0.0, 0.2, 0.4), "metric": "m", "discount": 0.95})
    speed = {0.0: 0.01, 0.2: 0.03, 0.4: 0.015}
    memory, loss, used = subject.init(), 5.0, []
    memory = subject.observe(memory, {"m": loss})
    for _ in range(60):
        rate = float(np.round(float(subject.rates(memory, KEYS[:1])[0]), 3))
        used.append(rate)
        loss -= speed[rate] * loss  # falls shrink as training goes on
        memory = subject.observe(memory, {"m": loss})
    assert set(used[:3]) == set(speed)
    assert used[-30:].count(0.2) > 20


def test_a_bandit_ignores_other_evaluators():
    subject = rule({"kind": "bandit", "metric": "m"})
    memory = subject.init()
    after = subject.observe(memory, {"other": 1.0})
    jax.tree.map(np.testing.assert_array_equal, memory, after)


def test_memory_lives_in_the_state():
    """The extras change with training and with what evaluators report, and nothing else does."""
    rate = {"kind": "bandit", "metric": "m", "arms": (0.0, 0.5)}
    run = compile_run(objective_config("flm", {"corruption_rate": rate}))
    state = run.program.observe(run.init(), {"m": 3.0})
    state = run.program.observe(state, {"m": 2.0})
    assert int(state.extras["objectives"]["flm"]["arm"]) == 1
    state, metrics = run(state, make_batch())
    assert metrics["flm/corruption_rate"] == 0.5
    assert float(state.extras["objectives"]["flm"]["last"]) == 2.0


@pytest.mark.slow
def test_a_schedule_follows_the_budget_under_accumulation():
    rate = {"kind": "schedule", "points": ((0, 0), (1, 1))}
    config = objective_config("flm", {"corruption_rate": rate}, **{"optim.accumulation": 2})
    run = compile_run(config)
    state = run.init().replace(step=jnp.asarray(25, jnp.int32))
    _, metrics = run(state, make_batch())
    assert metrics["flm/corruption_rate"] == pytest.approx(25 / config.total_steps)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (1.5, "corruption_rate"),
        ({"kind": "guess"}, "corruption_rate.kind"),
        ({"kind": "range", "low": 0.5, "high": 0.1}, "corruption_rate.low"),
        ({"kind": "range", "hihg": 0.1}, "corruption_rate.hihg"),
        ({"kind": "schedule", "points": ((0.5, 0.1), (0.2, 0.1))}, "corruption_rate.points"),
        ({"kind": "schedule", "points": (0.1, 0.5)}, "corruption_rate.points"),
        ({"kind": "schedule", "points": ((0.0, "much"),)}, "corruption_rate.points"),
        ({"kind": "bandit", "arms": (0.1,)}, "corruption_rate.arms"),
        ({"kind": "bandit", "exploration": float("nan")}, "corruption_rate.exploration"),
        ("0.3", "corruption_rate"),
    ],
)
def test_bad_rules_name_the_key(section, key):
    with pytest.raises(ValueError, match=rf"config\.objectives\.flm\.{key}: "):
        rule(section)
