"""A fusion tower of two streams: what each reads, what it trains, and METER's FLOPs from shapes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import (
    IMAGE_SIZE,
    MASK_ID,
    TOKENS,
    VOCAB,
    VOCABULARY,
    lowered_flops,
    make_batch,
    towers_model,
)

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.evals.attention_maps import text_over_image
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.block import Block
from vlp_jax.models.flops import block_flops, co_attention_flops, text_flops
from vlp_jax.models.masks import bidirectional_mask
from vlp_jax.models.sizes import build_model, model_config, parameter_table
from vlp_jax.models.three_towers import ThreeTowers, ThreeTowersConfig
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.readout import Readout
from vlp_jax.train.config import check_keys, default_config

LENGTHS = [12, 9, 5, 2]
BATCH = make_batch(LENGTHS)
IDS, N = jnp.asarray(BATCH["text_ids"]), jnp.array(LENGTHS)
MASK = bidirectional_mask(N, TOKENS)[:, None]
BUCKET = Bucket(TOKENS, IMAGE_SIZE)
IMAGE = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 32)), jnp.float32)

TOWERS = {"image_tower", "text_embedding", "text_tower"}
PAIR = TOWERS | {"image_to_fusion", "text_to_fusion", "fusion_tower"}
# Objectives: their section, and what of the parameters they train.
OBJECTIVES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "pair_mim": (
        {
            "type": "mim",
            "with_text": True,
            "decoder_width": 16,
            "decoder_depth": 1,
            "decoder_heads": 2,
        },
        PAIR | {"pair_mim_decoder"},
    ),
    "mlm": ({}, PAIR | {"vocabulary_head"}),
    "itc": ({"embedding_dim": 8}, TOWERS | {"contrastive_head"}),
    "itm": ({"readout": "bidirectional"}, PAIR | {"matching_head"}),
    "vqa": ({"num_classes": 4, "readout": "bidirectional"}, PAIR | {"vqa_head"}),
}


def co_attention_model() -> ThreeTowers:
    return towers_model(**{"fusion.depth": 2}, co_attention=True)


@pytest.fixture(scope="module")
def objectives() -> dict[str, Objective]:
    sections = ConfigDict({name: section for name, (section, _) in OBJECTIVES.items()})
    return {one.name: one for one in build_objectives(sections, co_attention_model(), VOCABULARY)}


@pytest.fixture(scope="module")
def params(objectives: dict[str, Objective]) -> Any:
    """Of all objectives, and none of them zero or one as in fresh norms and biases."""
    draw = np.random.default_rng(0)
    shapes = {}
    for one in objectives.values():
        spec = batch_spec(BUCKET, 1, (*FIELDS, *one.extra_fields))
        shapes |= jax.eval_shape(lambda key, o=one, s=spec: o.init(key, s)[0], jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.3 * draw.normal(size=leaf.shape).astype(np.float32), shapes)


def run(params: Any, forward: Any, *arguments: Any) -> Any:
    return jax.jit(nn.apply(forward, co_attention_model()))({"params": params}, *arguments)


def encode(model: ThreeTowers, ids: jax.Array, image: jax.Array) -> Any:
    lower = model.encode_text_lower(ids, MASK)[-1]
    return model.encode_pair(lower, MASK, image)


def test_streams_read_one_another_as_before_the_layer(params: Any) -> None:
    """Layer by layer, one text and one image at a time, and with the text cut to its length."""
    pair = run(params, encode, IDS, IMAGE)

    def entering(model: ThreeTowers, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        lower = model.encode_text_lower(ids, MASK)[-1]
        return model.text_to_fusion(model.text_tower.norm(lower)), model.image_to_fusion(IMAGE)

    text, image = run(params, entering, IDS)
    tower = params["fusion_tower"]
    block = Block(co_attention_model().config.text, cross_attention=True)
    layer_norm = nn.LayerNorm(epsilon=co_attention_model().config.text.norm_eps)
    for row, length in enumerate(LENGTHS):
        x, y = text[row : row + 1, 0, :length], image[row : row + 1]
        for layer in range(2):
            of_text, of_image = (
                {"params": tower[f"{side}_block_{layer:02d}"]} for side in ("text", "image")
            )
            x, y = block.apply(of_text, x, context=y), block.apply(of_image, y, context=x)
            np.testing.assert_allclose(pair.blocks[layer][row, 0, :length], x[0], atol=1e-4)
        y = layer_norm.apply({"params": tower["image_norm"]}, y)
        np.testing.assert_allclose(pair.image[row, 0], y[0], atol=1e-4)
        linear = tower["image_to_text"]
        expected = layer_norm.apply({"params": tower["text_norm"]}, x)[0]
        expected += y[0, :1] @ linear["kernel"] + linear["bias"][None]
        np.testing.assert_allclose(pair.text[row, 0, :length], expected, atol=1e-4)


def test_padding_is_seen_by_nobody(params: Any) -> None:
    real = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
    plain = run(params, encode, IDS, IMAGE)
    for changed, same in ((~real, True), (real, False)):
        other = run(params, encode, jnp.where(changed, (IDS + 7) % VOCAB, IDS), IMAGE)
        text = np.asarray(plain.text == other.text).all(axis=-1)
        assert text[:, 0][real].all() == same
        assert (plain.image == other.image).all() == same


def test_several_texts_of_an_image_are_read_as_one_by_one(params: Any) -> None:
    reader = Readout("bidirectional", "readout")

    def forward(model: ThreeTowers) -> tuple[jax.Array, jax.Array]:
        text = reader.encode(model, IDS, N, None)
        together = reader.read(model, text, IMAGE[:2], None)
        return together, reader.read(model, text, jnp.repeat(IMAGE[:2], 2, axis=0), None)

    together, single = run(params, forward)
    np.testing.assert_allclose(together, single, atol=2e-5)
    assert np.abs(single[0] - single[1]).max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_what_they_read_and_nothing_else(
    name: str, objectives: dict[str, Objective], params: Any
) -> None:
    """Their gradients are finite, and exact zeros for all other parameters.

    What the last layer makes of the image is read at its class token; MIM reads no more of the
    text than the layer before, so the last one of the text is not trained by it.
    """
    one, [_, touched] = objectives[name], OBJECTIVES[name]
    extra = {
        "answer": np.tile(np.arange(10, dtype=np.int32) % 4, (4, 1)),
        "answer_score": np.full((4, 10), 0.5, np.float32),
    }
    batch = {**BATCH, **{field: extra[field] for field in one.extra_fields}}

    def loss(params: Any, batch: Any) -> jax.Array:
        return one.loss(params, {}, batch, jax.random.key(0), BUCKET).loss.sum

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    moved = {path for path, leaf in by_path(gradient).items() if np.any(leaf)}
    assert {path.split("/")[0] for path in moved} == touched
    if "fusion_tower" in touched:
        blocks = {path.split("/")[1] for path in moved if path.startswith("fusion_tower/")}
        last = {"pair_mim": {"image_block_01"}}.get(name, {"image_block_01", "text_block_01"})
        assert {"image_block_00", "text_block_00"} | last <= blocks


def test_attention_of_the_text_over_the_image(params: Any) -> None:
    def forward(model: ThreeTowers) -> None:
        pixels = jnp.zeros((4, IMAGE_SIZE, IMAGE_SIZE, 3))
        model.encode_text(IDS, MASK, model.encode_image(pixels), ("bidirectional",))

    model = co_attention_model()
    applied = nn.apply(forward, model, mutable="intermediates")
    _, sown = jax.jit(applied)({"params": params})
    found = text_over_image(model, params, sown["intermediates"], (4, 1, TOKENS))
    assert found.shape == (4, TOKENS, model.config.image.tokens)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["mlm", "itm", "vqa"])
def test_formulas_match_the_lowered_module(name: str) -> None:
    config = model_config("co_attention_small")
    config.dtype = "float32"
    config.image.update(depth=2, patch_size=16)
    config.text.depth, config.fusion.depth, config.reconstructor.depth = 3, 2, 2
    model = build_model(config, 1000, 3, 144)
    sections: dict[str, dict[str, Any]] = {
        "mlm": {"rate": 1.0, "chunk_rows": 10**9},
        "itm": {"readout": "bidirectional"},
        "vqa": {"num_classes": 8, "readout": "bidirectional"},
    }
    chosen = {name: sections[name], **({"itc": {}} if name == "itm" else {})}
    built = build_objectives(ConfigDict(chosen), model, Vocabulary.of_words(1000, 3))
    [one] = [one for one in built if one.name == name]
    assert lowered_flops(one, Bucket(48, 144)) == pytest.approx(one.flops(48), rel=0.04)


@pytest.fixture(scope="module")
def meter() -> ThreeTowersConfig:
    """The base size at the resolution of METER, whose vocabulary is RoBERTa's."""
    config = build_model(model_config("co_attention_base"), 50_265, 4, 384).config
    assert isinstance(config, ThreeTowersConfig)
    return config


