"""Evaluators in a run: when they run, on which parameters, and which checkpoints they rank."""

import contextlib
from collections.abc import Iterable, Mapping

import jax

from vlp_jax.infra.checkpoint import Checkpoints
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.metrics import MetricWriter
from vlp_jax.infra.preemption import Interrupted, PreemptionGuard
from vlp_jax.objectives.base import Params
from vlp_jax.train.initial import served_paths
from vlp_jax.train.setup import Setup
from vlp_jax.train.state import TrainState


def evaluate(
    setup: Setup, state: TrainState, step: int, writer: MetricWriter, guard: PreemptionGuard
) -> dict[str, float] | None:
    """Run the evaluators that are due, on the moving average where there is one.

    Returns:
        Their figures, none where none is due; None where a signal has cut them short.
    """
    params = setup.program.served(state)
    due = [
        name
        for name, every in setup.eval_steps.items()
        if name not in setup.on_best
        and (step == setup.total_steps or (every and step % every == 0))
    ]
    values = _run(setup, due, params, step, guard)
    if values:
        writer.write(step, values)
    return values


def evaluate_best(
    setup: Setup, checkpoints: Checkpoints, step: int, writer: MetricWriter, guard: PreemptionGuard
) -> bool:
    """Run the evaluators that ask for the best checkpoint; False where a signal cut them short."""
    if not setup.on_best:
        return True
    subtree = "extras/ema" if setup.config.optim.ema_decay else "params"
    overlays = served_paths(setup.program.served_extras)
    ranking = setup.config.checkpoint.best_metric, setup.config.checkpoint.best_mode
    try:
        best = load_params(
            checkpoints.directory, "best", subtree, ranking, overlays, setup.tunables.elsewhere
        )
    except FileNotFoundError as error:
        raise ConfigError(
            "checkpoint.best_metric",
            f"no evaluation has given {setup.config.checkpoint.best_metric!r}, so that there is no "
            f"best checkpoint for {', '.join(sorted(setup.on_best))}",
            "Name another figure of evals and start the run again, which trains nothing anew",
        ) from error
    params = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, spec.sharding),
        best.state,
        setup.program.state_spec.params,
    )
    values = _run(setup, sorted(setup.on_best), params, best.step, guard)
    if values is not None:
        writer.write(step, values | {f"{name}/step": best.step for name in setup.on_best})
    return values is not None


def _run(
    setup: Setup, names: Iterable[str], params: Params, step: int, guard: PreemptionGuard
) -> dict[str, float] | None:
    """The figures of some evaluators; None where a signal has cut them short.

    Of several processes, one must not leave the others alone in a collective: there, the signal
    waits for the end.
    """
    alone = jax.process_count() == 1
    values: dict[str, float] = {}
    try:
        with guard.interrupting() if alone else contextlib.nullcontext():
            for name in names:
                ran = setup.evaluators[name].run(params, step)
                values |= {f"{name}/{key}": value for key, value in ran}
    except Interrupted:
        return None
    return values


def ranked(setup: Setup, evaluated: Mapping[str, float]) -> Mapping[str, float]:
    """The metrics of a checkpoint: none where the evaluator that ranks it did not run."""
    ranking = setup.config.checkpoint.best_metric.partition("/")[0]
    ran = {name.partition("/")[0] for name in evaluated}
    return evaluated if ranking in ran else {}


def is_save_due(
    step: int, saved: int, save_every: int, ranked: bool, ranks_every: int | None
) -> bool:
    """Whether a checkpoint is written after an update.

    Periods are rounded each by itself, and a checkpoint is a candidate for the best only if it was
    evaluated as it is. So where evaluations are the rarer, each has its checkpoint; where they are
    as frequent or more, a checkpoint that is due waits for the next of them.

    Args:
        step: updates made.
        saved: of the last checkpoint, or of the start.
        save_every: updates between two checkpoints.
        ranked: whether the evaluator that ranks checkpoints has just run.
        ranks_every: updates between two of its runs; None: there is none, or only at the end.
    """
    often = ranks_every is not None and ranks_every <= save_every
    if ranked and often:
        return step // save_every != saved // save_every
    return (ranked and ranks_every is not None) or (step % save_every == 0 and not often)
