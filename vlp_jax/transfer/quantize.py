"""Weights in eight bits, for inference: a quarter of the memory of what a model mostly consists of.

    params = quantized(params)      # the model reads them as it reads any
    model.apply({"params": params}, ...)

What is quantised are the kernels of the dense layers of blocks, wherever these are: queries, keys,
values and outputs of attentions, both layers of feed-forward parts, and both of adapters. What
enters the blocks and what reads them stays float32, and so does what is small: tables of tokens and
positions, patches, maps between towers, norms, biases, heads, and low-rank updates, which
``merge_lora`` puts into the kernels before.

Symmetric, with a scale for each output channel: ``kernel`` int8 in [-127, 127], and beside it
``scale`` float32, so that their product is the weight, off by half a scale at most. The layers
(``models.dense``) multiply the two inside the compiled program, where they read them. Activations
stay in the compute dtype, and nothing is calibrated.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.dense import SCALE, scaled_kernel

LARGEST = 127
_OUTPUTS = r"(self_attention|cross_attention)/out/kernel$"  # [H, d, D]: two dimensions enter
_KERNELS = re.compile(
    r"(^|/)((self_attention|cross_attention)/(query|key|value|out)|mlp/(in|out)"
    r"|(\w+_adapter|(\w+_)?replacement)/(down|up))/kernel$"
)


def quantized(params: Any) -> dict[str, Any]:
    """The parameters with the kernels of blocks in eight bits.

    Args:
        params: float tree of a model, or of a part of it.

    Raises:
        ValueError: no block is in the tree, or its kernels are in eight bits already.
    """
    leaves = by_path(params)
    paths = [path for path in leaves if _KERNELS.search(path)]
    if not paths:
        raise ValueError("there is nothing to quantise: the parameters hold no block")
    for path in paths:
        if leaves[path].dtype == jnp.int8:
            raise ValueError(f"{path} is in eight bits already; give float parameters")
        leaves[path], leaves[_scale_of(path)] = _quantized(path, leaves[path])
    return nested(leaves)


def dequantized(params: Any) -> dict[str, Any]:
    """The float32 parameters that those in eight bits stand for.

    Args:
        params: of ``quantized``.

    Raises:
        ValueError: nothing is in eight bits.
    """
    leaves = by_path(params)
    paths = [path for path in leaves if _KERNELS.search(path) and leaves[path].dtype == jnp.int8]
    if not paths:
        raise ValueError("no kernel is in eight bits; give what `quantized` has made")
    for path in paths:
        leaves[path] = scaled_kernel(leaves[path], leaves.pop(_scale_of(path)))
    return nested(leaves)


def size_in_bytes(params: Any) -> int:
    """What the leaves of a tree take in memory."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _scale_of(path: str) -> str:
    return f"{path.removesuffix('kernel')}{SCALE}"


def _quantized(path: str, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A kernel [in..., out...] as int8, and its scale, float32 [1..., out...]."""
    kernel = jnp.asarray(kernel, jnp.float32)
    entering = (0, 1) if re.search(_OUTPUTS, path) else (0,)
    most = jnp.abs(kernel).max(axis=entering, keepdims=True)
    scale = jnp.where(most > 0, most / LARGEST, 1.0)  # a channel of zeros stays one
    rounded = jnp.clip(jnp.round(kernel / scale), -LARGEST, LARGEST)
    return rounded.astype(jnp.int8), scale
