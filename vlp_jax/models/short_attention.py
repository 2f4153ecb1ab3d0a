"""Attention of short sequences by one GPU kernel, written in Pallas.

Compressed images have 17 to 64 tokens. There cuDNN's tiles of 64 to 128 queries and keys are mostly
empty, and XLA transposes, pads and multiplies in calls of their own, which takes several times as
long as reading and writing the operands (``docs/perf.md``). Here a program holds all queries and
keys of one head of one sequence on the chip, reads each once and writes the result.

It is compiled by Pallas' Triton backend, which runs on every NVIDIA GPU since Ampere. JAX 0.11
calls that deprecated in favour of Mosaic GPU (Hopper and later); before ``setup.py`` admits a JAX
without it, the two kernels below must move there or to the package ``jax_triton``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding, PartitionSpec

MAX_LENGTH = 64
_WARPS = 4


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether the kernel takes such operands, [..., Q, H, d] and [..., K, H, d]."""
    features = query.shape[-1]
    lengths = (query.shape[-3], key.shape[-3])
    return max(lengths) <= MAX_LENGTH and 16 <= features <= 128 and not features & (features - 1)


def short_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, tokens: int
) -> jax.Array:
    """Attention of at most ``MAX_LENGTH`` queries to as many keys; see ``attention``.

    Scores and softmax are float32, weights in the dtype of ``value`` where they multiply it. On a
    CPU the kernel is interpreted, which is slow and meant for tests. Over devices, sequences and
    heads may lie apart; nothing is exchanged.

    Args:
        query: [B, Q, H, d]; d is a power of two from 16 to 128.
        key: [B, K, H, d].
        value: [B, K, H, d].
        mask: bool [B, Q, K], True where the query may see the key; None: all.
        tokens: how many keys there are; those beyond are never seen.

    Returns:
        [B, Q, H, d] in the dtype of ``query``; zeros for a query that sees no key.

    Raises:
        ValueError: the operands do not fit the kernel.
    """
    if not fits(query, key):
        raise ValueError(f"no kernel for queries {query.shape} and keys {key.shape}")
    return _attention(query, key, value, mask, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, tokens: int
) -> jax.Array:
    (out,) = _call(_forward_kernel, 1, tokens, (query, key, value), mask)
    return out


def _attention_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, tokens: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]]:
    return _attention(query, key, value, mask, tokens), (query, key, value, mask)


