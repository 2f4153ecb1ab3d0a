"""Free Language Modeling: encode once, corrupt in attention, predict every token.

Source: fact sheet of Free Language Modeling (CVPR 2023), sections 1 and 2.

A text x_0 = <s>, x_1, ..., x_{n-1} = </s> is encoded uncorrupted in two streams that share all
weights, forward (row i sees j <= i) and reverse (row i sees j >= i). A query for token i then reads
the states of both streams outside a span around i. Since a forward state before the span has seen
nothing of the span, and neither has a reverse state after it, the span is hidden from the query;
the encoder ran once for all n - 1 predictions.

Each of the three losses predicts L = n - 1 tokens, so that the mean over tokens of every one has
the same weight:

* reconstruction: query i -> x_i, i = 1 .. n-1;
* forward: row i -> x_{i+1}, i = 0 .. n-2;
* reverse: row i -> x_{i-1}, i = 1 .. n-1.

Where the released code has a quirk (fact sheet, sections 1 and 7), this is what we do:

* *The end token stands in its own query there*, a trivial target. Here </s> is hidden from its
  query and predicted as any other token. Evaluators report words only, without </s>.
* *The class row sees all tokens in both streams, and its column is hidden from the others.* Here
  both masks are plainly causal: in the forward stream <s> sees itself and the image, which makes
  it the start of a caption, and x_1 is predicted from it (never predicted there). A query may
  always read it, so that at r = 1 the image remains. In the reverse stream row 0 comes last and
  sees everything. The readout of a whole text is the query for position 0.
* *The first row of padding predicts </s> in the reverse stream*, trivially. Rows of padding are no
  targets here, and no query reads them.
* *Blocked rows of an additive -10000 mask attend everywhere.* Masks are boolean here, and a row
  with nothing to see gives zeros.
* *Spans are clipped at the edges*, so that less than r is hidden. Here a span is shifted inwards:
  it always has the length drawn, and the mean share hidden is r.
* *Corruption is drawn afresh in evaluation.* Here evaluators pass a fixed key.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket, view_of
from vlp_jax.data.batch import PAIRS, Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder, TextStates
from vlp_jax.models.flops import (
    image_input_flops,
    reconstructor_flops,
    text_flops,
    vocabulary_flops,
)
from vlp_jax.models.masks import token_mask, two_stream_mask
from vlp_jax.objectives.base import (
    PROGRESS,
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
from vlp_jax.objectives.corruption import Corruption, build_corruption
from vlp_jax.objectives.cross_entropy import CHUNK_ROWS, TokenScores, vocabulary_cross_entropy
from vlp_jax.objectives.documents import documents_of

LOSSES = ("reconstruction", "forward", "reverse")


def hidden_spans(
    rng: jax.Array,
    lengths: jax.Array,
    tokens: int,
    rate: float | jax.Array,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw the span hidden from each query.

    With L = n - 1 tokens that can be hidden (positions 1 .. n-1), a span holds 1 + m of them,
    m ~ Binomial(L - 1, (rate L - 1) / (L - 1)), so that its mean length is rate * L; a rate below
    1 / L means 1 / L, the query's own token alone. The span is centred on its query, the odd
    token falling to either side by a coin, and shifted inwards at both ends.

    Args:
        rng: keys [B], one an example.
        lengths: int32 [B], n, including <s> and </s>; [B, N], of each query's own text.
        tokens: N.
        rate: corruption rate r in [0, 1], one for all or float32 [B].
        starts: int32 [B, N], where in the row each query's own text begins; None: with the row.

    Returns:
        First and last hidden place of each query, int32 [B, N] each; meaningful for queries
        1 .. n-1 of a text.
    """
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), lengths.shape[:1])
    lengths = lengths.reshape(len(lengths), -1)  # [B, 1 or N]
    starts = jnp.zeros_like(lengths) if starts is None else starts

    def one(
        key: jax.Array, length: jax.Array, rate: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        extra_key, side_key = jax.random.split(key)
        others = jnp.maximum(length - 2, 0)  # L - 1
        probability = jnp.clip((rate * (others + 1) - 1.0) / jnp.maximum(others, 1), 0.0, 1.0)
        # The binomial as a sum of coins, row i the coins of query i; coins past L - 1 do not count.
        coins = jax.random.uniform(extra_key, (tokens, tokens)) < probability[:, None]
        coins &= jnp.arange(tokens)[None, :] < others[:, None]
        extra = coins.sum(axis=-1, dtype=jnp.int32)
        odd_left = jax.random.bits(side_key, (tokens,), jnp.uint8) < 128
        before = (extra + odd_left) // 2
        first = jnp.arange(tokens) - before
        first = jnp.clip(first, start + 1, start + jnp.maximum(length - 1 - extra, 1))
        return first, first + extra

    return jax.vmap(one)(rng, lengths, rates, starts)


def visible_mask(
    positions: jax.Array, lengths: jax.Array, first: jax.Array, last: jax.Array, tokens: int
) -> jax.Array:
    """Which states of the two streams a query may read.

    Args:
        positions: int32 [Q], what is asked for. The query for 0 reads everything.
        lengths: int32 [B].
        first: int32 [B, N], first hidden position of each query.
        last: int32 [B, N], last hidden position.
        tokens: N.

    Returns:
        bool [B, Q, 2 N]: N keys of the forward stream, then N of the reverse one.
    """
    key = jnp.arange(tokens)[None, None, :]
    whole = (positions == 0)[None, :, None]
    forward = whole | (key < first[:, positions][..., None])
    reverse = whole | (key > last[:, positions][..., None])
    real = token_mask(lengths, tokens)[:, None, :]
    return jnp.concatenate([forward & real, reverse & real], axis=-1)


@dataclasses.dataclass(frozen=True)
class FLM(Defaults):
    """Reconstruction of every token plus next-token losses of both streams.

    Attributes:
        model: the shared encoder.
        batch_name: named batch it reads.
        corruption_rate: r in [0, 1], or a rule by which it changes (``objectives.corruption``).
            What lies below 1 / L (so also 0.0) hides the query's own token alone.
        loss_weights: factor of each loss in ``LOSSES``; their sum need not be 1.
        chunk_rows: rows of logits that exist at a time.
        name: key in ``config.objectives``.
        with_image: as of ``single_stream.SingleStream``.
    """

    model: Encoder
    batch_name: str = PAIRS
    corruption_rate: float | Mapping[str, Any] = 0.0
    loss_weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(LOSSES, 1.0 / len(LOSSES))
    )
    chunk_rows: int = CHUNK_ROWS
    name: str = "flm"
    with_image: bool = True

    def __post_init__(self) -> None:
        key = f"config.objectives.{self.name}"
        if set(self.loss_weights) != set(LOSSES):
            raise ValueError(
                f"{key}.loss_weights has {sorted(self.loss_weights)}; give {sorted(LOSSES)}"
            )
        weights = [self.loss_weights[name] for name in LOSSES]
        if not all(0.0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ConfigError(
                f"objectives.{self.name}.loss_weights",
                f"{dict(self.loss_weights)} are no weights",
                "Give numbers of 0 or more, one of them above 0",
            )
        _ = self.rule  # checks its keys

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Tokens of the images, where it reads any."""
        return (ImagePass(self.model),) if self.with_image else ()

    @functools.cached_property
    def rule(self) -> Corruption:
        """What decides on the corruption rate."""
        key = f"objectives.{self.name}.corruption_rate"
        return build_corruption(self.corruption_rate, key)

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of the whole model; extras of the rule of corruption."""
        check_image(self.name, self.with_image, batch_spec)
        batch = zeros(batch_spec)

        def forward(model: Encoder) -> None:
            queries, _ = self._encode(model, batch, rng, 0.0, None)
            model.predict_vocabulary(queries)

        return nn.init(forward, self.model)(rng)["params"], self.rule.init()

    @classmethod
    def learns_from(cls, section: Mapping[str, Any]) -> tuple[str, ...]:
        """What the rule of corruption learns from."""
        rate = section.get("corruption_rate", cls.corruption_rate)
        return build_corruption(rate, "objectives.flm.corruption_rate").learns_from

    def observe(self, extras: Extras, values: Mapping[str, float]) -> Extras:
        """Let the rule of corruption learn from an evaluation."""
        return self.rule.observe(extras, values)

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """The weighted sum of the three losses; see the module's docstring."""
        corruption_key, dropout_key, rate_key = jax.random.split(rng, 3)
        keys = example_keys(rate_key, batch["position"])
        rates = self.rule.rates(extras, keys, batch.get(PROGRESS, 0.0))
        noise = batch_noise(dropout_key, batch, train)
        seen = seen_part(rng, batch, bucket, train)
        scores, weight = self._scores(params, batch, corruption_key, rates, noise, seen)
        count = (weight > 0).sum(dtype=jnp.float32)
        tokens = batch["text_ids"].shape[1] - 1
        metrics = {}
        for i, name in enumerate(LOSSES):
            if not self.loss_weights[name]:
                continue  # its rows were skipped
            part = slice(i * tokens, (i + 1) * tokens)
            metrics[f"{name}_loss"] = Mean(scores.nll[:, part].sum(), count)
            metrics[f"{name}_accuracy"] = Mean(scores.correct[:, part].sum(), count)
        rows = batch["valid"].astype(jnp.float32)
        metrics["corruption_rate"] = Mean((rates * rows).sum(), rows.sum())
        return LossOutput(Mean(scores.loss, count), extras, metrics)

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example with n = ``text_length`` tokens; a step costs three times.

        By formula over real tokens, padding not counted.
        """
        c, view = self.model.config, view_of(bucket)
        predictions = text_length - 1
        weighted = sum(weight != 0 for weight in self.loss_weights.values())
        return (
            (image_input_flops(c, view) if self.with_image else 0.0)
            + text_flops(c, text_length, streams=2, view=view, with_image=self.with_image)
            + reconstructor_flops(c, predictions, keys=2 * text_length)
            + vocabulary_flops(c, weighted * predictions)
        )

    def reconstruction_scores(
        self, params: Params, batch: Batch, rng: jax.Array, rate: jax.Array
    ) -> TokenScores:
        """Score the reconstruction of every token at a given rate, without dropout.

        Args:
            params: parameters of the model.
            batch: named arrays, see ``vlp_jax.data.batch``.
            rng: key of the corruption, folded with each example's position.
            rate: float32 [], corruption rate.

        Returns:
            Scores [B, N - 1] of the tokens 1 .. N-1, zero at padding.
        """

        def forward(model: Encoder) -> tuple[jax.Array, ...]:
            queries, _ = self._encode(model, batch, rng, rate, None)
            return model.predict_vocabulary(queries)

        features, kernel, bias = nn.apply(forward, self.model)({"params": params})
        return vocabulary_cross_entropy(
            features,
            kernel,
            bias,
            batch["text_ids"][:, 1:],
            _token_weights(batch),
            self.model.config.vocab_size,
            self.chunk_rows,
        )

    def _encode(
        self,
        model: Encoder,
        batch: Batch,
        rng: jax.Array,
        rate: float | jax.Array,
        noise: jax.Array | None,
        seen: Seen | None = None,
    ) -> tuple[jax.Array, TextStates]:
        """Queries [B, N - 1, D] for the tokens 1 .. N-1, and the states they read."""
        ids, lengths = batch["text_ids"], batch["text_length"]
        tokens = ids.shape[1]
        documents = documents_of(batch)
        image = image_tokens(model, batch, noise, seen) if self.with_image else None
        streams = documents.within(two_stream_mask(lengths, tokens))
        states = model.encode_text(
            ids, streams, image, ("forward", "reverse"), noise, documents.positions
        )
        keys = example_keys(rng, batch["position"])
        places = jnp.arange(1, tokens)
        if documents.positions is None:
            first, last = hidden_spans(keys, lengths, tokens, rate)
            mask = visible_mask(places, lengths, first, last, tokens)
            return model.reconstruct(places, states, mask, noise), states
        first, last = hidden_spans(keys, documents.length, tokens, rate, documents.start)
        mask = visible_mask(places, lengths, first, last, tokens)
        # A query reads no further than its document, of whichever stream.
        own = documents.within(jnp.ones((1, tokens, tokens), jnp.bool_))[:, 1:]
        mask &= jnp.concatenate([own, own], axis=-1)
        return model.reconstruct(documents.positions[:, 1:], states, mask, noise), states

    def _scores(
        self,
        params: Params,
        batch: Batch,
        rng: jax.Array,
        rates: jax.Array,
        noise: jax.Array | None,
        seen: Seen | None,
    ) -> tuple[TokenScores, jax.Array]:
        """Scores [B, 3 (N - 1)] in the order of ``LOSSES``, and which tokens count [B, N - 1]."""
        ids = batch["text_ids"]

        def forward(model: Encoder) -> tuple[jax.Array, ...]:
            queries, states = self._encode(model, batch, rng, rates, noise, seen)
            forward_rows, reverse_rows = states.last[:, 0, :-1], states.last[:, 1, 1:]
            rows = jnp.concatenate([queries, forward_rows, reverse_rows], axis=1)
            return model.predict_vocabulary(rows)

        features, kernel, bias = nn.apply(forward, self.model)({"params": params})
        labels = jnp.concatenate([ids[:, 1:], ids[:, 1:], ids[:, :-1]], axis=1)
        counted = _token_weights(batch)
        weights = jnp.concatenate([self.loss_weights[name] * counted for name in LOSSES], axis=1)
        scores = vocabulary_cross_entropy(
            features,
            kernel,
            bias,
            labels,
            weights,
            self.model.config.vocab_size,
            self.chunk_rows,
        )
        return scores, counted


def _token_weights(batch: Batch) -> jax.Array:
    """1 for each of the n - 1 tokens of a valid text, 0 for padding: float32 [B, N - 1]."""
    documents = documents_of(batch)
    real = (documents.position >= 1) & (documents.position < documents.length)
    return (real[:, 1:] & batch["valid"][:, None]).astype(jnp.float32)
