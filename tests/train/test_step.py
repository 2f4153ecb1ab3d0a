"""The update: accumulation, devices, sharding, sums of objectives, and skipped updates.

Gradients are read from Adam's first moment, which is (1 - b1) times the gradient after one update.
A large eps keeps Adam's first step from turning rounding errors of vanishing gradients into
updates of full size.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tiny import (
    BATCH,
    BUCKET,
    TOKENS,
    Run,
    compile_run,
    make_batch,
    shared_config,
    tiny_config,
    tiny_model,
)

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import Batch, batch_spec
from vlp_jax.infra.mesh import global_batch, make_mesh, replicated
from vlp_jax.infra.sharding import fsdp_rules, shardings
from vlp_jax.objectives.base import (
    Defaults,
    ImagePass,
    LossOutput,
    Mean,
    Pass,
    batch_noise,
    encode_image,
)
from vlp_jax.objectives.classification import NLVR2, VQA, Classification
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.train import program as program_module
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import Moment, init_state, make_gradient, make_step, shared_passes

FIRST, SECOND = make_batch(seed=1), make_batch(seed=2)
MOMENT = Moment(jnp.float32(0.1), jnp.float32(0.0), jnp.float32(1.0))


def step_config(**overrides: Any) -> ConfigDict:
    return tiny_config(
        **{
            "optim.eps": 1e-3,
            "optim.clip_norm": 0.0,
            "optim.ema_decay": 0.9,
            "schedule.peak": 1e-2,
            "schedule.warmup_steps": 0,
            **overrides,
        }
    )


@pytest.fixture(scope="module")
def one() -> Run:
    """One device, whole batch: what all others are compared with."""
    return compile_run(step_config())


@pytest.fixture(scope="module")
def initial(one: Run) -> Any:
    """The fresh state on the host, with its key as bits."""
    return on_host(one.init())


def on_host(state: TrainState) -> Any:
    return jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))


def placed(run: Run, host_state: Any) -> TrainState:
    """A state from ``on_host`` where the program wants it; same values on any mesh."""
    state = host_state.replace(rng=jax.random.wrap_key_data(jnp.asarray(host_state.rng)))
    return jax.device_put(state, run.program.state_shardings)


def gradient(state: Any) -> Any:
    """The gradient of the first update, from Adam's first moment."""
    (moments,) = [s for s in state.opt_state if hasattr(s, "mu")]
    return jax.tree.map(lambda mu: mu / 0.1, moments.mu)


def assert_trees_close(a: Any, b: Any, atol: float) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def reference(one: Run, initial: Any) -> tuple[Any, dict[str, float]]:
    """State and metrics after one update on one device."""
    state, metrics = one(placed(one, initial), FIRST)
    return on_host(state), metrics


def assert_same_update(run: Run, initial: Any, reference: tuple[Any, dict[str, float]]) -> None:
    state, metrics = run(placed(run, initial), FIRST)
    state, (expected, expected_metrics) = on_host(state), reference
    assert_trees_close(gradient(state), gradient(expected), atol=1e-6)
    assert_trees_close(state.params, expected.params, atol=1e-6)
    assert_trees_close(state.extras, expected.extras, atol=1e-6)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)


def test_update_moves_every_parameter(initial: Any, reference: Any) -> None:
    """The comparisons below could pass on an update that does nothing."""
    state, metrics = reference
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(initial.params),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        assert np.abs(after - before).max() > 0, jax.tree_util.keystr(path)
    assert state.step == 1
    assert metrics["skipped"] == 0
    assert metrics["learning_rate"] == pytest.approx(1e-2)
    assert metrics["loss"] == metrics["flm/loss"] > 3  # log 50 = 3.9


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_equals_whole_batch(initial: Any, reference: Any, parts: int) -> None:
    run = compile_run(step_config(**{"optim.accumulation": parts}))
    assert_same_update(run, initial, reference)


@pytest.fixture(scope="module")
def data_parallel() -> Run:
    return compile_run(step_config(), make_mesh())


def test_eight_devices_equal_one(data_parallel: Run, initial: Any, reference: Any) -> None:
    assert_same_update(data_parallel, initial, reference)


