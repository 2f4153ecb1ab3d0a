"""Attention weights that a forward pass has sown, as maps over image tokens.

What tokens read of a model's prompts (``models.tuning``) is in no map: rows are short of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.models.encoder import Encoder
from vlp_jax.models.shared import SharedModel
from vlp_jax.models.three_towers import ThreeTowers
from vlp_jax.models.vision_language import VisionLanguageModel


def attention_rollout(weights: Sequence[jax.Array]) -> jax.Array:
    """How much of each input token reaches each output token.

    Args:
        weights: attention of every layer from the first on, a mean over heads, [..., T, T] each.

    Returns:
        float32 [..., T, T]; rows sum to 1 where those of all layers do.
    """
    rollout = jnp.broadcast_to(jnp.eye(weights[0].shape[-1]), weights[0].shape)
    for layer in weights:
        rollout = 0.5 * (layer @ rollout + rollout)
    return rollout


def text_over_image(model: Encoder, weights: Mapping[str, Any], tokens: int) -> jax.Array:
    """How much each token of a text has read of each token of its image.

    Where blocks read the image by cross-attention, by the last of them. Where they read both as one
    sequence, or the image beside the text, by the rollout of all that do.

    Args:
        model: whose pass it was, of texts with their image.
        weights: what the pass has sown.
        tokens: N, of a text.

    Returns:
        float32 [B, S * N, I], the streams of an example one after the other, as the keys of a
        reconstructor are.
    """
    image, prompts = model.config.image.tokens, model.config.text.tuning.shallow_prompts
    if isinstance(model, VisionLanguageModel):
        return _last_attention(model, weights, "text_upper")[..., :image]
    if isinstance(model, ThreeTowers) and model.config.co_attention:
        read = _last_attention(model, weights, "fusion_tower/text_block")[:, prompts:, :image]
        return read.reshape(len(jax.tree.leaves(weights["image_tower"])[0]), -1, image)
    stack = "fusion_tower" if isinstance(model, ThreeTowers) else "image_tower"
    beside = image + prompts
    reach = attention_rollout(
        [_joint(layer, beside) for layer in _self_attentions(model, weights, stack)]
    )
    reach = reach[..., beside : beside + tokens, :image]
    return reach.reshape(len(reach), -1, image)


def patches_over_image(model: Encoder, weights: Mapping[str, Any]) -> jax.Array:
    """How much of each token of an image is in each that texts read: float32 [B, I, I], or [I, I].

    Args:
        model: whose pass it was.
        weights: what the pass has sown.
    """
    if isinstance(model, SharedModel):  # texts read patches that have met no block
        return jnp.eye(model.config.image.tokens)
    return attention_rollout(
        [_over_heads(sown) for [sown] in _self_attentions(model, weights, "image_tower")]
    )


def query_over_text(model: Encoder, weights: Mapping[str, Any]) -> jax.Array:
    """What the last block of a reconstructor reads: float32 [B, Q, S * N].

    Args:
        model: whose pass it was.
        weights: what the pass has sown.
    """
    halves = isinstance(model, VisionLanguageModel)
    return _last_attention(model, weights, "reconstructor_upper" if halves else "reconstructor")


def _last_attention(model: Encoder, weights: Mapping[str, Any], stack: str) -> jax.Array:
    """The last cross-attention of a stack of blocks, a mean over heads: float32 [B, Q, K]."""
    tower, _, stack = stack.rpartition("/")
    sown = weights[tower] if tower else weights
    blocks = [name for name in sown if name.startswith(stack)]
    last = max(blocks, key=lambda name: int(name.rpartition("_")[2]))
    [read] = sown[last]["cross_attention"]["weights"]
    return _over_heads(_without_prompts(model, f"{tower}/{last}".removeprefix("/"), read))


def _self_attentions(
    model: Encoder, weights: Mapping[str, Any], tower: str
) -> list[tuple[jax.Array, ...]]:
    """What the blocks of a tower have sown, in their order."""
    names = [name for name in sorted(weights[tower]) if name.startswith("block_")]
    return [
        tuple(
            _without_prompts(model, f"{tower}/{name}", sown)
            for sown in weights[tower][name]["self_attention"]["weights"]
        )
        for name in names
    ]


def _without_prompts(model: Encoder, block: str, weights: jax.Array) -> jax.Array:
    """What is read of all but the prompts of a block, which come first: [..., Q, P + K]."""
    return weights[..., model.config.text.tuning.prompts_at(block) :]


def _joint(sown: Sequence[jax.Array], image: int) -> jax.Array:
    """Weights of a block over an image and a text as one sequence: float32 [B, S, T, T].

    Args:
        sown: by both as one sequence, [B, S, H, T, T]; or by a text that reads the image beside
            itself, [B, S, H, N, I + N], and by the image, [B, H, I, I], unless nobody reads what
            the block makes of it.
        image: I, tokens of the image.
    """
    text = _over_heads(sown[0])
    if text.shape[-2] == text.shape[-1]:
        return text
    own = _over_heads(sown[1]) if len(sown) > 1 else jnp.eye(image)[None]
    own = jnp.broadcast_to(own[:, None], (*text.shape[:2], image, image))
    above = jnp.pad(own, ((0, 0), (0, 0), (0, 0), (0, text.shape[-2])))
    return jnp.concatenate([above, text], axis=-2)


def _over_heads(weights: jax.Array) -> jax.Array:
    """[..., H, Q, K] -> float32 [..., Q, K]."""
    return weights.astype(jnp.float32).mean(axis=-3)
