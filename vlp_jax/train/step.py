"""One update: losses of all objectives, accumulation, clipping, skipping, moving average."""

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlp_jax.compress.buckets import StepBucket
from vlp_jax.data.batch import Batch
from vlp_jax.objectives.base import (
    PROGRESS,
    LossOutput,
    Mean,
    Objective,
    Params,
    Pass,
    batch_noise,
    seen_part,
)
from vlp_jax.train.mixture import Mixture, mixture_metrics
from vlp_jax.train.optim import global_norm, moving_average, trained_only, with_frozen
from vlp_jax.train.search import Search
from vlp_jax.train.stages import Stages
from vlp_jax.train.state import TrainState
from vlp_jax.train.watch import first_watched, watch
from vlp_jax.transfer.units import moving, with_kept

Batches = Mapping[str, Batch]
Metrics = dict[str, jax.Array]


class Moment(NamedTuple):
    """What an update takes from where the run stands.

    Attributes:
        learning_rate: float32 [].
        progress: share of the budget that is spent, float32 [].
        cost: what the update takes of the budget, as a share of one of whole images, float32 [].
    """

    learning_rate: jax.Array
    progress: jax.Array
    cost: jax.Array


StepFunction = Callable[[TrainState, Batches, Moment], tuple[TrainState, Metrics]]
GradientFunction = Callable[[TrainState, Batches, Moment], tuple[Any, "Losses"]]


class Losses(NamedTuple):
    """What comes with the gradient of a run's loss.

    Attributes:
        loss: the weighted sum of all objectives' losses, float32 [].
        outputs: of every objective, by name.
        batches: the part of the loss of every named batch, float32 [] each, before the weight of
            the batch.
        gradients: norms and cosines of the gradients of several batches, as metrics; empty where
            they were not taken one by one.
    """

    loss: jax.Array
    outputs: dict[str, LossOutput]
    batches: dict[str, jax.Array]
    gradients: Metrics


def init_state(
    objectives: Sequence[Objective],
    batch_specs: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
    optimizer_of: Callable[[Any], optax.GradientTransformation],
    rng: jax.Array,
    ema: bool,
    decisions: int = 0,
    mixture: Mixture | None = None,
    stages: Stages | None = None,
    search: Search | None = None,
) -> TrainState:
    """A fresh state. Objectives that share a module agree on its parameters.

    Linen derives each parameter's key from its path, so that two objectives over the same model
    create the same values, and merging their trees is the model they share.

    Args:
        objectives: all objectives of the run.
        batch_specs: shapes of every named batch, in any bucket.
        optimizer_of: from a parameter tree to the optimiser.
        rng: PRNG key of the run.
        ema: whether to keep a moving average of the parameters.
        decisions: of an online schedule of buckets.
        mixture: by which the weights of batches change; None: they are fixed.
        stages: of the run; None: it has one.
        search: of the run; None: nothing is searched for.
    """
    init_rng, run_rng = jax.random.split(rng)
    params: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    for objective in objectives:
        tree, extras[objective.name] = objective.init(init_rng, batch_specs[objective.batch_name])
        params |= tree
    counters = ("skipped", "skipped_in_a_row", "replaced")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        extras={
            "objectives": extras,
            "ema": jax.tree.map(jnp.copy, params) if ema else {},
            **({"decided": jnp.full(decisions, -1, jnp.int32)} if decisions else {}),
            **({"watched": first_watched(batch_specs)} if len(batch_specs) > 1 else {}),
            **({"mixture": mixture.init()} if mixture else {}),
            **({"stage": stages.init()} if stages else {}),
            **({"search": search.init()} if search else {}),
            **{name: jnp.zeros((), jnp.int32) for name in counters},
        },
        opt_state=optimizer_of(params).init(params),
        rng=run_rng,
    )


class SharedPass(NamedTuple):
    """One pass over a batch in an update, for several objectives.

    Attributes:
        batch_name: of the batch.
        computed: what.
        readers: names of the objectives that read it, two or more.
    """

    batch_name: str
    computed: Pass
    readers: tuple[str, ...]