def collectives(run: Run) -> dict[str, int]:
    """How often each collective stands in the compiled update."""
    text = run.step.as_text()
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    return {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}


def test_fsdp_equals_replicated(
    initial: Any,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rules = fsdp_rules(min_size=64)  # nearly everything is cut, at widths of 32
    monkeypatch.setattr(program_module, "shardings", functools.partial(shardings, rules=rules))
    run = compile_run(step_config(), make_mesh(data=2, fsdp=4))
    leaves = jax.tree.leaves(run.program.state_spec.params)
    cut = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    assert cut > 0.9 * sum(leaf.size for leaf in leaves)
    assert_same_update(run, initial, reference)
    counts = collectives(run)
    assert counts["all-gather"] > 0
    assert counts["all-to-all"] == 0
    assert counts["collective-permute"] == 0
    assert "rematerialization" not in capfd.readouterr().err


def test_collectives_of_the_data_parallel_update(data_parallel: Run, one: Run) -> None:
    """Gradients, and the sums of the metrics: nothing else crosses devices."""
    assert not any(collectives(one).values())
    counts = collectives(data_parallel)
    assert 1 <= counts.pop("all-reduce") <= 8
    assert not any(counts.values())


def test_same_bits_twice(one: Run, initial: Any, reference: Any) -> None:
    state, _ = one(placed(one, initial), FIRST)
    jax.tree.map(np.testing.assert_array_equal, on_host(state), reference[0])


def test_corruption_differs_between_steps(one: Run, initial: Any, reference: Any) -> None:
    later = placed(one, initial).replace(
        step=jax.device_put(jnp.int32(1), one.program.state_shardings.step)
    )
    _, metrics = one(later, FIRST)
    assert metrics["flm/reconstruction_loss"] != reference[1]["flm/reconstruction_loss"]
    assert metrics["flm/forward_loss"] == reference[1]["flm/forward_loss"]  # nothing is drawn


def test_moving_average_formula(one: Run, initial: Any, reference: Any) -> None:
    state, _ = reference
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, initial.extras["ema"], state.params)
    assert_trees_close(state.extras["ema"], expected, atol=1e-6)
    later, _ = one(placed(one, state), SECOND)
    later = on_host(later)
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.extras["ema"], later.params)
    assert_trees_close(later.extras["ema"], expected, atol=1e-6)


def test_cheaper_updates_let_the_average_decay_as_far_over_a_budget(
    one: Run, initial: Any, reference: Any
) -> None:
    """One of half the cost: 0.9 ** 0.5."""
    mesh = one.program.mesh
    half = jax.device_put(jnp.float32(0.5), replicated(mesh))
    moment = one.program.moment(0)._replace(cost=half)
    batches = {"pairs": global_batch(FIRST, mesh)}
    state, _ = one.step(placed(one, initial), batches, moment)
    keep = 0.9**0.5
    expected = jax.tree.map(
        lambda e, p: keep * e + (1 - keep) * p, initial.extras["ema"], on_host(state).params
    )
    assert_trees_close(on_host(state).extras["ema"], expected, atol=1e-6)


def test_parameters_follow_the_rate(one: Run, initial: Any, reference: Any) -> None:
    """The formula of AdamW, worked out from the gradient."""
    state, _ = reference
    path = ("text_lower_0", "mlp", "in", "kernel")
    pick = functools.partial(functools.reduce, lambda tree, key: tree[key], path)
    before, grad = pick(initial.params), pick(gradient(state))
    update = grad / (np.abs(grad) + 1e-3) + 0.01 * before
    np.testing.assert_allclose(pick(state.params), before - 1e-2 * update, atol=1e-6)


