"""SimCLR, SimSiam and MoCo v3 against NumPy, on 1 and 8 devices, and under compression."""

import dataclasses
import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    BATCH,
    BUCKET,
    IMAGE_SIZE,
    TOKENS,
    compile_run,
    make_batch,
    objective_config,
    tiny_model,
)

from configs.invariance import get_config
from vlp_jax.compress.buckets import Bucket, View
from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.objectives import OBJECTIVES, invariance
from vlp_jax.objectives.base import PROGRESS
from vlp_jax.objectives.invariance import Drawn, MoCoV3, SimCLR, SimSiam

KEY = jax.random.key(7)
SIZES = BUCKET[0][1]
HEADS = {"hidden_dim": 24, "embedding_dim": 8}
KINDS = {"simclr": SimCLR, "simsiam": SimSiam, "moco_v3": MoCoV3}
HALF = View(IMAGE_SIZE, 8, 2)
VIEW = View.whole(IMAGE_SIZE, 8)


def embedded_by(objective, params, target, batch, sizes=SIZES, key=KEY):
    """The embeddings alone; without batch norms in the tower, a pass renews no parameter."""

    @jax.jit
    def embedded(params, target, batch, key):
        found, after = objective.embeddings(params, target, Drawn(batch, key, sizes, True))
        assert after is params
        return found

    return embedded(params, target, batch, key)


def loss_of(objective, params, extras, batch, train=True):
    """The whole output of its loss function."""
    loss = jax.jit(lambda *given: objective.loss(*given, KEY, SIZES, train=train))
    return loss(params, extras, batch)


def initial(objective, seed=0):
    """Fresh parameters and extras."""
    return jax.jit(lambda key: objective.init(key, batch_spec(SIZES, 1)))(jax.random.key(seed))


@functools.cache
def built(kind, **arguments):
    objective = KINDS[kind](model=tiny_model(), name=kind, **HEADS, **arguments)
    return objective, *initial(objective)


@pytest.fixture(scope="module")
def batch():
    rows = make_batch()
    rows["valid"][-3:] = False
    return jax.tree.map(jnp.asarray, rows)


def config_of(kind, **overrides):
    return objective_config(kind, HEADS, **overrides)


def nt_xent(one, other, temperature):
    """The definition, view by view: 2 n vectors, each against all but itself."""
    z = np.concatenate([one, other]).astype(np.float64)
    n, losses, right = len(one), [], []
    for i in range(2 * n):
        logits = z[i] @ z.T / temperature
        partner = (i + n) % (2 * n)
        others = np.delete(logits, i)
        losses.append(np.log(np.exp(others).sum()) - logits[partner])
        right.append(logits[partner] > np.delete(logits, [i, partner]).max())
    return np.mean(losses), np.mean(right)


def info_nce(query, key, temperature):
    logits = np.asarray(query, np.float64) @ np.asarray(key, np.float64).T / temperature
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diagonal(logits))


def test_simclr_is_nt_xent(batch):
    objective, params, extras = built("simclr", temperature=0.5)
    one, other = embedded_by(objective, params, extras, batch)
    output = loss_of(objective, params, extras, batch)
    rows = np.asarray(batch["valid"])
    loss, accuracy = nt_xent(np.asarray(one)[rows], np.asarray(other)[rows], 0.5)
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(loss, rel=1e-5)
    found = output.metrics["accuracy"]
    assert float(found.sum / found.weight) == pytest.approx(accuracy)
    assert int(output.loss.weight) == rows.sum()


def test_moco_is_info_nce_of_both_directions(batch):
    objective, params, extras = built("moco_v3", temperature=0.5)
    output = loss_of(objective, params, extras, batch)
    one, other, key_one, key_other = embedded_by(objective, params, output.extras["target"], batch)
    rows = np.asarray(batch["valid"])
    one, other, key_one, key_other = (np.asarray(x)[rows] for x in (one, other, key_one, key_other))
    expected = 2 * 0.5 * (info_nce(one, key_other, 0.5) + info_nce(other, key_one, 0.5))
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(expected, rel=1e-5)


