"""DINO against NumPy: targets, centre, temperatures, and what evaluators see of it."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    BUCKET,
    IMAGE_SIZE,
    TOKENS,
    compile_run,
    make_batch,
    make_program,
    objective_config,
    tiny_model,
)

from vlp_jax.compress.buckets import Bucket, View
from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.heads import PrototypeHead
from vlp_jax.objectives.base import PROGRESS
from vlp_jax.objectives.dino import DINO, balanced
from vlp_jax.objectives.invariance import Drawn

KEY = jax.random.key(7)
SIZES = BUCKET[0][1]
HEAD = {"hidden_dim": 24, "embedding_dim": 8, "prototypes": 12, "small_crops": 2}
SMALL = {**HEAD, "small_size": 8}
HALF = View(IMAGE_SIZE, 8, 2)


def embedded_by(objective, params, target, batch, sizes=SIZES):
    """The embeddings alone; without batch norms in the tower, a pass renews no parameter."""

    @jax.jit
    def embedded(params, target, batch):
        found, after = objective.embeddings(params, target, Drawn(batch, KEY, sizes, True))
        assert after is params
        return found

    return embedded(params, target, batch)


def loss_of(objective, train=True):
    """Its loss, compiled: parameters, extras and batch -> the output."""
    return jax.jit(lambda *given: objective.loss(*given, KEY, SIZES, train=train))


def cosines_after(objective, params, output, batch):
    """The student's and the teacher's cosines in a loss, by the target that it left: float64."""
    embedded = embedded_by(objective, params, output.extras["target"], batch)
    return [np.asarray(x, np.float64) for x in embedded]


def dino(**arguments):
    return DINO(model=tiny_model(), name="dino", **{**SMALL, **arguments})


def initial(objective):
    """Fresh parameters and extras."""
    return jax.jit(lambda key: objective.init(key, batch_spec(SIZES, 1)))(jax.random.key(0))


@functools.cache
def built(**arguments):
    objective = dino(**arguments)
    return objective, *initial(objective)


def config_of(**overrides):
    return objective_config("dino", SMALL, **overrides)


@pytest.fixture(scope="module")
def batch():
    rows = make_batch()
    rows["valid"][-3:] = False
    return jax.tree.map(jnp.asarray, rows)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_the_loss_is_that_of_its_paper(batch):
    """All pairs of a teacher's crop and another of the student, and the centre after it."""
    objective, params, extras = built(teacher_temperature=0.07, first_teacher_temperature=0.04)
    extras = {**extras, "centre": jnp.linspace(-0.2, 0.2, 12)}
    now = {**batch, PROGRESS: jnp.float32(0.05)}  # half of the warm-up
    output = loss_of(objective)(params, extras, now)
    *student, one, other = cosines_after(objective, params, output, batch)
    assert len(student) == 4
    centre, rows = np.asarray(extras["centre"], np.float64), np.asarray(batch["valid"])
    total, count = 0.0, 0
    for index, teacher in enumerate((one, other)):
        target = softmax((teacher - centre) / 0.055)
        for crop, cosines in enumerate(student):
            if crop != index:
                total -= (target * np.log(softmax(cosines / 0.1))).sum(axis=1)[rows].mean()
                count += 1
    assert count == 6
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(total / count, rel=1e-4)
    mean = np.concatenate([one[rows], other[rows]]).mean(axis=0)
    np.testing.assert_allclose(output.extras["centre"], 0.9 * centre + 0.1 * mean, atol=1e-6)
    entropy = -(softmax((one - centre) / 0.055) * np.log(softmax((one - centre) / 0.055))).sum(1)
    found = output.metrics["teacher_entropy"]
    assert float(found.sum / found.weight) == pytest.approx(entropy[rows].mean(), rel=1e-4)


def sinkhorn(answers):
    """Three turns on positive numbers, float64 [N, K]."""
    for _ in range(3):
        answers = answers / answers.sum(axis=0, keepdims=True)
        answers = answers / answers.sum(axis=1, keepdims=True)
    return answers


