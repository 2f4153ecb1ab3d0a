"""One stack for both modalities: what meets what, and what does not."""

from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SIZE, TOKENS, VOCAB, make_batch, shared_model, tiny_model

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import batch_spec
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.encoder import TextStates
from vlp_jax.models.masks import bidirectional_mask, token_mask, two_stream_mask
from vlp_jax.models.pooling import Pool
from vlp_jax.models.shared import SharedModel
from vlp_jax.models.sizes import build_model, model_config, parameter_table
from vlp_jax.objectives.readout import Readout
from vlp_jax.objectives.single_stream import MLM

LENGTHS = [12, 9, 5, 2]
BATCH = make_batch(LENGTHS)
IDS, N = jnp.asarray(BATCH["text_ids"]), jnp.array(LENGTHS)
PIXELS = normalize(jnp.asarray(BATCH["image"]))
STREAMS = ("forward", "reverse")
IMAGE_SIDE = ("class_token", "patch_embedding", "image_tower/modality_embedding")
TEXT_SIDE = ("text_embedding", "stream_embedding", "vocabulary_head", "reconstructor", "query_norm")


@pytest.fixture(scope="module")
def model() -> SharedModel:
    return shared_model()


@pytest.fixture(scope="module")
def params(model: SharedModel) -> Any:
    def forward(model: SharedModel) -> None:
        states = encode(model, IDS, N, PIXELS, STREAMS)
        everything = jnp.ones((len(N), TOKENS, 2 * TOKENS), bool)
        model.predict_vocabulary(model.reconstruct(jnp.arange(TOKENS), states, everything))

    params = jax.jit(lambda key: nn.init(forward, model)(key))(jax.random.key(0))["params"]
    # Fresh norms and biases are alike everywhere: these are not.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def mask_of(lengths: jax.Array, tokens: int, streams: tuple[str, ...]) -> jax.Array:
    if streams == STREAMS:
        return two_stream_mask(lengths, tokens)
    return bidirectional_mask(lengths, tokens)[:, None]


def encode(
    model: SharedModel,
    ids: jax.Array,
    lengths: jax.Array,
    pixels: jax.Array | None,
    streams: tuple[str, ...],
) -> TextStates:
    image = None if pixels is None else model.encode_image(pixels)
    return model.encode_text(ids, mask_of(lengths, ids.shape[1], streams), image, streams)


def run(model: SharedModel, params: Any, forward: Any, *arguments: Any) -> Any:
    bound = nn.apply(forward, model)
    return jax.jit(lambda params, *given: bound({"params": params}, *given))(params, *arguments)


def untouched(gradient: Any, names: tuple[str, ...]) -> None:
    """Parameters with one of these in their path have a gradient of zero, and others have not."""
    for path, leaf in by_path(gradient).items():
        if any(name in path for name in names):
            assert not np.asarray(leaf).any(), path
        elif path.startswith("image_tower/block_01/mlp"):
            assert np.asarray(leaf).any(), path


def test_a_text_alone_leaves_what_images_have_alone(model: SharedModel, params: Any) -> None:
    def total(params: Any) -> jax.Array:
        def forward(model: SharedModel) -> jax.Array:
            states = encode(model, IDS, N, None, ("bidirectional",))
            return (model.vocabulary_logits(states.last) ** 2).sum()

        return nn.apply(forward, model)({"params": params})

    untouched(jax.jit(jax.grad(total))(params), (*IMAGE_SIDE, "stream_embedding", "reconstructor"))


def test_an_image_alone_leaves_what_texts_have_alone(model: SharedModel, params: Any) -> None:
    def total(params: Any) -> jax.Array:
        forward = nn.apply(lambda m: m.image_feature(m.encode_image(PIXELS)), model)
        return (forward({"params": params}) ** 3).sum()

    untouched(jax.jit(jax.grad(total))(params), TEXT_SIDE)


@pytest.mark.parametrize("pool", get_args(Pool))
def test_the_feature_of_an_image_is_what_is_read_of_the_tower(
    model: SharedModel, params: Any, pool: Pool
) -> None:
    def both(model: SharedModel) -> tuple[jax.Array, jax.Array]:
        tower = model.image_tower(PIXELS)
        expected = tower[:, 0] if pool == "class" else tower[:, 1:].mean(axis=1)
        return model.image_feature(model.encode_image(PIXELS), pool=pool), expected

    np.testing.assert_array_equal(*run(model, params, both))


