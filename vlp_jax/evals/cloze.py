"""A gallery: pictures, captions with a span hidden, predictions, and where one query looks.

Queries read no image tokens themselves: they read states of the text, which have read the image.
What a query sees of the image is therefore shown as a product of two attentions, each a mean over
heads: the query's weights over text states in the last block of the reconstructor, times those
states' weights over image tokens in the text block that it reads, or, of blocks that read the image
and the text as one, in all of them (``attention_maps``). It is an approximation: earlier blocks,
residual streams and feed-forward parts carry the image as well.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import Batch, HostBatch
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.evals.attention_maps import query_over_text, text_over_image
from vlp_jax.evals.base import EvalContext, token_classes
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.pictures import enlarge, heat_map
from vlp_jax.infra.artifacts import Card, Gallery, Picture, Span, SpanKind
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.masks import two_stream_mask
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.flm import FLM, visible_mask

GUESSES = 3  # predictions shown for each hidden token


class Answers(NamedTuple):
    """What the model says about a batch with one span hidden in each row.

    Attributes:
        ids: most probable tokens at each hidden position, best first, int32 [B, K, GUESSES]; K is
            the longest span, and what lies past a row's span means nothing.
        probabilities: of these tokens, float32 [B, K, GUESSES].
        attention: of the row's query over image tokens, class token first, float32 [B, I].
    """

    ids: jax.Array
    probabilities: jax.Array
    attention: jax.Array


class Cloze:
    """Fill a hidden span in each of a few captions and show the answers.

    Writes the gallery ``artifacts/<name>``. Metric: ``accuracy``, the share of hidden tokens whose
    first guess is right, a fraction of one.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str = "val",
        num_examples: int = 8,
        rate: float = 0.3,
        objective: str = "flm",
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``, also the name of the artefact.
            source: key in ``config.data.sources``.
            split: of that source.
            num_examples: the first records, fewer where the split has fewer.
            rate: share of a caption's tokens that the span holds, at least one token.
            objective: key in ``config.objectives``.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        if not 0.0 <= rate <= 1.0:
            raise ConfigError(
                f"evals.{name}.rate", f"{rate} is no corruption rate", "Give a number in [0, 1]"
            )
        self.figures: tuple[str, ...] = ("accuracy",)
        self._context = context
        self._name = name
        self._rate = rate
        self._model: Encoder = context.objective(name, objective, FLM).model
        self._set = FixedSet.one_batch(context, name, source, split, num_examples)
        classes = self._set.source.word_classes().values()
        self._classes = tuple(sorted({*classes} - {"function"}))
        self._predict = jax.jit(
            self._predict_batch,
            static_argnames="span_length",
            out_shardings=replicated(context.mesh),
        )
        self._batch: HostBatch | None = None

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Fill the spans and write the gallery; see the class for the metric."""
        batch, answers = self.answers(params)
        right, hidden = 0, 0
        for row in np.flatnonzero(batch["valid"]):
            labels = _hidden_ids(batch, row)
            right += int((answers.ids[row, : len(labels), 0] == labels).sum())
            hidden += len(labels)
        self._context.save(self._name, self._gallery(batch, answers, step))
        yield "accuracy", right / max(hidden, 1)

    def answers(self, params: Params) -> tuple[HostBatch, Answers]:
        """The set as one batch, and the answers as host arrays.

        The batch holds, beside the fields of ``vlp_jax.data.batch``, ``first_hidden``,
        ``last_hidden`` and ``query`` int32 [B], positions of the span and of the token whose
        query's attention is wanted.
        """
        context = self._context
        if self._batch is None:
            self._batch = self._read()
        spans = self._batch["last_hidden"] - self._batch["first_hidden"] + 1
        with jax.set_mesh(context.mesh):
            rows = {key: array[self._set.rows] for key, array in self._batch.items()}
            batch = global_batch(rows, context.mesh)
            answers = self._predict(params, batch, span_length=int(spans.max()))
        return self._batch, jax.device_get(answers)

    def _read(self) -> HostBatch:
        """All rows, on every process: the gallery shows them all and process 0 writes it."""
        [batch] = self._set.whole_batches()
        batch["valid"] &= batch["text_length"] > 2  # a caption without a word hides nothing
        plan, everything = self._set.plan, slice(0, len(batch["valid"]))
        classes = token_classes(plan, self._context.tokenizer, 0, everything, self._classes)
        spans = [
            choose_span(tokens[: length - 1], self._rate, seed=row)
            for row, (tokens, length) in enumerate(zip(classes, batch["text_length"], strict=True))
        ]
        names = ("first_hidden", "last_hidden", "query")
        columns = np.asarray(spans, np.int32).T
        return batch | {name: column.copy() for name, column in zip(names, columns, strict=True)}

    def _predict_batch(self, params: Params, batch: Batch, *, span_length: int) -> Answers:
        """Query every hidden token of every row with exactly the row's span hidden."""
        ids, lengths = batch["text_ids"], batch["text_length"]
        tokens = ids.shape[1]
        first, last = (
            jnp.broadcast_to(batch[name][:, None], ids.shape)
            for name in ("first_hidden", "last_hidden")
        )

        def forward(model: Encoder) -> jax.Array:
            image = model.encode_image(normalize(batch["image"]))
            mask = two_stream_mask(lengths, tokens)
            states = model.encode_text(ids, mask, image, ("forward", "reverse"))
            positions = jnp.arange(tokens)
            visible = visible_mask(positions, lengths, first, last, tokens)
            # The query for position 0 would read everything; it is asked for and left aside.
            queries = model.reconstruct(positions, states, visible)
            hidden = jnp.minimum(first[:, :1] + jnp.arange(span_length)[None], tokens - 1)
            return model.vocabulary_logits(jnp.take_along_axis(queries, hidden[..., None], axis=1))

        logits, variables = nn.apply(forward, self._model, mutable=["intermediates"])(
            {"params": params}
        )
        logits = logits[..., : self._model.config.vocab_size]
        probabilities, guesses = jax.lax.top_k(jax.nn.softmax(logits), GUESSES)
        weights = variables["intermediates"]
        reading = text_over_image(self._model, params, weights, (len(ids), 2, tokens))
        attention = query_over_text(self._model, weights) @ reading
        query = batch["query"][:, None, None]
        return Answers(guesses, probabilities, jnp.take_along_axis(attention, query, axis=1)[:, 0])

    def _gallery(self, batch: HostBatch, answers: Answers, step: int) -> Gallery:
        rows = np.flatnonzero(batch["valid"])
        return Gallery(
            title="Fill the hidden span",
            cards=tuple(self._card(batch, answers, int(row)) for row in rows),
            note=(
                "Marked words were hidden together and predicted one by one, each from the rest "
                "of the caption and the image. The second picture shows where one of the queries "
                "looks: its attention over the text times the text's attention over the image, "
                "as a mean over heads."
            ),
            step=step,
        )

    def _card(self, batch: HostBatch, answers: Answers, row: int) -> Card:
        tokenizer = self._context.tokenizer
        ids = batch["text_ids"][row, : batch["text_length"][row]]
        labels = _hidden_ids(batch, row)
        first, query = int(batch["first_hidden"][row]), int(batch["query"][row])
        texts = token_texts(tokenizer, ids)
        spans = [Span("".join(texts[:first]))]
        rows = []
        for offset, label in enumerate(labels):
            guesses = [_word(tokenizer, token) for token in answers.ids[row, offset]]
            shares = [float(p) for p in answers.probabilities[row, offset]]
            listed = [f"{w} {p:.0%}" for w, p in zip(guesses, shares, strict=True)]
            kind: SpanKind = "right" if answers.ids[row, offset, 0] == label else "wrong"
            spans.append(Span(texts[first + offset], kind, tooltip=", ".join(listed)))
            rows.append((_word(tokenizer, label), guesses[0], shares[0], ", ".join(listed[1:])))
        spans.append(Span("".join(texts[first + len(labels) :])))
        image = batch["image"][row]
        heat = np.asarray(answers.attention[row, 1:])  # without the class token
        return Card(
            images=(
                Picture.from_array(enlarge(image)),
                Picture.from_array(
                    heat_map(image, heat), f"where the query for “{texts[query].strip()}” looks"
                ),
            ),
            spans=tuple(span for span in spans if span.text),
            columns=("hidden", "prediction", "probability", "next guesses"),
            rows=tuple(rows),
        )


