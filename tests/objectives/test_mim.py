"""Masked image modelling: hidden patches are the target, and only they."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    IMAGE_SIZE,
    TOKENS,
    Run,
    make_batch,
    make_program,
    objective_config,
    shared_model,
    tiny_model,
)

from vlp_jax.compress.buckets import Bucket, View
from vlp_jax.compress.token_dropout import kept_patches
from vlp_jax.data.augment import random_view, standardize
from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.image_decoder import ImageDecoder
from vlp_jax.models.vit import ViT
from vlp_jax.objectives.base import example_keys
from vlp_jax.objectives.mim import _KEPT, MIM, scaled_patches

KEY = jax.random.key(7)
SIZE, PATCH = 32, 8
SIZES = Bucket(TOKENS, SIZE)
SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def built(**arguments):
    model = tiny_model(**arguments.pop("model", {}))
    model = model.clone(config=_sized(model.config))
    objective = MIM(model=model, name="mim", **{**SMALL, **arguments})
    return objective, *initial(objective)


def initial(objective):
    """Fresh parameters and extras."""
    return jax.jit(lambda key: objective.init(key, batch_spec(SIZES, 1)))(jax.random.key(0))


def loss_of(objective, params, extras, batch, sizes=SIZES):
    """The whole output of its loss function."""
    return jax.jit(lambda *given: objective.loss(*given, KEY, sizes))(params, extras, batch)


def _sized(config):
    return dataclasses.replace(config, image=dataclasses.replace(config.image, image_size=SIZE))


@pytest.fixture(scope="module")
def batch():
    rows = make_batch(image_size=SIZE)
    rows["valid"][-3:] = False
    return jax.tree.map(jnp.asarray, rows)


def test_the_loss_is_the_error_of_hidden_patches(batch):
    """With a decoder of zeros, what is predicted is its bias, and the error can be told."""
    objective, params, extras = built()
    decoder = jax.tree.map(jnp.zeros_like, params["mim_decoder"])
    bias = jnp.linspace(-1.0, 1.0, 3 * PATCH**2)
    decoder["pixels"] = {**decoder["pixels"], "bias": bias}
    output = loss_of(objective, {**params, "mim_decoder": decoder}, extras, batch)
    keys = example_keys(KEY, batch["position"])
    view = standardize(random_view(batch["image"], keys, objective.recipe, SIZE, SIZE))
    target = np.asarray(scaled_patches(view, PATCH), np.float64)
    np.testing.assert_allclose(target.mean(axis=-1), 0, atol=1e-5)
    chosen = example_keys(jax.random.fold_in(KEY, _KEPT), batch["position"])
    kept = np.asarray(kept_patches(chosen, 16, 4))
    losses = []
    for row in np.flatnonzero(batch["valid"]):
        hidden = np.setdiff1d(np.arange(16), kept[row])
        losses.append(np.square(target[row, hidden] - np.asarray(bias)[None]).mean())
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_decoder_puts_tokens_where_their_patches_lie():
    """Without blocks, each place reads its own token, or the learned one."""
    objective, *_ = built()
    config = objective.decoder.config
    decoder = ImageDecoder(dataclasses.replace(config, depth=0))
    view = View(SIZE, PATCH, 3)
    kept = jnp.array([[1, 4, 9], [0, 2, 15]])
    tokens = jax.random.normal(KEY, (2, 4, 32))
    params = decoder.init(KEY, tokens, kept, view)
    plain = decoder.apply(params, tokens, kept, view)
    assert plain.shape == (2, 16, 3 * PATCH**2)
    moved = decoder.apply(params, tokens.at[0, 2].add(1.0), kept, view)
    changed = np.abs(np.asarray(moved - plain)).max(axis=-1) > 1e-6
    assert np.argwhere(changed).tolist() == [[0, 4]]
    # Places that were not kept differ by their positions alone, the same in both images.
    both_hidden = [p for p in range(16) if p not in (1, 4, 9, 0, 2, 15)]
    np.testing.assert_allclose(plain[0, both_hidden], plain[1, both_hidden], atol=1e-6)


def test_hidden_pixels_do_not_reach_the_tower(batch):
    objective, params, _ = built()
    chosen = example_keys(jax.random.fold_in(KEY, _KEPT), batch["position"])
    kept = np.asarray(kept_patches(chosen, 16, 4))
    hidden = int(np.setdiff1d(np.arange(16), kept[0])[0])

    @jax.jit
    def tokens(pixels):
        view = objective.encoded(None)
        return ViT(objective.model.config.image).apply(
            {"params": params["image_tower"]}, pixels, None, view, chosen
        )[0]

    pixels = jax.random.normal(KEY, (16, SIZE, SIZE, 3))
    y, x = divmod(hidden, 4)
    touched = pixels.at[0, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].add(9.0)
    np.testing.assert_array_equal(tokens(pixels), tokens(touched))


def test_a_bucket_bounds_what_is_kept_and_scales_patches(batch):
    objective, params, extras = built()
    assert objective.encoded(None).kept == 4
    two = Bucket(TOKENS, SIZE, (View(SIZE, PATCH, 2),))
    assert objective.encoded(two).kept == 2
    assert objective.encoded(Bucket(TOKENS, SIZE, (View.whole(SIZE, 16),))).kept == 1
    assert objective.flops(0, two) < objective.flops(0)
    for bucket in (two, Bucket(TOKENS, SIZE, (View.whole(SIZE, 16),))):
        output = loss_of(objective, params, extras, batch, bucket)
        assert np.isfinite(float(output.loss.sum))


def config_of(**overrides):
    return objective_config("mim", SMALL, **{"data.image_size": SIZE, **overrides})


def compiled(config, mesh=None):
    program = make_program(config, mesh)
    return Run(program, program.lower((("pairs", SIZES),)).compile())


@pytest.mark.slow
def test_eight_devices_and_micro_batches_equal_one():
    results = []
    for mesh, parts in ((None, 1), (make_mesh(data=4, fsdp=2), 1), (None, 4)):
        config = config_of(**{"optim.eps": 1e-3, "optim.accumulation": parts})
        run = compiled(config, mesh)
        state, metrics = run(run.init(), make_batch(image_size=SIZE))
        results.append((jax.device_get(state.params), metrics["loss"]))
    for params, loss in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-5)
        chex.assert_trees_all_close(params, results[0][0], rtol=2e-3, atol=2e-5)


def test_an_update_trains_and_the_loss_falls():
    config = config_of(**{"schedule.peak": 3e-3, "schedule.warmup_steps": 0})
    run = compiled(config)
    state, first = run(run.init(), make_batch(image_size=SIZE))
    for _ in range(30):
        state, last = run(state, make_batch(image_size=SIZE))
    assert last["loss"] < first["loss"]


def on_shared(**arguments):
    """The objective on a shared stack, with parameters that differ from zero and one."""
    model = shared_model()
    model = model.clone(config=_sized(model.config))
    objective = MIM(model=model, name="mim", **{**SMALL, **arguments})
    params, extras = initial(objective)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return objective, jax.tree.unflatten(tree, moved), extras


@pytest.mark.slow
def test_a_shared_stack_is_the_tower_with_its_modality_folded(batch):
    """Added to the class token and to the bias of the patches, it is gone."""
    objective, params, extras = on_shared()
    image = dataclasses.replace(objective.model.config.image, modality=False)
    model = tiny_model()
    model = model.clone(config=dataclasses.replace(model.config, image=image))
    plain = dataclasses.replace(objective, model=model)
    tower = dict(params["image_tower"])
    mark = tower.pop("modality_embedding")
    patches = tower["patch_embedding"]
    tower["class_token"] = tower["class_token"] + mark
    tower["patch_embedding"] = {**patches, "bias": patches["bias"] + mark[0, 0]}
    folded = {**params, "image_tower": tower}
    spec = jax.eval_shape(lambda: plain.init(KEY, batch_spec(SIZES, 1))[0])
    assert jax.tree.map(jnp.shape, spec) == jax.tree.map(jnp.shape, folded)
    loss = jax.jit(lambda p: objective.loss(p, extras, batch, KEY, SIZES).loss.sum)
    expected = jax.jit(lambda p: plain.loss(p, extras, batch, KEY, SIZES).loss.sum)
    np.testing.assert_allclose(loss(params), expected(folded), rtol=1e-5)


def test_with_text_the_words_tell_what_is_hidden(batch):
    """Their padding tells nothing, hidden patches still nothing, and texts learn."""
    objective, params, extras = on_shared(with_text=True)
    assert {"image_tower", "text_embedding", "mim_decoder"} <= params.keys()

    @jax.jit
    def losses(ids, image):
        changed = {**batch, "text_ids": ids, "image": image}
        output = objective.loss(params, extras, changed, KEY, SIZES)
        return output.loss.sum

    ids, image = batch["text_ids"], batch["image"]
    plain = float(losses(ids, image))
    padding = jnp.arange(TOKENS)[None] >= batch["text_length"][:, None]
    assert float(losses(jnp.where(padding, 9, ids), image)) == plain
    assert float(losses(jnp.where(padding, ids, (ids + 3) % 50), image)) != plain
    gradient = jax.jit(jax.grad(lambda p: objective.loss(p, extras, batch, KEY, SIZES).loss.sum))(
        params
    )
    assert np.asarray(gradient["text_embedding"]["token"]["embedding"]).any()
    assert not np.asarray(gradient["stream_embedding"]).any()
    assert objective.flops(10) > dataclasses.replace(objective, with_text=False).flops(10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"with_text": True}, r"objectives\.mim\.with_text: True, .* type 'shared'"),
        ({"kept_share": 1.0}, r"objectives\.mim\.kept_share: 1.0"),
        ({"decoder_depth": 0}, r"objectives\.mim\.decoder_depth: 0"),
        ({"decoder_heads": 3}, r"objectives\.mim\.decoder_width: width 16 is not a multiple"),
        ({"augment": {"blurr": 1.0}}, r"objectives\.mim\.augment\.blurr"),
        ({"model": {"image.stem": "conv"}}, r"model\.image\.stem: 'conv'"),
    ],
)
def test_bad_arguments_name_the_key(arguments, message):
    with pytest.raises(ConfigError, match=message):
        built(**arguments)


def two_of_one_decoder(**section):
    config = objective_config("mim", {"type": "mim", "kept_share": 0.5, **SMALL})
    with config.unlocked():
        config.objectives.images = {"type": "mim", "decoder_of": "mim", **SMALL, **section}
    return make_program(config)


@pytest.mark.slow
def test_two_may_train_one_decoder():
    program = two_of_one_decoder()
    state = program.init()
    assert [name for name in state.params if name.endswith("_decoder")] == ["mim_decoder"]
    batch = jax.tree.map(jnp.asarray, make_batch())
    for objective in program.objectives:

        def loss(params, objective=objective):
            return objective.loss(params, {}, batch, KEY, Bucket(TOKENS, IMAGE_SIZE)).loss.sum

        gradient = jax.jit(jax.grad(loss))(state.params)["mim_decoder"]
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "section", [{"decoder_of": "other"}, {"decoder_of": "images"}, {"decoder_width": 8}]
)
def test_one_decoder_has_one_geometry(section):
    with pytest.raises(ConfigError, match=r"objectives\.images\.decoder_of: '\w+' is no `mim`"):
        two_of_one_decoder(**section)
