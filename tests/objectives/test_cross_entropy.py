"""The chunked loss against plain log-softmax: values, gradients, and on eight devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.infra.mesh import batch_sharding, make_mesh
from vlp_jax.objectives.cross_entropy import vocabulary_cross_entropy

B, K, D, V, VOCAB = 8, 5, 6, 16, 13


def arguments(dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Features, kernel, bias, labels and weights; some weights are zero, none need be one."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(B, K, D))
    kernel, bias = draw.normal(size=(D, V)), draw.normal(size=V)
    labels = draw.integers(0, VOCAB, (B, K), np.int32)
    weights = draw.choice([0.0, 0.3, 1.0, 2.5], (B, K))
    return (
        jnp.asarray(features, dtype),
        jnp.asarray(kernel, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        jnp.asarray(labels),
        jnp.asarray(weights, jnp.float32),
    )


def plain(
    features: jax.Array, kernel: jax.Array, bias: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, nll and correct over whole logits of the entries that exist."""
    logits = features.astype(jnp.float32) @ kernel[:, :VOCAB]
    logits = logits + jnp.broadcast_to(bias[:VOCAB], logits.shape)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
    counted = weights != 0
    return (nll * weights).sum(), nll * counted, correct * counted


def value_and_gradients(
    function: Callable[..., Any], args: tuple[jax.Array, ...], scale: float = 1.0
) -> Any:
    """(loss, nll, correct) and the gradient of ``scale`` times the loss in the floating inputs."""

    def total(*inputs: jax.Array) -> tuple[jax.Array, Any]:
        out = tuple(function(*inputs, *args[3:]))
        return scale * out[0], out

    (_, out), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*args[:3])
    return out, gradients


def ours(chunk_rows: int) -> Callable[..., Any]:
    return lambda *args: vocabulary_cross_entropy(*args, VOCAB, chunk_rows)


def assert_close(actual: Any, expected: Any, atol: float = 2e-6) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol, rtol=1e-5
        ),
        tuple(actual),
        tuple(expected),
    )


@pytest.mark.parametrize("chunk_rows", [1, 7, 8, 40, 10**6])
def test_equals_log_softmax(chunk_rows: int) -> None:
    args = arguments()
    assert_close(value_and_gradients(ours(chunk_rows), args), value_and_gradients(plain, args))


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_gradient_scales_with_the_cotangent(scale: float) -> None:
    args = arguments()
    assert_close(value_and_gradients(ours(7), args, scale), value_and_gradients(plain, args, scale))


def test_padded_vocabulary_is_never_predicted() -> None:
    features, kernel, bias, labels, weights = arguments()
    bias = bias.at[VOCAB:].set(100.0)  # would win every argmax, and swallow the softmax
    args = (features, kernel, bias, labels, weights)
    (out, gradients) = value_and_gradients(ours(7), args)
    assert_close((out, gradients), value_and_gradients(plain, args))
    assert not np.asarray(gradients[1][:, VOCAB:]).any()
    assert not np.asarray(gradients[2][VOCAB:]).any()


def test_skipped_rows_have_no_influence() -> None:
    features, kernel, bias, labels, weights = arguments()
    skipped = weights == 0
    assert skipped.any()
    poisoned = jnp.where(skipped[..., None], 1e30, features)
    wrong = jnp.where(skipped, VOCAB + 99, labels)
    clean = value_and_gradients(ours(7), (features, kernel, bias, labels, weights))
    assert_close(value_and_gradients(ours(7), (poisoned, kernel, bias, wrong, weights)), clean)
    assert not np.asarray(clean[1][0])[np.asarray(skipped)].any()


def test_no_row_counts() -> None:
    features, kernel, bias, labels, weights = arguments()
    out, gradients = value_and_gradients(
        ours(7), (features, kernel, bias, labels, jnp.zeros_like(weights))
    )
    for leaf in jax.tree.leaves((out, gradients)):
        assert not np.asarray(leaf).any()


def test_scores_carry_no_gradient() -> None:
    args = arguments()
    for field in ("nll", "correct"):
        gradient = jax.grad(lambda f, x=field: getattr(ours(7)(f, *args[1:]), x).sum())(args[0])
        assert not np.asarray(gradient).any()


def test_large_logits_do_not_overflow() -> None:
    features, *rest = arguments()
    (loss, *_), gradients = value_and_gradients(ours(7), (features * 1e4, *rest))
    for leaf in jax.tree.leaves((loss, gradients)):
        assert np.isfinite(leaf).all()


def test_bfloat16_features() -> None:
    """Products in bfloat16, sums in float32: within the rounding of the logits."""
    args = arguments(jnp.bfloat16)
    out, gradients = value_and_gradients(ours(7), args)
    expected, expected_gradients = value_and_gradients(plain, args)
    assert out[0].dtype == jnp.float32
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == gradients[2].dtype == jnp.float32
    np.testing.assert_allclose(out[0], expected[0], rtol=0.01)
    np.testing.assert_allclose(out[1], expected[1], atol=0.06)
    assert_close(gradients, expected_gradients, atol=0.15)


@pytest.mark.parametrize("count", [5_000, 12_289])
def test_a_mean_over_any_count_shifts_no_gradient(count: int) -> None:
    """1 / count in bfloat16 would be off by up to 0.4 %, and the bias would not."""
    args = arguments(jnp.bfloat16)

    def mean(count: float) -> Any:
        return lambda *args: tuple(x / count if i == 0 else x for i, x in enumerate(ours(7)(*args)))

    _, whole = value_and_gradients(mean(1.0), args)
    _, divided = value_and_gradients(mean(float(count)), args)
    for one, other in zip(whole, divided, strict=True):
        size, expected = (np.abs(np.asarray(x, np.float64)).sum() for x in (other, one))
        np.testing.assert_allclose(size * count / expected, 1.0, atol=5e-4)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=["data", "fsdp"])
def test_eight_devices_equal_one(axes: dict[str, int]) -> None:
    mesh = make_mesh(**axes)
    args = arguments()
    rows = batch_sharding(mesh)
    sharded = [jax.device_put(x, rows) if i in (0, 3, 4) else x for i, x in enumerate(args)]
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda *args: value_and_gradients(ours(2), args))(*sharded)
    assert_close(spread, value_and_gradients(plain, args))
