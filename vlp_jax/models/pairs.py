"""Models whose blocks read a text together with its image, and the two ways in which they do.

Both take tokens of either modality as they enter the first block, and give what leaves the blocks,
before any final norm.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.models.attention import padded_length
from vlp_jax.models.block import Block
from vlp_jax.models.dropout import noise_of
from vlp_jax.models.encoder import Encoder, TextStates, run_of_keys
from vlp_jax.models.layers import KeyValue, Memory, Noise, norm
from vlp_jax.models.masks import bidirectional_mask
from vlp_jax.models.pooling import Pool, pooled

JOINT = "bidirectional"  # the kind of stream that is one sequence with the image


class Pair(NamedTuple):
    """What the stack makes of texts that are one sequence with their image.

    Attributes:
        image: [B, S, I, D], of the image's tokens after the final norm, for each text.
        blocks: of the text's tokens after every block, [B, S, N, D] each.
        text: [B, S, N, D], of the text's tokens after the final norm.
    """

    image: jax.Array
    blocks: tuple[jax.Array, ...]
    text: jax.Array


class PairEncoder(Encoder):
    """A model that reads a text alone, or as one sequence with its image.

    The reconstructor reads the states of the last blocks that have read the text.
    """

    reads_text_alone: ClassVar[bool] = True

    def setup(self) -> None:
        """Name the reconstructor beside what all models have."""
        super().setup()
        c = self.config
        self.reconstructor = [
            Block(c.text, self_attention=False, cross_attention=True)
            for _ in range(c.reconstructor_depth)
        ]
        self.query_norm = norm(c.text)

    def text_feature(
        self, ids: jax.Array, lengths: jax.Array, noise: Noise = None, pool: Pool = "class"
    ) -> jax.Array:
        """Of the text alone: int32 [B, N], int32 [B] -> [B, D]."""
        mask = bidirectional_mask(lengths, ids.shape[1])[:, None]
        states = self.encode_text(ids, mask, None, (JOINT,), noise).last[:, 0]
        return pooled(states, pool, lengths)

    def encode_pair(
        self, lower: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
    ) -> Pair:
        """Texts and their image as one sequence each; each model by its own blocks.

        Args:
            lower: [B, S, N, D], last of the states of ``encode_text_lower``; S texts of one image.
            mask: bool [B, S, N, N], see ``read_as_one``.
            image: [B, I, D] from ``encode_image``.
            noise: of the dropout, or None.
        """
        raise NotImplementedError

    def reconstruct(
        self, positions: jax.Array, states: TextStates, mask: jax.Array, noise: Noise = None
    ) -> jax.Array:
        """Answer queries from the last states of the last tower that was run; see ``Encoder``."""
        x = self._queries(positions, len(states.last), noise)
        read = states.upper or states.lower
        for block, state in zip(
            self.reconstructor, read[len(read) - self.config.reconstructor_depth :], strict=True
        ):
            x = block(x, context=run_of_keys(state), context_mask=mask, noise=noise)
        return self.query_norm(x)


def read_as_one(
    blocks: Sequence[Block], text: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Each text and its image as one sequence, the image first, whose tokens all see one another.

    What is padding is told by lengths and not by a mask, which fused kernels do without.

    Args:
        blocks: of the stack.
        text: [B, S, N, D], S texts of one image.
        mask: bool [B, S, N, N], of the texts, all tokens of which see one another. Those that the
            first does not see are padding.
        image: [B, I, D].
        noise: of the dropout, or None.

    Returns:
        Of the image's tokens the last states, for each text, [B, S, I, D]; of the text's tokens
        those of every block, [B, S, N, D] each.
    """
    count, tokens = image.shape[1], text.shape[2]
    image = jnp.broadcast_to(image[:, None], (*text.shape[:2], *image.shape[1:]))
    x = jnp.concatenate([image.astype(text.dtype), text], axis=2)
    lengths = count + mask[:, :, 0].sum(axis=-1, dtype=jnp.int32)
    lengths = jnp.broadcast_to(lengths, x.shape[:2])
    config, both = blocks[0].config, count + tokens
    if noise is None or not config.dropout:
        padding = padded_length(both, config.dtype, config.attention) - both
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    states = []
    for block in blocks:
        x = block(x, tokens=lengths, noise=noise)
        states.append(x[:, :, count:both])
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
    for block, read in zip(blocks, _beside(blocks, image, noise_of_image), strict=True):
        x = block(x, mask=mask, noise=noise_of_text, beside=read)
        states.append(x)
    return tuple(states)


def project_beside(blocks: Sequence[Block], image: jax.Array) -> tuple[Memory, ...]:
    """What ``read_beside`` has every block read of an image, to be kept for texts that grow.

    Args:
        blocks: of the stack.
        image: [B, I, D].

    Returns:
        [B, H, P + I, d] each, P prompts of the block.
    """
    return tuple(Memory.of(read) for read in _beside(blocks, image, None))


def _beside(blocks: Sequence[Block], image: jax.Array, noise: Noise) -> Iterator[KeyValue]:
    """What every block reads of an image [B, I, D] that passes the blocks by itself."""
    for layer, block in enumerate(blocks):
        read = block.project(image)
        yield read
        if layer + 1 < len(blocks):  # nobody reads what the last block makes of the image
            image = block(image, noise=noise, own=read)
