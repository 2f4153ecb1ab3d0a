"""Three towers: what reads what, every objective over them, and how large they are."""

from typing import Any, get_args

import chex
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
    compile_run,
    lowered_flops,
    make_batch,
    tiny_config,
    towers_config,
    towers_model,
)

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.infra.sharding import by_path, describe
from vlp_jax.models.masks import bidirectional_mask, two_stream_mask
from vlp_jax.models.pooling import Pool
from vlp_jax.models.sizes import build_model, model_config, parameter_table
from vlp_jax.models.three_towers import ThreeTowers
from vlp_jax.models.vision_language import two_stacks
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.objectives.readout import Kind, Readout
from vlp_jax.train.adopted import adopt_model
from vlp_jax.train.config import check_keys, default_config

LENGTHS = [12, 9, 5, 2]
BATCH = make_batch(LENGTHS)
IDS, N = jnp.asarray(BATCH["text_ids"]), jnp.array(LENGTHS)
BUCKET = Bucket(TOKENS, IMAGE_SIZE)

IMAGE, TEXT = {"image_tower"}, {"text_embedding", "text_tower"}
FUSION = {"image_to_fusion", "text_to_fusion", "fusion_tower"}
PAIR = IMAGE | TEXT | FUSION
QUERY = {"reconstructor_0", "query_norm"}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
# Objectives: their section, and what of the parameters they train.
OBJECTIVES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mim": (DECODER, IMAGE | {"mim_decoder"}),
    "pair_mim": (
        {"type": "mim", "with_text": True, **DECODER},
        PAIR | {"pair_mim_decoder"},
    ),
    "mlm": ({}, PAIR | {"vocabulary_head"}),
    "text_mlm": ({"type": "mlm", "with_image": False}, TEXT | {"vocabulary_head"}),
    "flm": ({}, PAIR | QUERY | {"vocabulary_head"}),
    "itc": ({"embedding_dim": 8}, IMAGE | TEXT | {"contrastive_head"}),
    "itm": ({"readout": "bidirectional"}, PAIR | {"matching_head"}),
    "vqa": ({"num_classes": 4, "readout": "bidirectional"}, PAIR | {"vqa_head"}),
    "nlvr2": ({"readout": "forward"}, PAIR | {"nlvr2_head", "nlvr2_image_type"}),
}


@pytest.fixture(scope="module")
def objectives() -> dict[str, Objective]:
    sections = ConfigDict({name: section for name, (section, _) in OBJECTIVES.items()})
    return {one.name: one for one in build_objectives(sections, towers_model(), VOCABULARY)}


@pytest.fixture(scope="module")
def params(objectives: dict[str, Objective]) -> Any:
    """Of all objectives, and none of them zero or one as in fresh norms and biases."""
    draw = np.random.default_rng(0)
    shapes = {}
    for one in objectives.values():
        spec = batch_spec(BUCKET, 1, (*FIELDS, *one.extra_fields))
        shapes |= jax.eval_shape(lambda key, o=one, s=spec: o.init(key, s)[0], jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.3 * draw.normal(size=leaf.shape).astype(np.float32), shapes)


def compiled(forward: Any, params: Any) -> Any:
    """A function of the bound model and arrays, as one of the arrays."""
    bound = jax.jit(nn.apply(forward, towers_model()))
    return lambda *arguments: bound({"params": params}, *arguments)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_what_they_read_and_nothing_else(
    name: str, objectives: dict[str, Objective], params: Any
) -> None:
    """Their gradients are finite, and exact zeros for all other parameters."""
    one, [_, touched] = objectives[name], OBJECTIVES[name]
    extra = {
        "second_image": BATCH["image"][::-1],
        "label": np.array([0, 1, 1, 0], np.int32),
        "answer": np.tile(np.arange(10, dtype=np.int32) % 4, (4, 1)),
        "answer_score": np.full((4, 10), 0.5, np.float32),
    }
    batch = {**BATCH, **{field: extra[field] for field in one.extra_fields}}
    if name == "text_mlm":
        del batch["image"]
    spec = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in batch.items()}
    own, _ = jax.eval_shape(lambda key: one.init(key, spec), jax.random.key(0))
    assert touched <= own.keys() <= touched | {"contrastive_head"}  # matching draws by its scores

    def loss(params: Any, batch: Any) -> jax.Array:
        return one.loss(params, {}, batch, jax.random.key(0), BUCKET).loss.sum

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    moved = {path.split("/")[0] for path, leaf in by_path(gradient).items() if np.any(leaf)}
    assert moved == touched


