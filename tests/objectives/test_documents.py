"""Texts packed into rows, and texts without images: as if each had a row of its own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SIZE, TOKENS, VOCAB, VOCABULARY, make_batch, shared_model, tiny_model

from vlp_jax.compress.buckets import Bucket
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder
from vlp_jax.objectives.documents import DOCUMENT, documents_of
from vlp_jax.objectives.flm import FLM, hidden_spans
from vlp_jax.objectives.single_stream import AR, MLM, PrefixLM, Stream

KEY = jax.random.key(5)
LENGTHS = [7, 5, 6, 12, 3, 4]
PACKED = [[0, 1], [2, 5], [3], [4]]  # the texts of each row
BUCKET = Bucket(TOKENS, IMAGE_SIZE)
ALONE: dict[str, Any] = {"with_image": False}


def without_image(batch: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items() if name != "image"}


def packed(batch: Any) -> dict[str, np.ndarray]:
    """The texts of a batch in rows of ``PACKED``."""
    rows = len(PACKED)
    ids, document = np.ones((2, rows, TOKENS), np.int32)
    document[:] = 0
    lengths = np.zeros(rows, np.int32)
    for row, texts in enumerate(PACKED):
        for number, text in enumerate(texts, start=1):
            start, length = lengths[row], batch["text_length"][text]
            ids[row, start : start + length] = batch["text_ids"][text, :length]
            document[row, start : start + length] = number
            lengths[row] += length
    made = {name: batch[name][:rows] for name in ("position", "valid", "replaced")}
    return {**made, "text_ids": ids, "text_length": lengths, DOCUMENT: document}


def unpacked(rows: Any) -> np.ndarray:
    """What packed rows [B, N, ...] hold for each text, [T, N, ...], zeros beyond its length."""
    rows = np.asarray(rows)
    texts = np.zeros((len(LENGTHS), *rows.shape[1:]), rows.dtype)
    for row, held in enumerate(PACKED):
        start = 0
        for text in held:
            texts[text, : LENGTHS[text]] = rows[row, start : start + LENGTHS[text]]
            start += LENGTHS[text]
    return texts


def own_rows(rows: Any) -> np.ndarray:
    """Rows of texts that have rows of their own, zeros beyond their lengths."""
    rows = np.array(rows)
    for text, length in enumerate(LENGTHS):
        rows[text, length:] = 0
    return rows


PLAIN = make_batch(LENGTHS)
ROWS, TEXTS = without_image(packed(PLAIN)), without_image(PLAIN)
MODEL = shared_model()


def built(kind: Any, **arguments: Any) -> Any:
    if kind is MLM:
        arguments["vocabulary"] = VOCABULARY
    return kind(model=MODEL, name=kind.__name__.lower(), **ALONE, **arguments)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(lambda: built(FLM).init(KEY, jax.eval_shape(lambda: TEXTS))[0])()


def test_places_in_documents() -> None:
    places = documents_of(ROWS)
    index = np.tile(np.arange(TOKENS), (len(LENGTHS), 1))
    np.testing.assert_array_equal(unpacked(places.position), own_rows(index))
    lengths = np.tile(np.array(LENGTHS)[:, None], (1, TOKENS))
    np.testing.assert_array_equal(unpacked(places.length), own_rows(lengths))
    assert not np.asarray(places.length)[np.asarray(ROWS[DOCUMENT]) == 0].any()
    assert documents_of(TEXTS).positions is None


def features(objective: Any, params: Any, batch: Any, stream: Stream) -> np.ndarray:
    def forward(model: Encoder) -> jax.Array:
        return objective._features(model, batch, stream, None)[0]

    return np.asarray(jax.jit(nn.apply(forward, objective.model))({"params": params}))


@pytest.mark.parametrize("kind", [AR, PrefixLM])
def test_a_document_in_a_row_is_a_text_of_its_own(kind: Any, params: Any) -> None:
    """Predictions, and the loss; a prefix of no tokens is drawn without chance."""
    objective = built(kind, **({"rate": 1.0} if kind is PrefixLM else {}))
    own, together = (objective.stream(batch, KEY) for batch in (TEXTS, ROWS))
    predicts = unpacked(together.predicts)
    np.testing.assert_array_equal(predicts, own_rows(own.predicts))
    assert predicts.sum() == sum(LENGTHS) - len(LENGTHS)
    np.testing.assert_array_equal(
        unpacked(together.labels)[predicts], np.asarray(own.labels)[predicts]
    )
    found = unpacked(features(objective, params, ROWS, together))
    expected = own_rows(features(objective, params, TEXTS, own))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    losses = [
        jax.jit(lambda p, b=batch: objective.loss(p, {}, b, KEY, BUCKET).loss)(params)
        for batch in (TEXTS, ROWS)
    ]
    np.testing.assert_allclose(losses[1].weight, losses[0].weight)
    np.testing.assert_allclose(losses[1].sum, losses[0].sum, rtol=1e-5)


def test_prefixes_are_drawn_for_each_document() -> None:
    """All tokens of a document agree on where its prefix ends, and two documents differ."""
    objective = built(PrefixLM)
    first: dict[int, set[int]] = {0: set(), 1: set()}
    for seed in range(20):
        predicts = unpacked(objective.stream(ROWS, jax.random.key(seed)).predicts)
        for text, length in enumerate(LENGTHS):
            rows = np.flatnonzero(predicts[text])
            np.testing.assert_array_equal(rows, np.arange(rows[0], length - 1))
            first.setdefault(text, set()).add(length - 2 - rows[0])
    assert all(len(counts) > 1 for counts in first.values())


@pytest.mark.parametrize("whole_word", [False, True])
def test_words_of_every_document_are_masked_and_never_its_ends(whole_word: bool) -> None:
    objective = built(MLM, rate=0.5, whole_word=whole_word)
    ends = np.isin(np.asarray(ROWS["text_ids"]), (0, 2)) | (np.asarray(ROWS[DOCUMENT]) == 0)
    masked = np.stack(
        [objective.stream(ROWS, jax.random.key(seed)).predicts for seed in range(200)]
    )
    assert not masked[:, ends].any()
    share = masked.mean(axis=0)
    assert (share[~ends] > 0.3).all()
    every = built(MLM, rate=1.0).stream(ROWS, KEY).predicts
    np.testing.assert_array_equal(every, ~ends)


def test_masked_documents_are_read_as_texts_of_their_own(params: Any) -> None:
    """With nothing masked, for what is drawn depends on the row."""
    objective = built(MLM)
    plain = [
        objective.stream(batch, KEY)._replace(ids=batch["text_ids"]) for batch in (TEXTS, ROWS)
    ]
    found = unpacked(features(objective, params, ROWS, plain[1]))
    np.testing.assert_allclose(
        found, own_rows(features(objective, params, TEXTS, plain[0])), atol=2e-5
    )


def other_document(row: int, number: int) -> dict[str, jax.Array]:
    """``ROWS`` with the words of one document changed."""
    ids = np.array(ROWS["text_ids"])
    words = (np.asarray(ROWS[DOCUMENT])[row] == number) & ~np.isin(ids[row], (0, 2))
    ids[row, words] = (ids[row, words] + 11) % (VOCAB - 4) + 4
    return {**ROWS, "text_ids": jnp.asarray(ids)}


@pytest.mark.parametrize("kind", [MLM, PrefixLM])
def test_what_is_drawn_lets_no_document_see_another(kind: Any, params: Any) -> None:
    objective = built(kind)
    plain = features(objective, params, ROWS, objective.stream(ROWS, KEY))
    for row, number in ((0, 1), (0, 2), (1, 2)):
        batch = other_document(row, number)
        changed = features(objective, params, batch, objective.stream(batch, KEY))
        same = (plain == changed).all(axis=-1)
        document = np.asarray(ROWS[DOCUMENT])
        own = (document == number) & (np.arange(len(document)) == row)[:, None]
        assert same[(document > 0) & ~own].all()
        assert not same[own].all()


def flm_features(params: Any, batch: Any, rate: float) -> np.ndarray:
    """Queries, and rows of both streams: [B, N - 1, 3, D]."""

    def forward(model: Encoder) -> jax.Array:
        queries, states = built(FLM)._encode(model, batch, KEY, rate, None)
        return jnp.stack([queries, states.last[:, 0, 1:], states.last[:, 1, 1:]], axis=2)

    return np.asarray(jax.jit(nn.apply(forward, MODEL))({"params": params}))


def test_flm_of_documents_is_that_of_texts(params: Any) -> None:
    """At the base rate, at which nothing is drawn: queries, both streams, and all three losses."""
    found = np.pad(flm_features(params, ROWS, 0.0), ((0, 0), (1, 0), (0, 0), (0, 0)))
    expected = np.pad(flm_features(params, TEXTS, 0.0), ((0, 0), (1, 0), (0, 0), (0, 0)))
    # The first token of a row has no query, and that of a later document has one that is not read.
    np.testing.assert_allclose(unpacked(found)[:, 1:], own_rows(expected)[:, 1:], atol=2e-5)
    objective = built(FLM)
    together, own = (
        jax.jit(lambda p, b=batch: objective.loss(p, {}, b, KEY, BUCKET))(params)
        for batch in (ROWS, TEXTS)
    )
    np.testing.assert_allclose(together.loss.weight, own.loss.weight)
    for name, value in own.metrics.items():
        if name != "corruption_rate":  # a mean over rows
            np.testing.assert_allclose(together.metrics[name].sum, value.sum, rtol=1e-5)


def test_spans_of_flm_stay_in_their_document_and_hide_it_alone(params: Any) -> None:
    rate = 0.6
    plain = flm_features(params, ROWS, rate)
    for row, number in ((0, 1), (0, 2), (1, 2)):
        same = (plain == flm_features(params, other_document(row, number), rate)).all(axis=(-2, -1))
        document = np.asarray(ROWS[DOCUMENT])
        own = (document == number) & (np.arange(len(document)) == row)[:, None]
        assert same[((document > 0) & ~own)[:, 1:]].all()
        assert not same[own[:, 1:]].all()
    places = documents_of(ROWS)
    keys = jax.random.split(KEY, len(PACKED))
    first, last = (
        np.asarray(x) for x in hidden_spans(keys, places.length, TOKENS, rate, places.start)
    )
    start, position = np.asarray(places.start), np.asarray(places.position)
    asked = (position >= 1) & (np.asarray(ROWS[DOCUMENT]) > 0)
    query = np.arange(TOKENS)[None]
    end = start + np.asarray(places.length) - 1
    assert ((start + 1 <= first) & (first <= query) & (query <= last) & (last <= end))[asked].all()
    # The mean share hidden of the L tokens of a document is the rate.
    share = np.mean(
        [
            np.mean(((b - a + 1) / np.maximum(np.asarray(places.length) - 1, 1))[asked])
            for a, b in (
                hidden_spans(
                    jax.random.split(jax.random.key(seed), len(PACKED)),
                    places.length,
                    TOKENS,
                    rate,
                    places.start,
                )
                for seed in range(60)
            )
        ]
    )
    assert share == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("kind", [MLM, AR, PrefixLM, FLM])
def test_texts_alone_ignore_images_and_cost_none(kind: Any, params: Any) -> None:
    objective = built(kind)
    assert objective.passes == ()
    shown = {**TEXTS, "image": jnp.asarray(PLAIN["image"])}
    text = jax.make_jaxpr(lambda b: objective.loss(params, {}, b, KEY, BUCKET).loss)(TEXTS)
    both = jax.make_jaxpr(lambda b: objective.loss(params, {}, b, KEY, BUCKET).loss)(shown)
    assert len(text.jaxpr.eqns) == len(both.jaxpr.eqns)
    arguments = {"vocabulary": VOCABULARY} if kind is MLM else {}
    pairs = kind(model=MODEL, name="pairs", **arguments)
    assert objective.flops(10) < pairs.flops(10)
    with pytest.raises(ConfigError, match=r"objectives\.pairs\.with_image: True, but"):
        pairs.init(KEY, jax.eval_shape(lambda: TEXTS))


def test_a_model_of_two_stacks_names_the_key() -> None:
    objective = AR(model=tiny_model(), name="ar", **ALONE)
    with pytest.raises(ConfigError, match=r"model\.type"):
        objective.init(KEY, jax.eval_shape(lambda: TEXTS))
