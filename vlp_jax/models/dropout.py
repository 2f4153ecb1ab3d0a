"""Dropout whose random bits cost a handful of integer operations.

A general-purpose generator spends some hundred operations on each of the billion decisions of an
update, and its unrolled rounds, once for every site, make up much of the program to compile
(docs/perf.md has both figures). A dropout mask needs less: here a bit is a hash of the element's
index, of the place in the model, and of two words drawn for the update by JAX's own generator. It
depends on the global index alone, so that it is the same on any number of devices.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def dropout_noise(rng: jax.Array) -> jax.Array:
    """The words that every dropout of one update shares: PRNG key -> uint32 [2]."""
    return jax.random.bits(rng, (2,), jnp.uint32)


def noise_of(noise: jax.Array | None, part: str) -> jax.Array | None:
    """The noise of one of several passes through the same places of a model; None for None.

    Args:
        noise: uint32 [2] from ``dropout_noise``.
        part: name of the pass; no two passes of an update share one.
    """
    return None if noise is None else noise ^ jnp.uint32(zlib.crc32(part.encode()))


def dropout(x: jax.Array, rate: float, noise: jax.Array, site: str) -> jax.Array:
    """Zero each element with probability ``rate`` and scale the others by 1 / (1 - rate).

    Args:
        x: any shape, floating, fewer than 2**32 elements.
        rate: in [0, 1).
        noise: uint32 [2] from ``dropout_noise``.
        site: name of this place in the model; no two places share one.

    Raises:
        ValueError: the rate is out of range.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
    if rate == 0.0:
        return x
    keep = _uniform_bits(x.shape, noise, site) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros_like(x))


def _uniform_bits(shape: tuple[int, ...], noise: jax.Array, site: str) -> jax.Array:
    """uint32 of the given shape: two rounds of Murmur3's finaliser, keyed between and before.

    With one round, the masks of two sites would be shifted copies of one sequence.
    """
    salt = zlib.crc32(site.encode())
    first = noise[0] ^ jnp.uint32(salt)
    second = noise[1] + jnp.uint32(zlib.crc32(b"second round", salt))
    # The sum starts from a word that only the device knows: from constants alone, XLA would
    # evaluate the whole array while it compiles, and take minutes.
    bits = jnp.broadcast_to(first, shape)
    stride = 1
    for axis in reversed(range(len(shape))):
        along_axis = np.arange(shape[axis], dtype=np.uint32) * np.uint32(stride)
        bits += jax.lax.broadcast_in_dim(along_axis, shape, (axis,))
        stride *= shape[axis]
    return mix_bits(mix_bits(bits) ^ jnp.broadcast_to(second, shape))


def mix_bits(bits: jax.Array) -> jax.Array:
    """Bits that look random, by Murmur3's finaliser: uint32 -> uint32, one to one."""
    bits ^= bits >> jnp.uint32(16)
    bits *= jnp.uint32(0x85EBCA6B)
    bits ^= bits >> jnp.uint32(13)
    bits *= jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> jnp.uint32(16))
