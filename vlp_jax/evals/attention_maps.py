"""Attention weights that a forward pass has sown, as maps over image tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def attention_rollout(weights: Sequence[jax.Array]) -> jax.Array:
    """How much of each input token reaches each output token.

    Args:
        weights: attention of every layer from the first on, a mean over heads, [B, T, T] each.

    Returns:
        float32 [B, T, T]; rows sum to 1.
    """
    rollout = jnp.broadcast_to(jnp.eye(weights[0].shape[-1]), weights[0].shape)
    for layer in weights:
        rollout = 0.5 * (jnp.einsum("bij,bjk->bik", layer, rollout) + rollout)
    return rollout


def mean_attention(attention: Mapping[str, Any]) -> jax.Array:
    """The weights of one attention as a mean over heads: float32 [B, Q, K]."""
    [weights] = attention["weights"]
    return weights.astype(jnp.float32).mean(axis=1)


def last_attention(weights: Mapping[str, Any], stack: str) -> jax.Array:
    """The last cross-attention of a stack of blocks."""
    depth = max(int(k.rpartition("_")[2]) for k in weights if k.startswith(stack))
    return mean_attention(weights[f"{stack}_{depth}"]["cross_attention"])
