"""Groups by path, decay masks, clipping and the moving average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tiny import make_program, tiny_config

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import leaf_path
from vlp_jax.train.optim import decay_mask, moving_average, optimizer, rate_factors


@pytest.fixture(scope="module")
def params() -> Any:
    """Shapes of the parameters of the tiny model."""
    return make_program(tiny_config()).state_spec.params


def by_path(tree: Any) -> dict[str, Any]:
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def optim_config(**groups: dict[str, Any]) -> ConfigDict:
    config = tiny_config().optim
    with config.unlocked():
        config.groups = ConfigDict(groups)
    return config


def test_decay_spares_biases_norms_and_embeddings(params: Any) -> None:
    mask = by_path(decay_mask(optim_config(), params))
    spared = ("bias", "scale", "embedding", "class_token")
    for path, decayed in mask.items():
        assert decayed != path.endswith(spared), path
    assert mask["text_lower_0/self_attention/query/kernel"]
    assert mask["image_tower/patch_embedding/kernel"]
    assert mask["vocabulary_head/decoder_kernel"]
    assert not mask["text_lower_0/self_attention/query/bias"]  # [H, d], a matrix in shape


def test_first_matching_group_counts(params: Any) -> None:
    config = optim_config(
        head={"pattern": "vocabulary_head", "rate_factor": 5.0},
        image={"pattern": "^image_", "rate_factor": 0.1},
        kernels={"pattern": "kernel$", "rate_factor": 2.0},
    )
    factors = by_path(rate_factors(config, params))
    assert factors["vocabulary_head/decoder_kernel"] == 5.0
    assert factors["image_tower/block_00/mlp/in/kernel"] == 0.1
    assert factors["text_lower_0/mlp/in/kernel"] == 2.0
    assert factors["text_lower_0/mlp/in/bias"] == 1.0


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"pattern": "visual"}, r"visual\.rate_factor: missing\. Add it"),
        ({"rate_factor": 1.0}, r"visual\.pattern: missing\. Add it"),
        ({"pattern": "", "rate_factor": 1.0}, r"visual\.pattern: missing"),
        (
            {"patern": "visual", "rate_factor": 1.0},
            r"visual\.patern: unknown key\. Perhaps you mean 'pattern'",
        ),
        ({"pattern": "(", "rate_factor": 1.0}, r"visual\.pattern: '\(' is no regular expression"),
        ({"pattern": 5, "rate_factor": 1.0}, r"visual\.pattern: 5 is no regular expression"),
        (
            {"pattern": "visual", "rate_factor": 1.0},
            r"visual\.pattern: 'visual' matches no parameter .*Match paths below .*image_tower",
        ),
        ({"pattern": "^image_", "rate_factor": "fast"}, r"visual\.rate_factor: 'fast'"),
        ({"pattern": "^image_", "rate_factor": -1.0}, r"visual\.rate_factor: -1\.0"),
        ({"pattern": "^image_", "rate_factor": float("nan")}, r"visual\.rate_factor: nan"),
        (5.0, r"visual: 5\.0 is no section\. Set `pattern` and `rate_factor`"),
    ],
)
def test_bad_groups_name_the_key_and_the_remedy(params: Any, group: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.optim\.groups\.{message}"):
        optimizer(optim_config(visual=group), params)


def test_a_group_in_the_shadow_of_another_is_refused(params: Any) -> None:
    config = optim_config(
        image={"pattern": "^image_", "rate_factor": 1.0},
        patches={"pattern": "^image_tower/patch", "rate_factor": 2.0},
    )
    with pytest.raises(
        ConfigError, match=r"groups\.patches\.pattern: .*those of a group before it"
    ):
        rate_factors(config, params)


def test_a_bad_pattern_of_decay_names_the_key(params: Any) -> None:
    config = optim_config()
    config.no_decay = "["
    with pytest.raises(ConfigError, match=r"config.optim.no_decay"):
        decay_mask(config, params)


def tree(**leaves: Any) -> Any:
    return {name: jnp.asarray(value, jnp.float32) for name, value in leaves.items()}


WEIGHTS = tree(kernel=[[1.0, -2.0]], bias=[3.0])
GRADIENTS = tree(kernel=[[3.0, 0.0]], bias=[-4.0])


def first_update(**changes: Any) -> Any:
    config = optim_config(fast={"pattern": "bias", "rate_factor": 10.0})
    config.update(changes)
    transform = optimizer(config, WEIGHTS)
    updates, _ = transform.update(GRADIENTS, transform.init(WEIGHTS), WEIGHTS)
    return updates


def test_update_is_adamw_times_the_factor() -> None:
    """The first step of Adam is the sign of the gradient; decay adds 0.01 w to matrices only."""
    updates = first_update()
    np.testing.assert_allclose(updates["kernel"], [[1.01, -0.02]], atol=1e-6)
    np.testing.assert_allclose(updates["bias"], [-10.0], rtol=1e-6)


def test_matches_optax_adamw() -> None:
    config = optim_config()
    config.clip_norm = 0.0
    ours = optimizer(config, WEIGHTS)
    mask = {"kernel": True, "bias": False}
    theirs = optax.adamw(0.1, b1=0.9, b2=0.98, weight_decay=0.01, mask=mask)
    a, b = WEIGHTS, WEIGHTS
    a_state, b_state = ours.init(a), theirs.init(b)
    for step in range(3):
        gradients = jax.tree.map(lambda g, step=step: g * (step - 0.5), GRADIENTS)
        updates, a_state = ours.update(gradients, a_state, a)
        a = jax.tree.map(lambda p, u: p - 0.1 * u, a, updates)
        updates, b_state = theirs.update(gradients, b_state, b)
        b = optax.apply_updates(b, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize(("progress", "decay"), [(0.0, 0.04), (0.5, 0.22), (1.0, 0.4)])
def test_decay_goes_along_a_cosine_to_its_end(progress: float, decay: float) -> None:
    config = optim_config()
    config.update(weight_decay=0.04, final_weight_decay=0.4)
    transform = optimizer(config, WEIGHTS)
    updates, _ = transform.update(
        GRADIENTS, transform.init(WEIGHTS), WEIGHTS, progress=jnp.float32(progress)
    )
    expected = [[1.0 + decay * 1.0, decay * -2.0]]
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-1.0], rtol=1e-5)  # vectors do not decay


@pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (1.0, 0.2), (50.0, 1.0)])
def test_clipping_by_global_norm(clip: float, scale: float) -> None:
    """Seen through a large eps, with which Adam's first step is linear in the gradient (norm 5)."""
    updates = first_update(clip_norm=clip, eps=1e6, weight_decay=0.0)
    np.testing.assert_allclose(updates["kernel"] * 1e6, [[3.0 * scale, 0.0]], rtol=1e-4)
    np.testing.assert_allclose(updates["bias"] * 1e6, [-40.0 * scale], rtol=1e-4)


def test_moving_average() -> None:
    average = moving_average(tree(w=[1.0, 2.0]), {"w": jnp.asarray([3.0, 2.0], jnp.bfloat16)}, 0.9)
    assert average["w"].dtype == jnp.float32
    np.testing.assert_allclose(average["w"], [1.2, 2.0], rtol=1e-6)