def test_balanced_answers_give_every_prototype_its_share(batch):
    """The loss against Sinkhorn and Knopp in NumPy over the valid rows of both large crops."""
    objective, params, extras = built(centring="sinkhorn", teacher_temperature=0.05)
    now = {**batch, PROGRESS: jnp.float32(1.0)}
    output = loss_of(objective)(params, extras, now)
    *student, one, other = cosines_after(objective, params, output, batch)
    rows = np.asarray(batch["valid"])
    targets = np.split(sinkhorn(np.exp(np.concatenate([one[rows], other[rows]]) / 0.05)), 2)
    terms = [
        -(target * np.log(softmax(cosines[rows] / 0.1))).sum(axis=1).mean()
        for index, target in enumerate(targets)
        for crop, cosines in enumerate(student)
        if crop != index
    ]
    found = float(output.loss.sum / output.loss.weight)
    assert found == pytest.approx(np.mean(terms), rel=1e-4)
    usage = np.asarray(balanced(jnp.asarray(one, jnp.float32) / 0.05, batch["valid"]))[rows].sum(0)
    plain = softmax(one[rows] / 0.05).sum(axis=0)
    assert usage.std() < 0.35 * plain.std()  # three turns end with the rows
    np.testing.assert_array_equal(output.extras["centre"], extras["centre"])


def test_without_a_valid_row_answers_stay_finite():
    logits = 100.0 * jax.random.normal(KEY, (3, 4))
    np.testing.assert_allclose(
        balanced(logits, jnp.zeros(3, bool)), jax.nn.softmax(logits), atol=1e-6
    )


def test_outside_training_nothing_is_renewed(batch):
    objective, params, extras = built()
    output = loss_of(objective, train=False)(params, extras, batch)
    chex.assert_trees_all_equal(output.extras, extras)


def test_neither_target_nor_frozen_prototypes_have_a_gradient(batch):
    objective, params, extras = built(frozen_prototypes=0.1)

    def loss(params, target, progress):
        own, now = {**extras, "target": target}, {**batch, PROGRESS: progress}
        return objective.loss(params, own, now, KEY, SIZES).loss.sum

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))

    def gradient(progress):
        return gradients(params, extras["target"], jnp.float32(progress))

    early, target = gradient(0.05)
    chex.assert_trees_all_equal(target, jax.tree.map(jnp.zeros_like, target))
    late, _ = gradient(0.2)
    head = "dino_projector"
    assert not np.asarray(early[head]["prototypes"]).any()
    assert np.asarray(late[head]["prototypes"]).any()
    assert np.asarray(early[head]["dense_0"]["kernel"]).any()


def test_prototypes_are_compared_by_cosine():
    head = PrototypeHead(3, 16, 8, 12, jnp.dtype("float32"))
    x = jax.random.normal(KEY, (5, 10))
    params = head.init(KEY, x)
    near = head.apply(params, x)
    assert float(jnp.abs(near).max()) <= 1 + 1e-5
    scaled = jax.tree.map(jnp.copy, params)
    scaled["params"]["prototypes"] = 3.0 * scaled["params"]["prototypes"]
    np.testing.assert_allclose(head.apply(scaled, x), near, atol=1e-6)
    assert head.flops(10) == 2 * (10 * 16 + 16 * 16 + 16 * 8 + 8 * 12)


def test_with_norms_the_head_does_not_read_what_all_images_share():
    head = PrototypeHead(3, 16, 8, 12, jnp.dtype("float32"), norm=True)
    x = jax.random.normal(KEY, (5, 10))
    params = head.init(KEY, x)
    y = np.asarray(x, np.float64)
    for layer in range(3):
        own = jax.tree.map(np.asarray, params["params"][f"dense_{layer}"])
        y = y @ own["kernel"]
        if layer < 2:
            y = (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + 1e-5)
            y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        else:
            y = y + own["bias"]
    kernel = np.asarray(params["params"]["prototypes"], np.float64)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    near = head.apply(params, x)
    np.testing.assert_allclose(near, y @ (kernel / np.linalg.norm(kernel, axis=0)), atol=1e-4)
    np.testing.assert_allclose(head.apply(params, x + 3.0), near, atol=1e-4)