@pytest.mark.parametrize("streams", [STREAMS, ("bidirectional",)])
@pytest.mark.parametrize("with_image", [True, False])
def test_padding_never_leaks(
    model: SharedModel, params: Any, streams: tuple[str, ...], with_image: bool
) -> None:
    pixels = PIXELS if with_image else None

    def last(ids: jax.Array) -> np.ndarray:
        return np.asarray(
            run(model, params, lambda m, ids: encode(m, ids, N, pixels, streams).last, ids)
        )

    plain = last(IDS)
    padding = jnp.arange(TOKENS)[None] >= N[:, None]
    other = last(jnp.where(padding, 9, IDS))
    wide = last(jnp.pad(IDS, ((0, 0), (0, 5)), constant_values=7))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(other[row, :, :length], plain[row, :, :length])
        np.testing.assert_allclose(wide[row, :, :length], plain[row, :, :length], atol=2e-5)


def one_sequence(model: SharedModel, stream: int, image_sees_text: bool) -> jax.Array:
    """States after every block of image and text as one sequence, under a mask written out."""
    image = model.encode_image(PIXELS)
    x = model.encode_text_lower(IDS, jnp.ones((len(N), 1, TOKENS, TOKENS), bool))[0][:, 0]
    if not image_sees_text:
        x = x + model.stream_embedding[stream][None, None]
    count = image.shape[1]
    real = np.arange(TOKENS)[None] < np.asarray(N)[:, None]
    whole = np.ones((len(N), count + TOKENS, count + TOKENS), bool)
    whole[:, :count, count:] = real[:, None] & image_sees_text
    order = np.subtract.outer(np.arange(TOKENS), np.arange(TOKENS))  # row - column
    seen = [order >= 0, order <= 0][stream] | image_sees_text
    whole[:, count:, count:] = real[:, :, None] & real[:, None] & seen
    x = jnp.concatenate([image, x], axis=1)
    states = []
    for block in model.image_tower.blocks:
        x = block(x, mask=jnp.asarray(whole))
        states.append(x)
    return jnp.stack([*states, model.image_tower.norm(x)])


@pytest.mark.parametrize("stream", [0, 1])
def test_streams_beside_an_image_are_one_sequence_under_a_mask(
    model: SharedModel, params: Any, stream: int
) -> None:
    expected = run(model, params, lambda m: one_sequence(m, stream, image_sees_text=False))
    states = run(model, params, lambda m: encode(m, IDS, N, PIXELS, STREAMS))
    for found, whole in zip((*states.upper, states.last), expected, strict=True):
        np.testing.assert_allclose(found[:, stream], whole[:, -TOKENS:], atol=2e-5)


def test_a_bidirectional_text_is_one_sequence_with_its_image(
    model: SharedModel, params: Any
) -> None:
    def pair(model: SharedModel) -> Any:
        mask = mask_of(N, TOKENS, ("bidirectional",))
        lower = model.encode_text_lower(IDS, mask)[0]
        return model.encode_pair(lower, mask, model.encode_image(PIXELS))

    expected = run(model, params, lambda m: one_sequence(m, 0, image_sees_text=True))
    states = run(model, params, lambda m: encode(m, IDS, N, PIXELS, ("bidirectional",)))
    real = np.asarray(token_mask(N, TOKENS))  # what padding comes to is nothing to anybody
    for found, whole in zip((*states.upper, states.last), expected, strict=True):
        np.testing.assert_allclose(found[:, 0][real], whole[:, -TOKENS:][real], atol=2e-5)
    image = run(model, params, pair).image
    np.testing.assert_allclose(image[:, 0], expected[-1][:, :-TOKENS], atol=2e-5)


def test_each_text_has_its_own_image(model: SharedModel, params: Any) -> None:
    def last(pixels: jax.Array, streams: tuple[str, ...]) -> np.ndarray:
        return run(model, params, lambda m, x: encode(m, IDS, N, x, streams).last, pixels)

    for streams in (STREAMS, ("bidirectional",)):
        plain, changed = last(PIXELS, streams), last(PIXELS.at[1].multiply(-1.0), streams)
        same = np.asarray(plain == changed).all(axis=-1)
        assert not same[1].any()
        assert same[[0, 2, 3]].all()


def test_rows_of_a_stream_see_one_side_only_with_an_image_present(
    model: SharedModel, params: Any
) -> None:
    """Not even through the image: its tokens do not see the text."""
    forward = nn.apply(lambda m, ids: encode(m, ids, N, PIXELS, STREAMS), model)
    states_of = jax.jit(lambda ids: forward({"params": params}, ids))
    plain = states_of(IDS)
    for token in range(TOKENS):
        changed = states_of(IDS.at[:, token].set((IDS[:, token] + 7) % VOCAB))
        for before, after in zip(plain.upper, changed.upper, strict=True):
            same = np.asarray(before == after).all(axis=-1)
            for row, length in enumerate(LENGTHS):
                if token >= length:
                    assert same[row, :, :length].all()
                    continue
                assert same[row, 0, :token].all()
                assert not same[row, 0, token:length].any()
                assert same[row, 1, token + 1 : length].all()
                assert not same[row, 1, : token + 1].any()


