"""Heads and channels that are cut out: what goes, and that nothing else changes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captioning import counted_decoding
from ml_collections import ConfigDict
from models.test_decoding import DEPTHS
from models.test_tuning import ADAPTER, CASES
from tiny import IMAGE_SIZE, MASK_ID, VOCABULARY, lowered_flops, make_batch
from tuned import (
    MODELS,
    base,
    build,
    check_formulas_of_prompts,
    compiled,
    drawn,
    forward,
    small_geometry,
    small_vqa,
)
from tuned import geometry as tuned_geometry

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.decoding import (
    decode_token_flops,
    empty_cache,
    project_image_flops,
)
from vlp_jax.models.flops import prompt_flops
from vlp_jax.models.sizes import build_model, model_config
from vlp_jax.models.tuning import LoraConfig, units_of
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.tower import tower_tokens
from vlp_jax.transfer.generate import caption_search, generate
from vlp_jax.transfer.lora import merge_lora
from vlp_jax.transfer.quantize import dequantized, quantized
from vlp_jax.transfer.structured import importance, prune
from vlp_jax.transfer.units import pruned

HALF = {"heads": 0.5, "mlp": 0.5, "blocks": "all"}
LORA = {"rank": 2, "alpha": 6.0, "targets": ("query", "key", "value")}
PROMPTS = ("deep", "shallow")


def geometry(name, cut=HALF, **tuning):
    """Of a model of which parts are cut out, and tuned besides."""
    config = tuned_geometry(name, **tuning)
    config.tuning.prune.update(cut)
    return config


def silenced(params, config, found):
    """The whole model in which no output reads what the smaller one does without.

    What stays is told by the shapes of importance alone, in another way than ``prune`` does.
    """
    leaves = by_path(params)
    blocks = config.text.tuning.prune.blocks
    for branch, scores in found.items():
        if branch.rpartition("/")[0] not in blocks:
            continue
        scores = np.asarray(scores)
        for index in range(len(scores)):
            ahead = (scores > scores[index]).sum() + (scores[:index] == scores[index]).sum()
            if ahead >= len(scores) // 2:
                kernel = np.array(leaves[f"{branch}/out/kernel"])
                kernel[index] = 0
                leaves[f"{branch}/out/kernel"] = kernel
    return nested(leaves)


def shapes(config):
    init = nn.init(functools.partial(forward, ("bidirectional",)), build(config))
    tree = jax.eval_shape(init, jax.random.key(0))["params"]
    return {path: leaf.shape for path, leaf in by_path(tree).items()}


@pytest.mark.parametrize(
    ("name", "streams"), CASES, ids=[f"{n}-{'-'.join(streams)}" for n, streams in CASES]
)
def test_a_smaller_model_equals_one_whose_outputs_are_zero(name, streams):
    """In every block, and in those of the fusion alone; cut by magnitude."""
    found = importance(base(name))
    for cut in (HALF, {**HALF, "blocks": ""}):
        config = geometry(name, cut)
        model = build(config)
        small = prune(base(name), model.config, found)
        if streams == ("bidirectional",):
            there = {path: leaf.shape for path, leaf in by_path(small).items()}
            assert there == shapes(config)
        whole = compiled(build(MODELS[name]()), streams)
        expected = silenced(base(name), model.config, found)
        silent = whole({"params": expected})
        for one, other in zip(compiled(model, streams)({"params": small}), silent, strict=True):
            np.testing.assert_allclose(one, other, atol=3e-5)
        plain = whole({"params": base(name)})
        assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(silent, plain, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_what_no_output_reads_can_go(name):
    """By the gradient, that has no importance, though its own weights are not zero."""
    leaves = by_path(base(name))
    draw = np.random.default_rng(1)
    dead = {}
    for path, leaf in leaves.items():
        if path.endswith(("attention/out/kernel", "mlp/out/kernel")) and "reconstr" not in path:
            gone = draw.permutation(len(leaf))[: len(leaf) // 2]
            leaves[path] = leaf.copy()
            leaves[path][gone] = 0
            dead[path.removesuffix("/out/kernel")] = sorted(gone)
    params, whole = nested(leaves), compiled(build(MODELS[name]()))

    def loss(params):
        return sum(jnp.sum(jnp.sin(out)) for out in whole({"params": params}))

    found = importance(params, jax.grad(loss)(params))
    for branch, gone in dead.items():
        scores = np.asarray(found[branch])
        # Of the weights that make it, the gradient is zero; of what an output makes, the weight.
        np.testing.assert_array_equal(np.flatnonzero(scores == 0), gone)
    model = build(geometry(name))
    small = compiled(model)({"params": prune(params, model.config, found)})
    for one, other in zip(small, whole({"params": params}), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_importance_is_what_the_papers_sum():
    """By hand: two heads of one feature, two channels."""

    def layer(kernel, bias):
        return {"kernel": np.float32(kernel), "bias": np.float32(bias)}

    attention = {
        "query": layer([[[1], [2]]], [[1], [0]]),
        "key": layer([[[0], [3]]], [[0], [1]]),
        "value": layer([[[-1], [1]]], [[2], [0]]),
        "out": layer([[[4]], [[-5]]], [7]),
    }
    mlp = {"in": layer([[1, -2]], [3, 0]), "out": layer([[2], [6]], [9])}
    params = {"b": {"self_attention": attention, "mlp": mlp}}
    norms = importance(params)
    assert set(norms) == {"b/self_attention", "b/mlp"}
    np.testing.assert_allclose(norms["b/self_attention"], np.sqrt([23, 40]), rtol=1e-6)
    np.testing.assert_allclose(norms["b/mlp"], np.sqrt([14, 40]), rtol=1e-6)
    slopes = jax.tree.map(lambda x: np.float32(x > 0) - 2 * np.float32(x < 0), params)
    found = importance(params, slopes)
    np.testing.assert_allclose(found["b/self_attention"], [1 + 1 + 2 + 2 + 4, 2 + 3 + 1 + 1 + 10])
    np.testing.assert_allclose(found["b/mlp"], [1 + 3 + 2, 4 + 6])


def test_of_equals_the_first_stay():
    config = geometry("shared")
    model = build(config)
    found = {name: np.ones_like(scores) for name, scores in importance(base("shared")).items()}
    [block, *_] = model.config.stacks["image_tower"]
    found[f"{block}/mlp"][-2:] = 2
    leaves, whole = by_path(prune(base("shared"), model.config, found)), by_path(base("shared"))
    np.testing.assert_array_equal(
        leaves[f"{block}/self_attention/query/kernel"],
        whole[f"{block}/self_attention/query/kernel"][:, :1],
    )
    kept = [*range(30), 62, 63]
    np.testing.assert_array_equal(
        leaves[f"{block}/mlp/in/bias"], whole[f"{block}/mlp/in/bias"][kept]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_beside_adapters_skipped_units_and_low_rank_updates(name):
    """Updates are cut with their heads, so that cutting and merging may follow in any order."""
    stacks = build(MODELS[name]()).config.stacks
    first = [blocks[0] for blocks in stacks.values()]
    second = [blocks[-1] for blocks in stacks.values() if len(blocks) > 1]
    whole_block = first[-1] if len(stacks) > 1 else f"{first[-1]}/mlp"
    skip = (whole_block, *units_of(second, ("attention",)))
    tuning = {"adapter": ADAPTER, "lora": LORA, "blocks": "all", "replacement": 2}
    params = pruned(drawn(tuned_geometry(name, **tuning, gated=skip)), skip)
    found = importance(params)
    config = geometry(name, skip=skip, **tuning)
    model = build(config)
    small = prune(params, model.config, found)
    assert {path: leaf.shape for path, leaf in by_path(small).items()} == shapes(config)
    beside = compiled(model)({"params": small})
    whole = compiled(build(tuned_geometry(name, skip=skip, **tuning)))
    expected = whole({"params": silenced(params, model.config, found)})
    for one, other in zip(beside, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
    merged = geometry(name, skip=skip, **{**tuning, "lora": {"rank": 0}})
    run = compiled(build(merged))
    first_cut = merge_lora(small, LoraConfig(**LORA))
    first_merged = prune(merge_lora(params, LoraConfig(**LORA)), build(merged).config, found)
    for path, leaf in by_path(first_cut).items():
        np.testing.assert_allclose(leaf, by_path(first_merged)[path], atol=1e-6)
    for one, other in zip(run({"params": first_cut}), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    eight = quantized(first_cut)
    for one, other in zip(run({"params": eight}), run({"params": dequantized(eight)}), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)


def test_a_model_is_cut_further():
    """Shares are those of the whole model; less than before cannot be."""
    found = importance(base("shared"))
    quarter = build(geometry("shared", {**HALF, "heads": 0.0, "mlp": 0.25})).config
    half = build(geometry("shared", {**HALF, "heads": 0.0})).config
    once = prune(base("shared"), half, found)
    small = prune(base("shared"), quarter, found)
    twice = prune(small, half, importance(small))
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    with pytest.raises(ConfigError, match=r"tuning\.prune: .*/mlp has 32 and is to have 48"):
        prune(once, quarter, importance(once))


@pytest.mark.parametrize("attention", ["xla", "pallas"])
def test_kernels_take_any_number_of_heads(attention):
    """Three of four."""
    config = geometry("shared", {**HALF, "heads": 0.25})
    config.attention = attention
    config.image.update(width=64, heads=4)
    model = build(config)
    params = drawn(config)
    assert params["image_tower"]["block_00"]["self_attention"]["query"]["bias"].shape == (3, 16)
    found = compiled(model)({"params": params})
    config.attention = "xla"
    for one, other in zip(found, compiled(build(config))({"params": params}), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_stacks", "shared", "three_towers"])
def test_captions_are_decoded_by_what_is_left(name):
    """In some blocks, so that those of one cache differ in their heads."""
    model = build(geometry(name, {**HALF, "blocks": ".*_01" if name == "shared" else ""}))
    whole = build(MODELS[name]())
    [ar] = build_objectives(ConfigDict({"ar": {}}), whole, VOCABULARY)
    spec = batch_spec(Bucket(12, IMAGE_SIZE), 1, FIELDS)
    params = jax.tree.map(lambda leaf: 3.0 * leaf, ar.init(jax.random.key(0), spec)[0])
    found = importance(params)
    search = caption_search(Tokenizer.train(["a red square and a blue circle"] * 3, 50), 6, beams=2)
    pixels = make_batch([5, 7, 9, 11])["image"]
    small = generate(model, prune(params, model.config, found), pixels, search)
    silent = generate(whole, silenced(params, model.config, found), pixels, search)
    np.testing.assert_array_equal(small.ids, silent.ids)
    np.testing.assert_allclose(small.score, silent.score, atol=1e-4)
    cache = empty_cache(model.config, 1, 1, 6)
    assert {memory.key.shape[2] for memory in cache} == {1, 2}


def test_a_tower_by_itself_is_cut_as_well():
    config = geometry("two_stacks", skip=("image_tower/block_00/mlp",), adapter=ADAPTER)
    config.tuning.blocks = "all"
    model, params = build(config), drawn(config)
    pixels = normalize(jnp.asarray(make_batch()["image"]))
    inside = model.apply({"params": params}, pixels, method=lambda m, x: m.image_tower(x))
    alone = tower_tokens(model.config.image, params, pixels)
    np.testing.assert_allclose(alone, inside, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize(
    ("name", "streams"), CASES, ids=[f"{n}-{'-'.join(streams)}" for n, streams in CASES]
)
def test_prompts_are_read_by_the_heads_that_are_left(name, streams, kind):
    """Of every block its own: the first of each stack have half of them."""
    tuning = {"prompt": {"kind": kind, "length": 3}, "blocks": "all"}
    params = drawn(tuned_geometry(name, **tuning))
    found = importance(params)
    config = geometry(name, {**HALF, "blocks": ".*0"}, **tuning)
    model = build(config)
    small = prune(params, model.config, found)
    if streams == ("bidirectional",):
        assert {path: leaf.shape for path, leaf in by_path(small).items()} == shapes(config)
    beside = compiled(model, streams)
    whole = compiled(build(tuned_geometry(name, **tuning)), streams)
    expected = whole({"params": silenced(params, model.config, found)})
    for one, other in zip(beside({"params": small}), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
    other_prompts = nested(
        {p: -x if p.endswith("prompt/tokens") else x for p, x in by_path(small).items()}
    )
    assert np.abs(beside({"params": other_prompts})[0] - expected[0]).max() > 1e-2


def pruned_small(name):
    """``config.model`` of size small, with parts cut out of every block."""
    return small_geometry(name, prune={"heads": 0.5, "mlp": 0.4, "blocks": "all"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize(
    ("name", "streams"), CASES, ids=[f"{n}-{'-'.join(streams)}" for n, streams in CASES]
)
def test_formulas_of_prompts_count_the_heads_that_are_left(name, streams, kind):
    """What prompts add; keys and values of deep ones once for the four examples of a batch."""
    configs = []
    for prompt in ({}, {"kind": kind, "length": 40}):
        config = pruned_small(name)
        config.tuning.blocks, config.tuning.prune.blocks = "all", ".*0"
        config.tuning.prompt.update(prompt)
        configs.append(config)
    check_formulas_of_prompts(configs, streams)


@pytest.mark.parametrize("name", MODELS)
def test_formulas_match_the_lowered_module(name):
    config = pruned_small(name)
    one = small_vqa(config)
    expected = one.flops(48)
    assert lowered_flops(one, Bucket(48, 144)) == pytest.approx(expected, rel=0.04)
    config.tuning.prune.update(heads=0.0, mlp=0.0)
    assert expected < 0.75 * small_vqa(config).flops(48)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", *PROMPTS])
@pytest.mark.parametrize("size", ["base", "shared_base", "towers_base"])
def test_formulas_of_decoding_match_the_lowered_module(size, kind):
    """Where the last block reads image and prompts by fewer heads, and one before it reads none."""
    rows, room, beams, pixels = 2, 24, 2, 288
    config = model_config(size)
    config.dtype, config.reconstructor.depth = "float32", 2
    config.update_from_flattened_dict(DEPTHS[size])
    config.tuning = tuning_config()
    config.tuning.prune.update(heads=0.5, mlp=0.4, blocks="all")
    config.tuning.prompt.update(kind=kind, length=200)
    [*_, stack] = build_model(config, 10_000, MASK_ID, pixels).config.stacks.values()
    config.tuning.skip = (f"{stack[-2]}/attention",)
    model = build_model(config, 10_000, MASK_ID, pixels)
    counted = counted_decoding(model, rows, beams, room, pixels)
    expected = decode_token_flops(model.config, room, beams) + project_image_flops(model.config)
    expected += prompt_flops(model.config) / rows
    assert counted == pytest.approx(expected, rel=0.02)


def test_a_model_that_is_whole_has_no_section_of_it():
    """Its blocks know nothing of a cut."""
    assert build(tuned_geometry("shared")).config.text.tuning.prune is None


@pytest.mark.parametrize(
    ("cut", "error", "message"),
    [
        ({"heads": 1.0}, ValueError, r"model\.tuning\.prune\.heads=1\.0 is no share"),
        ({"mlp": -0.1}, ValueError, r"model\.tuning\.prune\.mlp=-0\.1 is no share"),
        ({"heads": 0.25}, ConfigError, r"prune\.heads: 0\.25 of the 2 of .* is less"),
        ({"mlp": 0.1}, ConfigError, r"prune\.mlp: 0\.1 of the 64 of .* channels of mlp by 8"),
        ({"heads": 0.5, "blocks": "x"}, ConfigError, r"prune\.blocks: 'x' matches no block"),
    ],
)
def test_bad_sections(cut, error, message):
    with pytest.raises(error, match=message):
        build(geometry("shared", cut))


def test_bad_input():
    params, config = base("shared"), build(geometry("shared")).config
    found = importance(params)
    with pytest.raises(ConfigError, match=r"model\.tuning\.prune: nothing is to be cut"):
        prune(params, build(tuned_geometry("shared")).config, found)
    with pytest.raises(ValueError, match=r"prune first and quantise then"):
        prune(quantized(params), config, found)
    with pytest.raises(ValueError, match=r"image_tower/block_00/\w+ has no importance"):
        prune(params, config, {})
    branch = "image_tower/block_01/mlp"
    with pytest.raises(ValueError, match=rf"importance of {branch} is not finite"):
        prune(params, config, {**found, branch: np.full(64, np.nan)})
    with pytest.raises(ValueError, match=r"has no gradient; take it with nothing frozen"):
        importance(params, {})
    with pytest.raises(ValueError, match=r"hold no block"):
        importance({"head": {"kernel": np.ones((2, 2))}})
