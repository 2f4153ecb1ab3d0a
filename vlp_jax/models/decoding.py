"""The forward stream of a model, one token at a time.

The forward stream is plainly causal: row i sees the tokens j <= i and the image. What a token hands
on to those after it are its keys and values in every block, so that a text grows by running its
last token alone through the blocks that texts pass. What the blocks read of the image, which sees
no text, is computed once, and shared by all texts that grow on it.

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
from vlp_jax.models.encoder import Encoder, EncoderConfig
from vlp_jax.models.flops import beside_flops, read_flops, stack_flops, vocabulary_flops
from vlp_jax.models.layers import Memory
from vlp_jax.models.shared import SharedConfig
from vlp_jax.models.three_towers import ThreeTowersConfig
from vlp_jax.models.vision_language import VisionLanguageConfig

Params = Mapping[str, Any]

TextCache = tuple[Memory, ...]  # [B, K, H, T, d], one for each block that texts pass
ImageMemory = tuple[Memory, ...]  # [B, H, I, d], one for each of those that read the image


def cast_kernels(model: Encoder, params: Params) -> Params:
    """Parameters with the kernels of all products in the compute dtype.

    The layers cast them at every use; in a loop over tokens that would be at every token. What is
    computed stays the same, bit for bit. Those in eight bits stay as they are, for they are what
    it takes least to read.
    """
    dtype = model.config.text.dtype

    def cast(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        is_kernel = path[-1].key in ("kernel", "decoder_kernel")
        return leaf.astype(dtype) if is_kernel and leaf.dtype != jnp.int8 else leaf

    result: Params = jax.tree_util.tree_map_with_path(cast, params)
    return result


def encode_image(model: Encoder, params: Params, pixels: jax.Array) -> jax.Array:
    """Image tokens: normalised pixels [B, S, S, 3] -> [B, I, D]."""
    return _run(model, params, lambda module: module.encode_image(pixels))


def project_image(model: Encoder, params: Params, image: jax.Array) -> ImageMemory:
    """Keys and values of the image in every block whose texts read it.

    Args:
        model: the model.
        params: its parameters.
        image: [B, I, D] from ``encode_image``.
    """
    return _run(model, params, lambda module: module.project_image(image))


def empty_cache(config: EncoderConfig, batch: int, beams: int, tokens: int) -> TextCache:
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

    def zeros(block: str) -> jax.Array:
        heads = text.tuning.heads_at(block, text.heads)
        shape = (batch, beams, heads, tokens, text.head_width)
        return constrain_batch(jnp.zeros(shape, text.dtype))

    # Texts pass the last stacks of a model, in their order.
    blocks = [block for stack in config.stacks.values() for block in stack][-config.text_blocks :]
    return tuple(Memory(zeros(block), zeros(block)) for block in blocks)


def decode_token(
    model: Encoder,
    params: Params,
    ids: jax.Array,
    position: jax.Array,
    cache: TextCache,
    memory: ImageMemory,
) -> tuple[jax.Array, TextCache]:
    """Run the last token of every text through the forward stream.

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

    def run(module: Encoder) -> tuple[jax.Array, TextCache]:
        last, grown = module.decode(ids, position, cache, memory)
        return module.vocabulary_logits(last), grown

    return _run(model, params, run)


def _run(model: Encoder, params: Params, stage: Callable[[Encoder], Any]) -> Any:
    return model.apply({"params": params}, method=stage)


def project_image_flops(config: EncoderConfig) -> float:
    """FLOPs of ``project_image`` for one image, without ``flops.prompt_flops``."""
    text = config.text
    tokens = config.image.tokens + text.tuning.shallow_prompts
    if isinstance(config, VisionLanguageConfig):
        return read_flops(text, config.stacks["text_upper"], tokens)
    if isinstance(config, ThreeTowersConfig):
        entering = 2.0 * config.image.tokens * text.width**2
        return entering + beside_flops(text, config.stacks["fusion_tower"], tokens)
    return beside_flops(text, config.stacks["image_tower"], tokens)


def decode_token_flops(config: EncoderConfig, tokens: int, beams: int = 1) -> float:
    """FLOPs of ``decode_token`` for one image, without ``flops.prompt_flops``.

    Args:
        config: of the model.
        tokens: T, room of the cache; its empty places are multiplied like any other.
        beams: K.
    """
    text = config.text
    image = config.image.tokens + text.tuning.shallow_prompts
    entering = 2.0 * beams * text.width**2
    words = vocabulary_flops(config, beams)
    if isinstance(config, SharedConfig):
        return stack_flops(text, config.stacks["image_tower"], beams, image + tokens) + words
    if isinstance(config, ThreeTowersConfig):
        fusion = stack_flops(text, config.stacks["fusion_tower"], beams, image + tokens)
        lower = stack_flops(text, config.stacks["text_tower"], beams, tokens)
        return lower + entering + fusion + words
    assert isinstance(config, VisionLanguageConfig)
    lower = stack_flops(text, config.stacks["text_lower"], beams, tokens)
    upper = stack_flops(text, config.stacks["text_upper"], beams, tokens, image)
    return lower + entering + upper - project_image_flops(config) + words
