"""The estimator on gradients whose bias and variance are known, and on a run's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tiny import BUCKET, IMAGE_SIZE, make_batch, make_program, objective_config

from vlp_jax.compress.buckets import View
from vlp_jax.infra.mesh import global_batch, make_mesh, replicated
from vlp_jax.train.gradient_error import (
    GradientErrors,
    Probed,
    derive,
    pairs_error,
    pairs_variance,
    sketch,
    stages_at,
)
from vlp_jax.train.optim import rate_factors, trained_only
from vlp_jax.train.program import Program
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import Moment

PART = (View(IMAGE_SIZE, 8, 2),)
SIZE, OFFSET, NOISE, OWN_NOISE = 64, 0.05, 1.0, 0.5


class Quadratic:
    """Stands for a program: the gradient of |p - x|^2 / 2, of which a bucket sees another one.

    Batch k has x = noise of variance NOISE^2 in each of SIZE numbers. The bucket's gradient has
    that noise, and on top a bias of OFFSET and a noise of its own of variance OWN_NOISE^2.
    """

    with_views = Program.with_views

    def __init__(self, factor_of_frozen: float = 0.0) -> None:
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.fields = {"pairs": ("image",)}
        frozen = {"pattern": "frozen", "rate_factor": factor_of_frozen}
        optim = {"b2": 0.9, "eps": 1e-8, "groups": {"frozen": frozen}}
        self.config = ConfigDict({"optim": optim})
        everywhere = replicated(self.mesh)
        params = {"a": jnp.ones(SIZE // 2), "b": jnp.ones((SIZE // 2,)), "frozen": jnp.ones(3)}
        self.factors = rate_factors(self.config.optim, params)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            extras={},
            opt_state=optax.chain(optax.scale_by_adam(b2=0.9)).init(
                trained_only(params, self.factors)
            ),
            rng=jax.random.key(0),
        )
        self.state: TrainState = jax.device_put(state, everywhere)
        self.state_spec = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), self.state
        )
        self.state_shardings = jax.tree.map(lambda _: everywhere, self.state)
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        self.moment_spec = Moment(number, number, number)

    def batch_specs(self, bucket: Any) -> dict[str, Any]:
        return {"pairs": {}}

    def moment(self, step: int) -> Moment:
        zero = jax.device_put(np.float32(0), replicated(self.mesh))
        return Moment(zero, zero, zero)

    def gradient(self, bucket: Any) -> Any:
        compressed = bool(bucket[0][1].views)

        def gradient(state: TrainState, batches: Any, moment: Moment) -> Any:
            key = jax.random.fold_in(state.rng, state.step)
            common, own = jax.random.split(key)

            def of(index: int, leaf: jax.Array) -> jax.Array:
                g = leaf - NOISE * jax.random.normal(jax.random.fold_in(common, index), leaf.shape)
                if compressed:
                    noise = jax.random.normal(jax.random.fold_in(own, index), leaf.shape)
                    g = g + OFFSET + OWN_NOISE * noise
                return g

            leaves, tree = jax.tree.flatten(state.params)
            found = jax.tree.unflatten(tree, [of(i, leaf) for i, leaf in enumerate(leaves)])
            return trained_only(found, self.factors), None

        return gradient


def probes(count: int, start: int = 0) -> list[Probed]:
    return [Probed(step, BUCKET, {"pairs": {}}) for step in range(start, start + count)]


def test_estimates_of_a_quadratic_are_unbiased():
    """Over repetitions, each estimate is the known value on average, within its spread."""
    program: Any = Quadratic()
    errors = GradientErrors(program, ((), PART))
    errors.compile([BUCKET])
    rows = []
    for repeat in range(120):
        whole, part = errors.measure(program.state, probes(8, 8 * repeat), (1.0, 0.25), 0.5)
        rows.append([*part[:3], whole.variance, *part[3:6]])
        assert whole.bias == 0
        assert whole.bias_error == 0
    bias = SIZE * OFFSET**2  # 0.16, where one batch's noise is SIZE * OWN_NOISE^2 = 16
    variance = SIZE * (NOISE**2 + OWN_NOISE**2)
    expected = [bias, variance, bias + 0.5 * variance, SIZE * NOISE**2]
    found = np.array(rows)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    np.testing.assert_array_less(np.abs(found[:, :4].mean(axis=0) - expected), 4 * error[:4])
    assert (found[:, 0] < 0).any()  # unbiased around a small value
    naive = bias + SIZE * OWN_NOISE**2 / 8  # what |mean difference|^2 would say
    assert found[:, 0].mean() < naive / 5
    # The standard errors are those that the repetitions show; that of the small bias is too large,
    # where only the jackknife tells one.
    ratio = np.square(found[:, 4:]).mean(axis=0) / found[:, :3].var(axis=0, ddof=1)
    np.testing.assert_allclose(ratio[1:], 1.0, rtol=0.4)
    assert 0.6 < ratio[0] < 1.7


def test_frozen_parameters_do_not_count():
    program: Any = Quadratic()
    errors = GradientErrors(program, (PART,))
    errors.compile([BUCKET])
    (before,) = errors.measure(program.state, probes(4), (0.5,))
    program = Quadratic(factor_of_frozen=1.0)
    errors = GradientErrors(program, (PART,))
    errors.compile([BUCKET])
    (after,) = errors.measure(program.state, probes(4), (0.5,))
    assert after.variance > before.variance * 1.01


def test_adams_scale_divides_by_the_root_of_its_mean_square():
    program: Any = Quadratic()
    adam = program.state.opt_state[0]
    nu = jax.tree.map(lambda leaf: jnp.full_like(leaf, 4.0 * (1 - 0.9)), adam.nu)
    state = program.state.replace(opt_state=(adam._replace(count=adam.count + 1, nu=nu),))
    state = jax.device_put(state, replicated(program.mesh))
    errors = GradientErrors(program, (PART,))
    errors.compile([BUCKET])
    (found,) = errors.measure(state, probes(4), (0.5,))
    assert found.adam_bias == pytest.approx(found.bias / 4, rel=1e-4)
    assert found.adam_mse == pytest.approx(found.mse / 4, rel=1e-4)
    (fresh,) = errors.measure(program.state, probes(4), (0.5,))
    assert np.isnan(fresh.adam_mse)
    assert fresh.mse == found.mse


def test_too_few_batches_and_bad_gradients_are_refused():
    program: Any = Quadratic()
    errors = GradientErrors(program, (PART,))
    errors.compile([BUCKET])
    with pytest.raises(ValueError, match="3 batches estimate nothing"):
        errors.measure(program.state, probes(3), (0.5,))
    params = {**program.state.params, "a": program.state.params["a"] * jnp.nan}
    with pytest.raises(ValueError, match="not finite"):
        errors.measure(program.state.replace(params=params), probes(4), (0.5,))


@pytest.mark.parametrize("mesh", [None, {"data": 4, "fsdp": 2}], ids=["one", "eight"])
def test_a_run_is_measured_on_any_number_of_devices(mesh):
    """Against gradients taken one by one in NumPy; a bucket that drops nothing has no error."""
    config = objective_config("itc", {"embedding_dim": 8})
    program = make_program(config, mesh and make_mesh(**mesh))
    everything = (View.whole(IMAGE_SIZE, 8),)
    errors = GradientErrors(program, ((), everything, PART))
    errors.compile([BUCKET])
    state = program.init()
    batches = [{"pairs": global_batch(make_batch(seed=seed), program.mesh)} for seed in range(4)]
    found = errors.measure(
        state, [Probed(k, BUCKET, b) for k, b in enumerate(batches)], (1.0, 1.0, 0.5)
    )
    whole, same, part = found
    assert same.bias == 0
    assert same.variance == pytest.approx(whole.variance, rel=1e-6)
    assert part.bias > 0
    vectors = {}
    for views in ((), PART):
        bucket = program.with_views(BUCKET, views)
        with jax.set_mesh(program.mesh):
            gradient = jax.jit(program.gradient(bucket))
            rows = []
            for k, batch in enumerate(batches):
                own = gradient(state.replace(step=jnp.int32(k)), batch, program.moment(k))[0]
                rows.append(np.concatenate([np.ravel(g) for g in jax.tree.leaves(own)]))
        vectors[views] = np.array(rows, np.float64)
    difference = vectors[PART] - vectors[()]
    gram = difference @ difference.T
    bias = (gram.sum() - np.trace(gram)) / 12
    assert part.bias == pytest.approx(bias, rel=1e-3)
    assert part.variance == pytest.approx(vectors[PART].var(axis=0, ddof=1).sum(), rel=1e-3)
    assert part.mse == pytest.approx(part.bias + 0.5 * part.variance)
    assert state.params is not None  # nothing was donated
    assert np.isfinite(jax.device_get(jax.tree.leaves(state.params)[0])).all()


def test_products_of_sketches_are_those_of_the_trees_on_average():
    draw = np.random.default_rng(0)
    one, other = ({"a": draw.normal(size=(300, 100)), "b": draw.normal(size=50)} for _ in range(2))
    other = {key: 0.5 * one[key] + other[key] for key in other}
    flat = [np.concatenate([np.ravel(t["a"]), t["b"]]) for t in (one, other)]
    a, b = (np.asarray(sketch(jax.tree.map(jnp.asarray, t), jnp.uint32(7))) for t in (one, other))
    norm = np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])
    assert abs(a @ b - flat[0] @ flat[1]) < 4 * norm / np.sqrt(len(a))
    assert a @ a == pytest.approx(flat[0] @ flat[0], rel=0.06)
    assert abs(np.sign(a).mean()) < 0.05


def test_the_error_of_a_mean_over_pairs_is_the_known_one():
    """Of products of normal numbers with mean m: variance 4 m^2 / K + 2 / (K (K - 1))."""
    draw, count = np.random.default_rng(0), 6
    for mean in (0.0, 0.5):
        x = draw.normal(mean, 1.0, (20_000, count))
        found = np.mean([pairs_variance(np.outer(row, row)) for row in x])
        expected = 4 * mean**2 / count + 2 / (count * (count - 1))
        assert found == pytest.approx(expected, rel=0.05)


def test_an_error_is_no_zero_where_its_estimate_is_below():
    """There it is that of the mean without each observation in turn."""
    draw, count, below = np.random.default_rng(0), 6, 0
    for row in draw.normal(0.0, 1.0, (200, count)):
        kernel = np.outer(row, row)
        unbiased, found = pairs_variance(kernel), pairs_error(kernel)
        if unbiased > 0:
            assert found == pytest.approx(unbiased**0.5)
            continue
        below += 1
        pairs = ~np.eye(count - 1, dtype=bool)
        left = [
            np.delete(np.delete(kernel, i, axis=0), i, axis=1)[pairs].mean() for i in range(count)
        ]
        expected = (count - 1) / count * np.square(left - np.mean(left)).sum()
        assert found == pytest.approx(expected**0.5)
        assert found > 0
    assert below > 20
    assert pairs_error(np.zeros((count, count))) == 0


def test_derived_costs_never_fall():
    costs = (1.0, 0.2, 0.5)
    mse = np.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [3.0, 1.0, 1.1], [1.0, 9.0, 2.0]])
    assert derive(mse, costs) == [1, 2, 2, 0]
    assert derive(mse[:1], costs) == [1]
    # What the first stage would lose by the cheap bucket, against what the second gains: 11 to 10.
    assert derive(np.array([[1.0, 11.0], [100.0, 10.0]]), (1.0, 0.5)) == [0, 0]
    assert derive(np.array([[1.0, 1.1], [1e6, 1e5]]), (1.0, 0.5)) == [1, 1]


def test_stages_end_halfway_between_checkpoints():
    assert stages_at([0.0, 0.25, 0.5, 1.0], [0, 0, 1, 2]) == [(0.375, 0), (0.75, 1), (1.0, 2)]
    assert stages_at([0.5], [1]) == [(1.0, 1)]
