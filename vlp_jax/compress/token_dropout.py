"""Patches of an image, and token dropout: a random part of them is encoded, none of the rest.

Uniform for each sample by itself, with a static number of patches kept (fact sheet of accelerated
invariance pretraining, sections 1 and 6). Positions are added before anything is dropped, so that a
patch keeps its place.
"""

import jax
import jax.numpy as jnp


def kept_patches(keys: jax.Array, patches: int, kept: int) -> jax.Array:
    """Which patches of every sample stay: each subset of that size is as likely.

    Args:
        keys: PRNG keys [B], one a sample.
        patches: P, how many there are.
        kept: K, how many stay, 1 to P.

    Returns:
        int32 [B, K], increasing; with K = P all of them, in their order.

    Raises:
        ValueError: K is none of 1 to P.
    """
    if not 1 <= kept <= patches:
        raise ValueError(f"{kept} of {patches} patches cannot be kept")
    whole = jnp.arange(patches, dtype=jnp.int32)
    if kept == patches:
        return jnp.broadcast_to(whole[None], (len(keys), patches))
    noise = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    _, chosen = jax.lax.top_k(noise, kept)
    return jnp.sort(chosen.astype(jnp.int32), axis=1)


def are_kept(kept: jax.Array, patches: int) -> jax.Array:
    """Which of all patches are among the kept ones: int32 [B, K] -> bool [B, P]."""
    return (kept[:, :, None] == jnp.arange(patches)[None, None]).any(axis=1)


def split_patches(x: jax.Array, side: int) -> jax.Array:
    """Squares of a picture, row by row: [B, S, S, C] -> [B, P, side * side * C]."""
    grid, channels = x.shape[1] // side, x.shape[-1]
    x = x.reshape(len(x), grid, side, grid, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), grid * grid, side * side * channels)


def take_patches(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The patches of the given places: [B, P, ...], int32 [B, K] -> [B, K, ...]."""
    shape = (*indices.shape, *(1 for _ in x.shape[2:]))
    return jnp.take_along_axis(x, indices.reshape(shape), axis=1, mode="clip")
