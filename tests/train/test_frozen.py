"""What is frozen stays bit for bit, has no moments, and costs no gradient."""

import re

import jax
import numpy as np
import pytest
from tiny import BUCKET, make_batch, make_program, objective_config

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path

PATTERN = "^(image_tower|text_lower_0/mlp/out/kernel$)"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_frozen_stays_and_the_rest_moves_as_beside_trained_ones(accumulation: int) -> None:
    """A large eps keeps rounding errors of vanishing gradients from full-size updates."""
    states, compiled, programs = {}, {}, {}
    for factor in (0.0, 1.0):
        config = objective_config(
            "mlm",
            {},
            **{"optim.clip_norm": 0.0, "optim.eps": 1e-3, "optim.accumulation": accumulation},
        )
        with config.unlocked():
            config.optim.groups.frozen = {"pattern": PATTERN, "rate_factor": factor}
        program = programs[factor] = make_program(config)
        compiled[factor] = program.lower(BUCKET).compile()
        state = program.init()
        begun = by_path(jax.device_get(state.params))
        batches, moment = program.batches({"pairs": make_batch()}), program.moment(50)
        states[factor], _ = compiled[factor](state, batches, moment)
    frozen, free = (by_path(states[factor].params) for factor in (0.0, 1.0))
    for path, leaf in begun.items():
        still = re.search(PATTERN, path) is not None
        assert np.array_equal(frozen[path], leaf) == still, path
        assert not np.array_equal(free[path], leaf), path
        if not still:
            np.testing.assert_allclose(frozen[path], free[path], atol=1e-6)
    moments = [path for path in by_path(states[0.0].opt_state) if "/mu/" in path]
    moved = {path for path in begun if not re.search(PATTERN, path)}
    assert {path.partition("/mu/")[2] for path in moments} == moved
    costs = {factor: one.cost_analysis()["flops"] for factor, one in compiled.items()}
    assert costs[0.0] < 0.9 * costs[1.0]
    share = sum(leaf.size for path, leaf in begun.items() if path in moved)
    share /= sum(leaf.size for leaf in begun.values())
    lengths = {"pairs": 12.0}
    told = {factor: one.flops(lengths) for factor, one in programs.items()}
    assert told[0.0] / told[1.0] == pytest.approx((2 + share) / 3)


def test_a_run_in_which_nothing_is_trained_is_refused() -> None:
    config = objective_config("mlm", {})
    with config.unlocked():
        config.optim.groups.frozen = {"pattern": ".", "rate_factor": 0.0}
    with pytest.raises(ConfigError, match=r"optim\.groups: they freeze every parameter"):
        make_program(config)
