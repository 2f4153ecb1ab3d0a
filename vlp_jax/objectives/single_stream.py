"""The baselines of FLM over the same encoder: MLM, AR and PrefixLM.

Source: fact sheet of Free Language Modeling, section 2. Each encodes the text in a single stream
and differs from the others in what is hidden and what is predicted (``Stream``); everything else
is shared. With L the number of tokens that can be predicted, prediction rate and mean corruption
rate (the share of the L tokens hidden from a prediction) are

=========  ===============  ===================
objective  prediction rate  corruption rate
=========  ===============  ===================
MLM        r                r
AR         1                1/2 + 1/(2 L)
PrefixLM   r                r/2 + 1/(2 L)
FLM        1                any in [1/L, 1]
=========  ===============  ===================

L = n - 1 (</s> is predicted, <s> never), for MLM n - 2: it masks words only, as BERT does.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket, view_of
from vlp_jax.data.batch import PAIRS, Batch
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import image_input_flops, text_flops, vocabulary_flops
from vlp_jax.models.masks import bidirectional_mask, forward_mask
from vlp_jax.objectives.base import (
    Defaults,
    Extras,
    ImagePass,
    LossOutput,
    Mean,
    Params,
    Pass,
    Seen,
    batch_noise,
    check_image,
    example_keys,
    image_tokens,
    seen_part,
    zeros,
)
from vlp_jax.objectives.cross_entropy import CHUNK_ROWS, vocabulary_cross_entropy
from vlp_jax.objectives.documents import Documents, documents_of


class Stream(NamedTuple):
    """What one objective makes of a text.

    Attributes:
        ids: int32 [B, N], what is encoded.
        hidden: bool [B, N], tokens of the text that ``ids`` does not tell.
        mask: bool [B, N, N], what each row may see.
        labels: int32 [B, N], what each row predicts.
        predicts: bool [B, N], which rows do.
    """

    ids: jax.Array
    hidden: jax.Array
    mask: jax.Array
    labels: jax.Array
    predicts: jax.Array


@dataclasses.dataclass(frozen=True)
class SingleStream(Defaults, abc.ABC):
    """A language objective over one stream.

    Attributes:
        model: the shared encoder.
        name: key in ``config.objectives``.
        batch_name: named batch it reads.
        chunk_rows: rows of logits that exist at a time.
        with_image: texts are read with their images. False: texts alone, by a model that reads
            them so (``model.type`` "shared" or "three_towers"), whether the batch has images or
            none.
    """

    model: Encoder
    name: str
    batch_name: str = PAIRS
    chunk_rows: int = CHUNK_ROWS
    with_image: bool = True

    stream_type: ClassVar[str]  # key of ``STREAM_TYPES``

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Tokens of the images, where it reads any."""
        return (ImagePass(self.model),) if self.with_image else ()

    @abc.abstractmethod
    def stream(self, batch: Batch, rng: jax.Array) -> Stream:
        """Draw what is hidden from a batch; ``rng`` is folded with each example's position."""

    @abc.abstractmethod
    def predictions(self, text_length: float) -> float:
        """Mean number of predictions of an example with so many tokens."""

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of the encoder and the vocabulary head; no extras."""
        check_image(self.name, self.with_image, batch_spec)
        batch = zeros(batch_spec)

        def forward(model: Encoder) -> None:
            self._features(model, batch, self.stream(batch, rng), None)

        return nn.init(forward, self.model)(rng)["params"], {}

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Cross-entropy of the predictions."""
        stream_key, dropout_key = jax.random.split(rng)
        stream = self.stream(batch, stream_key)
        noise = batch_noise(dropout_key, batch, train)
        seen = seen_part(rng, batch, bucket, train)

        def forward(model: Encoder) -> tuple[jax.Array, ...]:
            return self._features(model, batch, stream, noise, seen)

        features, kernel, bias = nn.apply(forward, self.model)({"params": params})
        weights = (stream.predicts & batch["valid"][:, None]).astype(jnp.float32)
        scores = vocabulary_cross_entropy(
            features,
            kernel,
            bias,
            stream.labels,
            weights,
            self.model.config.vocab_size,
            self.chunk_rows,
        )
        count = weights.sum()
        metrics = {
            "accuracy": Mean(scores.correct.sum(), count),
            "predictions": Mean(count, batch["valid"].sum(dtype=jnp.float32)),
        }
        return LossOutput(Mean(scores.loss, count), extras, metrics)

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example; by formula over real tokens, padding not counted."""
        c, view = self.model.config, view_of(bucket)
        joint = self.stream_type == "bidirectional"
        text = text_flops(c, text_length, 1, view, joint=joint, with_image=self.with_image)
        image = image_input_flops(c, view) if self.with_image else 0.0
        return image + text + vocabulary_flops(c, self.predictions(text_length))

    def _features(
        self,
        model: Encoder,
        batch: Batch,
        stream: Stream,
        noise: jax.Array | None,
        seen: Seen | None = None,
    ) -> tuple[jax.Array, ...]:
        image = image_tokens(model, batch, noise, seen) if self.with_image else None
        positions = documents_of(batch).positions
        states = model.encode_text(
            stream.ids, stream.mask[:, None], image, (self.stream_type,), noise, positions
        )
        return model.predict_vocabulary(states.last[:, 0])


@dataclasses.dataclass(frozen=True)
class MLM(SingleStream):
    """Masked language modeling: predict a share of the words from all the others.

    Of the masked tokens 80 % become the mask token, 10 % a random one, 10 % stay (BERT). The
    number masked is the rate times the words, rounded up or down by a coin, at least one.

    Attributes:
        vocabulary: of the run.
        rate: share of the words that is masked, in (0, 1].
        whole_word: mask all pieces of a word or none. The last word that is drawn may carry the
            share past the rate or leave it short, evenly.
    """

    vocabulary: Vocabulary = dataclasses.field(kw_only=True)
    rate: float = 0.15
    whole_word: bool = False

    stream_type = "bidirectional"

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ConfigError(
                f"objectives.{self.name}.rate", f"{self.rate} is no share", "Use one in (0, 1]"
            )

    def stream(self, batch: Batch, rng: jax.Array) -> Stream:
        """Mask each text on its own; see the class."""
        ids, lengths = batch["text_ids"], batch["text_length"]
        keys, documents = example_keys(rng, batch["position"]), documents_of(batch)
        continues = jnp.asarray(self.vocabulary.continues)[ids] & self.whole_word
        position = jnp.broadcast_to(documents.position, ids.shape)
        words = (position >= 1) & (position <= documents.length - 2)
        masked = jax.vmap(self._choose)(keys, words, continues & (position > 1))
        inputs = jax.vmap(self._corrupt)(keys, ids, masked)
        mask = documents.within(bidirectional_mask(lengths, ids.shape[1]))
        return Stream(inputs, masked, mask, ids, masked)

    def predictions(self, text_length: float) -> float:
        """The rate of all words."""
        return self.rate * (text_length - 2)

    def _choose(self, key: jax.Array, words: jax.Array, continues: jax.Array) -> jax.Array:
        """Which tokens are masked, of those of words; all bool [N]."""
        word = jnp.cumsum(~continues)
        rank_key, count_key = jax.random.split(jax.random.fold_in(key, 0))
        scores = jax.random.uniform(rank_key, words.shape)[word - 1]
        scores = jnp.where(words, scores, jnp.inf)
        # Tokens of words that come before a token's own in the drawn order, and of its own.
        before = jnp.sum(scores[None, :] < scores[:, None], axis=-1)
        own = jnp.sum((word[None, :] == word[:, None]) & words[None, :], axis=-1)
        wanted = self.rate * jnp.sum(words)
        coin = jax.random.uniform(count_key)
        # Half of the last word past the count, or half of it short; one token: rounding by a coin.
        return words & ((before + coin * own < wanted) | (before == 0))

    def _corrupt(self, key: jax.Array, ids: jax.Array, masked: jax.Array) -> jax.Array:
        kind_key, word_key = jax.random.split(jax.random.fold_in(key, 1))
        kind = jax.random.uniform(kind_key, ids.shape)
        words = jax.random.randint(word_key, ids.shape, 0, self.vocabulary.size, jnp.int32)
        new = jnp.where(kind < 0.8, self.vocabulary.mask_id, jnp.where(kind < 0.9, words, ids))
        return jnp.where(masked, new, ids)


@dataclasses.dataclass(frozen=True)
class AR(SingleStream):
    """Autoregressive language modeling: row i, which sees 0 .. i, predicts token i + 1."""

    stream_type = "forward"

    def stream(self, batch: Batch, rng: jax.Array) -> Stream:
        """Nothing is drawn."""
        del rng
        ids, documents = batch["text_ids"], documents_of(batch)
        return Stream(
            ids,
            jnp.zeros(ids.shape, jnp.bool_),
            documents.within(forward_mask(batch["text_length"], ids.shape[1])),
            _next_tokens(ids),
            _have_next(documents),
        )

    def predictions(self, text_length: float) -> float:
        """All tokens but <s>."""
        return text_length - 1


@dataclasses.dataclass(frozen=True)
class PrefixLM(SingleStream):
    """Autoregressive language modeling after a prefix whose tokens see one another.

    Attributes:
        rate: share of the L tokens that is predicted; None: for each text any number of them from
            1 to L, all equally likely.
    """

    rate: float | None = None

    stream_type = "forward"

    def __post_init__(self) -> None:
        if self.rate is not None and not 0.0 < self.rate <= 1.0:
            raise ConfigError(
                f"objectives.{self.name}.rate",
                f"{self.rate} is no share",
                "Use one in (0, 1], or None for a random prefix",
            )

    def stream(self, batch: Batch, rng: jax.Array) -> Stream:
        """Cut each text in two at random."""
        ids, lengths, documents = batch["text_ids"], batch["text_length"], documents_of(batch)
        tokens = ids.shape[1]
        keys = example_keys(rng, batch["position"])
        if documents.number is None:
            draw = jax.vmap(jax.random.uniform)(keys)[:, None]
        else:  # each document's is that of its first token
            draw = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys)
            draw = jnp.take_along_axis(draw, documents.start, axis=1)
        prefix = documents.length - self._predicted(draw, documents.length - 1)
        in_prefix = (documents.position < prefix)[:, None, :]
        mask = forward_mask(lengths, tokens) | (in_prefix & bidirectional_mask(lengths, tokens))
        predicts = (documents.position >= prefix - 1) & _have_next(documents)
        return Stream(
            ids,
            jnp.zeros(ids.shape, jnp.bool_),
            documents.within(mask),
            _next_tokens(ids),
            predicts,
        )

    def predictions(self, text_length: float) -> float:
        """The rate of L, or half of L + 1."""
        last = text_length - 1
        return (last + 1) / 2 if self.rate is None else max(self.rate * last, 1.0)

    def _predicted(self, draw: jax.Array, last: jax.Array) -> jax.Array:
        """How many of L = ``last`` tokens are predicted, by draws from [0, 1): int32 like both."""
        wanted = draw * last + 1 if self.rate is None else self.rate * last + draw
        return jnp.clip(wanted.astype(jnp.int32), 1, jnp.maximum(last, 1))


def _next_tokens(ids: jax.Array) -> jax.Array:
    """Token i + 1 at row i: int32 [B, N]; the last row's is never predicted."""
    return jnp.roll(ids, -1, axis=1)


def _have_next(documents: Documents) -> jax.Array:
    """Which tokens are followed by one of their own document: bool [B, N]."""
    return documents.position < documents.length - 1
