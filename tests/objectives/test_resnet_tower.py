"""A convolutional tower under objectives of images: statistics, devices, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import (
    BATCH,
    BUCKET,
    IMAGE_SIZE,
    TOKENS,
    compile_run,
    make_batch,
    make_program,
    objective_config,
)

from vlp_jax.compress.buckets import Bucket, View
from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.objectives.invariance import Drawn
from vlp_jax.objectives.tower import STATISTICS, TOWER, tower_tokens

KEY = jax.random.key(7)
SIZES = BUCKET[0][1]
HEADS = {"hidden_dim": 24, "embedding_dim": 8}
RESNET = {"type": "resnet", "stages": (1, 1), "channels": 4, "bottleneck": True, "stem": "conv3"}


def config_of(kind, **overrides):
    sections = {
        "dino": {**HEADS, "prototypes": 16, "small_crops": 1},
        "image_classification": {"num_classes": 5},
    }
    config = objective_config(kind, sections.get(kind, HEADS), **overrides)
    with config.unlocked():
        config.model.image = ConfigDict(RESNET)
    return config


def objective_of(kind):
    [objective] = make_program(config_of(kind)).objectives
    return objective, *initial(objective)


def initial(objective):
    """Fresh parameters and extras."""
    return jax.jit(lambda key: objective.init(key, batch_spec(SIZES, 1)))(jax.random.key(0))


def loss_of(objective, params, extras, batch, key=KEY, sizes=SIZES, train=True):
    """The whole output of its loss function."""
    loss = jax.jit(lambda *given: objective.loss(*given, sizes, train=train))
    return loss(params, extras, batch, key)


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(jnp.asarray, make_batch())


@pytest.mark.parametrize("kind", ["simclr", "moco_v3", "image_classification"])
@pytest.mark.slow
def test_eight_devices_equal_one_and_the_statistics_move(kind):
    """Norms read the global batch, so that everything that is renewed is the same."""
    results = []
    host = make_batch()
    if kind == "image_classification":
        host["label"] = np.arange(BATCH, dtype=np.int32) % 5
    for mesh in (None, make_mesh(data=4, fsdp=2)):
        run = compile_run(config_of(kind, **{"optim.eps": 1e-3, "optim.ema_decay": 0.5}), mesh)
        state = run.init()
        before = jax.device_get(state.params[STATISTICS])
        state, metrics = run(state, host)
        after = jax.device_get((state.params, state.extras["objectives"], state.extras["ema"]))
        results.append((after, metrics))
    (one, metrics), (eight, others) = results
    for name in metrics:
        assert others[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    chex.assert_trees_all_close(one, eight, rtol=2e-3, atol=2e-5)
    moved = one[0][STATISTICS]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(moved), strict=True):
        assert (np.asarray(old) != np.asarray(new)).all()
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, before, moved)
    chex.assert_trees_all_close(one[2][STATISTICS], averaged, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_an_update_sets_the_statistics_to_those_of_its_passes(batch):
    """Decay, rate and clipping of the optimiser do not reach them; both views count."""
    config = config_of("simclr", **{"optim.weight_decay": 0.5, "optim.clip_norm": 1e-6})
    run = compile_run(config)
    state = run.init()
    start = jax.device_get(state.params)
    [objective] = run.program.objectives
    rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 0)
    expected = loss_of(objective, start, {}, batch, rng).statistics[STATISTICS]

    @jax.jit
    def passed(params):
        drawn = Drawn(batch, rng, SIZES, True)
        looks = [objective._look(drawn, picture, picture) for picture in (0, 1)]
        _, first = objective._project(params, drawn, looks[:1])
        return first, objective._project(first, drawn, looks[1:])[1]

    first, both = passed(start)
    state, _ = run(state, make_batch())
    chex.assert_trees_all_close(state.params[STATISTICS], expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(expected, both[STATISTICS], rtol=1e-5, atol=1e-7)
    for once, twice in zip(
        jax.tree.leaves(first[STATISTICS]), jax.tree.leaves(both[STATISTICS]), strict=True
    ):
        assert (np.asarray(once) != np.asarray(twice)).any()


def test_outside_training_rows_do_not_know_their_batch(batch):
    objective, params, extras = objective_of("simclr")
    output = loss_of(objective, params, extras, batch, train=False)
    chex.assert_trees_all_equal(output.statistics[STATISTICS], params[STATISTICS])
    pixels = jax.random.normal(KEY, (4, IMAGE_SIZE, IMAGE_SIZE, 3))
    config = objective.model.config.image
    tokens = jax.jit(functools.partial(tower_tokens, config))
    four, two = (tokens(params, pixels[:n]) for n in (4, 2))
    np.testing.assert_allclose(four[:2], two, rtol=1e-5, atol=1e-5)
    other = {**params, STATISTICS: jax.tree.map(lambda x: x + 1.0, params[STATISTICS])}
    assert (np.asarray(tokens(other, pixels)) != np.asarray(four)).any()


@pytest.mark.parametrize("kind", ["moco_v3", "dino"])
@pytest.mark.slow
def test_the_moving_average_has_statistics_of_its_own(kind, batch):
    objective, params, extras = objective_of(kind)
    assert set(extras["target"]) == {TOWER, STATISTICS, f"{kind}_projector"}
    moved = {**params, STATISTICS: jax.tree.map(lambda x: x + 1.0, params[STATISTICS])}
    output = loss_of(objective, moved, extras, batch)
    share = objective.momentum
    expected = jax.tree.map(
        lambda old, new: share * old + (1 - share) * new,
        extras["target"][STATISTICS],
        moved[STATISTICS],
    )
    chex.assert_trees_all_close(output.extras["target"][STATISTICS], expected, rtol=1e-5)


def test_smaller_pictures_are_a_bucket(batch):
    config = config_of("simclr")
    config.compression.schedule = "staged"
    config.compression.buckets = ("p2@8", "whole")
    [objective] = make_program(config).objectives
    small = Bucket(TOKENS, IMAGE_SIZE, (View.whole(8, 2),))
    assert objective.flops(0, small) < 0.3 * objective.flops(0)
    output = loss_of(objective, *initial(objective), batch, sizes=small)
    assert np.isfinite(float(output.loss.sum))


def test_batch_norms_forbid_micro_batches():
    [objective] = make_program(config_of("image_classification")).objectives
    assert not objective.splittable


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("flm", {}, r"model\.image\.type: a ResNet, but objectives\.flm needs"),
        ("itc", {}, r"model\.image\.type: a ResNet, but objectives\.itc needs"),
        ("mim", {}, r"model\.image\.type: a ResNet, but objectives\.mim needs"),
        (
            "simclr",
            {"compression.buckets": ("p2@16k8", "whole"), "compression.schedule": "staged"},
            r"compression\.buckets: p2@16k8 drops patches",
        ),
    ],
)
def test_what_a_convolution_cannot_do_is_refused(kind, overrides, message):
    config = config_of(kind, **overrides)
    with config.unlocked():
        config.objectives = {kind: HEADS if kind == "simclr" else {"weight": 1.0}}
    with pytest.raises(ConfigError, match=message):
        make_program(config)


def test_another_kind_of_tower_is_refused():
    config = config_of("simclr")
    config.model.image.type = "convnext"
    with pytest.raises(ValueError, match=r"model\.image\.type: 'convnext'\. Use 'vit' or"):
        make_program(config)