def shared_passes(objectives: Sequence[Objective], accumulation: int) -> tuple[SharedPass, ...]:
    """The passes that objectives of one batch share, those that others read first.

    An objective that is split into micro-batches encodes the image itself: what its gradient is
    divided by is known after the last of them only, too late to add up what reaches the tower.

    Args:
        objectives: all objectives of the run.
        accumulation: micro-batches in one update.
    """
    read = [
        (place, objective.batch_name, computed, objective.name)
        for objective in objectives
        if _whole(objective, accumulation)
        for place, computed in enumerate(objective.passes)
    ]
    readers: dict[tuple[str, Pass], list[str]] = {}
    for _, batch_name, computed, name in sorted(read, key=operator.itemgetter(0)):
        readers.setdefault((batch_name, computed), []).append(name)
    return tuple(SharedPass(*of, tuple(names)) for of, names in readers.items() if len(names) > 1)


def make_gradient(
    objectives: Sequence[Objective],
    weights: Mapping[str, float],
    accumulation: int,
    bucket: StepBucket,
    batch_weights: Mapping[str, float] | None = None,
    sequential: bool = False,
    rates: Any = None,
    search: Search | None = None,
) -> GradientFunction:
    """The gradient of a run's loss in one bucket, over the named batches that the bucket has.

    Objectives of one batch share passes, forward and backward, and with each one noise of its
    dropout (``shared_passes``); where an objective is alone, its own noise is used.

    The gradient of every batch is taken at the same parameters, and their sum is applied once
    (fact sheet of MoMo, section 3).

    Args:
        objectives: all objectives of the run.
        weights: factor of each objective's loss, by name.
        accumulation: micro-batches, taken in strides from the global batch.
        bucket: static sizes.
        batch_weights: factor of the losses of each batch; 1 where it is not named.
        sequential: take the gradients of the batches one after the other, so that the activations
            of one batch at a time are held, and tell their norms and cosines; False: one pass over
            all of them. The sum is the same.
        rates: of ``rate_factors``; what they freeze has None in the place of its gradient, which
            is not computed. None: nothing is frozen.
        search: draws the units that the update does without; None: nothing is searched for.

    Returns:
        ``gradient(state, batches, moment) -> (gradient of the parameters, losses)``; everything
        random in it follows from ``state.rng`` and ``state.step``.
    """
    buckets = dict(bucket)
    # Keys are numbered over the whole run, whichever batches the bucket has.
    numbers = {objective.name: index for index, objective in enumerate(objectives)}
    passes = enumerate(shared_passes(objectives, accumulation), start=len(numbers))
    shared = [(number, one) for number, one in passes if one.batch_name in buckets]
    objectives = tuple(o for o in objectives if o.batch_name in buckets)
    fixed = {
        o.name: weights[o.name] * (batch_weights or {}).get(o.batch_name, 1.0) for o in objectives
    }
    groups = [(name,) for name in buckets] if sequential else [tuple(buckets)]

    def gradient(state: TrainState, batches: Batches, moment: Moment) -> tuple[Any, Losses]:
        step_rng = jax.random.fold_in(state.rng, state.step)
        if search is not None:
            state = state.replace(params=with_kept(state.params, search.kept(state)))
        factors = dict(fixed)
        if "mixture" in state.extras:
            moved = state.extras["mixture"]["weight"]
            factors = {o.name: fixed[o.name] * moved[o.batch_name] for o in objectives}
        keys = {name: jax.random.fold_in(step_rng, number) for name, number in numbers.items()}

        def evaluate(objective: Objective, trained: Any, extras: Any, batch: Batch) -> LossOutput:
            bucket = buckets[objective.batch_name]
            batch = {**batch, PROGRESS: moment.progress}
            params = with_frozen(trained, state.params)
            return objective.loss(params, extras, batch, keys[objective.name], bucket)

        def joint(trained: Any, group: Sequence[str]) -> tuple[jax.Array, dict[str, LossOutput]]:
            params = with_frozen(trained, state.params)
            mine = [o for o in objectives if o.batch_name in group and _whole(o, accumulation)]
            seen = {objective.name: batches[objective.batch_name] for objective in mine}
            for number, one in shared:
                if one.batch_name not in group:
                    continue
                batch = seen[one.readers[0]]  # all of them have the same passes before
                key = jax.random.fold_in(step_rng, number)
                noise = batch_noise(key, batch, train=True)
                part = seen_part(key, batch, buckets[one.batch_name], train=True)
                found = {one.computed.key: one.computed(params, batch, noise, part)}
                seen |= {name: {**seen[name], **found} for name in one.readers}
            outputs, total = {}, jnp.zeros(())
            for objective in mine:
                extras = state.extras["objectives"][objective.name]
                output = evaluate(objective, trained, extras, seen[objective.name])
                outputs[objective.name] = output
                total += factors[objective.name] * ratio(output.loss)
            return total, outputs

        loss, grads = jnp.zeros(()), None
        outputs: dict[str, LossOutput] = {}
        each: dict[str, Any] = {}  # gradient of each batch, where they are taken one by one
        everything = state.params if rates is None else trained_only(state.params, rates)
        for group in groups:
            trained = everything
            if each:  # wait for the gradient before: its activations are gone by then
                trained, grads = jax.lax.optimization_barrier((trained, grads))
            differentiated = jax.value_and_grad(joint, has_aux=True)
            (part_loss, part_outputs), part = differentiated(trained, group)
            loss, outputs = loss + part_loss, outputs | part_outputs
            for objective in objectives:
                if objective.batch_name not in group or _whole(objective, accumulation):
                    continue
                own, output = _accumulate(
                    functools.partial(evaluate, objective),
                    trained,
                    state.extras["objectives"][objective.name],
                    batches[objective.batch_name],
                    accumulation,
                )
                factor = factors[objective.name] / jnp.maximum(output.loss.weight, 1.0)
                part = jax.tree.map(lambda total, g, f=factor: total + f * g, part, own)
                loss += factor * output.loss.sum
                outputs[objective.name] = output
            grads = part if grads is None else jax.tree.map(jnp.add, grads, part)
            if sequential:
                each[group[0]] = part
        parts = {name: jnp.zeros(()) for name in buckets}
        for objective in objectives:
            own_loss = weights[objective.name] * ratio(outputs[objective.name].loss)
            parts[objective.batch_name] += own_loss
        return grads, Losses(loss, outputs, parts, _compared(each))

    return gradient


