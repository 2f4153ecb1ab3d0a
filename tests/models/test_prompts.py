"""Prompts are tokens: what they do equals what the same tokens do where they are put by hand."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captioning import caption_params, counted_decoding, whole_logits
from tiny import TOKENS, VOCAB
from tuned import (
    BATCH,
    IDS,
    LENGTHS,
    MODELS,
    N,
    base,
    build,
    check_formulas_of_prompts,
    drawn,
    geometry,
    small_geometry,
)

from vlp_jax.data.augment import normalize
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.block import Block
from vlp_jax.models.decoding import (
    decode_token,
    decode_token_flops,
    empty_cache,
    encode_image,
    project_image,
    project_image_flops,
)
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import prompt_flops
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.masks import bidirectional_mask, two_stream_mask
from vlp_jax.models.pairs import PairEncoder, read_beside
from vlp_jax.models.pretrained import merge
from vlp_jax.models.sizes import build_model
from vlp_jax.models.three_towers import ThreeTowers
from vlp_jax.models.tuning import PromptConfig, Tuning, is_added

LENGTH = 3
DEEP = {"prompt": {"kind": "deep", "length": LENGTH}, "blocks": "all"}
SHALLOW = {"prompt": {"kind": "shallow", "length": LENGTH}}
KINDS = {"deep": DEEP, "shallow": SHALLOW}
PIXELS = normalize(jnp.asarray(BATCH["image"]))
JOINT, ONE_SIDED = ("bidirectional",), ("forward", "reverse")
MASKS = {
    JOINT: bidirectional_mask(N, TOKENS)[:, None],
    ONE_SIDED: two_stream_mask(N, TOKENS),
}
REAL = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
CASES = [
    (name, streams)
    for name in MODELS
    for streams in (JOINT, ONE_SIDED)
    if (name, streams) != ("co_attention", ONE_SIDED)
]
by_case = pytest.mark.parametrize(
    ("name", "streams"), CASES, ids=[f"{n}-{'-'.join(streams)}" for n, streams in CASES]
)
by_kind = pytest.mark.parametrize("kind", KINDS)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def run(model: Encoder, params: Any, forward: Any, *arguments: Any) -> Any:
    return jax.jit(nn.apply(forward, model))({"params": params}, *arguments)


def without_prompts(params: Any) -> Any:
    return nested({path: x for path, x in by_path(params).items() if not is_added(path)})


def pair_of_blocks(cross_attention: bool, norm: Any) -> tuple[Block, Block, Any, Any]:
    """A block with prompts and one without, and the parameters of either."""
    plain = BlockConfig(32, 2, 64, norm=norm)
    tuning = Tuning(prompt=PromptConfig("deep", LENGTH), placed=("",))
    prompted = dataclasses.replace(plain, tuning=tuning)
    model = Block(prompted, cross_attention=cross_attention)
    x = normal(1, 2, 32)
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), x, context=x))["params"]
    draw = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: 0.3 * draw.normal(size=leaf.shape), init)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    bare = {key: value for key, value in params.items() if key != "prompt"}
    return model, Block(plain, cross_attention=cross_attention), params, bare


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_deep_prompts_are_further_tokens_of_the_context(norm: str) -> None:
    """With a mask of the context, and with streams, whose self-attention does not see them."""
    prompted, plain, params, bare = pair_of_blocks(True, norm)
    x, context = normal(2, 2, 4, 32), normal(2, 5, 32, seed=1)
    mask = jnp.asarray(np.random.default_rng(2).random((2, 8, 5)) < 0.5)
    prompts = jnp.broadcast_to(params["prompt"]["tokens"][None], (2, LENGTH, 32))
    further = jnp.concatenate([prompts, context], axis=1)
    for seen in (None, mask):
        found = prompted.apply({"params": params}, x, context=context, context_mask=seen)
        wide = seen
        if seen is not None:
            wide = jnp.pad(seen, ((0, 0), (0, 0), (LENGTH, 0)), constant_values=True)
        expected = plain.apply({"params": bare}, x, context=further, context_mask=wide)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        without = plain.apply({"params": bare}, x, context=context, context_mask=seen)
        assert np.abs(found - without).max() > 1e-2


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_deep_prompts_are_further_tokens_of_self_attention(norm: str) -> None:
    """Of one sequence and of streams, under a mask, by lengths, and beside tokens projected."""
    prompted, plain, params, bare = pair_of_blocks(False, norm)
    prompts = params["prompt"]["tokens"]

    def of(*arguments: Any, **options: Any) -> jax.Array:
        return prompted.apply({"params": params}, *arguments, **options)

    def by_hand(x: jax.Array, mask: jax.Array | None) -> jax.Array:
        before = jnp.broadcast_to(prompts, (*x.shape[:-2], *prompts.shape))
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0),) * (mask.ndim - 2) + ((LENGTH, 0), (LENGTH, 0)))
            mask = mask.at[..., :LENGTH].set(True)
        sequence = jnp.concatenate([before, x], axis=-2)
        return plain.apply({"params": bare}, sequence, mask=mask)[..., LENGTH:, :]

    x = normal(2, 5, 32)
    np.testing.assert_allclose(of(x), by_hand(x, None), atol=2e-5)
    assert np.abs(of(x) - plain.apply({"params": bare}, x)).max() > 1e-2
    streams = normal(2, 2, 5, 32, seed=1)
    mask = jnp.tril(jnp.ones((1, 2, 5, 5), bool))
    np.testing.assert_allclose(of(streams, mask=mask), by_hand(streams, mask), atol=2e-5)
    lengths = jnp.array([3, 5])
    cut = by_hand(x[:1, :3], None)
    np.testing.assert_allclose(of(x, tokens=lengths)[:1, :3], cut, atol=2e-5)
    np.testing.assert_allclose(of(x, tokens=3)[:, :3], by_hand(x[:, :3], None), atol=2e-5)

    others = prompted.apply({"params": params}, x, method=Block.project)
    assert others.key.shape[-3] == LENGTH + 5
    np.testing.assert_allclose(of(x, own=others), of(x), atol=2e-5)
    sequence = jnp.concatenate([jnp.broadcast_to(x[:, None], (2, 2, 5, 32)), streams], axis=2)
    whole = jnp.ones((1, 2, 10, 10), bool).at[..., 5:, 5:].set(mask)
    beside = of(streams, mask=mask, beside=others)
    np.testing.assert_allclose(beside, by_hand(sequence, whole)[:, :, 5:], atol=2e-5)


def test_deep_prompts_of_co_attention_are_tokens_of_the_other_stream() -> None:
    """Layer by layer, one text and one image at a time, with the text cut to its length."""
    config = geometry("co_attention", prompt=DEEP["prompt"])
    params, model = drawn(config), build(config)
    assert isinstance(model, ThreeTowers)
    tower = params["fusion_tower"]

    def forward(model: ThreeTowers) -> Any:
        image = model.encode_image(PIXELS)
        lower = model.encode_text_lower(IDS, MASKS[JOINT])[-1]
        entering = model.text_to_fusion(model.text_tower.norm(lower))
        pair = model.encode_pair(lower, MASKS[JOINT], image)
        return entering, model.image_to_fusion(image), pair.blocks

    text, image, states = run(model, params, forward)
    block = Block(dataclasses.replace(model.config.text, tuning=Tuning()), cross_attention=True)

    def apply(side: str, layer: int, x: jax.Array, other: jax.Array) -> jax.Array:
        own = tower[f"{side}_block_{layer:02d}"]
        rest = {key: value for key, value in own.items() if key != "prompt"}
        context = jnp.concatenate([other, own["prompt"]["tokens"][None]], axis=1)
        return block.apply({"params": rest}, x, context=context)

    for row, length in enumerate(LENGTHS):
        x, y = text[row : row + 1, 0, :length], image[row : row + 1]
        for layer in range(2):
            x, y = apply("text", layer, x, y), apply("image", layer, y, x)
            np.testing.assert_allclose(states[layer][row, 0, :length], x[0], atol=2e-4)


@by_case
def test_shallow_prompts_are_tokens_of_the_image(name: str, streams: tuple[str, ...]) -> None:
    """Given by hand to the same blocks without prompts, and of two streams to the text's as well.

    What comes of the tokens of text and image has the places and shapes it would have without.
    """
    config = geometry(name, **SHALLOW)
    params, model = drawn(config), build(config)
    plain = build(MODELS[name]())
    bare, mask = without_prompts(params), MASKS[streams]
    prompts = jnp.broadcast_to(params["image_prompt"]["tokens"][None], (len(IDS), LENGTH, 32))

    def found(model: Encoder) -> Any:
        image, lower = model.encode_image(PIXELS), model.encode_text_lower(IDS, mask)[-1]
        upper, last = model.encode_text_upper(lower, mask, image, streams)
        joint = isinstance(model, PairEncoder) and streams == JOINT
        return upper, last, model.encode_pair(lower, mask, image).image if joint else None

    def expected(model: Encoder) -> Any:
        image, lower = model.encode_image(PIXELS), model.encode_text_lower(IDS, mask)[-1]
        count = image.shape[1]
        if not isinstance(model, ThreeTowers):
            image = jnp.concatenate([image, prompts], axis=1)
            upper, last = model.encode_text_upper(lower, mask, image, streams)
            joint = isinstance(model, PairEncoder) and streams == JOINT
            pair = model.encode_pair(lower, mask, image).image[:, :, :count] if joint else None
            return upper, last, pair
        image = jnp.concatenate([model.image_to_fusion(image), prompts], axis=1)
        text, seen, before = model.text_to_fusion(model.text_tower.norm(lower)), mask, 0
        if streams == ONE_SIDED:
            states = read_beside(model.fusion_tower.blocks, text, mask, image)
            return states, model.fusion_tower.norm(states[-1]), None
        if model.config.co_attention:
            of_text = params["text_prompt"]["tokens"][None, None]
            of_text = jnp.broadcast_to(of_text, (len(IDS), 1, LENGTH, 32))
            text, before = jnp.concatenate([of_text, text], axis=2), LENGTH
            seen = bidirectional_mask(N + LENGTH, TOKENS + LENGTH)[:, None]
        pair = model.fusion_tower(text, seen, image)
        states = tuple(state[:, :, before:] for state in pair.blocks)
        return states, pair.text[:, :, before:], pair.image[:, :, :count]

    (upper, last, image), by_hand = run(model, params, found), run(plain, bare, expected)
    without = run(plain, bare, found)
    every = ((*upper, last), (*by_hand[0], by_hand[1]), (*without[0], without[1]))
    for states in zip(*every, strict=True):
        assert len({state.shape for state in states}) == 1
        one, other = (np.where(REAL[:, None, :, None], state, 0) for state in states[:2])
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(last - without[1])[:, 0, 0].max() > 1e-2
    if image is not None:
        assert image.shape == without[2].shape
        np.testing.assert_allclose(image, by_hand[2], atol=1e-4)


@by_kind
@by_case
def test_prompts_carry_no_text_to_where_it_is_hidden(
    name: str, streams: tuple[str, ...], kind: str
) -> None:
    """Neither what follows, in a stream that sees one side, nor padding."""
    config = geometry(name, **KINDS[kind])
    params = drawn(config)

    def last(model: Encoder, ids: jax.Array) -> jax.Array:
        image = model.encode_image(PIXELS)
        return model.encode_text(ids, MASKS[streams], image, streams).last

    encode = jax.jit(nn.apply(last, build(config)))
    plain = np.asarray(encode({"params": params}, IDS))
    padding = np.asarray(encode({"params": params}, jnp.where(REAL, IDS, (IDS + 7) % VOCAB)))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(padding[row, :, :length], plain[row, :, :length])
    if streams == ONE_SIDED:
        token = 4
        changed = np.asarray(encode({"params": params}, IDS.at[0, token].add(1)))
        moved = np.abs(changed - plain)[0].max(axis=-1)
        assert not moved[0, :token].any()
        assert moved[0, token:].all()
        assert not moved[1, token + 1 :].any()
        assert moved[1, : token + 1].all()


ONE_SIDED_MODELS = [name for name in MODELS if name != "co_attention"]


@pytest.mark.slow
@by_kind
@pytest.mark.parametrize("name", ONE_SIDED_MODELS)
def test_tokens_one_by_one_equal_the_whole_text(name: str, kind: str) -> None:
    """Two texts on each image, which share what is kept of it and of the prompts."""
    model = build(geometry(name, **KINDS[kind]))
    draw = np.random.default_rng(5)
    params = nested(
        {
            path: draw.normal(size=leaf.shape).astype(np.float32) if is_added(path) else leaf
            for path, leaf in by_path(caption_params(model)).items()
        }
    )
    texts = jnp.stack([IDS, jnp.roll(IDS, 1, axis=0)], axis=1)

    @jax.jit
    def decode(params: Any) -> tuple[jax.Array, jax.Array]:
        memory = project_image(model, params, encode_image(model, params, PIXELS))

        def step(cache: Any, position: jax.Array) -> tuple[Any, jax.Array]:
            logits, cache = decode_token(
                model, params, texts[:, :, position], position, cache, memory
            )
            return cache, logits

        cache = empty_cache(model.config, *texts.shape[:2], TOKENS)
        whole = [whole_logits(model, params, texts[:, beam], PIXELS) for beam in range(2)]
        return jax.lax.scan(step, cache, jnp.arange(TOKENS))[1], jnp.stack(whole)

    stepped, whole = decode(params)
    np.testing.assert_allclose(stepped.transpose(2, 1, 0, 3), whole, atol=1e-4)
    plain = build(MODELS[name]())
    without = whole_logits(plain, without_prompts(params), IDS, PIXELS)
    assert np.abs(whole[0] - without).max() > 1e-1


@by_kind
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_plain_model_start_one_with_prompts(name: str, kind: str) -> None:
    params = drawn(geometry(name, **KINDS[kind]))
    merged, report = merge(params, by_path(base(name)))
    new = {row.parameter for row in report.of("new")}
    assert new == {path for path in by_path(params) if is_added(path)}
    assert {path.rpartition("/")[2] for path in new} == {"tokens"}
    assert not report.of("unused")
    for path, leaf in by_path(merged).items():
        expected = params if path in new else base(name)
        np.testing.assert_array_equal(leaf, by_path(expected)[path])


def test_fresh_prompts_are_uniform() -> None:
    model = build(geometry("shared", prompt={"kind": "deep", "length": 500}))

    def init(model: Encoder) -> jax.Array:
        return model.image_feature(model.encode_image(PIXELS))

    params = jax.jit(nn.init(init, model))(jax.random.key(0))["params"]
    one, other = (params["image_tower"][f"block_0{n}"]["prompt"]["tokens"] for n in range(2))
    bound = np.sqrt(3 / 32)
    for tokens in (one, other):
        assert tokens.shape == (500, 32)
        assert bound - 1e-3 < np.abs(tokens).max() <= bound
        assert tokens.var() == pytest.approx(1 / 32, rel=0.05)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.slow
@by_kind
@by_case
def test_formulas_match_the_lowered_module(name: str, streams: tuple[str, ...], kind: str) -> None:
    """The lowered module also counts the softmax over them."""
    blocks = "all" if kind == "deep" else "fusion"
    prompts = {"prompt": {"kind": kind, "length": 40}, "blocks": blocks}
    check_formulas_of_prompts([small_geometry(name, **some) for some in ({}, prompts)], streams)


@pytest.mark.slow
@by_kind
@pytest.mark.parametrize("name", ONE_SIDED_MODELS)
def test_formulas_of_decoding_match_the_lowered_module(name: str, kind: str) -> None:
    rows, beams, room = 2, 4, 24
    counted, expected = [], []
    for tuning in ({}, {"prompt": {"kind": kind, "length": 40}}):
        model = build_model(small_geometry(name, **tuning), 1000, 3, 144)
        c = model.config
        counted.append(counted_decoding(model, rows, beams, room, 144))
        once = prompt_flops(c) / rows
        expected.append(decode_token_flops(c, room, beams) + project_image_flops(c) + once)
    assert counted[1] == pytest.approx(expected[1], rel=0.04)
    assert counted[1] - counted[0] == pytest.approx(expected[1] - expected[0], rel=0.05)