def test_simsiam_is_the_negative_cosine_of_both_directions(batch):
    objective, params, extras = built("simsiam")
    one, other, from_one, from_other = (
        np.asarray(x, np.float64) for x in embedded_by(objective, params, extras, batch)
    )
    rows = np.asarray(batch["valid"])
    cosines = (from_one * other).sum(axis=1) + (from_other * one).sum(axis=1)
    output = loss_of(objective, params, extras, batch)
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(
        -cosines[rows].mean() / 2, rel=1e-5
    )


def test_the_moving_average_is_renewed_before_the_keys_and_keeps_no_gradient(batch):
    objective, params, _ = built("moco_v3", momentum=0.9)
    target = jax.tree.map(lambda x: x + 1.0, objective._averaged(params))
    now = {**batch, PROGRESS: jnp.float32(0.5)}

    def loss(params, target):
        output = objective.loss(params, {"target": target}, now, KEY, SIZES)
        return output.loss.sum, output.extras["target"]

    gradients = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))
    (_, renewed), gradient = gradients(params, target)
    momentum = 1 - 0.1 * 0.5 * (1 + np.cos(np.pi * 0.5))
    expected = jax.tree.map(
        lambda old, new: momentum * old + (1 - momentum) * new, target, objective._averaged(params)
    )
    chex.assert_trees_all_close(renewed, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, target))
    assert [float(objective.momentum_at(share)) for share in (0.0, 1.0)] == pytest.approx([0.9, 1])


def test_keys_are_made_by_the_average_after_its_renewal(batch):
    """A target far from the parameters: neither the old one nor the parameters give this loss."""
    objective, params, _ = built("moco_v3", momentum=0.5, temperature=0.5)
    target = jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
        objective._averaged(params),
    )
    output = loss_of(objective, params, {"target": target}, batch)
    found = float(output.loss.sum / output.loss.weight)
    rows = np.asarray(batch["valid"])

    def loss_by(keys_of):
        one, other, key_one, key_other = (
            np.asarray(x)[rows] for x in embedded_by(objective, params, keys_of, batch)
        )
        return 2 * 0.5 * (info_nce(one, key_other, 0.5) + info_nce(other, key_one, 0.5))

    assert found == pytest.approx(loss_by(output.extras["target"]), rel=1e-5)
    for other in (target, objective._averaged(params)):
        assert found != pytest.approx(loss_by(other), rel=1e-3)


def test_outside_training_the_parameters_make_the_keys(batch):
    """An evaluator knows no moving average; a random one would make its figures meaningless."""
    objective, params, _ = built("moco_v3", temperature=0.5)
    _, random = initial(objective, seed=9)
    own = {"target": objective._averaged(params)}
    found, expected = (
        loss_of(objective, params, extras, batch, train=False).loss.sum for extras in (random, own)
    )
    assert float(found) == pytest.approx(float(expected))


def test_a_run_that_starts_from_parameters_averages_those():
    objective, params, extras = built("moco_v3")
    other = jax.tree.map(lambda x: x + 1.0, params)
    chex.assert_trees_all_equal(
        objective.started_from(other, extras)["target"], objective._averaged(other)
    )


def test_simsiam_sends_no_gradient_through_what_it_compares_with(batch):
    objective, params, extras = built("simsiam")
    one, other, *_ = embedded_by(objective, params, extras, batch)

    def loss(params):
        return objective.loss(params, extras, batch, KEY, SIZES).loss.sum

    def with_constants(params):
        _, _, from_one, from_other = embedded_by(objective, params, extras, batch)
        cosines = (from_one * other).sum(axis=1) + (from_other * one).sum(axis=1)
        return -jnp.where(batch["valid"], cosines, 0.0).sum() / 2

    chex.assert_trees_all_close(
        jax.jit(jax.grad(loss))(params),
        jax.jit(jax.grad(with_constants))(params),
        rtol=1e-4,
        atol=5e-4,  # of entries up to 30, sums of terms that are larger still
    )