def _compared(each: Mapping[str, Any]) -> Metrics:
    """Norm of the gradient of every batch, and the cosine of every two; none of fewer than two."""
    if len(each) < 2:
        return {}
    norms = {name: global_norm(tree) for name, tree in each.items()}
    found = {f"batch/{name}/grad_norm": norm for name, norm in norms.items()}
    for one, other in itertools.combinations(each, 2):
        products = jax.tree.map(
            lambda a, b: jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST), each[one], each[other]
        )
        lengths = norms[one] * norms[other]
        cosine = jax.tree.reduce(jnp.add, products) / jnp.where(lengths > 0, lengths, 1.0)
        found[f"batch/{one}/cosine/{other}"] = cosine
    return found


def make_step(
    gradient: GradientFunction,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    search: Search | None = None,
) -> StepFunction:
    """The update function of one bucket, to be jitted with the state donated.

    Args:
        gradient: of the bucket, see ``make_gradient``.
        optimizer: see ``vlp_jax.train.optim``.
        ema_decay: of the moving average in an update of whole images; 0: none. Over as much of the
            budget, cheaper updates let it decay as far.
        search: of the gradient.

    Returns:
        ``step(state, batches, moment) -> (state, metrics)``, metrics float32 [] each. The rate is
        an argument, so that runs of any length and peak share one program.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batches: Batches, moment: Moment) -> tuple[TrainState, Metrics]:
        learning_rate = moment.learning_rate
        grads, losses = gradient(state, batches, moment)
        loss, outputs = losses.loss, losses.outputs
        grad_norm = global_norm(grads)
        moves = None if search is None else moving(state.params, search.kept(state))
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, progress=moment.progress, moving=moves
        )
        params = jax.tree.map(
            lambda u, p: p if u is None else p - learning_rate * u,
            updates,
            state.params,
            is_leaf=lambda leaf: leaf is None,
        )
        params = {**params, **_renewed(outputs)}
        extras = {
            **state.extras,
            "objectives": state.extras["objectives"]
            | {name: output.extras for name, output in outputs.items()},
        }
        alarms: Metrics = {}
        if "watched" in extras:
            extras["watched"] = dict(extras["watched"])
            for name, part in losses.batches.items():
                watched, alarm = watch(extras["watched"][name], part)
                extras["watched"][name] = watched
                alarms |= {f"batch/{name}/loss": part, f"batch/{name}/alarm": alarm}
        if ema_decay:
            extras["ema"] = moving_average(state.extras["ema"], params, ema_decay**moment.cost)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        extras = keep(extras, state.extras)
        skipped = jnp.where(finite, 0, 1)
        replaced = sum(jnp.sum(batch["replaced"]) for batch in batches.values())
        extras["skipped"] = state.extras["skipped"] + skipped
        extras["skipped_in_a_row"] = jnp.where(finite, 0, state.extras["skipped_in_a_row"] + 1)
        extras["replaced"] = state.extras["replaced"] + replaced
        new_state = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            extras=extras,
            opt_state=keep(opt_state, state.opt_state),
        )
        metrics = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "param_norm": global_norm(state.params),
            "skipped": extras["skipped"],
            "skipped_in_a_row": extras["skipped_in_a_row"],
            "replaced": extras["replaced"],
            **alarms,
            **losses.gradients,
            **mixture_metrics(state.extras),
        }
        for name, output in outputs.items():
            metrics[f"{name}/loss"] = ratio(output.loss)
            for key, mean in output.metrics.items():
                metrics[f"{name}/{key}"] = ratio(mean)
        return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    return step


def _renewed(outputs: Mapping[str, LossOutput]) -> Params:
    """What passes have renewed of the parameters; the mean where several renew the same."""
    found: dict[str, list[Params]] = {}
    for output in outputs.values():
        for name, tree in output.statistics.items():
            found.setdefault(name, []).append(tree)
    return {
        name: jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)
        for name, trees in found.items()
    }


def _whole(objective: Objective, accumulation: int) -> bool:
    """Whether an objective sees its batch in one piece, not in micro-batches."""
    return accumulation == 1 or not objective.splittable


def ratio(mean: Mean) -> jax.Array:
    """Sum over weight; 0 where nothing was weighed."""
    return mean.sum / jnp.maximum(mean.weight, 1.0)


def _accumulate(
    evaluate: Callable[[Any, Any, Batch], LossOutput],
    trained: Any,
    extras: Any,
    batch: Batch,
    parts: int,
) -> tuple[Any, LossOutput]:
    """Gradient of the loss's sum over micro-batches, and the outputs added up.

    Micro-batch i takes the rows i, i + parts, ...: contiguous ones would lie on few devices each.
    """
    strided = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def gradient(extras: Any, micro: Batch) -> tuple[Any, LossOutput]:
        def loss_sum(trained: Any) -> tuple[jax.Array, LossOutput]:
            output = evaluate(trained, extras, micro)
            return output.loss.sum, output

        return jax.grad(loss_sum, has_aux=True)(trained)

    def add(carry: Any, micro: Batch) -> tuple[Any, None]:
        extras, *sums = carry
        grads, output = gradient(extras, micro)
        return (
            output.extras,
            *jax.tree.map(jnp.add, sums, [grads, output.loss, output.metrics]),
        ), None

    shapes = jax.eval_shape(gradient, extras, jax.tree.map(lambda x: x[0], strided))
    grads, output = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry, _ = jax.lax.scan(add, (extras, grads, output.loss, output.metrics), strided)
    extras, grads, loss, metrics = carry
    return grads, LossOutput(loss, extras, metrics)
