"""The forward stream of a model, one token at a time.

The forward stream is plainly causal: row i sees the tokens j <= i and the image. What a token hands
on to those after it are its keys and values in every block, so that a text grows by running its
last token alone through the text stack. The keys and values of the image are computed once, and
shared by all texts that grow on it.

    image = encode_image(model, params, pixels)
    memory = project_image(model, params, image)
    cache = empty_cache(model.config, batch, beams, tokens)
    logits, cache = decode_token(model, params, ids, position, cache, memory)

Functions of arrays, to be called inside a jitted one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.infra.sharding import constrain_batch
from vlp_jax.models.flops import block_flops, vocabulary_flops
from vlp_jax.models.layers import Memory
from vlp_jax.models.vision_language import (
    STREAM_TYPES,
    VisionLanguageConfig,
    VisionLanguageModel,
)

Params = Mapping[str, Any]

TextCache = tuple[Memory, ...]  # [B, K, H, T, d], one for each block of the text stack
ImageMemory = tuple[Memory, ...]  # [B, H, I, d], one for each block of its upper half


def cast_kernels(model: VisionLanguageModel, params: Params) -> Params:
    """Parameters with the kernels of all products in the compute dtype.

    The layers cast them at every use; in a loop over tokens that would be at every token. What is
    computed stays the same, bit for bit.
    """
    dtype = model.config.text.dtype

    def cast(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        is_kernel = path[-1].key in ("kernel", "decoder_kernel")
        return leaf.astype(dtype) if is_kernel else leaf

    result: Params = jax.tree_util.tree_map_with_path(cast, params)
    return result


def encode_image(model: VisionLanguageModel, params: Params, pixels: jax.Array) -> jax.Array:
    """Image tokens: normalised pixels [B, S, S, 3] -> [B, I, D]."""
    return _run(model, params, lambda module: module.encode_image(pixels))


def project_image(model: VisionLanguageModel, params: Params, image: jax.Array) -> ImageMemory:
    """Keys and values of the image in every block that reads it.

    Args:
        model: the model.
        params: its parameters.
        image: [B, I, D] from ``encode_image``.
    """
    return _run(
        model,
        params,
        lambda module: tuple(
            Memory.of(block.project_context(image)) for block in module.text_upper
        ),
    )


def empty_cache(config: VisionLanguageConfig, batch: int, beams: int, tokens: int) -> TextCache:
    """Room for the keys and values of texts that are to grow.

    Args:
        config: of the model.
        batch: B, images.
        beams: K, texts of an image.
        tokens: T, most tokens of a text, at most ``config.max_positions``.

    Raises:
        ValueError: T is more than the model has positions for.
    """
    if tokens > config.max_positions:
        raise ValueError(
            f"texts of {tokens} tokens do not fit model.text.max_positions={config.max_positions}; "
            "decode fewer tokens"
        )
    text = config.text
    shape = (batch, beams, text.heads, tokens, text.width // text.heads)

    def zeros() -> jax.Array:
        return constrain_batch(jnp.zeros(shape, text.dtype))

    blocks = config.lower_depth + config.upper_depth
    return tuple(Memory(zeros(), zeros()) for _ in range(blocks))


def decode_token(
    model: VisionLanguageModel,
    params: Params,
    ids: jax.Array,
    position: jax.Array,
    cache: TextCache,
    memory: ImageMemory,
) -> tuple[jax.Array, TextCache]:
    """Run the last token of every text through the text stack.

    Args:
        model: the model.
        params: its parameters.
        ids: int32 [B, K], the token of every text at ``position``.
        position: int32 [], the same for all.
        cache: keys and values of the tokens before it.
        memory: of ``project_image``, shared by the K texts of an image.

    Returns:
        float32 logits [B, K, V] of the token after it, V the padded vocabulary, and the cache with
        this token in its place.
    """

    def run(module: VisionLanguageModel) -> tuple[jax.Array, TextCache]:
        positions = jnp.broadcast_to(position, ids.shape[1:])
        x = module.text_embedding(ids, positions)[:, :, None]
        new = []
        lower = len(module.text_lower)
        for block, past in zip(module.text_lower, cache[:lower], strict=True):
            x, past = block.decode(x, position, past)
            new.append(past)
        x = module.text_projection(x)
        kind = module.type_embedding[STREAM_TYPES["forward"]].astype(x.dtype)
        x = x + kind[None, None, None]
        for block, past, image in zip(module.text_upper, cache[lower:], memory, strict=True):
            x, past = block.decode(x, position, past, image)
            new.append(past)
        last = module.text_norm(x) if module.config.text.norm == "pre" else x
        return module.vocabulary_logits(last[:, :, 0]), tuple(new)

    return _run(model, params, run)


def _run(
    model: VisionLanguageModel, params: Params, stage: Callable[[VisionLanguageModel], Any]
) -> Any:
    return model.apply({"params": params}, method=stage)


def project_image_flops(config: VisionLanguageConfig) -> float:
    """FLOPs of ``project_image`` for one image."""
    return config.upper_depth * 4.0 * config.image.tokens * config.text.width**2


def decode_token_flops(config: VisionLanguageConfig, tokens: int, beams: int = 1) -> float:
    """FLOPs of ``decode_token`` for one image.

    Args:
        config: of the model.
        tokens: T, room of the cache; its empty places are multiplied like any other.
        beams: K.
    """
    text = config.text
    return (
        config.lower_depth * block_flops(text, beams, tokens)
        + 2.0 * beams * text.width**2
        + config.upper_depth * block_flops(text, beams, tokens, config.image.tokens)
        - project_image_flops(config)
        + vocabulary_flops(config, beams)
    )
