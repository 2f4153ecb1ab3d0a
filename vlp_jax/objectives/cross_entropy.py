"""Cross-entropy over a large vocabulary, at the rows that count and at no others.

The map to the vocabulary is the widest product of the model, and its logits the largest array.
``vocabulary_cross_entropy`` sorts the rows that carry a target to the front and walks over them in
chunks; rows of padding cost nothing, whole logits never exist. While it differentiates it forms
the gradient of each chunk right after its logits, so that nothing is computed twice and nothing
is kept. Softmax and sums run in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlp_jax.infra.mesh import BATCH_AXES

CHUNK_ROWS = 2048


class TokenScores(NamedTuple):
    """Scores of a batch of rows.

    Attributes:
        loss: sum over rows of weight * -log p(label), float32 []; gradients flow through it.
        nll: -log p(label) of each row, float32, zero where the weight is; no gradient.
        correct: 1 where the label has the highest logit, float32, zero where the weight is; no
            gradient. While gradients are taken, a tie for the highest counts as correct.
    """

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array


def vocabulary_cross_entropy(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenScores:
    """Score features against labels over the vocabulary.

    Where a mesh is set, B is sharded over its batch axes and each shard walks its own rows.

    Args:
        features: compute dtype [B, K, D].
        kernel: float32 [D, V], V a padded vocabulary.
        bias: float32 [V].
        labels: int32 [B, K]; ignored where ``weights`` is 0.
        weights: float32 [B, K], 0 for rows to skip.
        vocab_size: entries of V that exist; the padding is never predicted.
        chunk_rows: rows of logits that exist at a time.

    Returns:
        Scores; ``nll`` and ``correct`` are [B, K].
    """

    def local(
        features: jax.Array,
        kernel: jax.Array,
        bias: jax.Array,
        labels: jax.Array,
        weights: jax.Array,
    ) -> TokenScores:
        loss, nll, correct = _rows_cross_entropy(
            vocab_size,
            min(chunk_rows, labels.size),
            features.reshape(-1, features.shape[-1]),
            kernel,
            bias,
            labels.reshape(-1),
            weights.reshape(-1),
        )
        return TokenScores(loss[None], nll.reshape(labels.shape), correct.reshape(labels.shape))

    # Cast before the shards gather it: half the bytes travel.
    arguments = (features, kernel.astype(features.dtype), bias, labels, weights)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in BATCH_AXES):
        scores = local(*arguments)
    else:
        rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        scores = jax.shard_map(
            local,
            in_specs=(rows, whole, whole, rows, rows),
            out_specs=rows,
            check_vma=False,
        )(*arguments)
    return TokenScores(
        scores.loss.sum(),
        jax.lax.stop_gradient(scores.nll),
        jax.lax.stop_gradient(scores.correct),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows_cross_entropy(
    vocab_size: int,
    chunk: int,
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss [], nll [R] and correct [R] of rows [R, D]; see ``vocabulary_cross_entropy``."""
    scores, _ = _walk(vocab_size, chunk, features, kernel, bias, labels, weights, gradient=False)
    return scores


def _rows_forward(
    vocab_size: int,
    chunk: int,
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    return _walk(vocab_size, chunk, features, kernel, bias, labels, weights, gradient=True)


def _rows_backward(
    vocab_size: int,
    chunk: int,
    gradients: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    scale = cotangents[0]
    # In float32: a rounded factor would shift all of them alike, by up to 0.4 %.
    features, kernel, bias = ((g.astype(jnp.float32) * scale).astype(g.dtype) for g in gradients)
    return features, kernel, bias, None, None


_rows_cross_entropy.defvjp(_rows_forward, _rows_backward)


def _walk(
    vocab_size: int,
    chunk: int,
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    gradient: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Walk over the rows of non-zero weight, ``chunk`` at a time.

    The number of chunks is only known on the device; everything else is static.
    """
    rows, width = features.shape
    padded = -(-rows // chunk) * chunk
    order = jnp.argsort(weights == 0.0, stable=True)  # rows that count come first
    order = jnp.pad(order, (0, padded - rows))
    sorted_weights = jnp.where(jnp.arange(padded) < rows, weights[order], 0.0)
    active = jnp.sum(weights != 0.0)
    exists = jnp.arange(kernel.shape[1]) < vocab_size

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step, nll, correct = state[:3]
        start = step * chunk
        index = jax.lax.dynamic_slice(order, (start,), (chunk,))
        weight = jax.lax.dynamic_slice(sorted_weights, (start,), (chunk,))[:, None]
        row = features[index]
        label = labels[index][:, None]
        # While it trains, products are stored in the compute dtype, as any other; softmax and sums
        # run in float32. Scores that are reported come from float32 logits.
        dtype = row.dtype if gradient else jnp.float32
        products = jnp.dot(row, kernel, preferred_element_type=dtype) + bias.astype(dtype)[None]
        logits = jnp.where(exists[None], products.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        highest = logits.max(axis=-1, keepdims=True)
        log_total = highest + jnp.log(jnp.exp(logits - highest).sum(axis=-1, keepdims=True))
        label_logit = jnp.take_along_axis(logits, label, axis=-1)
        counted = weight != 0.0
        row_nll = jnp.where(counted, log_total - label_logit, 0.0)
        best = (label_logit >= highest)[:, 0] if gradient else logits.argmax(axis=-1) == label[:, 0]
        row_correct = jnp.where(counted & best[:, None], 1.0, 0.0)
        nll = jax.lax.dynamic_update_slice(nll, row_nll[:, 0], (start,))
        correct = jax.lax.dynamic_update_slice(correct, row_correct[:, 0], (start,))
        if not gradient:
            return step + 1, nll, correct
        d_row, d_kernel, d_bias = state[3:]
        is_label = jnp.arange(kernel.shape[1])[None] == label
        d_logits = (jnp.exp(logits - log_total) - is_label) * weight
        d_bias = d_bias + d_logits.sum(axis=0)
        d_logits = d_logits.astype(features.dtype)
        d_row = jax.lax.dynamic_update_slice(d_row, jnp.dot(d_logits, kernel.T), (start, 0))
        d_kernel = d_kernel + jnp.dot(row.T, d_logits, preferred_element_type=jnp.float32)
        return step + 1, nll, correct, d_row, d_kernel, d_bias

    state: tuple[jax.Array, ...] = (
        jnp.zeros((), jnp.int32),
        jnp.zeros(padded),
        jnp.zeros(padded),
    )
    if gradient:
        state += (
            jnp.zeros((padded, width), features.dtype),
            jnp.zeros(kernel.shape, jnp.float32),
            jnp.zeros(bias.shape, jnp.float32),
        )
    state = jax.lax.while_loop(lambda state: state[0] * chunk < active, body, state)
    nll, correct = state[1:3]
    loss = jnp.sum(nll * sorted_weights)
    back = jnp.argsort(order[:rows])
    gradients: tuple[jax.Array, ...] = ()
    if gradient:
        d_row, d_kernel, d_bias = state[3:]
        gradients = (d_row[:rows][back], d_kernel.astype(kernel.dtype), d_bias)
    return (loss, nll[:rows][back], correct[:rows][back]), gradients