@pytest.mark.parametrize("pool", get_args(Pool))
def test_a_text_alone_reads_its_tower_alone(params: Any, pool: Pool) -> None:
    """Whatever the others hold; heads read the tower after its norm."""

    def forward(model: ThreeTowers) -> tuple[jax.Array, jax.Array]:
        mask = bidirectional_mask(N, TOKENS)[:, None]
        states = model.encode_text(IDS, mask, None, ("bidirectional",))
        assert not states.upper
        return states.last, model.text_feature(IDS, N, pool=pool)

    broken = {
        name: part if name in TEXT else jax.tree.map(lambda leaf: leaf * np.nan, part)
        for name, part in params.items()
    }
    last, feature = compiled(forward, broken)()
    assert np.isfinite(last).all()
    for row, length in enumerate(np.asarray(N)):
        tokens = last[row, 0, :1] if pool == "class" else last[row, 0, 1:length]
        np.testing.assert_allclose(tokens.mean(axis=0), feature[row], atol=1e-6)
    scale, bias = params["text_tower"]["norm"]["scale"], params["text_tower"]["norm"]["bias"]
    plain = (np.asarray(last) - bias) / scale
    np.testing.assert_allclose(plain.std(axis=-1), 1, atol=1e-3)


@pytest.mark.parametrize("pool", get_args(Pool))
def test_an_image_is_read_as_its_tower_has_made_it(params: Any, pool: Pool) -> None:
    def forward(model: ThreeTowers) -> tuple[jax.Array, jax.Array]:
        pixels = normalize(jnp.asarray(BATCH["image"]))
        tower = model.image_tower(pixels)
        expected = tower[:, 0] if pool == "class" else tower[:, 1:].mean(axis=1)
        return model.image_feature(model.encode_image(pixels), pool=pool), expected

    feature, expected = compiled(forward, {name: params[name] for name in IMAGE})()
    np.testing.assert_array_equal(feature, expected)


@pytest.mark.parametrize("streams", [("bidirectional",), ("forward", "reverse")])
def test_padding_is_seen_by_nobody(streams: tuple[str, ...], params: Any) -> None:
    """Not by the text, and not by the image where both are one sequence."""
    joint = streams == ("bidirectional",)
    mask = bidirectional_mask(N, TOKENS)[:, None] if joint else two_stream_mask(N, TOKENS)
    tokens = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 32)), jnp.float32)

    def forward(model: ThreeTowers, ids: jax.Array) -> tuple[jax.Array, ...]:
        states = model.encode_text(ids, mask, tokens, streams)
        if not joint:
            return (states.last,)
        return states.last, model.encode_pair(states.lower[-1], mask, tokens).image

    real = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
    encode = compiled(forward, params)
    plain = encode(IDS)
    for changed, same in ((~real, True), (real, False)):
        others = encode(jnp.where(changed, (IDS + 7) % VOCAB, IDS))
        text = np.asarray(plain[0] == others[0]).all(axis=-1)
        assert text.transpose(0, 2, 1)[real].all() == same
        for before, after in zip(plain[1:], others[1:], strict=True):
            assert (before == after).all() == same


