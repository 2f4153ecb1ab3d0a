"""The kernel for short sequences, interpreted on a CPU, against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlp_jax.models.attention import attention
from vlp_jax.models.short_attention import short_attention

BATCH, QUERIES, KEYS, HEADS, FEATURES = 8, 5, 19, 2, 16


@pytest.fixture(scope="module")
def operands() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (QUERIES, KEYS, KEYS)
    return tuple(
        jax.random.normal(key, (BATCH, size, HEADS, FEATURES))
        for key, size in zip(keys, sizes, strict=True)
    )


def total(out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sum whose gradient differs for every number of [B, Q, H, d], and these numbers."""
    return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))).sum(), out


@pytest.mark.parametrize("tokens", [KEYS, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_equal_those_of_xla(operands, masked, tokens):
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (BATCH, QUERIES, KEYS))
    mask = mask.at[0, 0].set(False) if masked else None  # one query that sees nothing

    def ours(*args):
        return total(short_attention(*args, mask, tokens))

    def plain(*args):
        seen = jnp.broadcast_to(jnp.arange(KEYS) < tokens, (BATCH, QUERIES, KEYS))
        seen = seen if mask is None else mask & seen
        return total(attention(*args, seen, implementation="xla"))

    (_, out), gradients = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(*operands)
    (_, expected), wanted = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(*operands)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=2e-6)
    if masked:
        assert not out[0, 0].any()


def test_attention_takes_it_over_streams_and_a_shared_mask(operands):
    query, key, value = (x.reshape(2, 4, *x.shape[1:]) for x in operands)
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, (1, 4, QUERIES, KEYS))

    def read(implementation):
        return lambda *args: attention(*args, mask, implementation=implementation)

    ours, xla = (read(name)(query, key, value) for name in ("pallas", "xla"))
    for name in ("pallas", "xla"):
        program = str(jax.make_jaxpr(read(name))(query, key, value))
        assert ("pallas_call" in program) == (name == "pallas")
    assert ours.shape == query.shape
    np.testing.assert_allclose(ours, xla, atol=1e-6)


def test_devices_keep_what_they_hold(operands):
    """Sequences and heads lie apart, and no device asks another for any."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", None, "model", None))
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (BATCH, QUERIES, KEYS))

    def gradients(*args):
        return jax.grad(lambda *x: total(short_attention(*x, mask, KEYS))[0], (0, 1, 2))(*args)

    apart = tuple(jax.device_put(x, sharding) for x in operands)
    compiled = jax.jit(gradients).lower(*apart).compile()
    for exchange in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert exchange not in compiled.as_text()
    for got, want in zip(compiled(*apart), gradients(*operands), strict=True):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_refuses_what_does_not_fit():
    long = jnp.zeros((1, 65, 1, 16))
    odd = jnp.zeros((1, 4, 1, 24))
    for query in (long, odd):
        with pytest.raises(ValueError, match="no kernel for queries"):
            short_attention(query, query, query, None, 4)
        # Asked of the one function for all, XLA takes over.
        assert attention(query, query, query, implementation="pallas").shape == query.shape