def test_small_crops_are_encoded_at_their_own_size():
    objective = dino()
    assert objective.small_view == View.whole(8, 8)
    default = DINO(model=tiny_model(), name="dino", **HEAD)
    assert default.small_view == View.whole(8, 8)  # three sevenths of 16, in patches of 8
    more = DINO(model=tiny_model(), name="dino", **{**SMALL, "small_crops": 4})
    one = (more.flops(0) - objective.flops(0)) / 2
    assert one == pytest.approx(objective._pass_flops(View.whole(8, 8), trained=True))


@pytest.mark.slow
def test_students_and_teachers_are_compressed_apart(batch):
    objective, params, extras = built()

    def embedded(*views):
        bucket = Bucket(TOKENS, IMAGE_SIZE, views)
        found = embedded_by(objective, params, extras["target"], batch, bucket)
        return [np.asarray(x) for x in found]

    whole = View.whole(IMAGE_SIZE, 8)
    plain, same = embedded(), embedded(whole)
    student, teacher = embedded(HALF, whole), embedded(whole, HALF)
    for index, (a, b, c, d) in enumerate(zip(plain, same, student, teacher, strict=True)):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any() == (index < 2), index  # small crops stay whole
        assert (a != d).any() == (index >= 4), index


@pytest.mark.parametrize(("centring", "head_norm"), [("mean", True), ("sinkhorn", False)])
@pytest.mark.slow
def test_eight_devices_equal_one(centring, head_norm):
    results = []
    config = config_of(**{"optim.eps": 1e-3})
    with config.unlocked():
        config.objectives.dino.centring = centring
        config.objectives.dino.head_norm = head_norm
        config.objectives.dino.small_crops = 1
    for mesh in (None, make_mesh(data=4, fsdp=2)):
        run = compile_run(config, mesh)
        state, metrics = run(run.init(), make_batch(), make_batch(seed=1))
        results.append((jax.device_get((state.params, state.extras["objectives"])), metrics))
    (one, first), (eight, second) = results
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    chex.assert_trees_all_close(one, eight, rtol=2e-3, atol=2e-5)


def test_evaluators_see_the_teacher():
    program = make_program(config_of())
    state = program.init()
    extras = state.extras["objectives"]["dino"]
    moved = {**extras, "target": jax.tree.map(lambda x: x + 1.0, extras["target"])}
    state = state.replace(extras={**state.extras, "objectives": {"dino": moved}})
    served = program.served(state)
    chex.assert_trees_all_equal(served["image_tower"], moved["target"]["image_tower"])
    assert set(served) == set(state.params)


def test_paths_of_the_student_are_dropped_and_none_of_the_teacher(batch):
    results = []
    for rate in (0.0, 0.5):
        model = tiny_model(**{"image.drop_path": rate, "image.depth": 2})
        objective = DINO(model=model, name="dino", **SMALL)
        params, extras = initial(objective)
        found = embedded_by(objective, params, extras["target"], batch)
        results.append([np.asarray(x) for x in found])
    for index, (plain, dropped) in enumerate(zip(*results, strict=True)):
        assert (plain != dropped).any() == (index < 4), index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_temperature": 0.0}, "teacher_temperature: 0.0 is no temperature"),
        ({"centre_momentum": 1.0}, "centre_momentum: 1.0"),
        ({"centring": "median"}, "centring: 'median' is unknown"),
        ({"small_size": 12}, "small_size: patches of 8 px do not divide"),
        ({"small_crops": -1}, "small_crops: -1"),
        ({"prototypes": 0}, "prototypes: 0 features"),
        ({"augment_small": {"blurr": 1.0}}, "augment_small.blurr"),
    ],
)
def test_bad_arguments_name_the_key(arguments, message):
    with pytest.raises(ConfigError, match=rf"objectives\.dino\.{message}"):
        dino(**arguments)