def test_layers_cost_what_those_of_meter_do(meter: ThreeTowersConfig) -> None:
    """Multiply-adds at 577 + 40 tokens (fact sheet of PCETL, section 4)."""
    image, text = meter.image.tokens, 40
    assert image == 577
    of_image = block_flops(meter.text, image, image, text) / 2e9
    of_text = block_flops(meter.text, text, text, image) / 2e9
    assert of_image == pytest.approx(5.36, abs=0.005)
    assert of_text == pytest.approx(1.05, abs=0.005)
    assert co_attention_flops(meter, text, image) / 2e9 == pytest.approx(38.4, abs=0.1)
    lower = meter.text_depth * block_flops(meter.text, text, text)
    fusion = text_flops(meter, text, 1, joint=True) - lower
    assert fusion / 2e9 == pytest.approx(38.4, abs=0.5)  # with the maps that enter it


@pytest.mark.parametrize("size", ["tiny", "mini", "small", "base"])
def test_named_sizes(size: str) -> None:
    """As the three towers of the name, but for the kind of the fusion tower."""
    config = default_config(f"co_attention_{size}")
    check_keys(config)
    assert config.model.fusion.type == "co_attention"
    towers = model_config(f"towers_{size}").to_dict()
    assert {**config.model.to_dict(), "fusion": {}} == {**towers, "fusion": {}}
    assert config.model.fusion.depth == towers["fusion"]["depth"]