def test_non_finite_update_is_skipped_and_counted(one: Run, initial: Any) -> None:
    """A gradient that overflows leaves all but the counters as it was, bit for bit."""
    broken = jax.tree.map(np.array, initial)
    broken.params["vocabulary_head"]["decoder_bias"][7] = np.inf
    state, metrics = one(placed(one, broken), FIRST)
    assert not np.isfinite(metrics["loss"])
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 1)
    state, metrics = one(state, SECOND)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 2)
    skipped = on_host(state)
    assert skipped.step == 2  # the step indexes the data
    for name in ("params", "opt_state", "rng"):
        jax.tree.map(np.testing.assert_array_equal, getattr(skipped, name), getattr(broken, name))
    for name in ("ema", "objectives"):
        jax.tree.map(np.testing.assert_array_equal, skipped.extras[name], broken.extras[name])

    mended = skipped.replace(params=initial.params)
    state, metrics = one(placed(one, mended), FIRST)
    assert np.isfinite(metrics["loss"])
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    assert on_host(state).step == 3


def test_replaced_records_are_summed(one: Run, initial: Any) -> None:
    damaged = {**FIRST, "replaced": np.arange(BATCH, dtype=np.int32)}
    _, metrics = one(placed(one, initial), damaged, damaged)
    assert metrics["replaced"] == 2 * sum(range(BATCH))


def test_state_is_donated(one: Run) -> None:
    """Warnings are errors here, so that a donation that cannot be used fails as well."""
    state = one.init()
    one(state, FIRST)
    kept = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_deleted()]
    assert not kept
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))


def test_sum_of_objectives_has_the_sum_of_gradients(initial: Any) -> None:
    """Two objectives over one model, at the base rate, where nothing is drawn."""
    config = step_config()
    losses = {"reconstruction": 0.7, "forward": 0.1, "reverse": 0.2}
    with config.unlocked():
        config.objectives = ConfigDict(
            {
                "a": {"type": "flm", "weight": 0.5},
                "b": {"type": "flm", "weight": 2.0, "loss_weights": losses},
            }
        )
    run = compile_run(config)
    extras = {**initial.extras, "objectives": {"a": {}, "b": {}}}
    state, metrics = run(placed(run, initial.replace(extras=extras)), FIRST)
    assert metrics["loss"] == pytest.approx(0.5 * metrics["a/loss"] + 2.0 * metrics["b/loss"])
    assert metrics["a/loss"] != metrics["b/loss"]

    def summed(params: Any) -> jax.Array:
        total = jnp.zeros(())
        for objective, weight in zip(run.program.objectives, (0.5, 2.0), strict=True):
            loss = objective.loss(params, {}, FIRST, jax.random.key(0), BUCKET[0][1]).loss
            total += weight * loss.sum / loss.weight
        return total

    expected = jax.jit(jax.grad(summed))(initial.params)
    assert_trees_close(gradient(on_host(state)), expected, atol=1e-6)


WEIGHTS = {"flm": 0.5, "itc": 2.0, "itm": 1.5}


@pytest.fixture(scope="module")
def three() -> Run:
    """Three objectives of one batch, and a tower whose cost stands out."""
    config = step_config(**{"model.image.patch_size": 4, "model.image.mlp_width": 256})
    with config.unlocked():
        config.objectives = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    return compile_run(config)


def apart(run: Run, state: TrainState) -> jax.stages.Compiled:
    """Loss and gradient as the weighted sum of the objectives, each called by itself."""
    objectives = run.program.objectives
    extras = state.extras["objectives"]

    def summed(params: Any, rng: jax.Array, batch: Batch) -> jax.Array:
        step_rng = jax.random.fold_in(rng, 0)
        total = jnp.zeros(())
        for index, objective in enumerate(objectives):
            key = jax.random.fold_in(step_rng, index)
            output = objective.loss(params, extras[objective.name], batch, key, BUCKET[0][1])
            total += WEIGHTS[objective.name] * output.loss.sum / output.loss.weight
        return total

    return jax.jit(jax.value_and_grad(summed)).lower(state.params, state.rng, FIRST).compile()


