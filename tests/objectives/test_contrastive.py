"""ITC over the global batch and ITM with hard negatives."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import (
    BATCH,
    IMAGE_SIZE,
    TOKENS,
    VOCABULARY,
    compile_run,
    make_batch,
    tiny_config,
    tiny_model,
)

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.masks import bidirectional_mask
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.contrastive import CONTRASTIVE_HEAD, ITC, ITM

SIZES = Bucket(TOKENS, IMAGE_SIZE)
KEY = jax.random.key(0)


def arrays(**changes):
    return {name: jnp.asarray(value) for name, value in {**make_batch(), **changes}.items()}


@pytest.fixture(scope="module")
def itc():
    return ITC(tiny_model(), embedding_dim=16)


@pytest.fixture(scope="module")
def itm():
    return ITM(ITC(tiny_model(), embedding_dim=16))


def initial(itm):
    return jax.jit(lambda: itm.init(jax.random.key(1), jax.eval_shape(arrays))[0])()


@pytest.fixture(scope="module")
def params(itm):
    return initial(itm)


def embedded(itc, params, batch):
    """Unit vectors of images and texts, and their scale."""
    return jax.jit(itc.dual_encoder.__call__)(params, batch)


def test_itc_is_the_symmetric_cross_entropy_of_cosines(itc, params):
    batch = arrays(valid=np.arange(BATCH) % 5 != 0)
    output = jax.jit(lambda p: itc.loss(p, {}, batch, KEY, SIZES, train=False))(params)
    image, text, scale = (np.asarray(x, np.float64) for x in embedded(itc, params, batch))
    rows = np.asarray(batch["valid"])
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-5)
    logits = scale * image[rows] @ text[rows].T

    def nll(logits):
        return np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)

    expected = (nll(logits) + nll(logits.T)).sum() / 2
    np.testing.assert_allclose(output.loss.sum, expected, rtol=1e-4)
    assert float(output.loss.weight) == rows.sum()
    np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-5)
    for side, units in (("image", image), ("text", text)):
        found = output.metrics[f"{side}_embedding_std"]
        np.testing.assert_allclose(found.sum, units[rows].std(axis=0).mean(), rtol=1e-4)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_padding_tokens_do_not_matter(itc, params, pool):
    itc, batch = dataclasses.replace(itc, pool=pool), arrays()
    padding = np.arange(TOKENS)[None] >= np.asarray(batch["text_length"])[:, None]
    other = {**batch, "text_ids": jnp.where(jnp.asarray(padding), 9, batch["text_ids"])}
    loss = jax.jit(lambda b: itc.loss(params, {}, b, KEY, SIZES, train=False).loss.sum)
    assert float(loss(batch)) == float(loss(other))


def test_the_mean_reads_every_token_but_the_first(itc, params):
    """Of both sides: projected, and made unit vectors."""
    batch = arrays()
    length = np.asarray(batch["text_length"])

    def states(model):
        mask = bidirectional_mask(batch["text_length"], TOKENS)[:, None]
        image = model.encode_image(normalize(batch["image"]))
        return image, model.encode_text_lower(batch["text_ids"], mask)[-1][:, 0]

    image, text = jax.jit(nn.apply(states, itc.model))({"params": params})
    words = [row[1:count].mean(axis=0) for row, count in zip(np.asarray(text), length, strict=True)]
    found = embedded(dataclasses.replace(itc, pool="mean"), params, batch)
    sides = {"image": np.asarray(image)[:, 1:].mean(axis=1), "text": np.stack(words)}
    for (side, feature), units in zip(sides.items(), found, strict=False):
        expected = feature @ np.asarray(params[CONTRASTIVE_HEAD][f"{side}_projection"]["kernel"])
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(units, expected, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one():
    """Negatives and their gradients come from all devices; ITM draws the same negatives."""
    config = tiny_config()
    with config.unlocked():
        config.objectives = {name: {"weight": 1.0} for name in ("flm", "itc", "itm")}
    eight = compile_run(config, make_mesh(data=2, fsdp=4))
    one = compile_run(config)
    batch = make_batch()
    states = []
    for run in (one, eight):
        state, metrics = run(run.init(), batch, batch)
        states.append((jax.device_get(state.params), metrics))
    for name, value in states[0][1].items():
        assert states[1][1][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), states[0][0], states[1][0]
    )


def test_every_pair_has_two_wrong_ones(itm, params):
    batch = arrays(valid=np.arange(BATCH) != 3)
    drawn = jax.jit(lambda key: itm._negatives(params, batch, key))
    texts, images, found = zip(*(drawn(jax.random.key(i)) for i in range(50)), strict=True)
    assert np.all(found)
    for index in (np.stack(texts), np.stack(images)):
        assert (index != np.arange(BATCH)).all()
        assert (index != 3).all()
        assert len(np.unique(index)) > BATCH // 2


def test_hard_negatives_are_drawn_by_similarity(itm, params):
    """With a sharp softmax the most similar wrong text is drawn."""
    head = params[CONTRASTIVE_HEAD] | {"log_scale": jnp.asarray(np.log(100.0), jnp.float32)}
    spread = jax.tree.map(lambda x: x, params) | {CONTRASTIVE_HEAD: head}
    batch = arrays()
    images, texts, scale = embedded(itm.itc, spread, batch)
    similarity = np.array(scale * images @ texts.T)
    np.fill_diagonal(similarity, -np.inf)
    chances = np.exp(similarity - similarity.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    drawn = jax.jit(jax.vmap(lambda key: itm._negatives(spread, batch, key)[0]))
    counts = np.asarray(drawn(jax.random.split(KEY, 2000)))
    for row in range(BATCH):
        seen = np.bincount(counts[:, row], minlength=BATCH) / len(counts)
        np.testing.assert_allclose(seen, chances[row], atol=0.05)


def test_a_row_with_the_same_text_is_no_wrong_one(itm, params):
    """Its image may well be described by it, and by similarity it would be drawn first of all."""
    batch = arrays()
    twice = {name: batch[name].at[1].set(batch[name][0]) for name in ("text_ids", "text_length")}
    drawn = jax.jit(jax.vmap(lambda key: itm._negatives(params, {**batch, **twice}, key)))
    for index in drawn(jax.random.split(KEY, 200))[:2]:
        assert (np.asarray(index)[:, 0] > 1).all()
        assert not np.isin(np.asarray(index)[:, 1], (0, 1)).any()


@pytest.mark.parametrize("valid", [[], [5], [2, 5]])
def test_without_a_wrong_one_only_the_pair_counts(itm, params, valid):
    mask = np.isin(np.arange(BATCH), valid)
    output = jax.jit(lambda: itm.loss(params, {}, arrays(valid=mask), KEY, SIZES, train=False))()
    assert float(output.loss.weight) == {0: 0, 1: 1, 2: 6}[len(valid)]
    assert np.isfinite(float(output.loss.sum))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.001, float("nan"), float("inf")])
def test_a_temperature_that_cannot_be_learned_is_refused(temperature):
    with pytest.raises(ConfigError, match=r"objectives.itc.temperature: .* is no temperature"):
        ITC(tiny_model(), temperature=temperature)


def test_an_unknown_pool_is_refused():
    with pytest.raises(ConfigError, match=r"objectives.itc.pool: 'max'. Use one of class, mean"):
        ITC(tiny_model(), pool="max")


@pytest.mark.parametrize("readout", ["query", "bidirectional", "forward"])
def test_matching_reads_text_and_image(readout):
    itm = ITM(ITC(tiny_model(), embedding_dim=16), readout=readout)
    batch = arrays()
    params = initial(itm)
    output = jax.jit(lambda params: itm.loss(params, {}, batch, KEY, SIZES))(params)
    assert float(output.loss.weight) == 3 * BATCH
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(0.65, abs=0.2)
    assert itm.flops(8) > 0

    @jax.jit
    def match(batch):
        def encode(model):
            return itm.reader.encode(model, batch["text_ids"], batch["text_length"], None)

        text = nn.apply(encode, itm.model)({"params": params})
        return itm.match(params, text, itm.itc.dual_encoder.image_tokens(params, batch["image"]))

    plain = np.asarray(match(batch))
    word = jnp.where(batch["text_ids"][:, 1] == 4, 5, 4)
    for changed in (
        {"text_ids": batch["text_ids"].at[:, 1].set(word)},
        {"image": 255 - batch["image"]},
    ):
        assert (np.abs(match({**batch, **changed}) - plain) > 1e-6).all()


def build(**sections):
    config = ConfigDict(sections)
    return {o.name: o for o in build_objectives(config, tiny_model(), VOCABULARY)}


def test_itm_takes_the_itc_of_the_run():
    """Whatever their names, so also where its own comes first."""
    built = build(a={"type": "itm"}, b={"type": "itc", "embedding_dim": 24}, c={"type": "flm"})
    assert list(built) == ["a", "b", "c"]
    assert built["a"].itc is built["b"]
    assert built["a"].model is built["c"].model


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"itm": {}}, r"objectives\.itm: draws .* the run has none\. Add objectives\.itc"),
        (
            {"itm": {}, "itc": {}, "other": {"type": "itc"}},
            r"objectives\.itm: draws .* the run has several \(itc, other\)\. Keep one",
        ),
        ({"itm": {"embedding_dim": 8}, "itc": {}}, r"objectives\.itm\.embedding_dim: unknown key"),
        ({"itm": {"itc": "itc"}, "itc": {}}, r"objectives\.itm\.itc: unknown key"),
    ],
)
def test_itm_needs_its_itc(sections, message):
    with pytest.raises(ConfigError, match=message):
        build(**sections)