def choose_span(classes: np.ndarray, rate: float, seed: int) -> tuple[int, int, int]:
    """The span to hide from one caption, and the token at its heart.

    The heart is drawn among content words where the classes of words are known, else among all
    tokens but the special ones. The span is centred on it and shifted inwards at the ends, so that
    it never holds ``<s>`` or ``</s>``.

    Args:
        classes: int32 [n - 1], of every token but ``</s>``; above 0 for content words.
        rate: share of the n - 1 tokens after ``<s>`` that the span holds.
        seed: of the draw.

    Returns:
        First and last hidden position, and the position of the heart.
    """
    words = len(classes) - 1
    if words < 1:
        return 1, 1, 1  # no word; the row is not shown
    content = np.flatnonzero(classes > 0)
    heart = int(
        np.random.default_rng(seed).choice(content if len(content) else np.arange(1, words + 1))
    )
    size = min(max(round(rate * len(classes)), 1), words)
    first = min(max(heart - (size - 1) // 2, 1), words - size + 1)
    return first, first + size - 1, heart


def token_texts(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The text that each token adds to the caption, spaces included; joined, the caption.

    Args:
        tokenizer: of the run.
        ids: int32 [n], ``<s>`` ... ``</s>``.

    Returns:
        n texts, empty for the special tokens.
    """
    text = tokenizer.decode(ids)
    ends = [len(tokenizer.decode(ids[:end])) for end in range(len(ids))] + [len(text)]
    # Decoders tidy up around punctuation, so that a longer prefix may have a shorter text.
    ends = np.maximum.accumulate(np.minimum(ends, len(text))).tolist()
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def _hidden_ids(batch: HostBatch, row: int | np.integer) -> np.ndarray:
    """The tokens of a row's span: int32 [span]."""
    return batch["text_ids"][row, batch["first_hidden"][row] : batch["last_hidden"][row] + 1]


def _word(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself, special tokens by their name."""
    return tokenizer.decode([token]).strip() or tokenizer.tokens([token])[0]
