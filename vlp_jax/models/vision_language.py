"""The encoder that FLM and its baselines share, with the reconstructor and the vocabulary head.

One linen module whose methods are the stages of a vision-language model. An objective calls the
stages it needs; parameters of stages it does not call are not created. Geometry after the FLM
fact sheet, section 1: image tower, text stack in two halves (the upper one reads the image by
cross-attention), and a reconstructor of independent queries that runs beside the text stack.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import View
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.block import Block
from vlp_jax.models.dense import Dense
from vlp_jax.models.encoder import Encoder, TextStates, padded_vocabulary, run_of_keys
from vlp_jax.models.image_tower import ImageTowerConfig
from vlp_jax.models.layers import BlockConfig, Memory, Noise, norm
from vlp_jax.models.masks import bidirectional_mask
from vlp_jax.models.pooling import Pool, pooled
from vlp_jax.models.three_towers import ThreeTowers
from vlp_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """Geometry of the whole model.

    Attributes:
        image: the image tower.
        text: what the blocks of the text stack and of the reconstructor share.
        lower_depth: text blocks without access to the image, 1 or more.
        upper_depth: text blocks with cross-attention to the image, 1 or more.
        reconstructor_depth: even, 2 or more, and at most twice the shorter half of the text stack;
            half of the blocks run beside the last blocks of each half.
        vocab_size: entries of the tokenizer.
        max_positions: rows of the position table.
        mask_id: token whose embedding starts every reconstruction query.
    """

    image: ImageTowerConfig
    text: BlockConfig
    lower_depth: int
    upper_depth: int
    reconstructor_depth: int
    vocab_size: int
    max_positions: int
    mask_id: int

    # See ``EncoderConfig``: texts have a stack of their own, and so has the vocabulary a table.
    marks_text: ClassVar[bool] = False
    tied: ClassVar[bool] = False
    fusion_stacks: ClassVar[tuple[str, ...]] = ("text_upper",)

    def __post_init__(self) -> None:
        for key in ("lower_depth", "upper_depth"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.text.{key}={getattr(self, key)} must be 1 or more")
        depth, half = self.reconstructor_depth, self.reconstructor_depth // 2
        if depth % 2 or not 1 <= half <= min(self.lower_depth, self.upper_depth):
            raise ValueError(
                f"model.reconstructor.depth={depth} must be even, 2 or more, and at most "
                f"twice the shorter half of the text stack "
                f"({self.lower_depth} + {self.upper_depth} blocks)"
            )

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Both halves of the text stack, and the image tower where that has blocks."""
        halves = {"text_lower": self.lower_depth, "text_upper": self.upper_depth}
        image = {"image_tower": self.image.blocks} if isinstance(self.image, ViTConfig) else {}
        return image | {
            name: tuple(f"{name}_{layer}" for layer in range(depth))
            for name, depth in halves.items()
        }

    @property
    def text_blocks(self) -> int:
        """Blocks of the text stack."""
        return self.lower_depth + self.upper_depth

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of 128."""
        return padded_vocabulary(self.vocab_size)


# Rows of the table that marks what enters the upper half.
STREAM_TYPES = {"forward": 0, "reverse": 1, "image": 2, "query": 3, "bidirectional": 4}


class VisionLanguageModel(Encoder):
    """Image tower, two-half text stack, reconstructor and vocabulary head."""

    config: VisionLanguageConfig

    def setup(self) -> None:
        """Name the submodules; linen creates the parameters of those that are called."""
        super().setup()
        c = self.config
        width = c.text.width
        self.image_projection = Dense(width, dtype=c.text.dtype)
        self.text_lower = [Block(c.text) for _ in range(c.lower_depth)]
        self.text_projection = Dense(width, dtype=c.text.dtype)
        self.type_embedding = self.param(
            "type_embedding", nn.initializers.normal(0.02), (len(STREAM_TYPES), width)
        )
        self.text_upper = [Block(c.text, cross_attention=True) for _ in range(c.upper_depth)]
        half = c.reconstructor_depth // 2
        reader = functools.partial(Block, self_attention=False, cross_attention=True)
        self.reconstructor_lower = [reader(c.text) for _ in range(half)]
        self.reconstructor_upper = [reader(c.text) for _ in range(half)]
        if c.text.norm == "pre":
            self.text_norm = norm(c.text)
            self.query_norm = norm(c.text)

    def encode_image(
        self,
        image: jax.Array,
        noise: Noise = None,
        view: View | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Image tokens as cross-attention reads them: [B, S, S, 3] -> [B, I, D]; see ``ViT``."""
        tokens = self.image_projection(self.image_tower(image, noise, view, keys))
        return tokens + self._type("image", tokens)

    def image_feature(
        self, tokens: jax.Array, noise: Noise = None, pool: Pool = "class"
    ) -> jax.Array:
        """Of what the tower has made: [B, I, D] -> [B, D]."""
        del noise
        return pooled(tokens, pool)

    def text_feature(
        self, ids: jax.Array, lengths: jax.Array, noise: Noise = None, pool: Pool = "class"
    ) -> jax.Array:
        """Of the lower half, whose tokens all see one another: int32 [B, N] -> [B, D]."""
        mask = bidirectional_mask(lengths, ids.shape[1])[:, None]
        return pooled(self.encode_text_lower(ids, mask, noise)[-1][:, 0], pool, lengths)

    def encode_text_lower(
        self,
        ids: jax.Array,
        mask: jax.Array,
        noise: Noise = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """The half of the text stack that reads no image; see ``Encoder``.

        A stream knows what it is from its mask alone here; the upper half is told.
        """
        x = self._embedded(ids, mask.shape[1], noise, positions)
        states = []
        for block in self.text_lower:
            x = block(x, mask=mask, noise=noise)
            states.append(x)
        return tuple(states)

    def encode_text_upper(
        self,
        lower: jax.Array,
        mask: jax.Array,
        image: jax.Array | None,
        streams: tuple[str, ...],
        noise: Noise = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The half of the text stack that reads the image; see ``Encoder``.

        Shallow prompts are read like image tokens, by the cross-attention of every block, and as
        no block writes to what these read they stay as they are.

        Args:
            lower: [B, S, N, D], last states of the lower half.
            mask: bool [B, S, N, N].
            image: [B, I, D] from ``encode_image``.
            streams: S keys of ``STREAM_TYPES``.
            noise: of the dropout, or None.

        Returns:
            States of its blocks, and what the heads read, [B, S, N, D] each.

        Raises:
            ConfigError: there is no image.
        """
        if image is None:
            raise ConfigError(
                "model.type",
                "the upper half of this model's text stack reads an image with every text",
                "Use a model of type 'shared' or 'three_towers', or texts that come with images",
            )
        x, image = self._enter_upper(lower, streams), self._with_prompts(image)
        states = []
        for block in self.text_upper:
            x = block(x, mask=mask, context=image, noise=noise)
            states.append(x)
        return tuple(states), self._leave_upper(x)

    def project_image(self, image: jax.Array) -> tuple[Memory, ...]:
        """What cross-attention of the upper half reads; see ``Encoder``."""
        image = self._with_prompts(image)
        return tuple(Memory.of(block.project_context(image)) for block in self.text_upper)

    def _text_blocks(self) -> tuple[Sequence[Block], Sequence[Block]]:
        return self.text_lower, self.text_upper

    def _enter_upper(self, lower: jax.Array, streams: tuple[str, ...]) -> jax.Array:
        x = self.text_projection(lower)
        types = jnp.stack([self._type_vector(stream, x) for stream in streams])
        return x + types[None, :, None]

    def _leave_upper(self, x: jax.Array) -> jax.Array:
        return self.text_norm(x) if self.config.text.norm == "pre" else x

    def reconstruct(
        self, positions: jax.Array, states: TextStates, mask: jax.Array, noise: Noise = None
    ) -> jax.Array:
        """Answer independent queries from the states of both streams; see ``Encoder``."""
        x = self._queries(positions, len(states.last), noise)
        half = self.config.reconstructor_depth // 2
        for block, state in zip(
            self.reconstructor_lower, states.lower[len(states.lower) - half :], strict=True
        ):
            x = block(x, context=run_of_keys(state), context_mask=mask, noise=noise)
        x = self.text_projection(x)
        x = x + self._type("query", x)
        for block, state in zip(
            self.reconstructor_upper, states.upper[len(states.upper) - half :], strict=True
        ):
            x = block(x, context=run_of_keys(state), context_mask=mask, noise=noise)
        return self.query_norm(x) if self.config.text.norm == "pre" else x

    def _type_vector(self, name: str, like: jax.Array) -> jax.Array:
        return self.type_embedding[STREAM_TYPES[name]].astype(like.dtype)

    def _type(self, name: str, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self._type_vector(name, like), like.shape)


def two_stacks(model: nn.Module, reader: str) -> VisionLanguageModel:
    """The model, for what works on no other.

    Args:
        model: of a run.
        reader: what needs it, for the message.

    Raises:
        ConfigError: it has one stack for images and texts, or three towers.
    """
    if not isinstance(model, VisionLanguageModel):
        kind = "three_towers" if isinstance(model, ThreeTowers) else "shared"
        raise ConfigError(
            "model.type",
            f"{kind!r}, but {reader} needs a text stack that reads the image tower",
            "Leave that out, or use a size of model that has two stacks",
        )
    return model
