"""Adapters, low-rank updates and skippable units, on every model; METER's figures from shapes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import VOCABULARY, lowered_flops
from tuned import (
    MODELS,
    all_units,
    base,
    build,
    compiled,
    drawn,
    forward,
    geometry,
    patterns,
    small_geometry,
    small_vqa,
    tuned_size,
)

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import block_flops, prompt_flops, text_flops
from vlp_jax.models.sizes import build_model
from vlp_jax.models.tuning import LoraConfig, is_added, is_skipped
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.objectives import build_objectives
from vlp_jax.train.config import check_keys, default_config
from vlp_jax.transfer.lora import merge_lora
from vlp_jax.transfer.units import gated_units, pruned, with_kept

ADAPTER = {"kind": "serial", "width": 3}
# Of all that can be added beside what is kept, in all blocks.
ADDED = {"adapter": ADAPTER, "prompt": {"kind": "deep", "length": 3}, "blocks": "all"}


@functools.cache
def gated(name: str, streams: tuple[str, ...]) -> tuple[Any, Any]:
    """Parameters with everything gated, and the compiled pass."""
    config = geometry(name, gated=all_units(name), replacement=2, **ADDED)
    return drawn(config), compiled(build(config), streams)


ONE_SIDED = ("forward", "reverse")
CASES = [
    *((name, ("bidirectional",)) for name in MODELS),
    *((name, ONE_SIDED) for name in MODELS if name != "co_attention"),
]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    ("name", "streams"), CASES, ids=[f"{n}-{'-'.join(streams)}" for n, streams in CASES]
)
def test_masked_equals_pruned(name: str, streams: tuple[str, ...], index: int) -> None:
    """With adapters beside what is kept, and others in the place of what is skipped."""
    skipped = patterns(name)[index]
    params, masked = gated(name, streams)
    switched = with_kept(params, dict.fromkeys(skipped, 0.0))
    expected = masked({"params": switched})
    smaller = geometry(name, skip=skipped, replacement=2, **ADDED)
    found = compiled(build(smaller), streams)({"params": pruned(params, skipped)})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    if skipped:
        whole = masked({"params": params})
        assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(whole, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_network_has_the_parameters_that_are_left(name: str) -> None:
    params, _ = gated(name, ("bidirectional",))
    skipped = patterns(name)[3]
    smaller = geometry(name, skip=skipped, replacement=2, **ADDED)
    init = nn.init(functools.partial(forward, ("bidirectional",)), build(smaller))
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    left = by_path(pruned(params, skipped))
    assert {path: leaf.shape for path, leaf in left.items()} == {
        path: leaf.shape for path, leaf in by_path(shapes).items()
    }
    assert {path for path in left if not is_added(path)} == {
        path for path in by_path(base(name)) if not is_skipped(path, skipped)
    }
    assert gated_units(params) == tuple(sorted(all_units(name)))
    assert not gated_units(pruned(params, skipped))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "tuning",
    [
        {"adapter": ADAPTER, "blocks": "all"},
        {"adapter": {"kind": "parallel", "norm": True, "scale": 4.0, "branches": ("mlp",)}},
        {"lora": {"rank": 2}},
    ],
    ids=["serial", "parallel", "lora"],
)
def test_fresh_additions_change_nothing(name: str, tuning: dict[str, Any]) -> None:
    """Whatever the base holds; and with other numbers they change all that reads the fusion."""
    model = build(geometry(name, **tuning))
    init = nn.init(functools.partial(forward, ("bidirectional",)), model)
    fresh = by_path(init(jax.random.key(0))["params"])
    known = by_path(base(name))
    assert {path for path in fresh if not is_added(path)} == set(known)
    filled = {path: known.get(path, leaf) for path, leaf in fresh.items()}
    run, plain = compiled(model), compiled(build(MODELS[name]()))({"params": base(name)})
    for one, other in zip(run({"params": nested(filled)}), plain, strict=True):
        np.testing.assert_array_equal(one, other)
    draw = np.random.default_rng(1)
    changed = {
        path: leaf + 0.3 * draw.normal(size=leaf.shape) if is_added(path) else leaf
        for path, leaf in filled.items()
    }
    assert np.abs(run({"params": nested(changed)})[0] - plain[0]).max() > 1e-3


def test_adapters_are_those_of_the_papers() -> None:
    """Serial: on what a branch has made; parallel: on what enters it; added before the sum."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    for kind in ("serial", "parallel"):
        adapter = {"kind": kind, "width": 3, "scale": 2.0, "branches": ("mlp",)}
        config = geometry("shared", adapter=adapter, blocks="all")
        params, model = drawn(config), build(config)
        block = params["image_tower"]["block_00"]
        found = model.apply(
            {"params": params}, x, method=lambda module, x: module.image_tower.blocks[0](x)
        )
        plain = build(MODELS["shared"]())
        rest = {key: part for key, part in block.items() if key != "mlp_adapter"}
        bare = {**params, "image_tower": {**params["image_tower"], "block_00": rest}}

        def parts(module: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            one = module.image_tower.blocks[0]
            out = one(x)
            h = one._enter("self_attention", x)
            middle = x + one.attend_self(h, None, None, None)
            return middle, out - middle

        middle, made = plain.apply({"params": bare}, x, method=parts)
        read, mlp = (made if kind == "serial" else middle), block["mlp_adapter"]
        hidden = np.maximum(read @ mlp["down"]["kernel"] + mlp["down"]["bias"][None, None], 0)
        added = 2.0 * (hidden @ mlp["up"]["kernel"] + mlp["up"]["bias"][None, None])
        np.testing.assert_allclose(found, middle + made + added, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_merged_updates_equal_those_beside(name: str) -> None:
    settings = {"rank": 2, "alpha": 6.0, "targets": ("query", "key", "value")}
    config = geometry(name, lora=settings, blocks="all")
    params, beside = drawn(config), compiled(build(config))
    merged = merge_lora(params, LoraConfig(**settings))
    assert not any(is_added(path) for path in by_path(merged))
    plain = compiled(build(MODELS[name]()))
    whole = plain({"params": merged})
    for one, other in zip(beside({"params": params}), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)
    without = plain(
        {"params": nested({p: x for p, x in by_path(params).items() if not is_added(p)})}
    )
    assert np.abs(np.asarray(without[0]) - whole[0]).max() > 1e-2
    with pytest.raises(ValueError, match="no low-rank updates"):
        merge_lora(merged, LoraConfig(**settings))


def meter(**tuning: Any) -> Encoder:
    """The base size with two streams at METER's resolution and vocabulary."""
    return build_model(tuned_size("co_attention_base", **tuning), 50_265, 4, 384)


def added_parameters(model: Encoder) -> int:
    [mlm] = build_objectives(ConfigDict({"mlm": {}}), model, VOCABULARY)
    spec = batch_spec(Bucket(40, 384), 1, FIELDS)
    shapes, _ = jax.eval_shape(lambda key: mlm.init(key, spec), jax.random.key(0))
    return sum(leaf.size for path, leaf in by_path(shapes).items() if is_added(path))


def macs(model: Encoder) -> float:
    return text_flops(model.config, 40, 1, joint=True) / 2


def test_figures_of_meter_from_shapes_alone() -> None:
    """Updated parameters and extra multiply-adds (fact sheet of PCETL, section 4)."""
    plain = macs(meter())
    adapter = {"kind": "serial", "width": 96}
    adapted = meter(adapter=adapter)
    assert added_parameters(adapted) == pytest.approx(5.34e6, abs=5e3)
    assert (macs(adapted) - plain) / 1e9 == pytest.approx(1.638, abs=1e-3)
    low = meter(lora={"rank": 4})
    assert added_parameters(low) == pytest.approx(0.29e6, abs=5e3)
    assert macs(low) == plain
    skip = tuple(f"fusion_tower/{side}_block_0{n}" for side in ("image", "text") for n in (1, 4))
    smaller = meter(adapter={**adapter, "norm": True}, skip=skip)
    assert added_parameters(smaller) == pytest.approx(5.38e6, abs=1e4)  # section 7: with norms
    assert (macs(smaller) - plain) / 1e9 == pytest.approx(-11.18, abs=0.02)
    scaled = {"kind": "parallel", "width": 96, "scale": 4.0, "norm": True}
    attentions = ("self_attention", "cross_attention")
    parallel = meter(adapter={**scaled, "branches": attentions})
    assert added_parameters(parallel) == pytest.approx(3.59e6, abs=1e4)
    assert (macs(parallel) - plain) / 1e9 == pytest.approx(1.10, abs=0.03)


def test_prompts_of_meter_and_vilt_from_shapes_alone() -> None:
    """Shallow ones cost what the fact sheet has (section 4), deep ones less; see ``three_towers``.

    0.30M parameters and 28.71G multiply-adds there, and 1.84M and 6.53G; ViLT's are 5.14G.
    """
    plain, length, width = macs(meter()), 200, 768
    shallow = meter(prompt={"kind": "shallow"})
    assert added_parameters(shallow) == 2 * length * width
    assert (macs(shallow) - plain) / 1e9 == pytest.approx(28.71, rel=2e-3)
    deep = meter(prompt={"kind": "deep"})
    assert added_parameters(deep) == 12 * length * width
    projected, read = prompt_flops(deep.config) / 2, macs(deep) - plain
    assert projected / 1e9 == pytest.approx(2.831, abs=1e-3)
    assert read / 1e9 == pytest.approx(1.137, abs=1e-3)
    # What would meet the table: queries of the prompts, and reading them in both attentions.
    assert (1.5 * projected + 2 * read) / 1e9 == pytest.approx(6.53, abs=0.01)

    tokens = 243  # at which ViLT's serial adapters of width 96 cost the 0.86G of the table
    assert 12 * 2 * tokens * 2 * width * 96 / 1e9 == pytest.approx(0.86, abs=0.005)
    size = tuned_size("vilt_base", prompt={"kind": "deep"})
    vilt = build_model(size, 30_522, 103, 384).config
    with_prompts = block_flops(vilt.text, tokens, tokens, block=vilt.stacks["image_tower"][0])
    read = 12 * (with_prompts - block_flops(vilt.text, tokens, tokens)) / 2
    projected = prompt_flops(vilt) / 2
    assert (projected + read) / 1e9 == pytest.approx(3.73, abs=0.005)
    assert (1.5 * projected + read) / 1e9 == pytest.approx(5.14, abs=0.005)


@pytest.mark.parametrize("name", MODELS)
def test_formulas_match_the_lowered_module(name: str) -> None:
    """With adapters beside what is kept, and others in the place of what is skipped."""
    config = small_geometry(name)
    stacks = build_model(config, 1000, 3, 144).config.stacks
    [*_, last] = stacks.values()
    config.tuning.skip = (last[0], f"{last[1]}/attention", f"{stacks['image_tower'][2]}/mlp")
    config.tuning.adapter.update(kind="serial", width=64)
    config.tuning.blocks = "all"
    one = small_vqa(config)
    assert lowered_flops(one, Bucket(48, 144)) == pytest.approx(one.flops(48), rel=0.04)


@pytest.mark.parametrize(
    ("tuning", "error", "message"),
    [
        (
            {"skip": ("text_upper_7",)},
            ConfigError,
            r"model\.tuning\.skip: 'text_upper_7' is no unit of this model\. .*text_upper_1",
        ),
        (
            {"skip": ("text_upper_0", "text_upper_0/mlp")},
            ConfigError,
            r"'text_upper_0/mlp' is named",
        ),
        ({"skip": ("text_upper_0", "text_upper_0")}, ConfigError, r"'text_upper_0' is named twice"),
        (
            {"skip": ("text_upper_0",), "gated": ("text_upper_0",)},
            ConfigError,
            r"model\.tuning\.gated: text_upper_0 are skipped",
        ),
        (
            {"blocks": "upper"},
            ConfigError,
            r"model\.tuning\.blocks: 'upper' matches no block .*text_upper_1",
        ),
        ({"blocks": "("}, ConfigError, r"model\.tuning\.blocks: '\('"),
        ({"adapter": {"kind": "both"}}, ValueError, r"adapter\.kind='both' is neither"),
        ({"adapter": {**ADAPTER, "width": -1}}, ValueError, r"adapter\.width=-1 must be 1"),
        ({"adapter": {**ADAPTER, "branches": ("ffn",)}}, ValueError, r"branches=\('ffn',\)"),
        ({"lora": {"rank": -2}}, ValueError, r"lora\.rank=-2 must be 1 or more"),
        (
            {"prompt": {"kind": "both"}},
            ValueError,
            r"model\.tuning\.prompt\.kind='both' is neither 'shallow' nor 'deep', nor ''",
        ),
        (
            {"prompt": {"kind": "deep", "length": 0}},
            ValueError,
            r"model\.tuning\.prompt\.length=0 must be 1 or more.*model\.tuning\.prompt\.kind=''",
        ),
        (
            {"prompt": {"kind": "shallow"}, "blocks": "text_upper_0"},
            ConfigError,
            r"model\.tuning\.blocks: 'text_upper_0' leaves out .*Use 'fusion' or 'all', or model",
        ),
        ({"lora": {"rank": 2, "targets": ("out",)}}, ValueError, r"targets=\('out',\)"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_bad_input(tuning: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(geometry("two_stacks", **tuning))


def test_a_config_may_have_the_section() -> None:
    config = default_config("shared_tiny")
    with config.unlocked():
        config.model.tuning = tuning_config()
    check_keys(config)
    with config.unlocked():
        config.model.tuning.width = 3
    with pytest.raises(ConfigError, match=r"model\.tuning\.width"):
        check_keys(config)


def test_a_unit_that_is_not_gated_cannot_be_switched() -> None:
    with pytest.raises(ValueError, match=r"'text_upper_0' is none of the gated units"):
        with_kept(base("two_stacks"), {"text_upper_0": 0.0})