@pytest.mark.slow
def test_objectives_of_one_batch_share_the_image_tower(three: Run) -> None:
    """Loss and gradient are those of the objectives apart, at two backward passes less."""
    initial = three.init()
    separate = apart(three, initial)
    loss, expected = jax.device_get(separate(initial.params, initial.rng, FIRST))

    model = three.program.objectives[0].model
    batch = {"image": jnp.asarray(FIRST["image"])}

    def tower(params: Any) -> jax.Array:
        return encode_image(model, params, batch, None).sum()

    def flops(compiled: jax.stages.Compiled) -> float:
        return compiled.cost_analysis()["flops"]

    forward, both = (
        flops(jax.jit(function).lower(initial.params).compile())
        for function in (tower, jax.value_and_grad(tower))
    )
    assert flops(three.step) < flops(separate) - 1.5 * (both - forward)

    state, metrics = three(initial, FIRST)  # the initial state is donated
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_trees_close(gradient(on_host(state)), expected, atol=5e-6)


@pytest.mark.slow
def test_contrast_and_matching_share_their_embeddings() -> None:
    """Loss and gradient are those of both apart, without a second pass over each side alone."""
    config = shared_config(**{"optim.eps": 1e-3, "optim.clip_norm": 0.0})
    with config.unlocked():
        config.objectives = {"itc": {"weight": WEIGHTS["itc"]}, "itm": {"weight": WEIGHTS["itm"]}}
    run = compile_run(config)
    initial = run.init()
    separate = apart(run, initial)
    loss, expected = jax.device_get(separate(initial.params, initial.rng, FIRST))

    itc, _ = run.program.objectives
    # Of tiny widths a tenth is not of matrix products, which alone are counted by formula.
    again = 0.9 * BATCH * itc.dual_encoder.flops(TOKENS)
    assert run.step.cost_analysis()["flops"] < separate.cost_analysis()["flops"] - again

    state, metrics = run(initial, FIRST)  # the initial state is donated
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_trees_close(gradient(on_host(state)), expected, atol=5e-6)


class Reader(Defaults):
    """A tiny objective over the image alone: the mean square of its tokens."""

    def __init__(self, name: str, batch_name: str = "pairs", model: Any = None, whole: bool = True):
        self.name, self.batch_name, self.splittable = name, batch_name, not whole
        self._model = model

    @property
    def passes(self) -> tuple[Pass, ...]:
        return (ImagePass(self._model),) if self._model else ()

    def init(self, rng: jax.Array, batch_spec: Any) -> tuple[Any, Any]:
        pixels = jnp.zeros(batch_spec["image"].shape)
        return nn.init(lambda model: model.encode_image(pixels), self._model)(rng)["params"], {}

    def loss(
        self,
        params: Any,
        extras: Any,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        tokens = encode_image(self._model, params, batch, batch_noise(rng, batch, train))
        return LossOutput(Mean((tokens**2).mean() * BATCH, jnp.float32(BATCH)), extras, {})


def test_a_shared_pass_has_one_noise() -> None:
    """Drawn from the key of the step; an objective alone draws its own, as it did."""
    model = tiny_model(**{"image.dropout": 0.5})
    optimizer = optax.trace(0.0)
    specs = {"pairs": batch_spec(BUCKET[0][1], 1)}
    batch = {"pairs": {name: jnp.asarray(array) for name, array in FIRST.items()}}

    def updates(*readers: Reader) -> tuple[TrainState, Any]:
        """A fresh state, and from the number of a step to the losses of its update."""
        state = init_state(readers, specs, lambda params: optimizer, jax.random.key(0), ema=False)
        weights = {reader.name: 1.0 for reader in readers}
        update = jax.jit(make_step(make_gradient(readers, weights, 1, BUCKET), optimizer, 0.0))

        def losses(step: int) -> list[float]:
            _, metrics = update(state.replace(step=jnp.int32(step)), batch, MOMENT)
            return [float(metrics[f"{reader.name}/loss"]) for reader in readers]

        return state, losses

    one, other = Reader("one", model=model), Reader("other", model=model)
    _, together = updates(one, other)
    first, second = together(0)
    assert first == second
    assert first not in together(1)

    state, alone = updates(one)
    key = jax.random.fold_in(jax.random.fold_in(state.rng, 0), 0)
    sizes = BUCKET[0][1]
    expected = jax.jit(lambda params: one.loss(params, {}, batch["pairs"], key, sizes).loss)
    assert alone(0) == pytest.approx([float(expected(state.params).sum) / BATCH], rel=1e-6)
    assert alone(0) != pytest.approx([first], rel=1e-3)


def test_what_shares_a_pass() -> None:
    """Same batch, same model, seen whole; equal models are the same."""
    model, other = tiny_model(), tiny_model(**{"image.depth": 2})
    readers = [
        Reader("a", model=model),
        Reader("b", model=tiny_model()),
        Reader("c", model=model, whole=False),
        Reader("d", model=other),
        Reader("e", "photographs", model),
        Reader("f"),
    ]
    assert shared_passes(readers, 1) == (("pairs", ImagePass(model), ("a", "b", "c")),)
    assert shared_passes(readers, 2) == (("pairs", ImagePass(model), ("a", "b")),)
    assert shared_passes(readers[1:], 2) == ()
    assert shared_passes([Classification(model, "x", 2), VQA(model, "y", 2)], 1) == (
        ("pairs", ImagePass(model), ("x", "y")),
    )
    itc = ITC(model, embedding_dim=8)
    assert shared_passes([ITM(itc), itc], 2) == (  # embeddings are made of the images' tokens
        ("pairs", ImagePass(model), ("itm", "itc")),
        ("pairs", itc.dual_encoder, ("itm", "itc")),
    )
    assert shared_passes([ITM(itc, batch_name="photographs"), itc], 1) == ()
    assert shared_passes([NLVR2(model, "x"), VQA(model, "y", 2)], 1) == ()  # two images at once


@pytest.mark.slow
def test_accumulation_splits_what_can_be_split(three: Run) -> None:
    """FLM in two parts beside ITC and ITM, which share their pass, equals all of them whole."""
    config = three.program.config.copy_and_resolve_references()
    config.optim.accumulation = 2
    run = compile_run(config)
    initial = on_host(three.init())
    expected, expected_metrics = three(placed(three, initial), FIRST)
    state, metrics = run(placed(run, initial), FIRST)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)
    assert_trees_close(gradient(on_host(state)), gradient(on_host(expected)), atol=5e-6)