def test_streams_beside_an_image_see_one_side_and_all_of_it(params: Any) -> None:
    """Through the image no row learns of the others, and every row learns of the image."""
    mask, draw = two_stream_mask(N, TOKENS), np.random.default_rng(1)
    tokens = jnp.asarray(draw.normal(size=(4, 5, 32)), jnp.float32)

    def forward(model: ThreeTowers, ids: jax.Array, image: jax.Array) -> jax.Array:
        return model.encode_text(ids, mask, image, ("forward", "reverse")).last

    encode = compiled(forward, params)
    plain, changed = encode(IDS, tokens), encode(IDS.at[:, 1].add(1), tokens)
    same = np.asarray(plain == changed).all(axis=-1)
    np.testing.assert_array_equal(same[0, 0], np.arange(TOKENS) < 1)
    np.testing.assert_array_equal(same[0, 1], np.arange(TOKENS) > 1)
    other = encode(IDS, tokens.at[:, 4].add(1.0))
    assert not np.asarray(plain == other).all(axis=-1)[0].any()


@pytest.mark.parametrize("kind", ["bidirectional", "forward", "query"])
def test_several_texts_of_an_image_are_read_as_one_by_one(kind: Kind, params: Any) -> None:
    reader = Readout(kind, "readout")
    tokens = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 32)), jnp.float32)

    def forward(model: ThreeTowers) -> tuple[jax.Array, jax.Array]:
        text = reader.encode(model, IDS, N, None)
        together = reader.read(model, text, tokens, None)
        return together, reader.read(model, text, jnp.repeat(tokens, 2, axis=0), None)

    together, single = compiled(forward, params)()
    np.testing.assert_allclose(together, single, atol=2e-5)
    assert np.abs(single[0] - single[1]).max() > 1e-3


