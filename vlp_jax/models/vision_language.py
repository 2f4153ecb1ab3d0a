"""The encoder that FLM and its baselines share, with the reconstructor and the vocabulary head.

One linen module whose methods are the stages of a vision-language model. An objective calls the
stages it needs; parameters of stages it does not call are not created. Geometry after the FLM
fact sheet, section 1: image tower, text stack in two halves (the upper one reads the image by
cross-attention), and a reconstructor of independent queries that runs beside the text stack.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import View
from vlp_jax.models.dense import Dense
from vlp_jax.models.image_tower import ImageTowerConfig, image_tower
from vlp_jax.models.layers import ACTIVATIONS, Block, BlockConfig, Noise, drop, norm

VOCABULARY_MULTIPLE = 128  # odd vocabularies compile for minutes and run slowly


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
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class TextStates(NamedTuple):
    """Outputs of every text block, for the reconstructor and the heads.

    Attributes:
        lower: one [B, S, N, D] for each block of the lower half.
        upper: one [B, S, N, D] for each block of the upper half.
        last: [B, S, N, D], what the heads read (after the final norm of a pre-LN stack).
    """

    lower: tuple[jax.Array, ...]
    upper: tuple[jax.Array, ...]
    last: jax.Array


# Rows of the table that marks what enters the upper half.
STREAM_TYPES = {"forward": 0, "reverse": 1, "image": 2, "query": 3, "bidirectional": 4}


class TextEmbedding(nn.Module):
    """Token plus position embedding, then a norm."""

    config: BlockConfig
    vocab_size: int
    max_positions: int

    def setup(self) -> None:
        """Create the two tables."""
        # Rows are read from the float32 table and cast after: the gradients of a row that many
        # examples share are then added in float32, for which GPUs have a fast atomic.
        init = nn.initializers.normal(0.02)
        self.token = nn.Embed(self.vocab_size, self.config.width, embedding_init=init)
        self.position = nn.Embed(self.max_positions, self.config.width, embedding_init=init)
        self.norm = norm(self.config)

    def __call__(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Embed ids at positions.

        Args:
            ids: int32 [B, N], or [1, 1] for one token at every place.
            positions: int32 [N].

        Returns:
            [B, N, D], B = 1 for ids [1, 1].
        """
        x = _rows(self.token, ids) + _rows(self.position, positions)[None]
        return self.norm(x.astype(self.config.dtype))


