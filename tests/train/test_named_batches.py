"""Several named batches in one update: gradients, sizes, turns, and what a run says of them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BATCH, IMAGE_SIZE, TOKENS, make_batch, make_program, objective_config
from two_batches import logged, run_config

from vlp_jax.compress.buckets import Bucket, StepBucket
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, make_mesh
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare
from vlp_jax.train.watch import ALARM, alarmed, first_watched, watch

SMALL, SHORT = 8, 8  # rows and tokens of the batch of texts
SIZES: StepBucket = (
    ("pairs", Bucket(TOKENS, IMAGE_SIZE)),
    ("text", Bucket(SHORT, IMAGE_SIZE)),
)
WEIGHTS = {"ar": 1.0, "mlm": 0.5, "itc": 2.0}
TEXT_WEIGHT = 3.0
HOST = {
    "pairs": make_batch(seed=1),
    "text": make_batch([3, 8, 5, 7, 8, 6, 4, 8], tokens=SHORT, seed=2),
}


def named_config(**overrides: Any) -> Any:
    config = objective_config("ar", {"type": "ar", "weight": WEIGHTS["ar"]})
    with config.unlocked():
        config.objectives.itc = {"weight": WEIGHTS["itc"]}
        config.objectives.mlm = {"weight": WEIGHTS["mlm"], "batch": "text"}
        config.data.batches.text = {"batch_size": SMALL, "weight": TEXT_WEIGHT}
    config.update_from_flattened_dict(overrides)
    return config


def gradient_of(config: Any, mesh: Any = None, bucket: StepBucket = SIZES) -> Any:
    """The gradient, and what comes with it, on the host."""
    program = make_program(config, mesh)
    batches = {name: global_batch(HOST[name], program.mesh) for name, _ in bucket}
    with jax.set_mesh(program.mesh):
        gradient = jax.jit(program.gradient(bucket))
        return jax.device_get(gradient(program.init(), batches, program.moment(0)))


@pytest.fixture(scope="module")
def sequential() -> Any:
    return gradient_of(named_config())


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Gradient of each batch by itself, at the same parameters and with the same draws."""
    return {name: gradient_of(named_config(), bucket=((name, size),)) for name, size in SIZES}


@pytest.mark.slow
def test_a_shared_pass_drops_the_same_whichever_batches_are_read() -> None:
    """Objectives of both batches share an image pass, each with noise of its own."""
    config = named_config(**{"model.image.dropout": 0.3})
    with config.unlocked():
        config.objectives.other = {"type": "ar", "batch": "text"}
    _, joint = gradient_of(config)
    _, own = gradient_of(config, bucket=SIZES[1:])
    assert own.batches["text"] == pytest.approx(joint.batches["text"], rel=1e-6)


def test_the_gradient_is_that_of_the_weighted_sum(sequential, alone):
    """Of the sum that each objective's own loss function gives, differentiated as one function."""
    program = make_program(named_config())
    state, moment = program.init(), program.moment(0)
    step_rng = jax.random.fold_in(state.rng, state.step)
    sizes = dict(SIZES)

    def total(params: Any) -> Any:
        summed = 0.0
        for number, objective in enumerate(program.objectives):
            batch = {k: jnp.asarray(v) for k, v in HOST[objective.batch_name].items()}
            output = objective.loss(
                params, {}, batch, jax.random.fold_in(step_rng, number), sizes[objective.batch_name]
            )
            factor = WEIGHTS[objective.name]
            factor *= TEXT_WEIGHT if objective.batch_name == "text" else 1.0
            summed += factor * output.loss.sum / output.loss.weight
        return summed

    loss, expected = jax.jit(jax.value_and_grad(total))(state.params)
    grads, losses = sequential
    assert losses.loss == pytest.approx(float(loss), rel=1e-5)
    chex.assert_trees_all_close(grads, expected, atol=2e-6, rtol=1e-5)
    summed = jax.tree.map(jnp.add, alone["pairs"][0], alone["text"][0])
    chex.assert_trees_all_close(grads, summed, atol=1e-6)
    del moment


