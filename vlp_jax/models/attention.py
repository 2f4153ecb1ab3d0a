"""One attention function for the whole project.

It picks XLA's, cuDNN's or our own kernel by what was measured for a shape (``docs/perf.md``), masks
truly (a query with nothing to see gives zeros, never a uniform average) and takes its softmax in
float32.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vlp_jax.models.dropout import dropout
from vlp_jax.models.short_attention import fits, short_attention

Implementation = Literal["auto", "xla", "cudnn", "pallas"]

# Below this many keys XLA's own products were as fast or faster on an H200 (docs/perf.md).
CUDNN_MIN_KEYS = 64
AMPERE = 8  # compute capability; older GPUs have neither cuDNN's kernel nor products in bfloat16


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_noise: jax.Array | None = None,
    site: str = "",
    implementation: Implementation = "auto",
    tokens: int | jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention over several heads.

    Args:
        query: [..., Q, H, d].
        key: [..., K, H, d], same leading dimensions as ``query``.
        value: [..., K, H, d].
        mask: bool [..., Q, K] over the leading dimensions of ``query`` (each may be 1), True where
            the query may see the key; None: everything is seen.
        dropout_rate: share of attention weights dropped; needs ``dropout_noise`` when positive.
        dropout_noise: see ``vlp_jax.models.dropout``.
        site: name of this attention in the model, for the dropout.
        implementation: ``xla``, ``cudnn`` (wherever there is neither mask nor dropout), ``pallas``
            (wherever there is no dropout and the operands fit ``short_attention``) or ``auto``
            (what was measured fastest of these).
        tokens: how many keys there are, one number for all or int32 [...] over the leading
            dimensions; those beyond are padding, which nobody sees, and what a query of a padding
            token gives is finite, no more. None: all.

    Returns:
        [..., Q, H, d] in the dtype of ``query``; zeros for a query that sees no key.

    Raises:
        ValueError: dropout without ``dropout_noise``.
    """
    tokens = key.shape[-3] if tokens is None else tokens
    if isinstance(tokens, jax.Array):
        keys = key.shape[-3]
        if mask is None and dropout_rate == 0.0 and _by_cudnn(keys, query.dtype, implementation):
            return _cudnn_attention(query, key, value, tokens)
        seen = real_keys(tokens, keys)
        mask = seen if mask is None else mask & seen
        tokens = keys
    if dropout_rate == 0.0 and _by_pallas(query, key, implementation):
        return _pallas_attention(query, key, value, mask, tokens)
    if mask is None and dropout_rate == 0.0 and _by_cudnn(tokens, query.dtype, implementation):
        return _cudnn_attention(query, key, value, tokens)
    key, value = key[..., :tokens, :, :], value[..., :tokens, :, :]
    if dropout_rate > 0.0 and dropout_noise is None:
        raise ValueError("dropout_rate > 0 needs dropout_noise")

    def drop(weights: jax.Array) -> jax.Array:
        if dropout_noise is None:
            return weights
        return dropout(weights, dropout_rate, dropout_noise, site)

    return _xla_attention(query, key, value, mask, drop)


def real_keys(lengths: jax.Array, keys: int) -> jax.Array:
    """The mask of keys that are no padding: int32 [...] -> bool [..., 1, K]."""
    place = jnp.arange(keys).reshape((1,) * lengths.ndim + (keys,))
    return (place < lengths[..., None])[..., None, :]


def padded_length(tokens: int, dtype: jnp.dtype, implementation: Implementation = "auto") -> int:
    """To how many tokens a sequence is best padded for self-attention without mask or dropout.

    cuDNN's kernel takes even lengths only. Padding the sequence once costs less than the queries,
    keys and values of every layer, forward and backward (docs/perf.md).

    Args:
        tokens: of the sequence.
        dtype: compute dtype.
        implementation: as in ``attention``.
    """
    return tokens + tokens % 2 if _by_cudnn(tokens, dtype, implementation) else tokens


def _by_cudnn(keys: int, dtype: Any, implementation: Implementation) -> bool:
    """Whether attention to so many keys, all of them seen, is left to cuDNN."""
    measured_faster = _on_matrix_units(dtype) and keys >= CUDNN_MIN_KEYS
    return implementation == "cudnn" or (implementation == "auto" and measured_faster)


def _by_pallas(query: jax.Array, key: jax.Array, implementation: Implementation) -> bool:
    """Whether attention without dropout is left to the kernel for short sequences."""
    measured_faster = _on_matrix_units(query.dtype) and key.shape[-3] < CUDNN_MIN_KEYS
    asked = implementation == "pallas" or (implementation == "auto" and measured_faster)
    return asked and fits(query, key)


