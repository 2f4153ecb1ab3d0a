"""Cross-entropies over the similarities of a batch, and figures of embeddings.

Rows of ``valid`` that are False, which only fill a batch up, are nobody's candidates.
"""

import jax
import jax.numpy as jnp

from vlp_jax.objectives.base import Mean


def info_nce(logits: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which column is a row's own, namely the one on the diagonal (arXiv 1807.03748).

    Args:
        logits: float32 [B, B], scaled similarities.
        valid: bool [B].

    Returns:
        The cross-entropy in nats, and 1 where no other column is as near: float32 [B] each.
    """
    logits = _among(valid[None, :], logits)
    own = jnp.diagonal(logits)
    return jax.nn.logsumexp(logits, axis=1) - own, 1.0 * (own > _best_other(logits))


def nt_xent(
    partners: jax.Array, rivals: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``info_nce`` with further candidates: the same view of every other image (arXiv 2002.05709).

    Args:
        partners: float32 [B, B], scaled similarities to the other view of every image.
        rivals: float32 [B, B], to this view of every image; the diagonal is left out.
        valid: bool [B].
    """
    partners = _among(valid[None, :], partners)
    rivals = _among(~jnp.eye(len(valid), dtype=bool) & valid[None, :], rivals)
    own = jnp.diagonal(partners)
    total = jnp.logaddexp(jax.nn.logsumexp(partners, axis=1), jax.nn.logsumexp(rivals, axis=1))
    best = jnp.maximum(_best_other(partners), rivals.max(axis=1))
    return total - own, 1.0 * (own > best)


def valid_mean(values: jax.Array, valid: jax.Array) -> Mean:
    """The mean over valid rows: float32 [B], bool [B]."""
    return Mean(jnp.where(valid, values, 0.0).sum(), valid.sum(dtype=jnp.float32))


def spread(units: jax.Array, valid: jax.Array) -> Mean:
    """Mean standard deviation of a dimension of unit vectors: float32 [B, E], bool [B].

    0 where they collapse, 1 / sqrt(E) at best.
    """
    weights = valid.astype(jnp.float32)[:, None] / jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    units = jax.lax.stop_gradient(units)
    mean = (weights * units).sum(axis=0, keepdims=True)
    variance = (weights * jnp.square(units - mean)).sum(axis=0)
    return Mean(jnp.sqrt(variance).mean(), jnp.ones(()))


def _among(candidates: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.where(candidates, logits, jnp.finfo(jnp.float32).min)


def _best_other(logits: jax.Array) -> jax.Array:
    """The largest of each row beside the diagonal: float32 [B, B] -> [B].

    Of embeddings that have collapsed all are alike, and none is nearer than the others.
    """
    return jnp.where(jnp.eye(len(logits), dtype=bool), -jnp.inf, logits).max(axis=1)