@pytest.mark.parametrize("kind", ["query", "bidirectional", "forward"])
def test_several_texts_of_an_image_equal_one_by_one(
    model: SharedModel, params: Any, kind: Any
) -> None:
    reader = Readout(kind, "readout")

    def read(model: SharedModel, pixels: jax.Array) -> jax.Array:
        text = reader.encode(model, IDS, N, None)
        return reader.read(model, text, model.encode_image(pixels), None)

    together = run(model, params, read, PIXELS[:2])
    apart = run(model, params, read, jnp.repeat(PIXELS[:2], 2, axis=0))
    np.testing.assert_allclose(together, apart, atol=2e-5)
    assert np.abs(np.asarray(apart[0] - apart[1])).max() > 1e-3


def test_kinds_of_streams_do_not_mix(model: SharedModel, params: Any) -> None:
    streams = ("forward", "bidirectional")
    mask = jnp.ones((len(N), 2, TOKENS, TOKENS), bool)
    mixed = nn.apply(lambda m: m.encode_text(IDS, mask, m.encode_image(PIXELS), streams), model)
    with pytest.raises(ValueError, match="do not see an image in one way"):
        mixed({"params": params})


def test_a_tied_head_reads_the_table_of_tokens(model: SharedModel, params: Any) -> None:
    x = jnp.ones((3, 32))
    _, kernel, bias = run(model, params, lambda m: m.predict_vocabulary(x))
    np.testing.assert_array_equal(kernel, params["text_embedding"]["token"]["embedding"].T)
    assert bias.shape == (128,)
    own = shared_model(**{"text.tied": False})
    spec = jax.eval_shape(nn.init(lambda m: m.predict_vocabulary(x), own), jax.random.key(0))
    assert spec["params"]["vocabulary_head"]["decoder_kernel"].shape == (32, 128)


def test_a_run_of_texts_has_the_whole_tower(model: SharedModel, params: Any) -> None:
    """A tower is loaded whole or not at all: from a run of images, and by one."""
    text = jax.eval_shape(
        nn.init(lambda m: encode(m, IDS, N, None, ("bidirectional",)), model), jax.random.key(0)
    )
    assert by_path(text["params"]["image_tower"]).keys() == by_path(params["image_tower"]).keys()


def test_a_model_of_two_stacks_reads_no_text_alone() -> None:
    mask = bidirectional_mask(N, TOKENS)[:, None]
    init = nn.init(lambda m: m.encode_text(IDS, mask, None, ("bidirectional",)), tiny_model())
    with pytest.raises(ConfigError, match=r"model\.type: .* Use a model of type 'shared'"):
        jax.eval_shape(init, jax.random.key(0))


def test_bad_geometry_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"model\.reconstructor\.depth=3"):
        shared_model(**{"reconstructor.depth": 3})
    config = model_config("shared_tiny")
    config.type = "both"
    with pytest.raises(ConfigError, match=r"model\.type: 'both'"):
        build_model(config, VOCAB, 3, IMAGE_SIZE)
    config = model_config("tiny")
    config.image.type = "mixer"
    with pytest.raises(ConfigError, match=r"model\.image\.type: 'mixer'"):
        build_model(config, VOCAB, 3, IMAGE_SIZE)


@pytest.mark.parametrize(
    ("size", "tower", "total"), [("shared_base", 85.8e6, 110.3e6), ("shared_large", 303.3e6, 336e6)]
)
def test_parameters_are_one_tower_and_the_table_of_tokens(
    size: str, tower: float, total: float
) -> None:
    """The fact sheet, section 1: ViT-B and the word table of BERT, 109.6M; ViT-L, 335.1M."""
    model = build_model(model_config(size), 30_522, 103, 224)
    mlm = MLM(model, name="mlm", vocabulary=Vocabulary.of_words(30_522, 103))
    spec = batch_spec(Bucket(16, 224), 1)
    params = jax.eval_shape(lambda key: mlm.init(key, spec)[0], jax.random.key(0))
    table = dict(parameter_table(params))
    assert table["image_tower"] == pytest.approx(tower, rel=0.002)
    assert table["total"] == pytest.approx(total, rel=0.003)