@pytest.mark.slow
def test_eight_devices_equal_one() -> None:
    """An update of contrast and of masked words, which share one pass of the image tower."""
    config = tiny_config()
    with config.unlocked():
        config.model = towers_config()
        config.objectives = {"itc": {"embedding_dim": 8}, "mlm": {}}
    results = []
    for mesh in (None, make_mesh(data=4, fsdp=2)):
        update = compile_run(config, mesh)
        state, metrics = update(update.init(), make_batch())
        results.append((jax.device_get(state.params), metrics))
    for name, value in results[0][1].items():
        assert results[1][1][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    chex.assert_trees_all_close(results[0][0], results[1][0], atol=2e-4)


COUNTED = {
    "mlm": {"rate": 1.0, "chunk_rows": 10**9},
    "text_mlm": {"type": "mlm", "rate": 1.0, "with_image": False, "chunk_rows": 10**9},
    "flm": {"chunk_rows": 10**9},
    "itc": {},
    "itm": {"readout": "bidirectional"},
    "vqa": {"num_classes": 8, "readout": "forward"},
    "nlvr2": {"readout": "query"},
    "pair_mim": {"type": "mim", "with_text": True, "decoder_depth": 1},
}


@pytest.mark.parametrize("name", COUNTED)
def test_formulas_match_the_lowered_module(name: str) -> None:
    """Images alone, texts alone, and pairs in both ways; as in ``test_flops``, but tied."""
    config = model_config("towers_small")
    config.dtype = "float32"
    config.image.update(depth=2, patch_size=16)
    config.text.depth, config.fusion.depth, config.reconstructor.depth = 3, 2, 2
    model = build_model(config, 1000, 3, 144)
    sections = {name: COUNTED[name], **({"itc": {}} if name == "itm" else {})}
    built = build_objectives(ConfigDict(sections), model, Vocabulary.of_words(1000, 3))
    [one] = [one for one in built if one.name == name]
    assert lowered_flops(one, Bucket(48, 144)) == pytest.approx(one.flops(48), rel=0.04)


@pytest.fixture(scope="module")
def base() -> Any:
    """Shapes at the base size with FLAVA's vocabulary, heads of matching and contrast included."""
    model = build_model(model_config("towers_base"), 30_522, 4, 224)
    itm = ITM(ITC(model, embedding_dim=768), readout="bidirectional")
    spec = batch_spec(Bucket(16, 224), 1)
    return jax.eval_shape(lambda key: itm.init(key, spec)[0], jax.random.key(0))


def test_base_has_the_parameters_of_flava(base: Any) -> None:
    """240.8M (fact sheet of MoMo, section 1), which count projections for contrast as well."""
    table = dict(parameter_table(base))
    width = 768
    contrast = 2 * width * width  # of ours, without biases
    ours = sum(table[name] for name in PAIR) + contrast
    assert ours == pytest.approx(240.8e6, rel=0.01)
    assert table["image_tower"] == pytest.approx(86.4e6, rel=0.01)
    assert table["text_embedding"] + table["text_tower"] == pytest.approx(108.9e6, rel=0.001)
    assert table["fusion_tower"] == pytest.approx(43.1e6, rel=0.015)
    # What FLAVA has on top: poolers of images and of pairs, learned positions of patches, a class
    # token of the fusion tower, two segments of texts, and biases; and rows that pad our table.
    poolers, positions = 2 * (width + 1) * width, 197 * width
    theirs = ours + poolers + positions + width + 2 * width + 2 * width - 70 * width
    assert theirs == pytest.approx(240.8e6, abs=0.05e6)


def test_sharding_rules_cover_the_towers(base: Any) -> None:
    """Every kernel is cut along its largest dimension, and the table along the vocabulary."""
    specs = {path: spec for path, _, spec in describe(make_mesh(data=2, fsdp=4), base)}
    small = ("bias", "scale", "class_token", "contrastive_head/log_scale")
    for path, spec in specs.items():
        if path.startswith("matching_head/classifier") or path.endswith(small):
            continue
        assert "fsdp" in spec, path
    assert specs["text_embedding/token/embedding"] == ("fsdp",)
    assert specs["fusion_tower/block_05/mlp/in/kernel"] == (None, "fsdp")
    assert specs["text_tower/block_11/mlp/out/kernel"] == ("fsdp",)


@pytest.mark.parametrize("size", ["tiny", "mini", "small", "base"])
def test_named_sizes_are_those_of_the_shared_stack(size: str) -> None:
    config = default_config(f"towers_{size}")
    check_keys(config)
    shared, model = model_config(f"shared_{size}"), config.model
    assert model.image.to_dict() == shared.image.to_dict()
    assert all(model.text[key] == shared.image[key] for key in ("width", "heads", "depth"))
    build_model(model, VOCAB, MASK_ID, 16 * model.image.patch_size)
    with config.unlocked():
        model.text.lower_depth = 1
    with pytest.raises(ConfigError, match=r"model\.text\.lower_depth"):
        check_keys(config)


@pytest.mark.parametrize("before", ["towers_mini", "shared_tiny"])
def test_a_run_adopts_the_geometry_of_a_checkpoint(before: str) -> None:
    config = default_config(before)
    config.model.dtype = "float32"
    saved = towers_config(**{"fusion.depth": 3})
    adopt_model(config, saved.to_dict())
    check_keys(config)
    assert config.model.to_dict() == saved.to_dict()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.reconstructor\.depth=2 .* model\.text\.depth=1"):
        towers_model(**{"reconstructor.depth": 2})
    with pytest.raises(ValueError, match=r"model\.image\.width=16 must be model\.text\.width=32"):
        towers_model(**{"image.width": 16})
    with pytest.raises(ValueError, match=r"model\.fusion\.depth=0 must be 1 or more"):
        towers_model(**{"fusion.depth": 0})
    with pytest.raises(ConfigError, match=r"'three_towers', but cloze needs a text stack"):
        two_stacks(towers_model(), "cloze")
    with pytest.raises(ConfigError, match=r"'towers'. Use one of 'two_stacks', 'shared', 'three_"):
        build_model(ConfigDict({**towers_config(), "type": "towers"}), VOCAB, MASK_ID, IMAGE_SIZE)
    with pytest.raises(ValueError, match="do not see an image in one way"):
        jax.eval_shape(
            lambda: nn.init(
                lambda model: model.encode_text_upper(
                    jnp.zeros((1, 2, 3, 32)),
                    jnp.ones((1, 2, 3, 3), bool),
                    jnp.zeros((1, 5, 32)),
                    ("forward", "bidirectional"),
                ),
                towers_model(),
            )(jax.random.key(0))
        )