class Coupled(Defaults):
    """A tiny objective that cannot be split and carries state: a mean that is subtracted."""

    name, batch_name = "coupled", "pairs"

    def __init__(self, splittable: bool = False):
        self.splittable = splittable

    def init(self, rng: jax.Array, batch_spec: Any) -> tuple[Any, Any]:
        return {"coupled": {"w": jnp.ones(3)}}, {"batches": jnp.zeros(())}

    def flops(self, text_length: float) -> float:
        return 0.0

    def loss(
        self,
        params: Any,
        extras: Any,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        lengths = batch["text_length"].astype(jnp.float32)
        spread = ((lengths - lengths.mean()) ** 2).sum()
        loss = Mean(spread * (params["coupled"]["w"] ** 2).sum(), jnp.float32(lengths.size))
        return LossOutput(loss, {"batches": extras["batches"] + 1}, {})


@pytest.mark.parametrize("splittable", [False, True])
def test_accumulation_respects_coupled_objectives(splittable: bool) -> None:
    """Whole where the objective says so; in strided parts, with extras handed on, elsewhere."""
    objective = Coupled(splittable)
    optimizer = optax.trace(0.0)
    state = init_state(
        [objective], {"pairs": {}}, lambda params: optimizer, jax.random.key(0), ema=False
    )
    step = make_step(make_gradient([objective], {"coupled": 1.0}, 2, BUCKET), optimizer, 0.0)
    new, metrics = jax.jit(step)(state, {"pairs": FIRST}, MOMENT)
    lengths = FIRST["text_length"].astype(np.float64)
    parts = [lengths[0::2], lengths[1::2]] if splittable else [lengths]
    spread = sum(((part - part.mean()) ** 2).sum() for part in parts) / BATCH
    assert float(metrics["loss"]) == pytest.approx(3 * spread, rel=1e-5)
    np.testing.assert_allclose(new.params["coupled"]["w"], 1 - 0.1 * 2 * spread, rtol=1e-5)
    assert new.extras["objectives"]["coupled"]["batches"] == len(parts)
