"""How far the gradient of compressed images is from that of whole ones, and what it costs.

At parameters theta, g_0 is the gradient of a batch of whole images and g_A that of the same batch
in bucket A. Over batches,

    bias^2(A)   = |E g_A - E g_0|^2          what no number of examples averages away
    variance(A) = tr Cov(g_A)                of a batch
    CA-MSE(A)   = bias^2(A) + c_A / C * variance(A)

where c_A is what an update in A costs and C what one update may cost, both as shares of an update
of whole images: for C a cheap bucket affords more examples, which cuts its variance and not its
bias (fact sheet of accelerated invariance pretraining, section 2; the estimators are ours).

Both gradients of a batch share images, augmentations and every other draw, so that most of their
noise cancels. With d_k their difference on batch k of K, ``|mean d|^2`` would count noise as bias;

    bias^2 = (|sum d|^2 - sum |d|^2) / (K (K - 1))

is the mean of all products of two different batches, and unbiased; it may come out below zero. So
is the variance a mean over pairs, and the CA-MSE with them; their standard errors follow from how
much the pairs differ, and those that share a batch (``pairs_variance``). That needs the products of
all pairs, which are taken of random projections (``sketch``) of the gradients, whose products are
right on average; the estimates themselves use the gradients.

Parameters that are not trained do not count. What the optimiser makes of an error is measured
beside it: the same figures of gradients divided by Adam's root of their mean square.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlp_jax.compress.buckets import MAX_SCHEDULED_BUCKETS, StepBucket, Views
from vlp_jax.data.build import open_loader
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.infra.compilation import CompiledSteps
from vlp_jax.infra.mesh import replicated
from vlp_jax.models.dropout import mix_bits
from vlp_jax.train.optim import global_norm, rate_factors, trained_only
from vlp_jax.train.program import Program
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import Batches, Moment

MIN_BATCHES = 4  # two pairs that share no batch
_SALT = 0x51AC7
SKETCH = 8_192  # numbers that stand for a gradient in the standard errors


class Estimate(NamedTuple):
    """Of one bucket; every figure has the unit of a squared gradient.

    Attributes:
        bias: squared.
        variance: of a batch.
        mse: cost-adjusted.
        bias_error, variance_error, mse_error: standard errors.
        adam_bias, adam_mse: of gradients as Adam scales them; NaN before its first update.
    """

    bias: float
    variance: float
    mse: float
    bias_error: float
    variance_error: float
    mse_error: float
    adam_bias: float
    adam_mse: float


class Probed(NamedTuple):
    """A batch, on the devices, on which gradients are compared.

    Attributes:
        step: number of the update whose batch it is; what is drawn follows from it.
        planned: its sizes.
        batches: as the update takes them.
    """

    step: int
    planned: StepBucket
    batches: Batches


class GradientErrors:
    """Estimates the gradient error of several buckets of a run.

    Attributes:
        seconds: program -> seconds its compile took.
    """

    def __init__(self, program: Program, buckets: Sequence[Views]):
        """Compiles nothing yet.

        Args:
            program: of the run.
            buckets: what is compared with whole images; whole images may be among them.
        """
        self._program = program
        self._buckets = tuple(buckets)
        most = MAX_SCHEDULED_BUCKETS * (1 + len(self._buckets))
        self._steps: CompiledSteps[StepBucket, Any] = CompiledSteps(limit=most)
        spec = program.state_spec
        optim = program.config.optim
        self._trained = trained_only(spec.params, rate_factors(optim, spec.params))
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self._trained)
        self._zeros = jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), self._trained),
            out_shardings=self._shardings,
        )
        self._scales = jax.jit(
            lambda state: _adam_scales(state, optim.b2, optim.eps), out_shardings=self._shardings
        )
        self._finish = jax.jit(_norms, out_shardings=replicated(program.mesh))

    @property
    def seconds(self) -> Mapping[StepBucket, float]:
        """Seconds that the compile of each program took."""
        return self._steps.seconds

    def compile(self, planned: Iterable[StepBucket]) -> None:
        """Compile what batches of these sizes need, and is not there yet."""
        arms = dict.fromkeys(((), *self._buckets))
        wanted = [self._program.with_views(sizes, views) for sizes in planned for views in arms]
        new = [key for key in dict.fromkeys(wanted) if key not in self._steps.seconds]
        self._steps.compile(new, lambda key: self._lower(key).compile)

    def measure(
        self,
        state: TrainState,
        probed: Iterable[Probed],
        costs: Sequence[float],
        update_cost: float = 1.0,
        first: int = 0,
    ) -> list[Estimate]:
        """The estimates of every bucket at one state.

        Args:
            state: of the run; it stays as it is.
            probed: ``MIN_BATCHES`` or more batches; their sizes must be compiled.
            costs: of an update in each bucket, as a share of one of whole images.
            update_cost: C, what one update may cost, in updates of whole images.
            first: buckets before this one are left out.

        Raises:
            ValueError: too few batches; or a gradient is not finite.
        """
        mesh, buckets = self._program.mesh, self._buckets[first:]
        with jax.set_mesh(mesh):
            scales = self._scales(state.opt_state)
            nothing, reference = self._zeros(), self._zeros()
            sums = [self._zeros() for _ in buckets]
            marks: list[list[jax.Array]] = [[] for _ in ((), *buckets)]
            for batch in probed:
                moment = self._program.moment(batch.step)
                numbers = (np.int32(batch.step), np.uint32(_SALT))
                numbers = jax.device_put(numbers, replicated(mesh))
                common = (state, batch.batches, moment, *numbers, scales)
                whole = self._steps[self._program.with_views(batch.planned, ())]
                gradient, reference, mark = whole(*common, nothing, reference)
                marks[0].append(mark)
                for index, views in enumerate(buckets):
                    if not views:
                        continue  # whole images: no difference
                    arm = self._steps[self._program.with_views(batch.planned, views)]
                    _, sums[index], mark = arm(*common, gradient, sums[index])
                    marks[index + 1].append(mark)
            count = len(marks[0])
            if count < MIN_BATCHES:
                raise ValueError(f"{count} batches estimate nothing; give {MIN_BATCHES} or more")
            norms = [jax.device_get(self._finish(s, reference, scales)) for s in sums]
        sketches = [np.asarray(jax.device_get(mark), np.float64) for mark in marks]
        estimates = []
        for index, views in enumerate(buckets):
            ratio = costs[first + index] / update_cost
            mark = sketches[index + 1] if views else _undivided(sketches[0])
            estimates.append(_estimate(norms[index], sketches[0], mark, ratio))
        if not np.isfinite([estimate[:3] for estimate in estimates]).all():
            raise ValueError(
                "a gradient of the batches is not finite, so that no error can be measured: take a "
                "checkpoint from before the run diverged"
            )
        return estimates

    def _lower(self, key: StepBucket) -> jax.stages.Lowered:
        """One arm on one batch: its gradient less the first one's, added to the sums."""
        program = self._program
        gradient = program.gradient(key)
        whole = not any(sizes.views for _, sizes in key)

        def arm(
            state: TrainState,
            batches: Batches,
            moment: Moment,
            step: jax.Array,
            salt: jax.Array,
            scales: Any,
            first: Any,
            sums: Any,
        ) -> tuple[Any, Any, jax.Array]:
            own, _ = gradient(state.replace(step=step), batches, moment)
            own = jax.tree.map(lambda g: g.astype(jnp.float32), own)
            vector = jax.tree.map(jnp.subtract, own, first)
            # What enters the variance is the arm's own gradient, the bias its difference.
            squares = jnp.stack(
                [_square(vector), _scaled(vector, scales), _square(own), _scaled(own, scales)]
            )
            mark = jnp.concatenate([sketch(vector, salt), squares])
            return own if whole else (), jax.tree.map(jnp.add, sums, vector), mark

        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding),
            self._trained,
        )
        everywhere = replicated(program.mesh)

        def number(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

        jitted = jax.jit(
            arm,
            donate_argnums=7,
            out_shardings=(self._shardings if whole else (), self._shardings, everywhere),
        )
        with jax.set_mesh(program.mesh):
            return jitted.lower(
                program.state_spec,
                program.batch_specs(key),
                program.moment_spec,
                number(jnp.int32),
                number(jnp.uint32),
                params,
                params,
                params,
            )


def _adam_scales(opt_state: Any, b2: float, eps: float) -> Any:
    """What Adam multiplies a gradient by; NaN before its first update."""
    adam = optax.tree.get(opt_state, "ScaleByAdamState")
    squares = optax.tree.bias_correction(adam.nu, b2, adam.count)
    return jax.tree.map(lambda nu: 1.0 / (jnp.sqrt(nu) + eps), squares)


def probe_batches(program: Program, plan: JointPlan, start: int, count: int) -> Iterator[Probed]:
    """The batches of the updates from ``start`` on, put on the devices one after the other."""
    steps = range(start, start + count)
    with open_loader(program.config, plan, steps, program.fields) as loader:
        for step, host in zip(steps, loader, strict=True):
            yield Probed(step, plan.bucket(step), program.batches(host))


def _norms(total: Any, reference: Any, scales: Any) -> tuple[jax.Array, jax.Array]:
    """Squared norms of a bucket's summed differences and summed gradients, plain and scaled."""
    own = jax.tree.map(jnp.add, total, reference)
    return (
        jnp.stack([_square(total), _scaled(total, scales)]),
        jnp.stack([_square(own), _scaled(own, scales)]),
    )


def _estimate(
    norms: tuple[np.ndarray, np.ndarray], first: np.ndarray, mark: np.ndarray, ratio: float
) -> Estimate:
    """The figures of a bucket.

    Args:
        norms: of ``_norms``.
        first: float [K, SKETCH + 4], what whole images left of every batch: the sketch of the
            gradient, and squared norms of difference and gradient, each plain and scaled.
        mark: the same of the bucket; its sketches are those of differences.
        ratio: c_A / C.
    """
    count = len(first)
    differences, squares = mark[:, SKETCH : SKETCH + 2], mark[:, SKETCH + 2 :]
    bias = (norms[0] - differences.sum(axis=0)) / (count * (count - 1))
    variance = (squares.sum(axis=0) - norms[1] / count) / (count - 1)
    mse = bias + ratio * variance
    difference = mark[:, :SKETCH]
    biases = difference @ difference.T
    gradient = first[:, :SKETCH] + difference
    products = gradient @ gradient.T
    variances = (squares[:, :1] + squares[:, :1].T) / 2 - products  # half a squared distance
    return Estimate(
        float(bias[0]),
        float(variance[0]),
        float(mse[0]),
        pairs_error(biases),
        pairs_error(variances),
        pairs_error(biases + ratio * variances),
        float(bias[1]),
        float(mse[1]),
    )


def _undivided(first: np.ndarray) -> np.ndarray:
    """What whole images leave as an arm of their own: no difference."""
    return np.concatenate([np.zeros_like(first[:, : SKETCH + 2]), first[:, SKETCH + 2 :]], axis=1)


def pairs_variance(kernel: np.ndarray) -> float:
    """The variance of the mean of a symmetric kernel over all pairs of observations.

    That of such a mean (a U-statistic) is known from the second moments of pairs that are the same,
    that share an observation, and that share none; each is estimated without bias (Hoeffding 1948),
    so that it may come out below zero.

    Args:
        kernel: float [K, K], K of 4 or more; the diagonal does not count.
    """
    count = len(kernel)
    kernel = kernel - np.diag(np.diag(kernel))
    rows = np.square(kernel.sum(axis=1)).sum()
    squares, total = np.square(kernel).sum(), kernel.sum()
    pairs = count * (count - 1)
    same = squares / pairs
    sharing = (rows - squares) / (pairs * (count - 2))
    apart = (total**2 - 4 * rows + 2 * squares) / (pairs * (count - 2) * (count - 3))
    return float((2 * (same - apart) + 4 * (count - 2) * (sharing - apart)) / pairs)


def pairs_error(kernel: np.ndarray) -> float:
    """The standard error of the mean of a symmetric kernel over all pairs of observations.

    The root of ``pairs_variance``; where that came out below zero, of the jackknife's variance,
    which cannot and is too large on average (Efron and Stein 1981).

    Args:
        kernel: float [K, K], K of 4 or more; the diagonal does not count.
    """
    unbiased = pairs_variance(kernel)
    if unbiased > 0:
        return math.sqrt(unbiased)
    count = len(kernel)
    kernel = kernel - np.diag(np.diag(kernel))
    without = (kernel.sum() - 2 * kernel.sum(axis=1)) / ((count - 1) * (count - 2))
    return math.sqrt((count - 1) * np.var(without))


def sketch(tree: Any, salt: jax.Array) -> jax.Array:
    """A random projection of a tree whose products are, on average, the tree's: float32 [SKETCH].

    Every number is added, with a sign of its own, to one of the sums (a count sketch). The signs
    are a hash of the number's place and the salt, for drawing as many would take longer than the
    gradient.

    Args:
        tree: floating arrays.
        salt: uint32 [], the same for sketches that are multiplied. On the device: from constants
            alone, XLA would evaluate all signs while it compiles.
    """
    total, first = jnp.zeros(SKETCH), 0
    for leaf in jax.tree.leaves(tree):
        rows = -(-leaf.size // SKETCH)
        flat = jnp.pad(leaf.reshape(-1), (0, rows * SKETCH - leaf.size)).reshape(rows, SKETCH)
        place = jax.lax.broadcasted_iota(jnp.uint32, (rows, SKETCH), 0) * np.uint32(SKETCH)
        place += jax.lax.broadcasted_iota(jnp.uint32, (rows, SKETCH), 1) + np.uint32(first)
        signs = mix_bits(mix_bits(place) ^ salt) >> np.uint32(31)
        sums = jnp.where(signs > 0, flat, -flat).sum(axis=0)
        total += jnp.roll(sums, first % SKETCH)  # small leaves lie side by side
        first = (first + leaf.size) % 2**32
    return total


def _square(tree: Any) -> jax.Array:
    return jnp.square(global_norm(tree))


def _scaled(tree: Any, scales: Any) -> jax.Array:
    return _square(jax.tree.map(jnp.multiply, tree, scales))


def derive(mse: np.ndarray, costs: Sequence[float]) -> list[int]:
    """The buckets of a schedule: the least error at each stage, under costs that never fall.

    Of all sequences whose costs do not fall, the one with the least product of errors, so that no
    stage counts more for its scale.

    Args:
        mse: float [S, A], cost-adjusted errors of A buckets at S stages.
        costs: A, of an update in each.

    Returns:
        S indices of buckets.
    """
    order = np.argsort(costs, kind="stable")
    logs = np.log(np.maximum(mse, np.finfo(np.float64).tiny))[:, order]
    best, came_from = logs[0], []
    for row in logs[1:]:
        # The best way to each bucket is from the best of those that cost no more.
        upto = np.minimum.accumulate(best)
        source = np.array([int(np.argmin(best[: a + 1])) for a in range(len(best))])
        came_from.append(source)
        best = upto + row
    path = [int(np.argmin(best))]
    for source in reversed(came_from):
        path.append(int(source[path[-1]]))
    return [int(order[a]) for a in reversed(path)]


def stages_at(progress: Sequence[float], choices: Sequence[int]) -> list[tuple[float, int]]:
    """Stages from the choices at some points of a run: each holds to halfway to the next.

    Args:
        progress: increasing shares of the budget.
        choices: a bucket for each.

    Returns:
        (share at its end, bucket), in order; neighbours of one bucket are one stage.
    """
    stages: list[tuple[float, int]] = []
    for index, choice in enumerate(choices):
        last = index == len(choices) - 1
        end = 1.0 if last else (progress[index] + progress[index + 1]) / 2
        if stages and stages[-1][1] == choice:
            stages.pop()
        stages.append((end, choice))
    return stages
