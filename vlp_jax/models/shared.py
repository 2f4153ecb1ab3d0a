"""One stack for images, texts and both: every block reads tokens of either modality.

After MoMo (arXiv 2304.05523): an image alone, a text alone, and a text with its image pass through
the same blocks. What the paper leaves open (its fact sheet, section 1) is chosen here: patches at
fixed sine-cosine positions, a learned vector for each modality, pre-LN blocks with a final norm,
and a vocabulary head that is tied to the table of tokens.

The stack is the image tower, so that whatever reads or trains a tower has it under its name.

How a text meets its image follows from what the text may see of itself:

* *Bidirectional*: both are one sequence, whose tokens all see one another.
* *Forward and reverse*: the tokens of the image do not see the text, or each row of it would see
  all others through them. The image passes the blocks by itself, once for all streams, and every
  block of a stream reads the states of the image that enter this block beside its own. That is one
  sequence under a mask, with nothing computed that the mask would hide.

Shallow prompts (``models.tuning``) are further tokens of an image that a text reads. An image alone
and a text alone pass the stack without any.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.compress.buckets import View
from vlp_jax.models.block import Block
from vlp_jax.models.dropout import noise_of
from vlp_jax.models.encoder import padded_vocabulary
from vlp_jax.models.layers import BlockConfig, Memory, Noise
from vlp_jax.models.pairs import (
    JOINT,
    Pair,
    PairEncoder,
    project_beside,
    read_as_one,
    read_beside,
)
from vlp_jax.models.pooling import Pool, pooled
from vlp_jax.models.vit import ViTConfig

# Rows of the table that marks streams which see one side; what sees all is the plain text.
STREAM_TYPES = {"forward": 0, "reverse": 1}


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """Geometry of the whole model.

    Attributes:
        image: the stack and how images enter it: pre-LN, with the vector of a modality.
        reconstructor_depth: 1 or more, at most the depth of the stack; the reconstructor reads the
            states of the last so many blocks.
        vocab_size: entries of the tokenizer.
        max_positions: rows of the position table.
        mask_id: token whose embedding starts every reconstruction query.
        tied: the vocabulary head reads the table of tokens.
    """

    image: ViTConfig
    reconstructor_depth: int
    vocab_size: int
    max_positions: int
    mask_id: int
    tied: bool = True

    marks_text: ClassVar[bool] = True
    fusion_stacks: ClassVar[tuple[str, ...]] = ("image_tower",)

    def __post_init__(self) -> None:
        if self.image.block.norm != "pre":
            raise ValueError(
                f"model.image.norm={self.image.block.norm!r}: a shared stack has norm='pre'"
            )
        if not self.image.modality:
            raise ValueError("the stack of a shared model needs a vector for images: modality=True")
        if not 1 <= self.reconstructor_depth <= self.image.depth:
            raise ValueError(
                f"model.reconstructor.depth={self.reconstructor_depth} must be 1 or more, and at "
                f"most model.image.depth={self.image.depth}"
            )

    @property
    def text(self) -> BlockConfig:
        """Of the blocks, for what stands beside the stack; there no path is dropped."""
        return dataclasses.replace(self.image.block, drop_path=0.0)

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """The one stack, which is the image tower."""
        return {"image_tower": self.image.blocks}

    @property
    def depth(self) -> int:
        """Blocks of the stack."""
        return self.image.depth

    @property
    def text_blocks(self) -> int:
        """Those of the stack."""
        return self.depth

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of 128."""
        return padded_vocabulary(self.vocab_size)


