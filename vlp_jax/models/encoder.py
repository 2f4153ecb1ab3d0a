"""What objectives need of a vision-language model: its stages, whichever model has them.

Three models have these stages. ``VisionLanguageModel`` has an image tower and a text stack whose
upper half reads the image by cross-attention; in ``SharedModel`` one stack reads images, texts, and
both at once; ``ThreeTowers`` has a tower for each of these. An objective calls stages and knows
none of them; parameters of stages it does not call are not created.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import View
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.block import Block
from vlp_jax.models.dense import Dense
from vlp_jax.models.image_tower import ImageTowerConfig, image_tower
from vlp_jax.models.layers import ACTIVATIONS, BlockConfig, Memory, Noise, drop, norm
from vlp_jax.models.pooling import Pool
from vlp_jax.models.tuning import Prompt

VOCABULARY_MULTIPLE = 128  # odd vocabularies compile for minutes and run slowly


class EncoderConfig(Protocol):
    """What the geometries of all models have in common.

    Attributes:
        image: the image tower.
        text: of the blocks that read text; heads and the reconstructor take their width from it.
        text_blocks: blocks that a text with its image passes.
        reconstructor_depth: blocks of the reconstructor.
        vocab_size: entries of the tokenizer.
        padded_vocab_size: of the table of tokens.
        max_positions: rows of the position table.
        mask_id: token whose embedding starts every reconstruction query.
        marks_text: the embedding of a text tells it from an image.
        tied: the vocabulary head reads the table of tokens.
        stacks: name of each stack -> paths of its blocks, which may be tuned or skipped; the
            reconstructor is none of them.
        fusion_stacks: those that read both a text and its image.
    """

    @property
    def image(self) -> ImageTowerConfig: ...  # noqa: D102
    @property
    def text(self) -> BlockConfig: ...  # noqa: D102
    @property
    def text_blocks(self) -> int: ...  # noqa: D102
    @property
    def reconstructor_depth(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def padded_vocab_size(self) -> int: ...  # noqa: D102
    @property
    def max_positions(self) -> int: ...  # noqa: D102
    @property
    def mask_id(self) -> int: ...  # noqa: D102
    @property
    def marks_text(self) -> bool: ...  # noqa: D102
    @property
    def tied(self) -> bool: ...  # noqa: D102
    @property
    def stacks(self) -> dict[str, tuple[str, ...]]: ...  # noqa: D102
    @property
    def fusion_stacks(self) -> tuple[str, ...]: ...  # noqa: D102


def padded_vocabulary(size: int) -> int:
    """``size`` rounded up to a multiple of 128."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class TextStates(NamedTuple):
    """Outputs of every text block, for the reconstructor and the heads.

    Attributes:
        lower: one [B, S, N, D] for each block of the lower half, or of a text tower; of a shared
            stack, what enters it.
        upper: one [B, S, N, D] for each block of the upper half, of a shared stack, or of a fusion
            tower, which a text alone does not pass.
        last: [B, S, N, D], what the heads read (after the final norm of a pre-LN stack).
    """

    lower: tuple[jax.Array, ...]
    upper: tuple[jax.Array, ...]
    last: jax.Array


