"""Two ways in which the blocks of one stack read a text together with its image.

Both take tokens of either modality as they enter the first block, and give what leaves the blocks,
before any final norm.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vlp_jax.models.dropout import noise_of
from vlp_jax.models.layers import Block, Noise


def read_as_one(
    blocks: Sequence[Block], text: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Each text and its image as one sequence, the image first.

    Args:
        blocks: of the stack.
        text: [B, S, N, D], S texts of one image.
        mask: bool [B, S, N, N], of the texts. A token that no row of its text sees is not seen by
            the image either.
        image: [B, I, D].
        noise: of the dropout, or None.

    Returns:
        Of the image's tokens the last states, for each text, [B, S, I, D]; of the text's tokens
        those of every block, [B, S, N, D] each.
    """
    count, tokens = image.shape[1], text.shape[2]
    image = jnp.broadcast_to(image[:, None], (*text.shape[:2], *image.shape[1:]))
    x = jnp.concatenate([image.astype(text.dtype), text], axis=2)
    seen = mask.any(axis=2, keepdims=True)
    seen = jnp.broadcast_to(seen, (*seen.shape[:2], count, tokens))
    of_text = jnp.concatenate([seen, mask], axis=2)
    of_image = jnp.ones((*of_text.shape[:3], count), jnp.bool_)
    mask = jnp.concatenate([of_image, of_text], axis=3)
    states = []
    for block in blocks:
        x = block(x, mask=mask, noise=noise)
        states.append(x[:, :, count:])
    return x[:, :, :count], tuple(states)


def read_beside(
    blocks: Sequence[Block], text: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
) -> tuple[jax.Array, ...]:
    """Streams of a text beside an image that does not see them.

    The image passes the blocks by itself, once for all streams; every block of a stream reads the
    states of the image that enter this block beside its own.

    Args:
        blocks: of the stack.
        text: [B, S, N, D], streams of one example.
        mask: bool [B, S, N, N], what each stream may see of itself.
        image: [B, I, D].
        noise: of the dropout, or None.

    Returns:
        Of the streams the states of every block, [B, S, N, D] each.
    """
    # Both pass through the same places.
    noise_of_image, noise_of_text = noise_of(noise, "image"), noise_of(noise, "text")
    x, states = text, []
    for layer, block in enumerate(blocks):
        read = block.project(image)
        x = block(x, mask=mask, noise=noise_of_text, beside=read)
        states.append(x)
        if layer + 1 < len(blocks):  # nobody reads what the last block makes of the image
            image = block(image, noise=noise_of_image, own=read)
    return tuple(states)