class SharedModel(PairEncoder):
    """One stack, embeddings of both modalities, reconstructor and vocabulary head."""

    config: SharedConfig

    def setup(self) -> None:
        """Name the submodules; linen creates the parameters of those that are called."""
        super().setup()
        c = self.config
        self.stream_embedding = self.param(
            "stream_embedding", nn.initializers.normal(0.02), (len(STREAM_TYPES), c.text.width)
        )

    def encode_image(
        self,
        image: jax.Array,
        noise: Noise = None,
        view: View | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Embedded patches, which have met no block: [B, S, S, 3] -> [B, I, D]; see ``ViT``."""
        del noise  # there is no dropout before the first block
        return self.image_tower.embed(image, view, keys)

    def image_feature(
        self, tokens: jax.Array, noise: Noise = None, pool: Pool = "class"
    ) -> jax.Array:
        """Of what the stack makes of the image alone: [B, I, D] -> [B, D]."""
        return pooled(self.image_tower.encode(tokens, noise_of(noise, "image")), pool)

    def encode_text_lower(
        self,
        ids: jax.Array,
        mask: jax.Array,
        noise: Noise = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """What enters the stack: tokens, positions and the vector of texts; see ``Encoder``."""
        return (self._embedded(ids, mask.shape[1], noise, positions),)

    def encode_text_upper(
        self,
        lower: jax.Array,
        mask: jax.Array,
        image: jax.Array | None,
        streams: tuple[str, ...],
        noise: Noise = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The stack; see ``Encoder`` and the module's docstring.

        Raises:
            ValueError: some streams see one side and others both.
        """
        if any(stream in STREAM_TYPES for stream in streams):
            if JOINT in streams:
                raise ValueError(f"{streams} do not see an image in one way")
            lower = self._enter_upper(lower, streams)
        elif image is not None:
            pair = self.encode_pair(lower, mask, image, noise)
            return pair.blocks, pair.text
        if image is None:
            return self._text_alone(lower, mask, noise)
        image = self._with_prompts(image)
        states = read_beside(self.image_tower.blocks, lower, mask, image, noise)
        return states, self._leave_upper(states[-1])

    def project_image(self, image: jax.Array) -> tuple[Memory, ...]:
        """What every block reads of the image beside a text; see ``Encoder``."""
        return project_beside(self.image_tower.blocks, self._with_prompts(image))

    def _text_blocks(self) -> tuple[Sequence[Block], Sequence[Block]]:
        return (), self.image_tower.blocks

    def _enter_upper(self, lower: jax.Array, streams: tuple[str, ...]) -> jax.Array:
        types = jnp.stack([self.stream_embedding[STREAM_TYPES[name]] for name in streams])
        return lower + types.astype(lower.dtype)[None, :, None]

    def _leave_upper(self, x: jax.Array) -> jax.Array:
        return self.image_tower.norm(x)

    def encode_pair(
        self, lower: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
    ) -> Pair:
        """Texts and their image as one sequence each, the image first.

        Args:
            lower: [B, S, N, D], of ``encode_text_lower``; S texts of one image.
            mask: bool [B, S, N, N], of the texts: all tokens of one see one another. Those that its
                first token does not see are padding.
            image: [B, I, D] from ``encode_image``.
            noise: of the dropout, or None.
        """
        tower, count = self.image_tower, image.shape[1]
        image = self._with_prompts(image)
        of_image, states = read_as_one(tower.blocks, lower, mask, image, noise)
        return Pair(tower.norm(of_image[:, :, :count]), states, tower.norm(states[-1]))

    def _text_alone(
        self, x: jax.Array, mask: jax.Array, noise: Noise
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        self._complete_tower()
        noise = noise_of(noise, "text")
        states = []
        for block in self.image_tower.blocks:
            x = block(x, mask=mask, noise=noise)
            states.append(x)
        return tuple(states), self.image_tower.norm(x)

    def _complete_tower(self) -> None:
        """Create what the tower has for images, where a text alone would leave it out.

        A tower is loaded whole or not at all, so that a run of texts begins from one of images, and
        the other way round, only where both have all of it.
        """
        if self.is_initializing():
            size = self.config.image.image_size
            self.image_tower.embed(jnp.zeros((1, size, size, 3)))
