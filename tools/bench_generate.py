"""Measure what the key-value cache pays in captioning, on the machine at hand, without any data.

    python -m tools.bench_generate --config=configs/flm_base.py --batch=2048 [--max_length=24]

prints one JSON line. Captions are written greedily in two ways: with the cache, as
``vlp_jax.transfer.generate`` does, and by encoding the prefix again for every token, as one does
without it. The image is encoded once in both, and both run the vocabulary head on the last row
alone. Prefixes are padded to multiples of ``--prefix_multiple`` (1: not at all), each length a
program of its own; compile time is left out. Parameters and pixels are random, and no caption ends
before ``--max_length`` tokens.

``speedup`` is the ratio of seconds for whole captions, image included, ``flop_ratio`` that of the
FLOPs that both execute, by formula, and ``share`` the part of it that is reached. ``decoding``
holds the same figures without the image tower. ``same_tokens`` is the share of tokens in which
both agree (in bf16, near-ties can fall either way).
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from vlp_jax.data.augment import normalize
from vlp_jax.infra.command import bad_input, check_length, parse_flags
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.hardware import device_facts
from vlp_jax.models.decoding import (
    Params,
    cast_kernels,
    decode_token_flops,
    encode_image,
    project_image_flops,
)
from vlp_jax.models.flops import text_flops, tower_flops, vocabulary_flops
from vlp_jax.models.masks import forward_mask
from vlp_jax.models.sizes import build_model
from vlp_jax.models.vision_language import (
    VisionLanguageConfig,
    VisionLanguageModel,
    two_stacks,
)
from vlp_jax.transfer.generate import Search, greedy_search

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration to measure")
_BATCH = flags.DEFINE_integer("batch", 2048, "images captioned at a time", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 24, "tokens of a caption", lower_bound=3)
_PREFIX_MULTIPLE = flags.DEFINE_integer(
    "prefix_multiple", 4, "what the lengths of re-encoded prefixes are multiples of", lower_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed repeats", lower_bound=1)

# Any ids will do: the model is random.
BOS, PAD, EOS, MASK = 0, 1, 2, 4


def bench_generate(
    config: Any, batch: int, max_length: int, prefix_multiple: int, repeats: int
) -> dict[str, Any]:
    """Time captions with and without the cache on one device.

    Args:
        config: a run's config; its model, image size and vocabulary count.
        batch: images at a time.
        max_length: tokens of every caption, ``<s>`` and ``</s>`` included.
        prefix_multiple: lengths of re-encoded prefixes are multiples of it.
        repeats: timed repeats; medians are reported.

    Returns:
        The figures, ready for JSON.

    Raises:
        ValueError: ``max_length`` is beyond the positions of the model, or a key does not fit.
    """
    check_length("max_length", max_length, config.model.text.max_positions)
    size = config.data.image_size
    model = two_stacks(
        build_model(config.model, config.tokenizer.vocab_size, MASK, size), "generating"
    )
    pixels = np.random.default_rng(config.seed).integers(
        0, 256, (batch, size, size, 3), dtype=np.uint8
    )
    params = jax.jit(functools.partial(_init, model))(jax.random.key(config.seed), pixels[:1])
    # All captions are as long as can be: the search may end at the last place alone.
    search = Search(BOS, EOS, PAD, (BOS, PAD, MASK), max_length, min_length=max_length)

    encode = jax.jit(lambda params, pixels: encode_image(model, params, normalize(pixels)))
    with_cache = jax.jit(lambda params, image: greedy_search(model, params, image, search).ids)
    next_token = jax.jit(functools.partial(_next_token, model, search))
    prefixes = prefix_lengths(max_length, prefix_multiple)

    def without_cache(params: Params, image: jax.Array) -> jax.Array:
        ids = jnp.full((batch, max_length), PAD, jnp.int32).at[:, 0].set(BOS)
        for position, prefix in enumerate(prefixes):
            ids = next_token(params, ids, image, position, jnp.arange(prefix))
        return ids

    pixels = jax.device_put(pixels)
    image = encode(params, pixels)
    seconds = {
        "encode": _seconds(lambda: encode(params, pixels), repeats),
        "cached": _seconds(lambda: with_cache(params, image), repeats),
        "uncached": _seconds(lambda: without_cache(params, image), repeats),
    }
    same = with_cache(params, image)[:, 0] == without_cache(params, image)
    flops = {
        "encode": tower_flops(model.config.image) + _image_projection_flops(model.config),
        "cached": cached_flops(model.config, max_length),
        "uncached": uncached_flops(model.config, prefixes),
    }
    figures = _figures(seconds, flops, with_image=True)
    return {
        **figures,
        "captions_per_second": round(batch / figures["cached_seconds"], 1),
        "encode_seconds": round(seconds["encode"], 6),
        "decoding": _figures(seconds, flops, with_image=False),
        "flops_per_caption": {name: round(count) for name, count in flops.items()},
        "same_tokens": round(float(same.mean()), 4),
        "batch": batch,
        "max_length": max_length,
        "prefix_multiple": prefix_multiple,
        "config": config.name,
        **device_facts(),
    }


def prefix_lengths(max_length: int, multiple: int) -> list[int]:
    """Tokens that are encoded again for each token of a caption after the first."""
    return [min(-(-known // multiple) * multiple, max_length) for known in range(1, max_length)]


def cached_flops(config: VisionLanguageConfig, max_length: int) -> float:
    """FLOPs of a caption from an encoded image, with the cache."""
    steps = (max_length - 1) * decode_token_flops(config, max_length)
    return project_image_flops(config) + steps


def uncached_flops(config: VisionLanguageConfig, prefixes: Sequence[int]) -> float:
    """FLOPs of a caption from an encoded image, from prefixes that are encoded again."""
    again = sum(
        text_flops(config, prefix, streams=1) + vocabulary_flops(config, 1) for prefix in prefixes
    )
    return again - len(prefixes) * _image_projection_flops(config)  # made once, with the image


def _image_projection_flops(config: VisionLanguageConfig) -> float:
    return 2.0 * config.image.tokens * config.image.width * config.text.width


def _init(model: VisionLanguageModel, key: jax.Array, pixels: jax.Array) -> Params:
    """Parameters of the stages that write captions."""

    def stages(module: VisionLanguageModel) -> jax.Array:
        return _last_row(
            module, jnp.zeros((1, 2), jnp.int32), module.encode_image(normalize(pixels)), 1
        )

    return cast_kernels(model, model.init(key, method=stages)["params"])


def _last_row(
    module: VisionLanguageModel, ids: jax.Array, image: jax.Array, position: int | jax.Array
) -> jax.Array:
    """Logits [B, V] after the token at ``position``, by encoding the whole text."""
    rows, tokens = ids.shape
    mask = forward_mask(jnp.full(rows, position + 1), tokens)[:, None]
    states = module.encode_text(ids, mask, image, ("forward",))
    row = jax.lax.dynamic_index_in_dim(states.last[:, 0], position, axis=1, keepdims=False)
    features, kernel, bias = module.predict_vocabulary(row)
    kernel = kernel.astype(features.dtype)
    return jnp.dot(features, kernel, preferred_element_type=jnp.float32) + bias[None]


def _next_token(
    model: VisionLanguageModel,
    search: Search,
    params: Params,
    ids: jax.Array,
    image: jax.Array,
    position: jax.Array,
    prefix: jax.Array,
) -> jax.Array:
    """Texts [B, T] with one more token, from their first ``len(prefix)`` tokens."""
    logits: Any = model.apply(
        {"params": params}, ids[:, : prefix.size], image, position, method=_last_row
    )
    vocabulary = jnp.arange(logits.shape[-1])
    is_end = vocabulary == search.eos_id
    allowed = (vocabulary < model.config.vocab_size) & ~is_end
    allowed &= ~jnp.isin(vocabulary, jnp.array(search.forbidden))
    allowed = jnp.where(position + 2 == search.max_length, is_end, allowed)
    token = jnp.where(allowed[None], logits, -jnp.inf).argmax(axis=-1)
    return jax.lax.dynamic_update_index_in_dim(ids, token, position + 1, axis=1)


def _seconds(run: Callable[[], jax.Array], repeats: int) -> float:
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _figures(
    seconds: dict[str, float], flops: dict[str, float], with_image: bool
) -> dict[str, float]:
    """Both ways compared, with the image encoded once in both or left out of both."""

    def total(parts: dict[str, float], way: str) -> float:
        return parts[way] + (parts["encode"] if with_image else 0.0)

    speedup = total(seconds, "uncached") / total(seconds, "cached")
    ratio = total(flops, "uncached") / total(flops, "cached")
    return {
        "cached_seconds": round(total(seconds, "cached"), 6),
        "uncached_seconds": round(total(seconds, "uncached"), 6),
        "speedup": round(speedup, 3),
        "flop_ratio": round(ratio, 3),
        "share": round(speedup / ratio, 3),
    }


def main(argv: Sequence[str]) -> None:
    """Run the measurement."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _CONFIG.value is None:
        raise app.UsageError("--config=configs/NAME.py is needed")
    with bad_input():
        figures = bench_generate(
            _CONFIG.value,
            _BATCH.value,
            _MAX_LENGTH.value,
            _PREFIX_MULTIPLE.value,
            _REPEATS.value,
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