@pytest.mark.parametrize("kind", ["simclr", "moco_v3"])
def test_a_collapse_is_no_accuracy(kind, batch):
    """All embeddings alike: none is nearer than the others, and they do not spread."""
    objective, params, extras = built(kind)
    last = "predictor" if kind == "moco_v3" else "projector"
    flat = jax.tree.map(jnp.zeros_like, params[f"{kind}_{last}"])
    output = loss_of(objective, {**params, f"{kind}_{last}": flat}, extras, batch)
    figures = {name: float(mean.sum / mean.weight) for name, mean in output.metrics.items()}
    assert figures == {"accuracy": 0.0, "embedding_std": 0.0, "alignment": 0.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_eight_devices_equal_one(kind):
    """Negatives, batch norms and draws are those of the global batch."""
    results = []
    for mesh in (None, make_mesh(data=4, fsdp=2)):
        config = config_of(kind, **{"optim.eps": 1e-3})
        with config.unlocked():
            config.objectives[kind].hidden_dim = 512  # so large that heads are cut by fsdp
        run = compile_run(config, mesh)
        state, metrics = run(run.init(), make_batch(), make_batch(seed=1))
        results.append((jax.device_get((state.params, state.extras["objectives"])), metrics))
    (one, first), (eight, second) = results
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6), name
    # Batch norms divide by deviations, of which some are small: gradients keep fewer digits then.
    chex.assert_trees_all_close(one, eight, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["simclr", "moco_v3"])
def test_queries_and_keys_are_compressed_apart(kind):
    """A bucket of whole images is the plain update; another key changes keys alone."""
    objective, params, extras = built(kind)
    whole = View.whole(IMAGE_SIZE, 8)
    batch = jax.tree.map(jnp.asarray, make_batch())

    def embedded(*views):
        bucket = Bucket(TOKENS, IMAGE_SIZE, views)
        found = embedded_by(objective, params, extras.get("target"), batch, bucket)
        return [np.asarray(x) for x in found]

    plain, same, key, both = embedded(), embedded(whole), embedded(whole, HALF), embedded(HALF)
    queries = 2 if kind == "moco_v3" else 1
    for index, (a, b) in enumerate(zip(plain, same, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=str(index))
    for index, (a, b, c) in enumerate(zip(plain, key, both, strict=True)):
        assert (np.abs(a - b).max() < 1e-5) == (index < queries), index
        assert (a != c).any(), index


def test_a_view_of_another_size_is_the_same_crop():
    """Larger patches of a larger picture: as many tokens, and nearly the same embedding."""
    objective, params, extras = built("simclr")
    batch = jax.tree.map(jnp.asarray, make_batch())

    def tower(*views, key=KEY):
        bucket = Bucket(TOKENS, IMAGE_SIZE, views)
        return embedded_by(objective, params, extras.get("target"), batch, bucket, key)[0]

    plain = tower()
    near = (plain * tower(View.whole(32, 16))).sum(axis=1)
    other = tower(key=jax.random.key(8))
    assert float(near.mean()) > float((plain * other).sum(axis=1).mean()) + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_trains_and_the_loss_falls(kind):
    config = config_of(kind, **{"schedule.peak": 3e-3, "schedule.warmup_steps": 0})
    if kind == "moco_v3":  # in so few updates, keys that lag behind would not be found
        with config.unlocked():
            config.objectives[kind].momentum = 0.5
    run = compile_run(config)
    state, losses = run.init(), []
    for _ in range(80):
        state, metrics = run(state, make_batch())
        losses.append(metrics["loss"])
    assert np.isfinite(losses).all()
    # Views differ from update to update, and so does the loss by itself.
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert int(state.extras["skipped"]) == 0


def test_flops_of_keys_count_a_third():
    objective, *_ = built("moco_v3")
    whole, half = (
        Bucket(TOKENS, IMAGE_SIZE, (View.whole(IMAGE_SIZE, 8), v))
        for v in (View.whole(IMAGE_SIZE, 8), HALF)
    )
    saved = objective.flops(0) - objective.flops(0, half)
    assert objective.flops(0, whole) == objective.flops(0)
    query = Bucket(TOKENS, IMAGE_SIZE, (HALF, View.whole(IMAGE_SIZE, 8)))
    assert objective.flops(0) - objective.flops(0, query) == pytest.approx(3 * saved)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("simclr", {"temperature": 0.0}, "temperature: 0.0 is no temperature"),
        ("moco_v3", {"momentum": 1.0}, "momentum: 1.0"),
        ("simsiam", {"augment": {"blurr": 0.1}}, "augment.blurr"),
        ("simclr", {"augment_second": {"scale": [0.9, 0.1]}}, "augment_second.scale"),
        ("simclr", {"augment": {"scale": 0.5}}, "augment.scale: 0.5 is no range"),
        ("simclr", {"augment": {"blur": "a"}}, "augment.blur: 'a' is no share"),
        ("simclr", {"hidden_dim": 2.5}, "hidden_dim: 2.5 features"),
        ("simsiam", {"predictor_dim": 0}, "predictor_dim: 0 features"),
    ],
)
def test_bad_arguments_name_the_key(kind, arguments, message):
    with pytest.raises(ConfigError, match=rf"objectives\.{kind}\.{message}"):
        KINDS[kind](model=tiny_model(), name=kind, **arguments)


