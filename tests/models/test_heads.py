"""The contrastive scale and unit vectors, where their gradients could be lost or explode."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_model

from vlp_jax.models.heads import MAX_SCALE, ContrastiveHead, ProjectionHead, unit


@pytest.fixture(scope="module")
def head():
    return ContrastiveHead(tiny_model().config.text, 4)


def scale_of(head, log_scale):
    features = jnp.ones((1, 32))
    params = head.init(jax.random.key(0), features, features)["params"]
    return head.apply({"params": params | {"log_scale": log_scale}}, features, features)[2]


def test_the_scale_ends_at_its_limit_and_finds_back(head):
    beyond = jnp.asarray(np.log(2 * MAX_SCALE), jnp.float32)
    assert float(scale_of(head, beyond)) == pytest.approx(MAX_SCALE)
    down = jax.grad(lambda x: scale_of(head, x))(beyond)  # a loss that falls with the scale
    up = jax.grad(lambda x: -scale_of(head, x))(beyond)
    assert (float(down), float(up)) == (pytest.approx(MAX_SCALE), 0.0)
    inside = jnp.asarray(np.log(20.0), jnp.float32)
    assert float(jax.grad(lambda x: -scale_of(head, x))(inside)) == pytest.approx(-20.0)


def test_a_scale_that_was_driven_to_its_limit_follows_the_data_again(head):
    optimizer = optax.adam(2e-2)
    params = jnp.asarray(np.log(14.0), jnp.float32)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, sign):
        gradient = jax.grad(lambda x: sign * scale_of(head, x))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for sign, steps in ((-1.0, 150), (1.0, 60)):
        for _ in range(steps):
            params, state = update(params, state, sign)
    assert float(scale_of(head, params)) < 0.9 * MAX_SCALE


def test_unit_vectors_have_length_one_and_no_wild_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-8, 0.0]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-6)
    assert np.isnan(unit(jnp.array([[jnp.nan, 1.0]]))).all(), "a fault must show"
    gradient = jax.grad(lambda x: unit(x).sum())(x)
    np.testing.assert_array_equal(gradient[1:], 0.0)
    # d/dx of x / |x| in the first component: (y^2 - x y) / |x|^3
    np.testing.assert_allclose(gradient[0], [(16 - 12) / 125, (9 - 12) / 125], rtol=1e-5)


@pytest.mark.parametrize("last_norm", [True, False])
def test_a_projection_head_is_dense_norm_relu_layer_by_layer(last_norm):
    head = ProjectionHead(3, 16, 4, last_norm, jnp.dtype("float32"))
    x = np.asarray(jax.random.normal(jax.random.key(0), (32, 8)), np.float64)
    params = jax.device_get(head.init(jax.random.key(1), jnp.asarray(x, jnp.float32)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * draw.standard_normal(leaf.shape), params)
    tree = params["params"]
    assert ("bias" in tree["dense_2"]) == (not last_norm)
    assert all("bias" not in tree[f"dense_{layer}"] for layer in (0, 1))

    def normed(x):
        return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)

    y = x
    for layer in (0, 1):
        y = normed(y @ tree[f"dense_{layer}"]["kernel"])
        y = np.maximum(0, y * tree[f"norm_{layer}"]["scale"] + tree[f"norm_{layer}"]["bias"])
    y = y @ tree["dense_2"]["kernel"] + tree["dense_2"].get("bias", 0.0)
    y = normed(y) if last_norm else y
    found = head.apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, y, rtol=2e-3, atol=2e-3)
    assert head.flops(8) == 2 * (8 * 16 + 16 * 16 + 16 * 4)
