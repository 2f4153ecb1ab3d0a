"""FLM hides as much as asked for, and its loss is what it says."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import IMAGE_SIZE, MASK_ID, TOKENS, VOCAB, VOCABULARY, make_batch, tiny_model

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import HostBatch, batch_spec
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.flops import vocabulary_flops
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.base import Mean, example_keys
from vlp_jax.objectives.flm import FLM, LOSSES, hidden_spans, visible_mask

LENGTHS = [12, 12, 9, 5, 3, 2]
BATCH = make_batch(LENGTHS)
BUCKET = Bucket(TOKENS, IMAGE_SIZE)
KEY = jax.random.key(7)


WEIGHTS = {"reconstruction": 0.5, "forward": 0.3, "reverse": 0.1}


@pytest.fixture(scope="module")
def flm() -> FLM:
    return FLM(tiny_model(), loss_weights=WEIGHTS)


@pytest.fixture(scope="module")
def params(flm: FLM) -> Any:
    return jax.jit(lambda key: flm.init(key, batch_spec(BUCKET, 2))[0])(jax.random.key(0))


def real_queries() -> np.ndarray:
    """Which of the queries 1 .. N-1 ask for a real token: bool [B, N-1]."""
    return np.arange(1, TOKENS)[None] < np.array(LENGTHS)[:, None]


def test_readout_sees_everything() -> None:
    """The query for position 0 reads every real state of both streams, at any rate."""
    lengths = jnp.array(LENGTHS)
    first, last = hidden_spans(jax.random.split(KEY, len(LENGTHS)), lengths, TOKENS, 1.0)
    visible = np.asarray(visible_mask(jnp.array([0]), lengths, first, last, TOKENS))[:, 0]
    real = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(visible, np.concatenate([real, real], axis=1))


SHARE_TOKENS, SHARE_ROWS = 44, 1500
draw_spans = jax.jit(hidden_spans, static_argnums=2)


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("hideable", [9, 14, 19, 40])
def test_hidden_share_is_the_rate(hideable: int, rate: float) -> None:
    """Mean over queries within 0.01 of r; every single query, edges included, within noise."""
    length = hideable + 1
    lengths = jnp.full(SHARE_ROWS, length)
    keys = jax.random.split(jax.random.key(hideable), SHARE_ROWS)
    first, last = draw_spans(keys, lengths, SHARE_TOKENS, rate)
    queries = np.arange(1, length)
    first, last = np.asarray(first)[:, queries], np.asarray(last)[:, queries]
    assert (first >= 1).all()
    assert (last <= length - 1).all()
    assert (first <= queries[None]).all()
    assert (queries[None] <= last).all()

    positions = jnp.asarray(queries)
    spread = [
        jnp.broadcast_to(
            jnp.pad(x, ((0, 0), (1, SHARE_TOKENS - length))), (*lengths.shape, SHARE_TOKENS)
        )
        for x in (first, last)
    ]
    visible = np.asarray(visible_mask(positions, lengths, *spread, SHARE_TOKENS))
    # The two streams never show the same word, and what neither shows is the hidden span.
    words = np.r_[1:length, SHARE_TOKENS + 1 : SHARE_TOKENS + length]
    seen = visible[..., words].sum(axis=-1)
    np.testing.assert_array_equal(seen, hideable - (last - first + 1))

    share = (last - first + 1) / hideable
    expected = max(rate, 1 / hideable)
    assert share.mean() == pytest.approx(expected, abs=0.01)
    deviation = np.sqrt(max(expected * (1 - expected), 0) / hideable / SHARE_ROWS)
    assert np.abs(share.mean(axis=0) - expected).max() <= 5 * deviation + 1e-9
    if rate in (0.0, 1.0):
        assert share.std() == pytest.approx(0.0, abs=1e-9)  # nothing is left to chance


def test_spans_are_centred() -> None:
    """Far from the edges, the odd token falls to either side equally often."""
    lengths = jnp.full(SHARE_ROWS, 41)
    keys = jax.random.split(jax.random.key(1), SHARE_ROWS)
    first, last = (np.asarray(x)[:, 20] for x in draw_spans(keys, lengths, SHARE_TOKENS, 0.2))
    before, after = 20 - first, last - 20
    assert np.abs(before - after).max() == 1
    odd = before != after
    assert (before > after)[odd].mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_shortest_texts(length: int) -> None:
    keys = jax.random.split(KEY, 50)
    first, last = draw_spans(keys, jnp.full(50, length), SHARE_TOKENS, 0.5)
    np.testing.assert_array_equal(first[:, 1], 1)
    np.testing.assert_array_equal(last[:, 1], 1)


def test_spans_depend_on_the_position_in_the_run() -> None:
    """Not on the place in the batch: a batch cut in two draws the same spans."""
    positions = jnp.arange(100, 108)
    lengths = jnp.full(8, TOKENS)
    whole = hidden_spans(example_keys(KEY, positions), lengths, TOKENS, 0.5)
    part = hidden_spans(example_keys(KEY, positions[1::2]), lengths[1::2], TOKENS, 0.5)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[1::2], b)
    assert len(np.unique(np.asarray(whole[0]), axis=0)) > 4  # rows do differ


@pytest.fixture(scope="module")
def plain_loss(flm: FLM, params: Any) -> Any:
    """From whole logits, token by token: batch -> {name of a loss: (nll, correct) [B, N-1]}."""

    def forward(model: Any, batch: HostBatch) -> tuple[jax.Array, ...]:
        corruption_key, _ = jax.random.split(KEY)
        queries, states = flm._encode(model, batch, corruption_key, flm.corruption_rate, None)
        rows = jnp.stack([queries, states.last[:, 0, :-1], states.last[:, 1, 1:]])
        features, kernel, bias = model.predict_vocabulary(rows)
        logits = features @ kernel
        return (logits + jnp.broadcast_to(bias, logits.shape))[..., :VOCAB]

    def losses(batch: HostBatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        logits = jax.jit(nn.apply(forward, flm.model))({"params": params}, batch)
        ids = batch["text_ids"]
        targets = {"reconstruction": ids[:, 1:], "forward": ids[:, 1:], "reverse": ids[:, :-1]}
        scores = {}
        for name, logit in zip(LOSSES, logits, strict=True):
            log_p = jax.nn.log_softmax(logit)
            nll = -np.take_along_axis(np.asarray(log_p), targets[name][..., None], -1)[..., 0]
            scores[name] = nll, np.asarray(logit).argmax(-1) == targets[name]
        return scores

    return losses


def test_loss_is_the_mean_over_valid_tokens(flm: FLM, params: Any, plain_loss: Any) -> None:
    batch = {**BATCH, "valid": np.array([1, 1, 0, 1, 1, 1], bool)}
    out = jax.jit(lambda p, b: flm.loss(p, {}, b, KEY, BUCKET))(params, batch)
    counted = real_queries() & batch["valid"][:, None]
    expected = plain_loss(batch)
    total = sum(WEIGHTS[name] * nll[counted].sum() for name, (nll, _) in expected.items())
    assert float(out.loss.weight) == counted.sum()
    np.testing.assert_allclose(out.loss.sum, total, rtol=1e-5)
    per_token = {f"{n}_{kind}" for n in LOSSES for kind in ("loss", "accuracy")}
    assert set(out.metrics) == {*per_token, "corruption_rate"}
    for name, (nll, correct) in expected.items():
        for kind, values in (("loss", nll), ("accuracy", correct)):
            mean: Mean = out.metrics[f"{name}_{kind}"]
            assert float(mean.weight) == counted.sum()
            np.testing.assert_allclose(mean.sum, values[counted].sum(), rtol=1e-5)


def test_reconstruction_scores_match_the_loss(flm: FLM, params: Any, plain_loss: Any) -> None:
    corruption_key, _ = jax.random.split(KEY)
    scores = jax.jit(lambda p, b: flm.reconstruction_scores(p, b, corruption_key, 0.0))(
        params, BATCH
    )
    nll, _ = plain_loss(BATCH)["reconstruction"]
    np.testing.assert_allclose(scores.nll, nll * real_queries(), atol=1e-5)


def test_batch_without_valid_rows_is_harmless(flm: FLM, params: Any) -> None:
    """Rows that only fill up a batch: length 0, nothing to see, nothing to learn."""
    empty = {**BATCH, "valid": np.zeros(len(LENGTHS), bool)}
    empty["text_length"] = np.zeros(len(LENGTHS), np.int32)
    loss, gradients = jax.jit(
        jax.value_and_grad(lambda p: flm.loss(p, {}, empty, KEY, BUCKET).loss.sum)
    )(params)
    assert float(loss) == 0.0
    for leaf in jax.tree.leaves(gradients):
        assert not np.asarray(leaf).any()


def test_dropout_only_in_training(params: Any) -> None:
    flm = FLM(tiny_model(**{"text.dropout": 0.5}))

    def loss(batch: HostBatch, rng: jax.Array, train: bool) -> jax.Array:
        return flm.loss(params, {}, batch, rng, BUCKET, train).loss.sum

    jitted = jax.jit(loss, static_argnums=2)
    other = jax.random.key(8)
    later = {**BATCH, "position": BATCH["position"] + 100}
    assert jitted(BATCH, KEY, False) == jitted(BATCH, other, False) == jitted(later, KEY, False)
    assert (
        len(
            {
                float(x)
                for x in (
                    jitted(BATCH, KEY, False),
                    jitted(BATCH, KEY, True),
                    jitted(BATCH, other, True),
                    jitted(later, KEY, True),  # another micro-batch of the same update
                )
            }
        )
        == 4
    )


def test_losses_without_weight_are_neither_computed_nor_reported(flm: FLM, params: Any) -> None:
    """Their rows are skipped, so that their metrics would read zero."""
    only = FLM(flm.model, loss_weights={"reconstruction": 1.0, "forward": 0.0, "reverse": 0.0})
    out = jax.eval_shape(lambda p: only.loss(p, {}, BATCH, KEY, BUCKET), params)
    reported = {name for name in out.metrics if name != "corruption_rate"}
    assert reported == {"reconstruction_loss", "reconstruction_accuracy"}
    head = (flm.flops(TOKENS) - only.flops(TOKENS)) / 2
    assert head == vocabulary_flops(flm.model.config, TOKENS - 1)


def test_bad_arguments_name_the_key() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"config.objectives.flm.corruption_rate: 1.5"):
        FLM(model, corruption_rate=1.5)
    with pytest.raises(ValueError, match=r"config.objectives.mine.loss_weights"):
        FLM(model, loss_weights={"forward": 1.0}, name="mine")


def test_build_objectives() -> None:
    model = tiny_model()
    assert model.config.mask_id == MASK_ID
    config = ConfigDict(
        {
            "second": {"type": "flm", "batch": "other", "corruption_rate": 0.5, "weight": 2.0},
            "flm": {"loss_weights": {"reconstruction": 1.0, "forward": 0.0, "reverse": 0.0}},
        }
    )
    first, second = build_objectives(config, model, VOCABULARY)
    assert (first.name, first.batch_name) == ("flm", "pairs")
    assert (second.name, second.batch_name) == ("second", "other")
    assert second.corruption_rate == 0.5
    assert first.loss_weights["reconstruction"] == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.objectives: there is none"),
        ({"mlm2": {}}, r"config.objectives.mlm2: 'mlm2' is no objective. Use one of \['ar'"),
        ({"flm": {"corruption": 0.5}}, "config.objectives.flm.corruption: .*'corruption_rate'"),
    ],
)
def test_build_objectives_refuses(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objectives(ConfigDict(config), tiny_model(), VOCABULARY)