def test_dropout_in_the_tower_is_refused():
    model = tiny_model(**{"image.dropout": 0.1})
    with pytest.raises(ConfigError, match=r"model\.image\.dropout: 0\.1: objectives\.simclr"):
        SimCLR(model=model, name="simclr")


def test_batches_are_whole():
    for kind in KINDS.values():
        assert not kind.splittable
    assert BATCH == 16


@pytest.mark.parametrize("view", [None, HALF], ids=["whole", "half"])
def test_pictures_pass_the_tower_together_as_they_do_alone(batch, view):
    """Only pictures of one size; every one with the kept patches and the recipe of its own."""
    objective, params, _ = built("moco_v3")
    sizes = dataclasses.replace(SIZES, views=() if view is None else (view, VIEW))
    drawn = Drawn(batch, KEY, sizes, True)
    looks = [objective._look(drawn, picture, 0) for picture in (0, 1)]
    looks += [objective._look(drawn, picture, 1, salt=1) for picture in (0, 1)]

    @jax.jit
    def projected(params):
        together, _ = objective._project(params, drawn, looks)
        return together, [objective._project(params, drawn, [look])[0][0] for look in looks]

    together, alone = projected(params)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for one, other in itertools.combinations(alone[:2] if view is None else alone, 2):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-3


def test_paths_are_dropped_for_each_picture_of_a_pass_apart(batch):
    """The same pictures twice in one pass: some rows drop the same paths, others not."""
    model = tiny_model(**{"image.drop_path": 0.5, "image.depth": 2})
    objective = SimCLR(model=model, name="simclr", **HEADS)
    params, _ = initial(objective)
    for train in (True, False):
        drawn = Drawn(batch, KEY, SIZES, train)
        looks = [objective._look(drawn, 0, 0)] * 2
        encode = jax.jit(lambda p, d=drawn, e=looks: objective._encode(p, d, e, True)[0])
        one, other = encode(params)
        same = np.isclose(one, other, atol=1e-5).all(axis=1)
        assert same.all() if not train else 0 < same.sum() < BATCH


@pytest.mark.parametrize(("kind", "passes"), [("simclr", 1), ("moco_v3", 2)])
def test_a_network_runs_once_for_both_pictures(batch, kind, passes, monkeypatch):
    objective, params, extras = built(kind)
    encode, rows = invariance.encode, []

    def counted(config, params, pixels, *arguments):
        rows.append(len(pixels))
        return encode(config, params, pixels, *arguments)

    monkeypatch.setattr(invariance, "encode", counted)
    jax.eval_shape(lambda: objective.loss(params, extras, batch, KEY, SIZES))
    assert rows == [2 * BATCH] * passes


@pytest.mark.parametrize("name", ["dino", "mim", "moco_v3", "simclr"])
def test_the_recipes_that_configs_spell_out_are_the_defaults(name: str) -> None:
    """They are keys of the config so that flags can change them; archives of cells rely on it."""
    section = get_config(name).objectives[name].to_dict()
    defaults = inspect.signature(OBJECTIVES[name]).parameters
    spelled = {"temperature", "teacher_temperature", "momentum", "kept_share"} & section.keys()
    assert spelled
    assert {key: section[key] for key in spelled} == {key: defaults[key].default for key in spelled}


@pytest.mark.parametrize("name", ["dino", "moco_v3", "simclr", "simsiam"])
def test_the_crops_that_configs_spell_out_are_the_defaults(name: str) -> None:
    section, kind = get_config(name).objectives[name], OBJECTIVES[name]
    assert section.augment.scale == kind.first_recipe.scale == kind.second_recipe.scale
    if "augment_small" in section:
        assert section.augment_small.scale == kind.small_recipe.scale