def _rows(table: nn.Embed, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D]: int32 [...] -> [..., D], in the dtype of the table."""
    if ids.size > 1:
        return table(ids)
    # A lookup of one row would have the gradient of one row, which XLA makes an update of a slice.
    # Where the table is cut along V, it then clobbers the first row of every shard that does not
    # hold the one looked up (jax 0.10.2; tests/train/test_step.py). A selection has no such update.
    chosen = jnp.arange(table.num_embeddings)[:, None] == ids.reshape(1, 1)
    row = jnp.where(chosen, table.embedding, 0.0).sum(axis=0)
    return jnp.broadcast_to(row, (*ids.shape, table.features))


class VocabularyHead(nn.Module):
    """Dense, GELU, norm, then a map to the padded vocabulary, kept apart for the fused loss."""

    config: BlockConfig
    vocab_size: int

    def setup(self) -> None:
        """Create the transform and the decoder's kernel and bias."""
        width = self.config.width
        self.dense = Dense(width, dtype=self.config.dtype)
        self.norm = norm(self.config)
        self.decoder_kernel = self.param(
            "decoder_kernel", nn.initializers.normal(0.02), (width, self.vocab_size)
        )
        self.decoder_bias = self.param(
            "decoder_bias", nn.initializers.zeros_init(), (self.vocab_size,)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the decoder multiplies: [..., D] -> [..., D]."""
        return self.norm(ACTIVATIONS["gelu"](self.dense(x)))

    def decoder(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [D, V] and bias [V], float32, V padded."""
        return self.decoder_kernel, self.decoder_bias


class VisionLanguageModel(nn.Module):
    """Image tower, two-half text stack, reconstructor and vocabulary head."""

    config: VisionLanguageConfig

    def setup(self) -> None:
        """Name the submodules; linen creates the parameters of those that are called."""
        c = self.config
        width = c.text.width
        self.image_tower = image_tower(c.image)
        self.image_projection = Dense(width, dtype=c.text.dtype)
        self.text_embedding = TextEmbedding(c.text, c.padded_vocab_size, c.max_positions)
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
        self.vocabulary_head = VocabularyHead(c.text, c.padded_vocab_size)
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

    def encode_text(
        self,
        ids: jax.Array,
        mask: jax.Array,
        image: jax.Array,
        streams: tuple[str, ...],
        noise: Noise = None,
    ) -> TextStates:
        """Encode uncorrupted text in one or more streams that share all weights.

        Args:
            ids: int32 [B, N].
            mask: bool [B, S, N, N], what each stream may see.
            image: [B, I, D] from ``encode_image``.
            streams: S keys of ``STREAM_TYPES``; the upper half is told which stream is which,
                the lower half knows it from its mask alone.
            noise: of the dropout, or None.

        Returns:
            States of every block, [B, S, N, D] each.
        """
        lower = self.encode_text_lower(ids, mask, noise)
        upper, last = self.encode_text_upper(lower[-1], mask, image, streams, noise)
        return TextStates(lower, upper, last)

    def encode_text_lower(
        self, ids: jax.Array, mask: jax.Array, noise: Noise = None
    ) -> tuple[jax.Array, ...]:
        """The half of the text stack that reads no image.

        Args:
            ids: int32 [B, N].
            mask: bool [B, S, N, N], what each of S streams may see.
            noise: of the dropout, or None.

        Returns:
            States of its blocks, [B, S, N, D] each.
        """
        x = self.text_embedding(ids, jnp.arange(ids.shape[1]))
        x = drop(self, "tokens", x, self.config.text.dropout, noise)
        # Streams sit on an inner axis: the batch axis is never concatenated (it is sharded).
        x = jnp.broadcast_to(x[:, None], (x.shape[0], mask.shape[1], *x.shape[1:]))
        states = []
        for block in self.text_lower:
            x = block(x, mask=mask, noise=noise)
            states.append(x)
        return tuple(states)

    def encode_text_upper(
        self,
        lower: jax.Array,
        mask: jax.Array,
        image: jax.Array,
        streams: tuple[str, ...],
        noise: Noise = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The half of the text stack that reads the image.

        Args:
            lower: [B, S, N, D], last states of the lower half.
            mask: bool [B, S, N, N].
            image: [B, I, D] from ``encode_image``.
            streams: S keys of ``STREAM_TYPES``.
            noise: of the dropout, or None.

        Returns:
            States of its blocks, and what the heads read (after the final norm of a pre-LN
            stack), [B, S, N, D] each.
        """
        x = self.text_projection(lower)
        types = jnp.stack([self._type_vector(stream, x) for stream in streams])
        x = x + types[None, :, None]
        states = []
        for block in self.text_upper:
            x = block(x, mask=mask, context=image, noise=noise)
            states.append(x)
        return tuple(states), self.text_norm(x) if self.config.text.norm == "pre" else x

    def reconstruct(
        self, positions: jax.Array, states: TextStates, mask: jax.Array, noise: Noise = None
    ) -> jax.Array:
        """Answer independent queries, each for one position, from the states of both streams.

        A query starts as the mask token at its position and reads, block by block, the states that
        ``mask`` leaves visible; queries do not see one another, nor the image except through the
        states.

        Args:
            positions: int32 [Q], positions asked for.
            states: of ``encode_text``, two streams.
            mask: bool [B, Q, S * N], N keys of the first stream, then N of the second.
            noise: of the dropout, or None.

        Returns:
            [B, Q, D].
        """
        batch = states.last.shape[0]
        mask_token = jnp.full((1, 1), self.config.mask_id, jnp.int32)
        x = self.text_embedding(mask_token, positions)
        x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
        x = drop(self, "queries", x, self.config.text.dropout, noise)

        def keys(state: jax.Array) -> jax.Array:
            return state.reshape(batch, -1, state.shape[-1])

        half = self.config.reconstructor_depth // 2
        for block, state in zip(
            self.reconstructor_lower, states.lower[len(states.lower) - half :], strict=True
        ):
            x = block(x, context=keys(state), context_mask=mask, noise=noise)
        x = self.text_projection(x)
        x = x + self._type("query", x)
        for block, state in zip(
            self.reconstructor_upper, states.upper[len(states.upper) - half :], strict=True
        ):
            x = block(x, context=keys(state), context_mask=mask, noise=noise)
        return self.query_norm(x) if self.config.text.norm == "pre" else x

    def predict_vocabulary(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features for the decoder, its kernel and its bias: [..., D], [D, V], [V]."""
        return (self.vocabulary_head(x), *self.vocabulary_head.decoder())

    def vocabulary_logits(self, x: jax.Array) -> jax.Array:
        """Scores of the entries of the padded vocabulary: [..., D] -> float32 [..., V].

        Where scores are reported or compared; losses take ``predict_vocabulary``.
        """
        features, kernel, bias = self.predict_vocabulary(x)
        kernel = kernel.astype(features.dtype)
        products = jnp.dot(features, kernel, preferred_element_type=jnp.float32)
        return products + bias.reshape((1,) * (x.ndim - 1) + (-1,))

    def _type_vector(self, name: str, like: jax.Array) -> jax.Array:
        return self.type_embedding[STREAM_TYPES[name]].astype(like.dtype)

    def _type(self, name: str, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self._type_vector(name, like), like.shape)
