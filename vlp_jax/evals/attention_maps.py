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
from vlp_jax.models.tuning import Part, kept_name
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


def text_over_image(
    model: Encoder, params: Any, weights: Mapping[str, Any], texts: tuple[int, int, int]
) -> jax.Array:
    """How much each token of a text has read of each token of its image.

    Where blocks read the image by cross-attention, by the last of them. Where they read both as one
    sequence, or the image beside the text, by the rollout of all that do. What is skipped, or
    switched off, reads nothing.

    Args:
        model: whose pass it was, of texts with their image.
        params: of the model, for its switches (``models.block``).
        weights: what the pass has sown.
        texts: B, S, N: examples, streams of each and tokens of a stream.

    Returns:
        float32 [B, S * N, I], the streams of an example one after the other, as the keys of a
        reconstructor are.
    """
    image, prompts = model.config.image.tokens, model.config.text.tuning.shallow_prompts
    examples, streams, tokens = texts
    nothing = jnp.zeros((examples, streams * tokens, image))
    if isinstance(model, VisionLanguageModel):
        return _last_reading(model, params, weights, "text_upper", nothing)
    if isinstance(model, ThreeTowers) and model.config.co_attention:
        shape = (examples * streams, prompts + tokens, image)
        read = _last_reading(model, params, weights, "fusion_text", jnp.zeros(shape))
        return read[:, prompts:].reshape(nothing.shape)
    stack = "fusion_tower" if isinstance(model, ThreeTowers) else "image_tower"
    beside = image + prompts
    layers = [
        _where_on(params, block, _joint(layer, beside))
        for block, layer in _self_attentions(model, weights, stack)
    ]
    if not layers:
        return nothing
    reach = attention_rollout(layers)
    return reach[..., beside : beside + tokens, :image].reshape(nothing.shape)


def patches_over_image(model: Encoder, params: Any, weights: Mapping[str, Any]) -> jax.Array:
    """How much of each token of an image is in each that texts read: float32 [B, I, I], or [I, I].

    Args:
        model: whose pass it was.
        params: of the model, for its switches (``models.block``).
        weights: what the pass has sown.
    """
    alone = jnp.eye(model.config.image.tokens)
    if isinstance(model, SharedModel):  # texts read patches that have met no block
        return alone
    layers = [
        _where_on(params, block, _over_heads(layer))
        for block, [layer] in _self_attentions(model, weights, "image_tower")
    ]
    return attention_rollout(layers) if layers else alone


def query_over_text(model: Encoder, weights: Mapping[str, Any]) -> jax.Array:
    """What the last block of a reconstructor reads: float32 [B, Q, S * N].

    Args:
        model: whose pass it was.
        weights: what the pass has sown.
    """
    halves = isinstance(model, VisionLanguageModel)
    stack = "reconstructor_upper" if halves else "reconstructor"
    blocks = [name for name in weights if name.startswith(stack)]
    last = max(blocks, key=lambda name: int(name.rpartition("_")[2]))
    [read] = _sown(weights, last, "cross_attention")
    return _over_heads(_without_prompts(model, last, read))


def _last_reading(
    model: Encoder, params: Any, weights: Mapping[str, Any], stack: str, nothing: jax.Array
) -> jax.Array:
    """The last cross-attention of a stack, a mean over heads, of what a text reads of its image.

    Float32 [B, Q, I], as ``nothing`` is, which it comes to where no block reads the image.
    """
    found = nothing
    for block in model.config.stacks[stack]:
        for sown in _sown(weights, block, "cross_attention"):
            read = _over_heads(_without_prompts(model, block, sown))
            found = jnp.where(_is_on(params, block), read[..., : nothing.shape[-1]], found)
    return found


def _self_attentions(
    model: Encoder, weights: Mapping[str, Any], stack: str
) -> list[tuple[str, tuple[jax.Array, ...]]]:
    """The blocks of a stack whose self-attention is there, in their order, and what it has sown."""
    return [
        (block, tuple(_without_prompts(model, block, one) for one in sown))
        for block in model.config.stacks.get(stack, ())
        if (sown := _sown(weights, block, "self_attention"))
    ]


def _sown(weights: Mapping[str, Any], block: str, attention: str) -> tuple[jax.Array, ...]:
    """What an attention of a block has sown; nothing where it is skipped."""
    inside: Any = weights
    for key in (*block.split("/"), attention, "weights"):
        inside = inside.get(key, {})
    return tuple(inside)


def _where_on(params: Any, block: str, layer: jax.Array) -> jax.Array:
    """Attention [..., T, T] of a block; where it is switched off, of tokens to themselves."""
    return jnp.where(_is_on(params, block), layer, jnp.eye(layer.shape[-1]))


def _is_on(params: Any, block: str) -> jax.Array:
    """Whether nothing stands in the place of a block's attention, or of all of it: bool []."""
    inside = params
    for key in block.split("/"):
        inside = inside[key]
    parts: tuple[Part, ...] = ("block", "attention")
    switches = [inside[kept_name(part)] for part in parts if kept_name(part) in inside]
    return jnp.all(jnp.array(switches) > 0)


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
