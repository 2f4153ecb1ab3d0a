"""The shared encoder: streams, independent queries, and causality of both directions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SIZE, TOKENS, make_batch, tiny_model

from vlp_jax.data.augment import normalize
from vlp_jax.models.encoder import TextEmbedding, TextStates
from vlp_jax.models.masks import forward_mask, reverse_mask, two_stream_mask
from vlp_jax.models.vision_language import VisionLanguageModel
from vlp_jax.models.vit import ViT

LENGTHS = [12, 9, 5, 2]
BATCH = make_batch(LENGTHS)
IDS, IMAGE, N = BATCH["text_ids"], BATCH["image"], jnp.array(LENGTHS)
STREAMS = ("forward", "reverse")


def everything_visible(queries: int) -> jax.Array:
    return jnp.ones((len(LENGTHS), queries, 2 * TOKENS), bool)


def encode(
    model: VisionLanguageModel,
    ids: jax.Array,
    image: jax.Array,
    mask: jax.Array,
    streams: tuple[str, ...] = STREAMS,
) -> TextStates:
    return model.encode_text(ids, mask, model.encode_image(normalize(image)), streams)


@pytest.fixture(scope="module", params=["pre", "post"])
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return tiny_model(**{"text.norm": request.param})


@pytest.fixture(scope="module")
def params(model: VisionLanguageModel) -> Any:
    def forward(model: VisionLanguageModel) -> None:
        states = encode(model, IDS, IMAGE, two_stream_mask(N, TOKENS))
        queries = model.reconstruct(jnp.arange(TOKENS), states, everything_visible(TOKENS))
        model.predict_vocabulary(queries)

    return jax.jit(lambda key: nn.init(forward, model)(key))(jax.random.key(0))


@pytest.fixture(scope="module")
def states_of(model: VisionLanguageModel, params: Any) -> Any:
    def forward(model: VisionLanguageModel, ids: jax.Array, image: jax.Array) -> TextStates:
        return encode(model, ids, image, two_stream_mask(N, TOKENS))

    return jax.jit(lambda ids, image: nn.apply(forward, model)(params, ids, image))


def test_stacked_streams_equal_separate_streams(
    model: VisionLanguageModel, params: Any, states_of: Any
) -> None:
    stacked = states_of(IDS, IMAGE)
    for stream, (name, mask) in enumerate(
        [("forward", forward_mask(N, TOKENS)), ("reverse", reverse_mask(N, TOKENS))]
    ):
        alone = jax.jit(
            nn.apply(lambda m, s=name, x=mask: encode(m, IDS, IMAGE, x[:, None], (s,)), model)
        )(params)
        for together, separate in zip(
            jax.tree.leaves(stacked), jax.tree.leaves(alone), strict=True
        ):
            np.testing.assert_allclose(together[:, stream], separate[:, 0], atol=1e-5)


def test_streams_differ(states_of: Any) -> None:
    """The test above could pass on streams that are the same."""
    last = states_of(IDS, IMAGE).last
    assert np.abs(last[0, 0] - last[0, 1]).max() > 1e-3


@pytest.mark.parametrize("token", range(TOKENS))
def test_rows_see_one_side_only(states_of: Any, token: int) -> None:
    """Forward row i does not depend on tokens > i, reverse row i not on tokens < i."""
    plain = states_of(IDS, IMAGE)
    ids = IDS.copy()
    ids[:, token] = (ids[:, token] + 7) % 50
    changed = states_of(ids, IMAGE)
    for before, after in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        same = np.asarray(before == after).all(axis=-1)  # [B, 2, N]
        for row, length in enumerate(LENGTHS):
            if token >= length:  # padding is seen by no real row
                assert same[row, :, :length].all()
                continue
            assert same[row, 0, :token].all()
            assert not same[row, 0, token:length].any()
            assert same[row, 1, token + 1 : length].all()
            assert not same[row, 1, : token + 1].any()


def test_every_row_of_the_upper_half_sees_its_own_image_only(states_of: Any) -> None:
    plain = states_of(IDS, IMAGE)
    image = IMAGE.copy()
    image[1] = 255 - image[1]
    changed = states_of(IDS, image)
    for before, after in zip(plain.lower, changed.lower, strict=True):
        np.testing.assert_array_equal(before, after)
    same = np.asarray(plain.last == changed.last).all(axis=-1)
    assert not same[1].any()
    assert same[[0, 2, 3]].all()


@pytest.fixture(scope="module")
def reconstruct(model: VisionLanguageModel, params: Any, states_of: Any) -> Any:
    """(positions, mask) -> queries [B, Q, D] over the states of ``BATCH``."""
    states = states_of(IDS, IMAGE)
    method = nn.apply(VisionLanguageModel.reconstruct, model)
    return jax.jit(lambda positions, mask: method(params, positions, states, mask))


def test_one_query_equals_all_queries(reconstruct: Any) -> None:
    mask = np.random.default_rng(0).random((len(LENGTHS), TOKENS, 2 * TOKENS)) < 0.5
    every = reconstruct(jnp.arange(TOKENS), mask)
    for query in (0, 1, 6, 11):
        one = reconstruct(jnp.array([query]), mask[:, query : query + 1])
        np.testing.assert_allclose(one[:, 0], every[:, query], atol=2e-6)


def test_blind_query_depends_on_its_position_alone(reconstruct: Any) -> None:
    blind = np.zeros((len(LENGTHS), TOKENS, 2 * TOKENS), bool)
    out = reconstruct(jnp.arange(TOKENS), blind)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:1], out.shape), atol=1e-6)
    assert np.abs(out[0, 0] - out[0, 1]).max() > 1e-3


def test_lookup_of_one_row_equals_that_of_many() -> None:
    """One row takes a way of its own (see ``_rows``): same values, same gradient."""
    embedding = TextEmbedding(tiny_model().config.text, vocab_size=20, max_positions=10)
    positions = jnp.arange(10)
    variables = embedding.init(jax.random.key(0), jnp.zeros((1, 10), jnp.int32), positions)

    def total(variables: Any, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        out = embedding.apply(variables, ids, positions)
        return (jnp.broadcast_to(out, (1, 10, 32)) ** 3).sum(), out

    for place in (positions, jnp.array([4])):
        one = jax.grad(total, has_aux=True)(variables, jnp.full((1, 1), 7), place)
        many = jax.grad(total, has_aux=True)(
            variables, jnp.full((1, 10), 7), jnp.broadcast_to(place, 10)
        )
        np.testing.assert_allclose(jnp.broadcast_to(one[1], (1, 10, 32)), many[1], atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-4), one[0], many[0])


def test_reported_scores_are_not_rounded() -> None:
    """A product of bfloat16 features in float32: ties would change which token is the best."""
    model = tiny_model(dtype="bfloat16")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 32)), jnp.bfloat16)
    params = nn.init(lambda module: module.vocabulary_logits(x), model)(jax.random.key(0))["params"]

    def both(module: VisionLanguageModel) -> tuple[jax.Array, ...]:
        return module.vocabulary_logits(x), *module.predict_vocabulary(x)

    logits, features, kernel, bias = nn.apply(both, model)({"params": params})
    kernel = kernel.astype(jnp.bfloat16)
    expected = np.asarray(features, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    assert (features.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_bad_geometry_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"model.reconstructor.depth=4"):
        tiny_model(**{"reconstructor.depth": 4})
    with pytest.raises(ValueError, match=r"model.image.patch_size=5"):
        tiny_model(**{"image.patch_size": 5})
    with pytest.raises(ValueError, match=r"model.image.stem"):
        tiny_model(**{"image.stem": "fancy"})
    with pytest.raises(ValueError, match="width 32 is not a multiple of heads 3"):
        tiny_model(**{"text.heads": 3})
    with pytest.raises(ValueError, match="activation 'relu'"):
        tiny_model(**{"text.activation": "relu"})
    with pytest.raises(ValueError, match="norm 'none'"):
        tiny_model(**{"text.norm": "none"})


def test_patch_embedding_is_a_convolution() -> None:
    """The product of a plain stem equals a convolution of stride and width ``patch_size``."""
    tower = ViT(tiny_model().config.image)
    image = normalize(jnp.asarray(IMAGE))
    variables = jax.jit(tower.init)(jax.random.key(0), image)
    _, captured = tower.apply(
        variables, image, capture_intermediates=lambda m, _: m.name == "patch_embedding"
    )
    tokens = captured["intermediates"]["patch_embedding"]["__call__"][0]
    dense = variables["params"]["patch_embedding"]
    kernel = dense["kernel"].reshape(8, 8, 3, -1)
    convolved = jax.lax.conv_general_dilated(
        image, kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = convolved.reshape(len(LENGTHS), (IMAGE_SIZE // 8) ** 2, -1)
    np.testing.assert_allclose(tokens, expected, atol=1e-5)  # the bias starts at zero


def test_image_tower_is_sensitive_to_the_place_of_a_patch() -> None:
    """Without positions, swapping two patches would only swap two tokens."""
    tower = ViT(tiny_model().config.image)
    image = normalize(jnp.asarray(IMAGE))
    variables = jax.jit(tower.init)(jax.random.key(0), image)
    swapped = jnp.concatenate([image[:, 8:], image[:, :8]], axis=1)
    class_token = tower.apply(variables, image)[:, 0]
    assert np.abs(class_token - tower.apply(variables, swapped)[:, 0]).max() > 1e-5
