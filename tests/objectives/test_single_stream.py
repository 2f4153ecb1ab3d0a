"""MLM, AR and PrefixLM: what they hide, what they predict, and that nothing leaks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SIZE, MASK_ID, TOKENS, VOCAB, VOCABULARY, make_batch, tiny_model

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.models.masks import two_stream_mask
from vlp_jax.objectives.base import example_keys
from vlp_jax.objectives.flm import hidden_spans, visible_mask
from vlp_jax.objectives.single_stream import AR, MLM, PrefixLM

ROWS = 4096
LENGTH = 11


def same_lengths(length=LENGTH, rows=ROWS):
    batch = make_batch([length] * rows)
    return {name: jnp.asarray(value) for name, value in batch.items()}


def objective(kind, **arguments):
    if kind is MLM:
        arguments["vocabulary"] = VOCABULARY
    return kind(model=tiny_model(), name=kind.__name__.lower(), **arguments)


def rates_of_stream(stream, predictable):
    """Prediction rate and mean corruption rate, from the masks alone."""
    told = ~stream.hidden[:, None, :]  # by the input at j
    known = np.asarray(stream.mask & told)  # [B, row, j]: row may read token j
    hidden = ~known[:, :, 1 : predictable + 1]
    predicts = np.asarray(stream.predicts)
    count = predicts.sum()
    return (
        count / (len(predicts) * predictable),
        hidden.sum(axis=-1)[predicts].mean() / predictable,
    )


@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("whole_word", [False, True])
def test_mlm_rates_are_tied(rate, whole_word):
    mlm = objective(MLM, rate=rate, whole_word=whole_word)
    stream = mlm.stream(same_lengths(), jax.random.key(0))
    words = LENGTH - 2
    wanted = max(rate, 1 / words)
    predicted, corrupted = rates_of_stream(stream, words)
    assert predicted == pytest.approx(wanted, abs=0.01)
    # The mean over predictions weighs texts with more of them more: rounding alone makes it larger.
    assert corrupted == pytest.approx(wanted, abs=0.03)


def test_ar_rates():
    stream = objective(AR).stream(same_lengths(rows=64), jax.random.key(0))
    last = LENGTH - 1
    predicted, corrupted = rates_of_stream(stream, last)
    assert predicted == 1.0
    assert corrupted == pytest.approx(0.5 + 1 / (2 * last))


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_prefix_lm_rates(rate):
    stream = objective(PrefixLM, rate=rate).stream(same_lengths(), jax.random.key(0))
    last = LENGTH - 1
    predicted, corrupted = rates_of_stream(stream, last)
    assert predicted == pytest.approx(rate, abs=0.005)
    assert corrupted == pytest.approx(rate / 2 + 1 / (2 * last), abs=0.01)


def test_random_prefix_predicts_any_number():
    stream = objective(PrefixLM).stream(same_lengths(), jax.random.key(0))
    counts = np.asarray(stream.predicts).sum(axis=1)
    assert set(counts) == set(range(1, LENGTH))
    assert np.bincount(counts)[1:].std() < 0.1 * ROWS / (LENGTH - 1)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_flm_rates(rate):
    """What a query cannot read in any state of either stream, through both masks."""
    lengths = jnp.full(512, LENGTH)
    keys = example_keys(jax.random.key(0), jnp.arange(512))
    first, last = hidden_spans(keys, lengths, TOKENS, rate)
    positions = jnp.arange(1, LENGTH)
    visible = visible_mask(positions, lengths, first, last, TOKENS)
    streams = two_stream_mask(lengths, TOKENS)
    tells = jnp.concatenate([streams[:, 0], streams[:, 1]], axis=1)  # [B, state, token]
    known = jnp.einsum("bqs,bst->bqt", visible.astype(int), tells.astype(int)) > 0
    hidden = ~np.asarray(known)[:, :, 1:LENGTH]
    assert hidden[:, np.arange(LENGTH - 1), np.arange(LENGTH - 1)].all()
    assert hidden.mean() == pytest.approx(max(rate, 1 / (LENGTH - 1)), abs=0.01)


def test_mlm_replaces_eighty_ten_ten():
    mlm = objective(MLM, rate=1.0)
    batch = same_lengths()
    stream = mlm.stream(batch, jax.random.key(0))
    hidden = np.asarray(stream.hidden)
    new, old = np.asarray(stream.ids)[hidden], np.asarray(batch["text_ids"])[hidden]
    assert (new == MASK_ID).mean() == pytest.approx(0.8 + 0.1 / VOCAB, abs=0.01)
    assert (new == old).mean() == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.01)
    untouched = ~hidden
    np.testing.assert_array_equal(
        np.asarray(stream.ids)[untouched], np.asarray(batch["text_ids"])[untouched]
    )
    assert not hidden[:, 0].any()
    assert not hidden[:, LENGTH - 1 :].any()


def test_whole_words_are_masked_together():
    continues = np.zeros(VOCAB, np.bool_)
    continues[VOCAB // 2 :] = True
    vocabulary = Vocabulary(VOCAB, MASK_ID, continues)
    mlm = MLM(model=tiny_model(), name="mlm", vocabulary=vocabulary, rate=0.4, whole_word=True)
    batch = same_lengths()
    stream = mlm.stream(batch, jax.random.key(0))
    hidden, ids = np.asarray(stream.hidden), np.asarray(batch["text_ids"])
    inside = continues[ids][:, 2 : LENGTH - 1]  # a piece after another piece or a word's first
    np.testing.assert_array_equal(
        hidden[:, 2 : LENGTH - 1][inside], hidden[:, 1 : LENGTH - 2][inside]
    )
    # Of nine tokens, words of two on average: at least one word carries the share upwards.
    assert hidden[:, 1 : LENGTH - 1].mean() == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize("kind", [MLM, AR, PrefixLM])
def test_hidden_tokens_do_not_leak(kind):
    """Changing a token that a prediction must not know changes no feature of its row."""
    subject = objective(kind)
    batch = same_lengths(rows=8)
    params, _ = subject.init(jax.random.key(1), jax.eval_shape(lambda: batch))
    stream = subject.stream(batch, jax.random.key(2))

    @jax.jit
    def features(ids):
        def forward(model):
            return subject._features(model, batch, stream._replace(ids=ids), None)[0]

        return nn.apply(forward, subject.model)({"params": params})

    before = features(stream.ids)
    known = np.asarray(stream.mask & ~stream.hidden[:, None, :])
    predicts = np.asarray(stream.predicts)
    changed_any = False
    for token in range(1, LENGTH):
        hidden = np.asarray(stream.hidden)[:, token]
        # A masked token tells nothing because its id is replaced: the replacement stays.
        ids = jnp.where(
            jnp.asarray(hidden), stream.ids[:, token], (stream.ids[:, token] + 7) % VOCAB
        )
        after = features(stream.ids.at[:, token].set(ids))
        same = np.abs(np.asarray(after - before)).max(axis=-1) == 0.0
        blind = predicts & ~known[:, :, token]
        assert same[blind].all()
        changed_any |= bool((~same[predicts & known[:, :, token]]).any())
    assert changed_any


@pytest.mark.parametrize("kind", [MLM, AR, PrefixLM])
def test_streams_depend_on_position_alone(kind):
    subject = objective(kind)
    batch = same_lengths(rows=8)
    whole = subject.stream(batch, jax.random.key(0))
    half = subject.stream({k: v[1::2] for k, v in batch.items()}, jax.random.key(0))
    for one, other in zip(whole, half, strict=True):
        np.testing.assert_array_equal(one[1::2], other)


@pytest.mark.parametrize("kind", [MLM, AR, PrefixLM])
def test_loss_and_flops(kind):
    subject = objective(kind)
    batch = {name: jnp.asarray(value) for name, value in make_batch().items()}
    params, extras = subject.init(jax.random.key(1), jax.eval_shape(lambda: batch))
    bucket = Bucket(TOKENS, IMAGE_SIZE)
    output = jax.jit(lambda p: subject.loss(p, extras, batch, jax.random.key(0), bucket))(params)
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(np.log(VOCAB), abs=0.5)
    assert float(output.metrics["predictions"].sum) == float(output.loss.weight)
    assert subject.flops(10) > subject.flops(5) > 0


@pytest.mark.parametrize("arguments", [{"rate": 0.0}, {"rate": 1.5}])
@pytest.mark.parametrize("kind", [MLM, PrefixLM])
def test_bad_rates_name_the_key(kind, arguments):
    with pytest.raises(ValueError, match=r"objectives\.\w+\.rate"):
        objective(kind, **arguments)