def _attention_backward(
    tokens: int,
    residuals: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    *read, mask = residuals
    query, key, value = _call(_backward_kernel, 3, tokens, (*read, cotangent), mask)
    return query, key, value, None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(
    kernel: Callable[..., None],
    outputs: int,
    tokens: int,
    operands: Sequence[Any],
    mask: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Run a kernel for every head of every sequence, wherever the devices hold them.

    Args:
        kernel: takes references to ``operands``, the mask if there is one, and the outputs.
        outputs: how many; they have the shapes of the first operands.
        tokens: of the keys.
        operands: [B, N, H, d] each.
        mask: bool [B, Q, K] or None.
    """
    interpret = jax.default_backend() != "gpu"

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        batch, _, heads, features = arrays[0].shape

        def tile(array: jax.Array) -> pl.BlockSpec:
            if array.ndim == 3:
                block = (None, *(_side(n) for n in array.shape[1:]))
                return pl.BlockSpec(block, lambda i: (jax.lax.div(i, heads), 0, 0))
            return pl.BlockSpec(
                (None, _side(array.shape[1]), None, features),
                lambda i: (jax.lax.div(i, heads), 0, jax.lax.rem(i, heads), 0),
            )

        return pl.pallas_call(
            functools.partial(
                kernel,
                lengths=(arrays[0].shape[1], arrays[1].shape[1]),
                tokens=tokens,
                masked=mask is not None,
            ),
            out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:outputs]),
            grid=(batch * heads,),
            in_specs=tuple(tile(x) for x in arrays),
            out_specs=tuple(tile(x) for x in arrays[:outputs]),
            compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*arrays)

    apart = custom_partitioning(run)

    def partition(mesh: Any, _: Any, results: Any) -> tuple[Any, Any, Any, Any]:
        spec = results[0].sharding.spec
        rows, heads = (*spec, None, None, None, None)[:4:2]
        whole = NamedSharding(mesh, PartitionSpec(rows, None, heads, None))
        arguments = (whole,) * len(operands)
        if mask is not None:
            arguments += (NamedSharding(mesh, PartitionSpec(rows, None, None)),)
        return mesh, run, (whole,) * outputs, arguments

    names = ["b q h d", *["b k h d"] * 2, "b q h d"]
    read = names[: len(operands)] + ([] if mask is None else ["b q k"])
    apart.def_partition(
        partition=partition,
        sharding_rule=f"{', '.join(read)} -> {', '.join(names[:outputs])}",
        need_replication_factors=("q", "d", "k"),  # as they come in the rule
    )
    return apart(*operands, *(() if mask is None else (mask.astype(jnp.int8),)))


def _side(rows: int) -> int:
    """Of a block that holds so many rows; a product's sides are 16 or more (Triton)."""
    return max(16, pl.next_power_of_2(rows))


def _load(reference: Any, rows: int) -> jax.Array:
    """The rows [N, d] that there are, zeros beyond."""
    seen = jnp.arange(reference.shape[0]) < rows
    return plgpu.load(reference, mask=seen[:, None], other=0.0)


def _store(reference: Any, value: jax.Array, rows: int) -> None:
    seen = jnp.arange(reference.shape[0]) < rows
    plgpu.store(reference, value.astype(reference.dtype), mask=seen[:, None])


def _weights(
    query: jax.Array, key: jax.Array, mask: Any, lengths: tuple[int, int], tokens: int
) -> jax.Array:
    """float32 [Q, K] of one head: rows sum to 1, or are zero where nothing is seen."""
    scores = plgpu.dot(query, key.T) * query.shape[-1] ** -0.5
    row, column = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    seen = column < tokens
    if mask is not None:
        there = (row < lengths[0]) & (column < lengths[1])
        seen = seen & (plgpu.load(mask, mask=there, other=0) != 0)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(axis=-1)[:, None])
    weights = weights / weights.sum(axis=-1)[:, None]
    return jnp.where(seen, weights, 0.0)


def _forward_kernel(
    query: Any,
    key: Any,
    value: Any,
    *references: Any,
    lengths: tuple[int, int],
    tokens: int,
    masked: bool,
) -> None:
    """One head: references to [Q, d], [K, d], [K, d], the mask [Q, K] if ``masked``; out [Q, d]."""
    mask, out = references if masked else (None, *references)
    queries, keys = lengths
    weights = _weights(_load(query, queries), _load(key, keys), mask, lengths, tokens)
    values = _load(value, keys)
    _store(out, plgpu.dot(weights.astype(values.dtype), values), queries)


def _backward_kernel(
    query: Any,
    key: Any,
    value: Any,
    cotangent: Any,
    *references: Any,
    lengths: tuple[int, int],
    tokens: int,
    masked: bool,
) -> None:
    """As ``_forward_kernel``, which is computed again; out: gradients of query, key and value."""
    mask, *out = references if masked else (None, *references)
    queries, keys = lengths
    read = (_load(query, queries), _load(key, keys))
    weights = _weights(*read, mask, lengths, tokens)
    values, cotangents = _load(value, keys), _load(cotangent, queries)
    _store(out[2], plgpu.dot(weights.astype(values.dtype).T, cotangents), keys)
    of_weights = plgpu.dot(cotangents, values.T)
    mean = (weights * of_weights).sum(axis=-1)[:, None]
    of_scores = weights * (of_weights - mean) * query.shape[-1] ** -0.5
    of_scores = of_scores.astype(values.dtype)
    _store(out[0], plgpu.dot(of_scores, read[1]), queries)
    _store(out[1], plgpu.dot(of_scores.T, read[0]), keys)
