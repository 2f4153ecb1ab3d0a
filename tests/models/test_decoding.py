"""Decoding token by token gives what encoding the whole text gives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captioning import caption_params, counted_decoding, whole_logits
from tiny import MASK_ID, TOKENS, make_batch, shared_model, tiny_model, towers_model

from vlp_jax.data.augment import normalize
from vlp_jax.models.decoding import (
    TextCache,
    cast_kernels,
    decode_token,
    decode_token_flops,
    empty_cache,
    encode_image,
    project_image,
    project_image_flops,
)
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.sizes import build_model, model_config

LENGTHS = [TOKENS] * 4
BATCH = make_batch(LENGTHS)
IDS, PIXELS = jnp.asarray(BATCH["text_ids"]), normalize(jnp.asarray(BATCH["image"]))


def two_stacks(norm: str) -> Encoder:
    depth = {"text.lower_depth": 2, "text.upper_depth": 2}
    return tiny_model(**{"text.norm": norm, "text.dropout": 0.1, **depth})


MODELS: dict[str, Callable[[], Encoder]] = {
    "pre": lambda: two_stacks("pre"),
    "post": lambda: two_stacks("post"),
    "shared": lambda: shared_model(**{"image.depth": 3, "image.dropout": 0.1}),
    "three_towers": lambda: towers_model(**{"text.depth": 2, "fusion.depth": 2}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Encoder:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def params(model: Encoder) -> Any:
    return caption_params(model)


@pytest.fixture(scope="module")
def logits(model: Encoder, params: Any) -> np.ndarray:
    """[B, N, V] of the whole text."""

    return np.asarray(jax.jit(lambda params: whole_logits(model, params, IDS, PIXELS))(params))


def decode(
    model: Encoder, params: Any, ids: jax.Array, pixels: jax.Array, room: int
) -> tuple[np.ndarray, TextCache]:
    """Logits [N, B, K, V] of texts [B, K, N], token by token, and the last cache."""

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, TextCache]:
        memory = project_image(model, params, encode_image(model, params, pixels))

        def step(cache: TextCache, position: jax.Array) -> tuple[TextCache, jax.Array]:
            token = ids[:, :, position]
            logits, cache = decode_token(model, params, token, position, cache, memory)
            return cache, logits

        cache = empty_cache(model.config, *ids.shape[:2], room)
        cache, logits = jax.lax.scan(step, cache, jnp.arange(ids.shape[2]))
        return logits, cache

    logits, cache = run(params)
    return np.asarray(logits), cache


@pytest.mark.parametrize("room", [TOKENS, TOKENS + 5])
def test_tokens_one_by_one_equal_the_whole_text(
    model: Encoder, params: Any, logits: np.ndarray, room: int
) -> None:
    """At every position, whatever room the cache leaves behind the text."""
    stepped, _ = decode(model, params, IDS[:, None], PIXELS, room)
    np.testing.assert_allclose(stepped[:, :, 0].swapaxes(0, 1), logits, rtol=1e-5, atol=3e-5)
    spread = np.abs(np.diff(logits, axis=1)).max(axis=-1)
    assert spread.min() > 1e-1  # rows differ: the test above could fail


def test_beams_are_texts_of_their_own(model: Encoder, params: Any, logits: np.ndarray) -> None:
    """Three texts on each image: each equals itself alone, on that image."""
    texts = jnp.stack([IDS, jnp.roll(IDS, 1, axis=0), jnp.roll(IDS, 2, axis=0)], axis=1)
    stepped, cache = decode(model, params, texts, PIXELS, TOKENS)
    np.testing.assert_allclose(stepped[:, :, 0].swapaxes(0, 1), logits, rtol=1e-5, atol=3e-5)
    for beam in (1, 2):
        alone, _ = decode(model, params, texts[:, beam : beam + 1], PIXELS, TOKENS)
        # Of batches of other sizes: CPUs differ in the order of their sums, by up to 3.1e-5 so far.
        np.testing.assert_allclose(stepped[:, :, beam], alone[:, :, 0], rtol=1e-5, atol=5e-5)
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(4, 3, 2, TOKENS, 16)}


def test_decoding_reads_the_image(model: Encoder, params: Any, logits: np.ndarray) -> None:
    stepped, _ = decode(model, params, IDS[:, None], PIXELS[::-1], TOKENS)
    assert np.abs(stepped[:, :, 0].swapaxes(0, 1) - logits).max(axis=-1).min() > 1e-3


def test_kernels_cast_once_give_the_same_bits() -> None:
    model = tiny_model(dtype="bfloat16")
    params = caption_params(model)
    cast = cast_kernels(model, params)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(cast)}
    assert dtypes == {"bfloat16", "float32"}  # norms, biases and tables stay
    before, _ = decode(model, params, IDS[:, None], PIXELS, TOKENS)
    after, _ = decode(model, cast, IDS[:, None], PIXELS, TOKENS)
    np.testing.assert_array_equal(before, after)


def test_more_tokens_than_positions() -> None:
    with pytest.raises(ValueError, match=r"65 tokens do not fit model.text.max_positions=64"):
        empty_cache(tiny_model().config, 1, 1, 65)


# Of each kind of block some, which are alike, and words so few that blocks still weigh most.
DEPTHS = {
    "base": {"image.depth": 1, "text.lower_depth": 2, "text.upper_depth": 3},
    "shared_base": {"image.depth": 4},
    "towers_base": {"image.depth": 1, "text.depth": 2, "fusion.depth": 3},
}


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("size", DEPTHS)
def test_flops_match_the_lowered_module(size: str, beams: int) -> None:
    rows, room, pixels = 2, 24, 288
    config = model_config(size)
    config.dtype, config.reconstructor.depth = "float32", 2
    config.update_from_flattened_dict(DEPTHS[size])
    model = build_model(config, 10_000, MASK_ID, pixels)
    counted = counted_decoding(model, rows, beams, room, pixels)
    expected = decode_token_flops(model.config, room, beams) + project_image_flops(model.config)
    assert counted == pytest.approx(expected, rel=0.02)
