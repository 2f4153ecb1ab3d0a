"""Boolean attention masks, built on the device from lengths. True: may be seen."""

import jax
import jax.numpy as jnp


def token_mask(lengths: jax.Array, tokens: int) -> jax.Array:
    """Which positions hold a token: int32 [B] -> bool [B, N]."""
    return jnp.arange(tokens)[None, :] < lengths[:, None]


def bidirectional_mask(lengths: jax.Array, tokens: int) -> jax.Array:
    """Every token sees every token: int32 [B] -> bool [B, N, N]; rows of padding see nothing."""
    real = token_mask(lengths, tokens)
    return real[:, :, None] & real[:, None, :]


def forward_mask(lengths: jax.Array, tokens: int) -> jax.Array:
    """Token i sees j <= i: int32 [B] -> bool [B, N, N]; rows of padding see nothing."""
    index = jnp.arange(tokens)
    return bidirectional_mask(lengths, tokens) & (index[None, :] <= index[:, None])[None]


def reverse_mask(lengths: jax.Array, tokens: int) -> jax.Array:
    """Token i sees j >= i: int32 [B] -> bool [B, N, N]; rows of padding see nothing."""
    index = jnp.arange(tokens)
    return bidirectional_mask(lengths, tokens) & (index[None, :] >= index[:, None])[None]


def two_stream_mask(lengths: jax.Array, tokens: int) -> jax.Array:
    """Forward and reverse masks stacked on an inner axis: int32 [B] -> bool [B, 2, N, N]."""
    return jnp.stack([forward_mask(lengths, tokens), reverse_mask(lengths, tokens)], axis=1)


def with_keys_before(mask: jax.Array, further: int) -> jax.Array:
    """So many keys before those of a mask, which every query sees.

    Args:
        mask: bool [..., Q, K].
        further: F.

    Returns:
        bool [..., Q, F + K].
    """
    return jnp.concatenate([jnp.ones((*mask.shape[:-1], further), jnp.bool_), mask], axis=-1)
