"""One vector for several tokens, against loops over the real ones."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.models.pooling import pooled

TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)), jnp.float32)
LENGTHS = (5, 3, 2, 0)


def test_the_class_is_the_first_token_and_the_mean_that_of_the_others() -> None:
    np.testing.assert_array_equal(pooled(TOKENS, "class"), TOKENS[:, 0])
    np.testing.assert_allclose(pooled(TOKENS, "mean"), TOKENS[:, 1:].mean(axis=1), rtol=1e-6)


def test_the_mean_of_a_text_is_that_of_its_real_tokens() -> None:
    """Of one without any, which only fills a batch up, it is zero; and its gradient is no NaN."""
    found = pooled(TOKENS, "mean", jnp.asarray(LENGTHS))
    for row, length in enumerate(LENGTHS):
        words = np.asarray(TOKENS)[row, 1:length]
        np.testing.assert_allclose(found[row], words.mean(axis=0) if len(words) else 0, rtol=1e-6)
    gradient = jax.grad(lambda x: pooled(x, "mean", jnp.asarray(LENGTHS)).sum())(TOKENS)
    for row, length in enumerate(LENGTHS):
        shares = np.zeros(5)
        shares[1:length] = 1 / max(length - 1, 1)
        np.testing.assert_allclose(gradient[row, :, 0], shares, rtol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    """And not a sum first, and then what is divided."""
    tokens = np.random.default_rng(1).normal(size=(4, 8, 64)).astype(jnp.bfloat16)
    for lengths in (None, (8, 7, 4, 2)):
        found = pooled(jnp.asarray(tokens), "mean", None if lengths is None else jnp.array(lengths))
        rows = zip(tokens.astype(np.float32), lengths or (8,) * 4, strict=True)
        expected = np.stack([row[1:length].mean(axis=0) for row, length in rows])
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