class TextEmbedding(nn.Module):
    """Token plus position embedding, then a norm.

    Attributes:
        config: width and compute dtype.
        vocab_size: rows of the table of tokens.
        max_positions: rows of the table of positions.
        modality: a learned vector is added after the norm, which tells a text from an image where
            one stack reads both.
    """

    config: BlockConfig
    vocab_size: int
    max_positions: int
    modality: bool = False

    def setup(self) -> None:
        """Create the two tables."""
        # Rows are read from the float32 table and cast after: the gradients of a row that many
        # examples share are then added in float32, for which GPUs have a fast atomic.
        init = nn.initializers.normal(0.02)
        self.token = nn.Embed(self.vocab_size, self.config.width, embedding_init=init)
        self.position = nn.Embed(self.max_positions, self.config.width, embedding_init=init)
        self.norm = norm(self.config)
        if self.modality:
            self.modality_embedding = self.param(
                "modality_embedding", init, (1, 1, self.config.width)
            )

    def __call__(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Embed ids at positions.

        Args:
            ids: int32 [B, N], or [1, 1] for one token at every place.
            positions: int32 [N], or [B, N] where rows differ.

        Returns:
            [B, N, D], B = 1 for ids [1, 1] at positions [N].
        """
        places = _rows(self.position, positions)
        x = _rows(self.token, ids) + (places[None] if positions.ndim == 1 else places)
        x = self.norm(x.astype(self.config.dtype))
        return x + self.modality_embedding.astype(x.dtype) if self.modality else x

    def table(self) -> jax.Array:
        """Of the tokens, float32 [V, D]."""
        return jnp.asarray(self.token.embedding)


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
    """Dense, GELU, norm, then a map to the padded vocabulary, kept apart for the fused loss.

    Attributes:
        config: width and compute dtype.
        vocab_size: V, padded.
        tied: the map is the table of tokens that ``decoder`` is given; it has no kernel of its own.
    """

    config: BlockConfig
    vocab_size: int
    tied: bool = False

    def setup(self) -> None:
        """Create the transform and the decoder's kernel and bias."""
        width = self.config.width
        self.dense = Dense(width, dtype=self.config.dtype)
        self.norm = norm(self.config)
        if not self.tied:
            self.decoder_kernel = self.param(
                "decoder_kernel", nn.initializers.normal(0.02), (width, self.vocab_size)
            )
        self.decoder_bias = self.param(
            "decoder_bias", nn.initializers.zeros_init(), (self.vocab_size,)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the decoder multiplies: [..., D] -> [..., D]."""
        return self.norm(ACTIVATIONS["gelu"](self.dense(x)))

    def decoder(self, table: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Kernel [D, V] and bias [V], float32, V padded.

        Args:
            table: float32 [V, D], of the tokens; read by a head that is tied to it.
        """
        if not self.tied:
            return self.decoder_kernel, self.decoder_bias
        if table is None:
            raise ValueError("a tied head needs the table of tokens")
        return table.T, self.decoder_bias


class Encoder(nn.Module):
    """A vision-language model; its methods are the stages that objectives call.

    Attributes:
        config: geometry.
        reads_text_alone: whether ``encode_text`` takes a text without an image.
    """

    config: EncoderConfig

    reads_text_alone: ClassVar[bool] = False

    def setup(self) -> None:
        """Name what all models have; linen creates the parameters of those that are called."""
        c = self.config
        self.image_tower = image_tower(c.image)
        self.text_embedding = TextEmbedding(
            c.text, c.padded_vocab_size, c.max_positions, c.marks_text
        )
        self.vocabulary_head = VocabularyHead(c.text, c.padded_vocab_size, c.tied)
        prompts = c.text.tuning.shallow_prompts
        self.image_prompt = Prompt(prompts, c.text.width, c.text.dtype) if prompts else None

    def encode_image(
        self,
        image: jax.Array,
        noise: Noise = None,
        view: View | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Image tokens as texts read them: [B, S, S, 3] -> [B, I, D]; see ``ViT``."""
        raise NotImplementedError

    def image_feature(
        self, tokens: jax.Array, noise: Noise = None, pool: Pool = "class"
    ) -> jax.Array:
        """What is read of an image that meets no text.

        Args:
            tokens: [B, I, D] from ``encode_image``.
            noise: of the dropout, or None.
            pool: of its tokens, see ``models.pooling``.

        Returns:
            [B, D].
        """
        raise NotImplementedError

    def text_feature(
        self, ids: jax.Array, lengths: jax.Array, noise: Noise = None, pool: Pool = "class"
    ) -> jax.Array:
        """What is read of a text that meets no image: int32 [B, N], int32 [B] -> [B, D].

        ``pool`` is that of ``image_feature``, over the real tokens.
        """
        raise NotImplementedError

    def encode_text(
        self,
        ids: jax.Array,
        mask: jax.Array,
        image: jax.Array | None,
        streams: tuple[str, ...],
        noise: Noise = None,
        positions: jax.Array | None = None,
    ) -> TextStates:
        """Encode uncorrupted text in one or more streams that share all weights.

        Args:
            ids: int32 [B, N].
            mask: bool [B, S, N, N], what each stream may see.
            image: [B, I, D] from ``encode_image``; None: text alone.
            streams: of each of S streams what it is: ``forward`` and ``reverse``, whose rows see
                one side, or ``bidirectional``.
            noise: of the dropout, or None.
            positions: int32 [B, N] of the tokens; None: their places.

        Returns:
            States of every block, [B, S, N, D] each.

        Raises:
            ConfigError: the model does not read text alone.
        """
        lower = self.encode_text_lower(ids, mask, noise, positions)
        upper, last = self.encode_text_upper(lower[-1], mask, image, streams, noise)
        return TextStates(lower, upper, last)

    def encode_text_lower(
        self,
        ids: jax.Array,
        mask: jax.Array,
        noise: Noise = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """The part of the text stack that no image enters; arguments as of ``encode_text``.

        Returns:
            Its states, [B, S, N, D] each.
        """
        raise NotImplementedError

    def encode_text_upper(
        self,
        lower: jax.Array,
        mask: jax.Array,
        image: jax.Array | None,
        streams: tuple[str, ...],
        noise: Noise = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The part of the text stack that reads the image.

        Args:
            lower: [B, S, N, D], last of the states of ``encode_text_lower``.
            mask: bool [B, S, N, N].
            image: [B, I, D] from ``encode_image``; None: text alone.
            streams: what each of S streams is.
            noise: of the dropout, or None.

        Returns:
            States of its blocks, and what the heads read (after the final norm of a pre-LN
            stack), [B, S, N, D] each.

        Raises:
            ConfigError: the model does not read text alone.
        """
        raise NotImplementedError

    def reconstruct(
        self, positions: jax.Array, states: TextStates, mask: jax.Array, noise: Noise = None
    ) -> jax.Array:
        """Answer independent queries, each for one position, from the states of the streams.

        A query starts as the mask token at its position and reads, block by block, the states that
        ``mask`` leaves visible; queries do not see one another, nor the image except through the
        states.

        Args:
            positions: int32 [Q], positions asked for, or [B, Q] where rows differ.
            states: of ``encode_text``.
            mask: bool [B, Q, S * N], N keys of the first stream, then N of the second.
            noise: of the dropout, or None.

        Returns:
            [B, Q, D].
        """
        raise NotImplementedError

    def project_image(self, image: jax.Array) -> tuple[Memory, ...]:
        """Keys and values of an image that sees no text, in every block whose texts read it.

        Args:
            image: [B, I, D] from ``encode_image``.

        Returns:
            [B, H, I, d] each, I the tokens of the image and what prompts are read with them.
        """
        raise NotImplementedError

    def decode(
        self,
        ids: jax.Array,
        position: jax.Array,
        past: tuple[Memory, ...],
        image: tuple[Memory, ...],
    ) -> tuple[jax.Array, tuple[Memory, ...]]:
        """Run one more token of texts through the forward stream, without dropout.

        Args:
            ids: int32 [B, K], the token at ``position`` of K texts of an image.
            position: int32 [], the same for all.
            past: of the tokens before it, in every block that texts pass: [B, K, H, T, d].
            image: of ``project_image``.

        Returns:
            What the heads read of the token, [B, K, D], and ``past`` with it in its place.
        """
        lower, upper = self._text_blocks()
        positions = jnp.broadcast_to(position, ids.shape[1:])
        x = self.text_embedding(ids, positions)[:, :, None]
        kept = []
        for block, before in zip(lower, past[: len(lower)], strict=True):
            x, after = block.decode(x, position, before)
            kept.append(after)
        x = self._enter_upper(x, ("forward",))
        for block, before, read in zip(upper, past[len(lower) :], image, strict=True):
            x, after = block.decode(x, position, before, read)
            kept.append(after)
        return self._leave_upper(x)[:, :, 0], tuple(kept)

    def _text_blocks(self) -> tuple[Sequence[Block], Sequence[Block]]:
        """Those that no image enters, and those that read it, of one-sided streams."""
        raise NotImplementedError

    def _enter_upper(self, lower: jax.Array, streams: tuple[str, ...]) -> jax.Array:
        """What the blocks that read an image are given of a text alone.

        Args:
            lower: [B, S, N, D], last of the states of ``encode_text_lower``.
            streams: what each of S streams is; of one, what all are.

        Returns:
            [B, S, N, D].
        """
        raise NotImplementedError

    def _leave_upper(self, x: jax.Array) -> jax.Array:
        """What the heads read of a text that has read an image: [B, S, N, D], the same shape."""
        raise NotImplementedError

    def _with_prompts(self, image: jax.Array) -> jax.Array:
        """Image tokens as they enter the blocks that texts read them in, then shallow prompts.

        Args:
            image: [B, I, D].

        Returns:
            [B, I + P, D]; P = 0 in a model that is not tuned by shallow prompts.
        """
        if self.image_prompt is None:
            return image
        prompts = self.image_prompt().astype(image.dtype)[None]
        prompts = jnp.broadcast_to(prompts, (len(image), *prompts.shape[1:]))
        return jnp.concatenate([image, prompts], axis=1)

    def predict_vocabulary(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features for the decoder, its kernel and its bias: [..., D], [D, V], [V]."""
        table = self.text_embedding.table() if self.config.tied else None
        return (self.vocabulary_head(x), *self.vocabulary_head.decoder(table))

    def vocabulary_logits(self, x: jax.Array) -> jax.Array:
        """Scores of the entries of the padded vocabulary: [..., D] -> float32 [..., V].

        Where scores are reported or compared; losses take ``predict_vocabulary``.
        """
        features, kernel, bias = self.predict_vocabulary(x)
        kernel = kernel.astype(features.dtype)
        products = jnp.dot(features, kernel, preferred_element_type=jnp.float32)
        return products + bias.reshape((1,) * (x.ndim - 1) + (-1,))

    def _embedded(
        self, ids: jax.Array, streams: int, noise: Noise, positions: jax.Array | None
    ) -> jax.Array:
        """Embedded tokens for every stream: int32 [B, N] -> [B, S, N, D]."""
        positions = jnp.arange(ids.shape[1]) if positions is None else positions
        x = self.text_embedding(ids, positions)
        x = drop(self, "tokens", x, self.config.text.dropout, noise)
        # Streams sit on an inner axis: the batch axis is never concatenated (it is sharded).
        return jnp.broadcast_to(x[:, None], (x.shape[0], streams, *x.shape[1:]))

    def _queries(self, positions: jax.Array, batch: int, noise: Noise) -> jax.Array:
        """The mask token at every position: int32 [Q] or [B, Q] -> [B, Q, D]."""
        mask_token = jnp.full((1, 1), self.config.mask_id, jnp.int32)
        x = self.text_embedding(mask_token, positions)
        x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
        return drop(self, "queries", x, self.config.text.dropout, noise)


def check_text_alone(model: Encoder, reader: str) -> None:
    """Refuse a model that reads no text without an image.

    Args:
        model: of a run.
        reader: what has no image for it, for the message.

    Raises:
        ConfigError: the model has a text stack whose upper half reads an image.
    """
    if not model.reads_text_alone:
        raise ConfigError(
            "model.type",
            f"'two_stacks', but {reader} gives it a text without an image",
            "Use a model of type 'shared' or 'three_towers', such as the size shared_small",
        )


def run_of_keys(states: jax.Array) -> jax.Array:
    """States of several streams as one run of keys: [B, S, N, D] -> [B, S * N, D]."""
    return states.reshape(len(states), -1, states.shape[-1])
