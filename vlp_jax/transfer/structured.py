"""Structured pruning: the heads and channels that matter least are cut out of blocks.

    found = importance(params, gradients)        # of one batch; add up those of several
    smaller = prune(params, model.config, found)  # of the model with config.model.tuning.prune set

What is left is a smaller model, not a masked one (``models.tuning.PruneConfig``). All blocks lose
the same share, so that importance is compared within an attention or a feed-forward part only.

Importance is the first-order estimate of what a loss changes by without a group of weights, the sum
of |w dL/dw| over the group (Michel et al., arXiv 1905.10650, of heads; Molchanov et al., arXiv
1906.10771, of channels), or without data the L2 norm of its weights. The group of a head is what
its queries, keys and values are made by, low-rank updates included, and what the output makes of
it; that of a channel is what it is made by and what is made of it.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.encoder import EncoderConfig
from vlp_jax.models.tuning_config import block_config

_HEADS = re.compile(
    r"^(?P<branch>(?P<block>.+)/(self_attention|cross_attention))/"
    r"(?P<layer>query|key|value|out)/(?P<leaf>kernel|bias|lora_up)$"
)
_CHANNELS = re.compile(r"^(?P<branch>(?P<block>.+)/mlp)/(?P<layer>in|out)/(?P<leaf>kernel|bias)$")


def importance(params: Any, gradients: Any = None) -> dict[str, jax.Array]:
    """How much the heads and channels of every block matter.

    Args:
        params: float tree of a model, or of a part of it.
        gradients: of a loss by all of these; None: the L2 norm of weights is taken.

    Returns:
        Path of a branch (``BLOCK/self_attention``, ``BLOCK/cross_attention``, ``BLOCK/mlp``) ->
        float32 [H] of its heads or [C] of its channels. Of gradients of several batches, the sum of
        what this gives for each of them is meant: what matters in one way to one batch and in
        another to the next is important.

    Raises:
        ValueError: there is no block, or a weight has no gradient.
    """
    leaves, slopes = by_path(params), None if gradients is None else by_path(gradients)
    sums: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        group = _group(path)
        if group is None:
            continue
        if slopes is not None and path not in slopes:
            raise ValueError(f"{path} has no gradient; take it with nothing frozen")
        weights = jnp.asarray(leaf, jnp.float32)
        parts = weights**2 if slopes is None else jnp.abs(weights * slopes[path])
        parts, axis = _apart(path, parts, leaves)
        others = tuple(i for i in range(parts.ndim) if i != axis)
        sums[group["branch"]] = sums.get(group["branch"], 0.0) + parts.sum(axis=others)
    if not sums:
        raise ValueError("there is nothing to prune: the parameters hold no block")
    return sums if slopes is not None else {name: jnp.sqrt(total) for name, total in sums.items()}


def prune(params: Any, config: EncoderConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the smaller model, out of those of a larger one.

    Args:
        params: of a model with the heads and channels of ``config`` or more; adapters and low-rank
            updates may be beside them.
        config: of the smaller model, whose ``tuning.prune`` says how many are left in which blocks.
        found: of ``importance``, for these blocks. Of equals the first stay.

    Raises:
        ConfigError: the config cuts nothing, or fewer are there than it leaves.
        ValueError: a branch has no importance, or one that is not finite, or weights are in eight
            bits.
    """
    tuning = config.text.tuning
    if tuning.prune is None:
        raise ConfigError("model.tuning.prune", "nothing is to be cut", "Give heads or mlp above 0")
    leaves = by_path(params)
    smaller = dict(leaves)
    for path, leaf in leaves.items():
        group = _group(path)
        if group is None or group["block"] not in tuning.prune.blocks:
            continue
        if leaf.dtype == jnp.int8:
            raise ValueError(f"{path} is in eight bits; prune first and quantise then")
        branch, block = group["branch"], group["block"]
        if branch not in found:
            raise ValueError(f"{branch} has no importance; measure it with these parameters")
        apart, axis = _apart(path, leaf, leaves)
        kept = _kept(np.asarray(found[branch]), _left(config, block, branch), branch)
        small = apart.take(kept, axis=axis)
        smaller[path] = small.reshape(len(small), -1) if group["leaf"] == "lora_up" else small
    return nested(smaller)


def _left(config: EncoderConfig, block: str, branch: str) -> int:
    """Heads or channels that a branch of a block is to have."""
    stack = block_config(config, block)
    if branch.endswith("/mlp"):
        return stack.tuning.channels_at(block, stack.mlp_width)
    return stack.tuning.heads_at(block, stack.heads)


def _kept(scores: np.ndarray, left: int, branch: str) -> np.ndarray:
    """Which stay, in their order: int [left] of float [H or C]."""
    if len(scores) < left:
        raise ConfigError(
            "model.tuning.prune",
            f"{branch} has {len(scores)} and is to have {left}: shares are those of a whole model",
            "Give as much as it was pruned by before, or more",
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"the importance of {branch} is not finite; give other batches")
    return np.sort(np.argsort(-scores, kind="stable")[:left])


def _group(path: str) -> re.Match[str] | None:
    """Of a leaf that is cut with heads or channels: its block, branch, layer and name."""
    match = _HEADS.match(path) or _CHANNELS.match(path)
    # What an output adds belongs to no group.
    return None if match is None or (match["layer"], match["leaf"]) == ("out", "bias") else match


def _apart(path: str, leaf: Any, leaves: Mapping[str, Any]) -> tuple[Any, int]:
    """A leaf with a dimension of heads or channels, and which one that is."""
    group = _group(path)
    assert group is not None
    if group["leaf"] == "lora_up":  # [r, H * d]
        heads = leaves[f"{group['branch']}/{group['layer']}/bias"].shape
        return leaf.reshape(len(leaf), *heads), 1
    return leaf, 0 if group["layer"] == "out" or group["leaf"] == "bias" else 1