def test_one_after_the_other_equals_all_at_once(sequential):
    grads, losses = gradient_of(named_config(**{"optim.sequential": False}))
    chex.assert_trees_all_close(grads, sequential[0], atol=1e-6)
    assert losses.loss == pytest.approx(float(sequential[1].loss), rel=1e-6)
    assert losses.gradients == {}


@pytest.mark.slow
def test_a_batch_that_is_cut_still_sees_a_contrast_whole(sequential):
    """Language losses are accumulated over micro-batches, the contrast is not; the sum is one."""
    config = named_config(**{"optim.accumulation": 2})
    grads, losses = gradient_of(config)
    assert losses.outputs["itc"].loss.sum == pytest.approx(
        float(sequential[1].outputs["itc"].loss.sum), rel=1e-5
    )
    chex.assert_trees_all_close(grads, sequential[0], atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_give_the_gradient_of_one(sequential):
    grads, losses = gradient_of(named_config(), make_mesh(data=2, fsdp=4))
    chex.assert_trees_all_close(grads, sequential[0], atol=2e-6, rtol=1e-5)
    for name, value in losses.gradients.items():
        assert value == pytest.approx(float(sequential[1].gradients[name]), abs=1e-4)


def test_parameters_that_a_batch_does_not_touch_get_exact_zeros(alone):
    text, pairs = alone["text"][0], alone["pairs"][0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(text["contrastive_head"]):
        assert not leaf.any(), path
    assert all(leaf.any() for leaf in jax.tree.leaves(pairs["contrastive_head"]))


def test_norms_and_cosines_are_those_of_the_gradients(sequential, alone):
    flat = {
        name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        for name, (grads, _) in alone.items()
    }
    norms = {name: np.linalg.norm(vector) for name, vector in flat.items()}
    told = sequential[1].gradients
    assert set(told) == {"batch/pairs/grad_norm", "batch/text/grad_norm", "batch/pairs/cosine/text"}
    for name, norm in norms.items():
        assert told[f"batch/{name}/grad_norm"] == pytest.approx(norm, rel=1e-4)
    cosine = flat["pairs"] @ flat["text"] / (norms["pairs"] * norms["text"])
    assert told["batch/pairs/cosine/text"] == pytest.approx(cosine, abs=1e-5)
    parts = sequential[1].batches
    whole = parts["pairs"] + TEXT_WEIGHT * parts["text"]
    assert sequential[1].loss == pytest.approx(float(whole), rel=1e-6)


def test_flops_are_the_mean_of_all_examples():
    program = make_program(named_config())
    lengths = {"pairs": 9.5, "text": 6.0}
    both = program.flops(lengths)
    each = {name: program.flops(lengths, ((name, size),)) for name, size in SIZES}
    expected = (BATCH * each["pairs"] + SMALL * each["text"]) / (BATCH + SMALL)
    assert both == pytest.approx(expected)


def test_the_alarm_sees_a_batch_that_is_forgotten():
    """One loss falls and then rises by itself, with noise; the other one only falls."""
    draw = np.random.default_rng(0)
    falling = 2.0 + 2.0 * np.exp(-np.arange(1200) / 200) + 0.1 * draw.normal(size=1200)
    rising = falling + np.where(np.arange(1200) > 800, 0.002, 0.0) * (np.arange(1200) - 800)
    losses = jnp.asarray(np.stack([falling, rising], axis=1), jnp.float32)

    def update(watched: Any, pair: Any) -> Any:
        found = {name: watch(watched[name], pair[i]) for i, name in enumerate(("good", "bad"))}
        return {n: one for n, (one, _) in found.items()}, [alarm for _, alarm in found.values()]

    _, alarms = jax.lax.scan(update, first_watched(("good", "bad")), losses)
    good, bad = np.asarray(alarms)
    assert good.max() < ALARM
    assert bad[:800].max() < ALARM
    assert bad[950:].min() > ALARM
    values = {"batch/good/alarm": float(good[-1]), "batch/bad/alarm": float(bad[-1]), "loss": 99.0}
    assert alarmed(values) == ["bad"]


def test_the_alarm_of_a_constant_loss_is_silent():
    watched = first_watched(["one"])["one"]
    for loss in (1.0,) * 60:
        watched, alarm = watch(watched, jnp.float32(loss))
    assert float(alarm) == pytest.approx(0.0, abs=0.1)


MIXTURE = {
    "mixture.metrics": {"pairs": "held/a", "text": "held/b"},
    "mixture.strength": 2.0,
    "mixture.limit": 3.0,
}


def weights_of(state: Any) -> dict[str, float]:
    return {name: float(weight) for name, weight in state.extras["mixture"]["weight"].items()}


def test_what_gains_less_weighs_more_within_limits():
    program = make_program(named_config(**MIXTURE))
    state = program.init()
    assert set(weights_of(state).values()) == {1.0}
    state = program.observe(state, {"held/a": 4.0})  # not yet all
    state = program.observe(state, {"held/a": 4.0, "held/b": 2.0})
    assert set(weights_of(state).values()) == {1.0}
    state = program.observe(state, {"held/a": 3.0, "held/b": 1.8})
    weight = weights_of(state)
    assert weight["text"] / weight["pairs"] == pytest.approx((0.9 / 0.75) ** 2, rel=1e-5)
    assert weight["text"] + weight["pairs"] == pytest.approx(2.0, rel=1e-5)
    state = program.observe(state, {"held/a": 0.1, "held/b": 4.0})  # one is forgotten
    weight = weights_of(state)
    assert weight["pairs"] == pytest.approx(1 / 3, rel=1e-5)
    assert weight["text"] == pytest.approx(5 / 3, rel=1e-5)
    spec = program.state_spec.extras["mixture"]
    for leaf, expected in zip(
        jax.tree.leaves(state.extras["mixture"]), jax.tree.leaves(spec), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, 0)


STAGES = {
    "stages.batches": ("text", "pairs+text"),
    "stages.metrics": ("held/b",),
    "stages.patience": 1,
}


def test_the_batches_of_a_stage_alone_are_weighed_and_the_next_begins_anew():
    program = make_program(named_config(**MIXTURE, **STAGES))
    state = program.observe(program.init(), {"held/b": 4.0})
    state = program.observe(state, {"held/a": 4.0, "held/b": 2.0})
    assert set(weights_of(state).values()) == {1.0}  # one batch has none to be compared with
    state = program.observe(state, {"held/a": 4.0, "held/b": 2.0})  # flat: the stage ends
    state = program.observe(state, {"held/a": 3.0, "held/b": 2.0})
    assert set(weights_of(state).values()) == {1.0}
    state = program.observe(state, {"held/a": 1.5, "held/b": 2.0})
    weight = weights_of(state)
    assert weight["text"] / weight["pairs"] == pytest.approx(2**2, rel=1e-5)


@pytest.mark.slow
def test_moved_weights_are_those_of_the_gradient(alone):
    program = make_program(named_config(**MIXTURE))
    state = program.observe(program.init(), {"held/a": 4.0, "held/b": 2.0})
    state = program.observe(state, {"held/a": 2.0, "held/b": 2.0})
    weight = weights_of(state)
    assert weight["text"] != weight["pairs"]
    batches = {name: global_batch(HOST[name], program.mesh) for name, _ in SIZES}
    grads, _ = jax.jit(program.gradient(SIZES))(state, batches, program.moment(0))
    expected = jax.tree.map(
        lambda a, b: weight["pairs"] * a + weight["text"] * b, alone["pairs"][0], alone["text"][0]
    )
    chex.assert_trees_all_close(jax.device_get(grads), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_run_reads_every_batch_in_every_update(tmp_path):
    setup = prepare(run_config(), tmp_path)
    assert setup.budget.batch_size == 24
    train(setup)
    records = logged(tmp_path)
    assert len(records) == 12
    for record in records:
        assert record["train/loss"] == pytest.approx(
            record["train/batch/pairs/loss"] + record["train/batch/text/loss"], rel=1e-5
        )
        assert -1.0 <= record["train/batch/pairs/cosine/text"] <= 1.0


@pytest.mark.slow
def test_batches_that_take_turns_see_what_simultaneous_ones_see(tmp_path):
    """Over as many examples: the same rows in the same order, one batch an update."""
    together = prepare(run_config(), tmp_path / "together")
    turns = prepare(run_config(**{"data.alternate": "uniform"}), tmp_path / "turns")
    assert turns.budget.batch_size == 12
    seen: dict[str, list[Any]] = {"pairs": [], "text": []}
    for t in range(24):
        [(name, batch)] = turns.plan.batches(t).items()
        seen[name].append(batch.record)
    for name, records in seen.items():
        expected = [together.plan.batch(name, t).record for t in range(12)]
        np.testing.assert_array_equal(records, expected)
    train(turns)
    for record in logged(tmp_path / "turns"):
        losses = [key for key in record if key.startswith("train/batch/") and key.endswith("/loss")]
        assert len(losses) == 1
        assert record["train/loss"] == pytest.approx(record[losses[0]], rel=1e-6)


def test_turns_in_proportion_follow_the_records(tmp_path):
    setup = prepare(run_config(**{"data.alternate": "proportional"}), tmp_path)
    names = [name for t in range(3600) for name in setup.plan.batches(t)]
    # An epoch of each: 512 records in batches of 16, 256 in batches of 8.
    assert names.count("pairs") == names.count("text") == 1800


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objectives.other.batch", "texts", r"objectives\.other\.batch: no source feeds a batch"),
        ("data.sources.captions.batch", "words", r"data\.batches\.text: no source feeds"),
        ("data.batches.text.weight", -1.0, r"data\.batches\.text\.weight: -1\.0 is no weight"),
        ("data.batches.text.batch_size", 12, r"data\.batches\.text\.batch_size: 12 rows cannot"),
        ("mixture.metrics", {"pairs": "a/b"}, r"mixture\.metrics: has figures for \['pairs'\]"),
        (
            "mixture.metrics",
            {"pairs": "a/b", "text": "a/c"},
            r"mixture\.metrics: learns from 'a/b', which no evaluator reports",
        ),
        ("data.alternate", "sometimes", r"data\.alternate: 'sometimes' is no way to take turns"),
    ],
)
def test_bad_sections_are_named(tmp_path, key, value, message):
    config_section = config = run_config()
    with config.unlocked():
        section, _, last = key.rpartition(".")
        for part in section.split("."):
            config_section = config_section[part] if part else config_section
        config_section[last] = value
    with pytest.raises(ConfigError, match=message):
        prepare(config, tmp_path)


def test_stages_in_turns_are_refused(tmp_path):
    config = run_config(**{"data.alternate": "uniform", **STAGES})
    with pytest.raises(ConfigError, match=r"data\.alternate: batches take turns in the stages"):
        prepare(config, tmp_path)


def test_figures_of_a_mixture_come_together(tmp_path):
    config = run_config()
    held = {"type": "heldout", "num_examples": 8}
    config.mixture.metrics = {"pairs": "first/loss", "text": "second/loss"}
    with config.unlocked():
        config.evals = {
            "first": {**held, "source": "scenes", "objective": "ar", "every_percent": 30.0},
            "second": {**held, "source": "captions", "objective": "other", "every_percent": 70.0},
        }
    with pytest.raises(ConfigError, match=r"mixture\.metrics: weights move when all figures"):
        prepare(config, tmp_path)


def test_a_weight_for_a_batch_that_is_not_there_is_refused(tmp_path):
    config = run_config()
    with config.unlocked():
        config.data.batches.images = {"weight": 2.0}
    with pytest.raises(ConfigError, match=r"data\.batches\.images: no source feeds this batch"):
        prepare(config, tmp_path)


def test_a_batch_that_nobody_reads_is_refused(tmp_path):
    config = run_config()
    with config.unlocked():
        del config.objectives.other
    with pytest.raises(ConfigError, match=r"captions\.batch: no objective reads the batch 'text'"):
        prepare(config, tmp_path)