def _on_matrix_units(dtype: Any) -> bool:
    """Whether fused kernels are there and worth it: 16-bit numbers, NVIDIA GPUs from Ampere on."""
    return dtype in (jnp.bfloat16, jnp.float16) and _capability() >= AMPERE


def _capability() -> int:
    """First number of the compute capability of the GPUs of this process; 0: NVIDIA's are none."""
    if jax.default_backend() != "gpu":
        return 0
    first = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]
    return int(first) if first.isdecimal() else 0


def _xla_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    weights = drop(attention_weights(query, key, mask))
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def attention_weights(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """How much each query reads of each key, before dropout.

    Args:
        query: [..., Q, H, d].
        key: [..., K, H, d].
        mask: as in ``attention``.

    Returns:
        [..., H, Q, K] in the dtype of ``query``, from a softmax in float32; a row sums to 1, or is
        zero where the query sees no key.
    """
    return _softmax(_scores(_scaled(query), key), mask).astype(query.dtype)


def attention_over_memory(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    beside: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of few queries over keys that lie head by head, without dropout.

    Args:
        query: [..., Q, H, d]; [B, S, Q, H, d] with ``beside``.
        key: [..., H, K, d], same leading dimensions as ``query``.
        value: [..., H, K, d].
        mask: as in ``attention``.
        beside: further keys and values, [B, H, I, d] each, which all queries of an example see;
            they are not copied for its S streams.

    Returns:
        As ``attention``.
    """
    query = _scaled(query)
    scores = jnp.einsum("...qhd,...hkd->...hqk", query, key, preferred_element_type=jnp.float32)
    if beside is None:
        weights = _softmax(scores, mask).astype(query.dtype)
        return jnp.einsum("...hqk,...hkd->...qhd", weights, value)
    further = jnp.einsum("bsqhd,bhkd->bshqk", query, beside[0], preferred_element_type=jnp.float32)
    count = further.shape[-1]
    if mask is not None:
        mask = jnp.concatenate([jnp.ones((*mask.shape[:-1], count), jnp.bool_), mask], axis=-1)
    weights = _softmax(jnp.concatenate([further, scores], axis=-1), mask).astype(query.dtype)
    of_further = jnp.einsum("bshqk,bhkd->bsqhd", weights[..., :count], beside[1])
    return of_further + jnp.einsum("...hqk,...hkd->...qhd", weights[..., count:], value)


def _scaled(query: jax.Array) -> jax.Array:
    return query * query.shape[-1] ** -0.5


def _softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Weights of float32 scores [..., H, Q, K]; a row that sees no key is zero."""
    if mask is not None:
        mask = jnp.expand_dims(mask, -3)  # the same for every head
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        # A fully hidden row comes out of the softmax uniform; this makes it zero.
        weights = jnp.where(mask, weights, 0.0)
    return weights


@jax.custom_vjp
def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Products of queries and keys: [..., Q, H, d], [..., K, H, d] -> float32 [..., H, Q, K].

    Accumulated and kept in float32 for the softmax. The gradient enters its two products in the
    compute dtype, as in fused kernels; without this rule JAX multiplies them in float32, off the
    fast matrix units.
    """
    return jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)


def _scores_forward(
    query: jax.Array, key: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scores(query, key), (query, key)


def _scores_backward(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    query, key = residuals
    cotangent = cotangent.astype(query.dtype)
    return (
        jnp.einsum("...hqk,...khd->...qhd", cotangent, key),
        jnp.einsum("...hqk,...qhd->...khd", cotangent, query),
    )


_scores.defvjp(_scores_forward, _scores_backward)


def _pallas_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, tokens: int
) -> jax.Array:
    """``short_attention`` over any leading dimensions."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*query.shape[:-2], key.shape[-3]))
        mask = mask.reshape(-1, *mask.shape[-2:])
    queries, keys, values = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    return short_attention(queries, keys, values, mask, tokens).reshape(query.shape)


def _cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, tokens: int | jax.Array
) -> jax.Array:
    """Fused attention to the first ``tokens`` keys; odd lengths are padded to even ones."""
    queries, keys = query.shape[-3], key.shape[-3]
    rows = math.prod(query.shape[:-3])

    def padded(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, *x.shape[-3:])
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    def lengths(count: int | jax.Array) -> jax.Array | None:
        if isinstance(count, jax.Array):
            return count.reshape(rows).astype(jnp.int32)
        all_real = isinstance(tokens, int) and tokens == keys
        if all_real and queries % 2 == 0 and keys % 2 == 0:
            return None
        return jnp.full((rows,), count, jnp.int32)

    out = jax.nn.dot_product_attention(
        padded(query),
        padded(key),
        padded(value),
        query_seq_lengths=lengths(queries),
        key_value_seq_lengths=lengths(tokens),
        implementation="cudnn",
    )
    return out[:, :queries].reshape(query.shape)