def test_a_stream_is_as_large_as_a_merged_tower_and_its_cross_attentions() -> None:
    """4 D squared for an attention, and a norm on either side of it."""

    def fusion(size: str) -> int:
        model = build_model(model_config(size), VOCAB, MASK_ID, 32)
        spec = batch_spec(Bucket(8, 32), 1)
        [mlm] = build_objectives(ConfigDict({"mlm": {}}), model, VOCABULARY)
        shapes, _ = jax.eval_shape(lambda key: mlm.init(key, spec), jax.random.key(0))
        return dict(parameter_table(shapes))["fusion_tower"]

    width, depth = 256, 3
    attention = 4 * (width + 1) * width + 2 * 2 * width
    linear = (width + 1) * width
    expected = 2 * (fusion("towers_mini") + depth * attention) + linear
    assert fusion("co_attention_mini") == expected


@pytest.mark.parametrize(
    ("name", "section"),
    [("ar", {}), ("flm", {}), ("vqa", {"num_classes": 4, "readout": "query"})],
    ids=["ar", "flm", "query"],
)
def test_streams_that_see_one_side_are_refused(name: str, section: dict[str, Any]) -> None:
    sections = ConfigDict({name: section})
    [one] = build_objectives(sections, co_attention_model(), VOCABULARY)
    spec = batch_spec(BUCKET, 1, (*FIELDS, *one.extra_fields))
    with pytest.raises(ConfigError, match=r"model\.fusion\.type: 'co_attention'.*'merged'"):
        jax.eval_shape(lambda key: one.init(key, spec)[0], jax.random.key(0))


def test_an_unknown_kind_of_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.fusion\.type='mixed' is none of"):
        towers_model(**{"fusion.type": "mixed"}, co_attention=True)
