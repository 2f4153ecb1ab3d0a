"""Statistics of the dropout bits, and that they do not depend on the sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.infra.mesh import batch_sharding, make_mesh
from vlp_jax.models.dropout import dropout, dropout_noise, noise_of

SHAPE = (64, 32, 32)
SIZE = 2**16
NOISE = dropout_noise(jax.random.key(0))


def dropped(rate: float, noise: jax.Array = NOISE, site: str = "a") -> np.ndarray:
    """Where ones become zeros, float64 [SIZE]."""
    out = dropout(jnp.ones(SHAPE), rate, noise, site)
    return np.asarray(out == 0.0, np.float64).reshape(-1)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_mean(rate: float) -> None:
    bits = dropped(rate)
    error = 4 * np.sqrt(rate * (1 - rate) / SIZE)  # four standard deviations
    assert abs(bits.mean() - rate) < error
    out = np.asarray(dropout(jnp.full(SHAPE, 3.0), rate, NOISE, "a"), np.float64)
    assert abs(out.mean() / 3.0 - 1.0) < error / (1 - rate)
    np.testing.assert_allclose(out[out != 0], 3.0 / (1 - rate), rtol=1e-6)


def test_no_structure_along_any_axis() -> None:
    bits = dropped(0.5).reshape(SHAPE)
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        means = bits.mean(axis=others)
        error = 0.5 / np.sqrt(SIZE / SHAPE[axis])
        assert np.abs(means - 0.5).max() < 5 * error


@pytest.mark.parametrize(
    ("noise", "site"),
    [
        (NOISE, "b"),
        (dropout_noise(jax.random.key(1)), "a"),
        (NOISE, "block_01/mlp"),
        (noise_of(NOISE, "text"), "a"),
    ],
    ids=["another site", "another update", "a path", "another pass"],
)
def test_masks_are_independent(noise: jax.Array, site: str) -> None:
    """Neither equal nor shifted copies: no lag correlates two masks."""
    first, second = dropped(0.5) - 0.5, dropped(0.5, noise, site) - 0.5
    spectrum = np.fft.rfft(first).conj() * np.fft.rfft(second)
    correlation = np.fft.irfft(spectrum) / (0.25 * SIZE)
    assert np.abs(correlation).max() < 6 / np.sqrt(SIZE)


def test_same_bits_on_any_sharding() -> None:
    x = jnp.ones(SHAPE)
    drop = jax.jit(lambda x, noise: dropout(x, 0.3, noise, "a"))
    whole = np.asarray(drop(x, NOISE))
    for mesh in (make_mesh(), make_mesh(data=2, fsdp=4)):
        np.testing.assert_array_equal(
            drop(jax.device_put(x, batch_sharding(mesh)), np.asarray(NOISE)), whole
        )


def test_edges() -> None:
    x = jnp.ones(4)
    assert dropout(x, 0.0, NOISE, "a") is x
    assert dropout(x.astype(jnp.bfloat16), 0.5, NOISE, "a").dtype == jnp.bfloat16
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout rate"):
            dropout(x, rate, NOISE, "a")
