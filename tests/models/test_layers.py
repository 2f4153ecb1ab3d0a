"""Activations: their values and gradients, and what they keep between the two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.models.layers import ACTIVATIONS

X = jnp.linspace(-6.0, 6.0, 481)

# JAX's own, and as their authors write them: arXiv 1606.08415, and the CLIP towers.
REFERENCES = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: (
        0.5 * x * (1.0 + jnp.tanh(jnp.sqrt(2.0 / jnp.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1.0 + jnp.exp(-1.702 * x)),
}


def test_every_activation_has_a_reference() -> None:
    assert REFERENCES.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name: str) -> None:
    slope = jnp.cos(X)
    found, back = jax.vjp(ACTIVATIONS[name], X)
    expected, expected_back = jax.vjp(REFERENCES[name], X)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(back(slope)[0], expected_back(slope)[0], atol=5e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_only_the_input_is_kept_for_the_gradient(name: str) -> None:
    _, back = jax.vjp(ACTIVATIONS[name], X)
    kept = [leaf for leaf in jax.tree.leaves(back) if jnp.shape(leaf) == X.shape]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], X)
