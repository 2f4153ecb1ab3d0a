"""One update: losses of all objectives, accumulation, clipping, skipping, moving average."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlp_jax.compress.buckets import StepBucket
from vlp_jax.data.batch import Batch
from vlp_jax.objectives.base import LossOutput, Mean, Objective
from vlp_jax.train.optim import global_norm, moving_average
from vlp_jax.train.state import TrainState

Batches = Mapping[str, Batch]
Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, Batches, jax.Array], tuple[TrainState, Metrics]]


def init_state(
    objectives: Sequence[Objective],
    batch_specs: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
    optimizer_of: Callable[[Any], optax.GradientTransformation],
    rng: jax.Array,
    ema: bool,
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
            **{name: jnp.zeros((), jnp.int32) for name in counters},
        },
        opt_state=optimizer_of(params).init(params),
        rng=run_rng,
    )


def make_step(
    objectives: Sequence[Objective],
    weights: Mapping[str, float],
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulation: int,
    bucket: StepBucket,
) -> StepFunction:
    """The update function of one bucket, to be jitted with the state donated.

    Args:
        objectives: all objectives of the run.
        weights: factor of each objective's loss, by name.
        optimizer: see ``vlp_jax.train.optim``.
        ema_decay: of the moving average; 0: none.
        accumulation: micro-batches in one update, taken in strides from the global batch.
        bucket: static sizes.

    Returns:
        ``step(state, batches, learning_rate) -> (state, metrics)``, metrics float32 [] each. The
        rate, float32 [], is an argument, so that runs of any length and peak share one program.
    """
    buckets = dict(bucket)

    def step(
        state: TrainState, batches: Batches, learning_rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
        step_rng = jax.random.fold_in(state.rng, state.step)
        keys = {
            objective.name: jax.random.fold_in(step_rng, index)
            for index, objective in enumerate(objectives)
        }

        def evaluate(objective: Objective, params: Any, extras: Any, batch: Batch) -> LossOutput:
            bucket = buckets[objective.batch_name]
            return objective.loss(params, extras, batch, keys[objective.name], bucket)

        def joint(params: Any) -> tuple[jax.Array, dict[str, LossOutput]]:
            outputs, total = {}, jnp.zeros(())
            for objective in objectives:
                extras = state.extras["objectives"][objective.name]
                output = evaluate(objective, params, extras, batches[objective.batch_name])
                outputs[objective.name] = output
                total += weights[objective.name] * _ratio(output.loss)
            return total, outputs

        if accumulation == 1:
            (loss, outputs), grads = jax.value_and_grad(joint, has_aux=True)(state.params)
        else:
            loss, grads, outputs = jnp.zeros(()), None, {}
            for objective in objectives:
                part, output = _accumulate(
                    functools.partial(evaluate, objective),
                    state.params,
                    state.extras["objectives"][objective.name],
                    batches[objective.batch_name],
                    accumulation if objective.splittable else 1,
                )
                factor = weights[objective.name] / jnp.maximum(output.loss.weight, 1.0)
                part = jax.tree.map(lambda g, factor=factor: g * factor, part)
                grads = part if grads is None else jax.tree.map(jnp.add, grads, part)
                loss += factor * output.loss.sum
                outputs[objective.name] = output

        grad_norm = global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        extras = {
            **state.extras,
            "objectives": {name: output.extras for name, output in outputs.items()},
        }
        if ema_decay:
            extras["ema"] = moving_average(state.extras["ema"], params, ema_decay)
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
        }
        for name, output in outputs.items():
            metrics[f"{name}/loss"] = _ratio(output.loss)
            for key, mean in output.metrics.items():
                metrics[f"{name}/{key}"] = _ratio(mean)
        return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    return step


def _ratio(mean: Mean) -> jax.Array:
    """Sum over weight; 0 where nothing was weighed."""
    return mean.sum / jnp.maximum(mean.weight, 1.0)


def _accumulate(
    evaluate: Callable[[Any, Any, Batch], LossOutput],
    params: Any,
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
        def loss_sum(params: Any) -> tuple[jax.Array, LossOutput]:
            output = evaluate(params, extras, micro)
            return output.loss.sum, output

        return jax.grad(loss_sum, has_aux=True)(params)

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
