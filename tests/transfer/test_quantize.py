"""Weights in eight bits: how far they are off, what they take, and that models read them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_tuning import ADDED, gated, patterns
from tuned import MODELS, base, build, compiled, drawn, geometry

from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.tuning import LoraConfig
from vlp_jax.transfer.lora import merge_lora
from vlp_jax.transfer.quantize import LARGEST, dequantized, quantized, size_in_bytes
from vlp_jax.transfer.units import pruned

LORA = {"rank": 2, "alpha": 6.0, "targets": ("query", "key", "value")}


def scales(params):
    """By the path of their kernel."""
    leaves = by_path(params)
    eight = [path for path, leaf in leaves.items() if leaf.dtype == jnp.int8]
    return {path: leaves[f"{path.removesuffix('kernel')}scale"] for path in eight}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_off_by_half_a_scale_at_most(name):
    """Of each output channel: the largest weight of it is exact."""
    params = by_path(base(name))
    small = quantized(base(name))
    back = by_path(dequantized(small))
    assert set(back) == set(params)
    found = scales(small)
    for path, leaf in params.items():
        assert back[path].shape == leaf.shape
        if path not in found:
            np.testing.assert_array_equal(back[path], leaf)
            continue
        scale = np.asarray(found[path])
        entering = 2 if path.endswith("attention/out/kernel") else 1
        assert scale.shape == (1,) * entering + leaf.shape[entering:]
        error = np.abs(np.asarray(back[path]) - leaf)
        assert (error <= scale / 2 * (1 + 1e-5)).all(), path
        assert error.max() > 0
        np.testing.assert_allclose(
            np.abs(back[path]).max(axis=tuple(range(entering))),
            np.abs(leaf).max(axis=tuple(range(entering))),
            rtol=1e-6,
        )


@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_blocks_and_nothing_else(name):
    leaves = by_path(quantized(base(name)))
    eight = {path for path, leaf in leaves.items() if leaf.dtype == jnp.int8}
    block = re.compile(r"(block_\d+|text_(lower|upper)_\d+|reconstructor\w*_\d+)/")
    there = {path for path in by_path(base(name)) if path.endswith("/kernel")}
    assert eight == {path for path in there if block.search(path)}
    assert {path.split("/")[-2] for path in eight} == {"query", "key", "value", "out", "in"}


def test_weights_on_the_grid_are_exact():
    """And so are zeros, of which a channel has no scale."""
    draw = np.random.default_rng(0)
    whole = draw.integers(-LARGEST, LARGEST + 1, (8, 6)).astype(np.float32)
    whole[0], whole[:, 3] = LARGEST, 0
    kernel = whole * np.float32(2.0) ** draw.integers(-9, 0, 6)
    params = {"block_00": {"mlp": {"in": {"kernel": kernel, "bias": np.zeros(6, np.float32)}}}}
    small = quantized(params)
    np.testing.assert_array_equal(small["block_00"]["mlp"]["in"]["kernel"], whole.astype(np.int8))
    np.testing.assert_array_equal(dequantized(small)["block_00"]["mlp"]["in"]["kernel"], kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_them(name, dtype):
    """As it reads what they stand for; and almost as it reads what they were made of."""
    config = geometry(name)
    config.dtype = dtype
    # As large as what is trained: with weights of one, rounding is lost in saturated softmaxes.
    params = nested({p: x if x.ndim < 2 else 0.3 * x for p, x in by_path(base(name)).items()})
    small, run = quantized(params), compiled(build(config))
    found = run({"params": small})
    for one, other in zip(found, run({"params": dequantized(small)}), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)
    for one, other in zip(found, run({"params": params}), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        apart = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert 0 < apart < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_what_they_take(name):
    params = base(name)
    small = quantized(params)
    eight = scales(small)
    kernels = {path: leaf for path, leaf in by_path(params).items() if path in eight}
    numbers = sum(leaf.size for leaf in kernels.values())
    channels = sum(scale.size for scale in eight.values())
    assert size_in_bytes(kernels) == 4 * numbers
    assert size_in_bytes(params) - size_in_bytes(small) == 3 * numbers - 4 * channels
    # A channel of these models has 32 to 64 weights, of real ones hundreds.
    assert (numbers + 4 * channels) / (4 * numbers) < 0.29


@pytest.mark.parametrize("name", MODELS)
def test_after_units_were_skipped(name):
    """With adapters and prompts beside what is left, and adapters in the place of what is not."""
    skipped = patterns(name)[3]
    params, _ = gated(name, ("bidirectional",))
    small = quantized(pruned(params, skipped))
    names = {path.split("/")[-2] for path in scales(small)}
    assert {"down", "up"} <= names
    run = compiled(build(geometry(name, skip=skipped, replacement=2, **ADDED)))
    for one, other in zip(run({"params": small}), run({"params": dequantized(small)}), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)


def test_after_and_beside_low_rank_updates():
    """Beside them the updates stay float32."""
    config = geometry("shared", lora=LORA, blocks="all")
    params = drawn(config)
    beside, merged = quantized(params), quantized(merge_lora(params, LoraConfig(**LORA)))
    assert {leaf.dtype.name for p, leaf in by_path(beside).items() if "lora" in p} == {"float32"}
    for small, model in ((beside, build(config)), (merged, build(MODELS["shared"]()))):
        run = compiled(model)
        for one, other in zip(
            run({"params": small}), run({"params": dequantized(small)}), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)


def test_weights_are_stored_in_eight_bits_and_read_inside_the_program():
    run = compiled(build(MODELS["shared"]()))
    program = run.lower({"params": quantized(base("shared"))})
    entering = [leaf.dtype for leaf in jax.tree.leaves(program.in_avals)]
    assert entering.count(jnp.int8) == len(scales(quantized(base("shared"))))
    assert "i8" in program.as_text()


def test_bad_input():
    small = quantized(base("shared"))
    with pytest.raises(ValueError, match=r"kernel is in eight bits already"):
        quantized(small)
    with pytest.raises(ValueError, match=r"no kernel is in eight bits"):
        dequantized(base("shared"))
    with pytest.raises(ValueError, match=r"hold no block"):
        quantized({"head": {"kernel": np.ones((2, 2))}})
