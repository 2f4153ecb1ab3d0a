"""What texts have read of an image, by the weights that a pass has sown."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_batch, shared_model, towers_model
from tuned import MODELS as ALL
from tuned import all_units, build, geometry, patterns

from vlp_jax.data.augment import normalize
from vlp_jax.evals.attention_maps import patches_over_image, query_over_text, text_over_image
from vlp_jax.objectives.readout import Readout
from vlp_jax.transfer.units import pruned, with_kept

LENGTHS = [12, 7]
TOKENS = max(LENGTHS)
BATCH = make_batch(LENGTHS)
IDS, LENGTH = jnp.asarray(BATCH["text_ids"]), jnp.array(LENGTHS)
PIXELS = normalize(jnp.asarray(BATCH["image"]))
DEPTH = 2
MODELS = {
    "shared": lambda: shared_model(**{"image.depth": DEPTH}),
    "three_towers": lambda: towers_model(**{"image.depth": 2, "fusion.depth": DEPTH}),
}


def uniform(allowed, deep=0):
    """Weights of tokens that read all that they may alike, and so many prompts as well."""
    return allowed / np.maximum(allowed.sum(axis=-1, keepdims=True) + deep, 1)


def expected_reach(kind, image, shallow=0, deep=0):
    """Rollout of uniform attention, text by text: [B, S * N, I]; with so many prompts of a kind."""
    found, kept, image = [], image, image + shallow
    for length in LENGTHS:
        streams = []
        for stream in {"query": ("forward", "reverse")}.get(kind, (kind,)):
            rows = np.arange(TOKENS)
            sees = {
                "bidirectional": np.broadcast_to(rows < length, (TOKENS, TOKENS)),
                "forward": (rows[None] <= rows[:, None]) & (rows < length),
                "reverse": (rows[None] >= rows[:, None]) & (rows < length),
            }[stream]
            allowed = np.zeros((image + TOKENS,) * 2)
            allowed[:, :image] = 1
            allowed[image:, image:] = sees
            if stream == "bidirectional":  # the image sees the text as well
                allowed[:image, image:] = rows < length
            reach = np.eye(image + TOKENS)
            for _ in range(DEPTH):
                reach = 0.5 * (uniform(allowed, deep) @ reach + reach)
            streams.append(reach[image:, :kept])
        found.append(np.concatenate(streams))
    return np.stack(found)


def read(kind, model):
    """What a text and its image come to."""
    readout = Readout(kind, "readout")
    image = model.encode_image(PIXELS)
    return readout.read(model, readout.encode(model, IDS, LENGTH, None), image, None)


def sown(model, kind):
    """Parameters whose queries are all zero, and what a pass sows."""
    params = jax.jit(nn.init(functools.partial(read, kind), model))(jax.random.key(0))["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0.0 if any(key.key == "query" for key in path) else leaf, params
    )
    run = nn.apply(functools.partial(read, kind), model, mutable=["intermediates"])
    return params, jax.jit(lambda params: run({"params": params})[1]["intermediates"])(params)


def texts(kind):
    """Examples, streams and tokens of ``BATCH``."""
    return len(LENGTHS), Readout(kind, "readout").streams, TOKENS


@pytest.mark.parametrize("kind", ["bidirectional", "forward", "query"])
@pytest.mark.parametrize("name", MODELS)
def test_uniform_attention_reaches_as_far_as_masks_allow(name, kind):
    """In closed form: what each text has of each image token, real rows of it."""
    model = MODELS[name]()
    image = model.config.image.tokens
    reach = np.asarray(text_over_image(model, *sown(model, kind), texts(kind)))
    expected = expected_reach(kind, image)
    assert reach.shape == expected.shape
    streams = reach.shape[1] // TOKENS
    real = np.tile(np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None], (1, streams))
    np.testing.assert_allclose(reach[real], expected[real], rtol=1e-5)
    assert len(np.unique(expected[real].round(6))) > 1  # rows differ, by what they may see


@pytest.mark.parametrize(
    ("name", "kind", "prompt"),
    [
        ("shared", "forward", "deep"),
        ("shared", "query", "shallow"),
        ("three_towers", "bidirectional", "deep"),
        ("three_towers", "forward", "shallow"),
    ],
)
def test_what_is_read_of_prompts_is_in_no_map(name, kind, prompt):
    model = build(geometry(name, prompt={"kind": prompt, "length": 3}))
    image = model.config.image.tokens
    reach = np.asarray(text_over_image(model, *sown(model, kind), texts(kind)))
    expected = expected_reach(kind, image, **{prompt: 3})
    real = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
    real = np.tile(real, (1, reach.shape[1] // TOKENS))
    np.testing.assert_allclose(reach[real], expected[real], rtol=1e-5)
    assert (reach[real].sum(axis=-1) < expected_reach(kind, image)[real].sum(axis=-1)).all()


@pytest.mark.parametrize("prompt", ["deep", "shallow"])
@pytest.mark.parametrize(
    ("name", "kind"), [("two_stacks", "forward"), ("co_attention", "bidirectional")]
)
def test_cross_attention_is_told_from_that_to_prompts(name, kind, prompt):
    model = build(geometry(name, prompt={"kind": prompt, "length": 3}))
    image = model.config.image.tokens
    reach = text_over_image(model, *sown(model, kind), texts(kind))
    assert reach.shape == (2, TOKENS, image)
    np.testing.assert_allclose(reach, 1 / (image + 3), rtol=1e-5)


def test_patches_of_a_tower_are_mixed_and_those_of_one_stack_are_not_yet():
    shared, towers = (make() for make in MODELS.values())
    count = shared.config.image.tokens
    np.testing.assert_array_equal(patches_over_image(shared, {}, {}), np.eye(count))
    mixed = np.asarray(patches_over_image(towers, *sown(towers, "forward")))
    share = 1 - 0.5**2  # two blocks
    np.testing.assert_allclose(mixed[0], 0.25 * np.eye(count) + share / count, rtol=1e-5)


def test_a_query_reads_all_real_states_alike():
    for make in MODELS.values():
        model = make()
        _, weights = sown(model, "query")
        first, second = np.asarray(query_over_text(model, weights))[:, 0]
        np.testing.assert_allclose(first, 1 / (2 * LENGTHS[0]), rtol=1e-5)
        assert (second > 0).sum() == 2 * LENGTHS[1]
        np.testing.assert_allclose(second.sum(), 1.0, rtol=1e-5)


@functools.cache
def mapped(name, kind, skipped=None):
    """Drawn parameters, and maps by them: of a model with all units gated, or without some."""
    tuning = {"gated": all_units(name)} if skipped is None else {"skip": skipped}
    model = build(geometry(name, replacement=2, blocks="all", **tuning))
    run = nn.apply(functools.partial(read, kind), model, mutable=["intermediates"])

    @jax.jit
    def maps(params):
        weights = run({"params": params})[1].get("intermediates", {})
        reach = text_over_image(model, params, weights, texts(kind))
        return reach, patches_over_image(model, params, weights)

    draw = np.random.default_rng(0)
    init = nn.init(functools.partial(read, kind), model)
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    params = jax.tree.map(lambda x: 0.3 * draw.normal(size=x.shape).astype(np.float32), shapes)
    return params, maps


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (n, k)
        for n in ALL
        for k in ("bidirectional", "query")
        if (n, k) != ("co_attention", "query")
    ],
)
def test_maps_of_switched_units_are_those_of_a_network_without_them(name, kind, index):
    """Where no block is left that reads the image, nothing is read of it."""
    skipped = patterns(name)[index]
    params, maps = mapped(name, kind)
    kept = {unit: float(unit not in skipped) for unit in all_units(name)}
    reach, patches = maps(with_kept(params, kept))
    _, smaller = mapped(name, kind, skipped)
    left, mixed = smaller(pruned(params, skipped))
    np.testing.assert_allclose(reach, left, atol=1e-5)
    np.testing.assert_allclose(*np.broadcast_arrays(patches, mixed), atol=1e-5)
    assert reach.shape == (len(LENGTHS), texts(kind)[1] * TOKENS, mixed.shape[-1])
    if index == 1:  # nothing is left
        assert not np.any(left)
        np.testing.assert_array_equal(mixed, np.eye(len(mixed)))
    elif index == 0:
        assert np.all(np.any(left, axis=-1))
