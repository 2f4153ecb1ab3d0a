"""An objective's own loss on held-out records and on records that are trained on.

    config.evals.heldout = {"source": "scenes", "num_examples": 1000, "every_percent": 25.0}

The gap between the two is how much the model has learned by heart. It means the same for every
objective, whatever is masked, hidden or predicted: both sets are scored by the loss that the run
descends, without dropout, and with the same draws at every evaluation.
"""

from collections.abc import Iterable, Iterator

import jax
import numpy as np

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import Batch, HostBatch, batch_spec
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.evals.base import EvalContext, fixed_plan, read, set_fields
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.objectives.base import (
    Extras,
    Mean,
    Objective,
    Params,
)


class Heldout:
    """Loss of an objective on a fixed set, and on as many records of the training set.

    Metrics, in the unit of the loss (nats a prediction for the language objectives): ``loss``,
    ``loss_train``, and ``gap_loss``, the first minus the second. Each is a mean over all
    predictions of all draws. Draws are keyed by an example's place in its set, so that an example
    gets the same ones on any number of devices and in batches of any size. An objective that
    couples the examples of a batch (``itc``, ``itm``, ``simclr`` and its like) has another loss in
    batches of another size, and in a last one that is filled up.

    What the objective remembers is as at the first update: a corruption rate that moves over the
    run is held at its first value, so that losses of different steps compare.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str = "val",
        num_examples: int = 1000,
        objective: str = "",
        num_draws: int = 4,
        batch_size: int = 0,
    ):
        """Plans both sets; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``.
            source: key in ``config.data.sources``.
            split: of that source, another than it is trained on.
            num_examples: the first records of each set, fewer where one has fewer; 0: as many as
                the held-out split has.
            objective: key in ``config.objectives``; empty: the only one.
            num_draws: masks, spans or prefixes drawn for each example; 1 where none are (``ar``).
            batch_size: rows of a global batch; 0: those of the run's micro-batches.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        self.figures: tuple[str, ...] = ("loss", "loss_train", "gap_loss")
        if num_draws < 1:
            raise ConfigError(f"evals.{name}.num_draws", f"{num_draws} draws", "Use 1 or more")
        self._context = context
        self._objective = _chosen(context, name, objective)
        self._num_draws = num_draws
        fields = self._objective.extra_fields
        self._set = FixedSet(
            context, name, source, split, num_examples, batch_size, fields, pictures=False
        )
        if split == context.config.data.sources[source].get("split", "train"):
            raise ConfigError(
                f"evals.{name}.split", f"the run trains on {split!r}", "Use one that is held out"
            )
        held_out = self._set.plan
        self._train_plan = fixed_plan(
            context, context.sources[source], held_out.num_rows, held_out.batch_size
        )
        self._fields = set_fields(held_out, fields)
        whole = replicated(context.mesh)
        self._extras = jax.jit(self._first_extras, out_shardings=whole)()
        self._sums = jax.jit(self._batch_sums, static_argnames="bucket", out_shardings=whole)

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Score both sets; see the class for the metrics."""
        del step
        train = read(
            self._context.config, self._train_plan, self._set.rows, self._objective.extra_fields
        )
        loss = self._loss(params, self._set.plan, self._set.host_batches())
        loss_train = self._loss(params, self._train_plan, train)
        yield "loss", loss
        yield "loss_train", loss_train
        yield "gap_loss", loss - loss_train

    def _loss(self, params: Params, plan: EvalPlan, batches: Iterable[HostBatch]) -> float:
        """Mean loss over a set."""
        total, weight = 0.0, 0.0
        mesh = self._context.mesh
        with jax.set_mesh(mesh):
            for t, host_batch in enumerate(batches):
                batch = global_batch({name: host_batch[name] for name in self._fields}, mesh)
                sums = self._sums(params, self._extras, batch, bucket=plan.batch(t).bucket)
                found = jax.device_get(sums)
                # float64: so that the order of the batches is not seen
                total += np.sum(found.sum, dtype=np.float64)
                weight += np.sum(found.weight, dtype=np.float64)
        return float(total / weight)

    def _batch_sums(self, params: Params, extras: Extras, batch: Batch, *, bucket: Bucket) -> Mean:
        """The loss of a batch under each draw: float32 [draws] each."""
        objective = self._objective
        for one in objective.passes:  # once for all draws
            batch = {**batch, one.key: one(params, batch)}

        def loss(key: jax.Array) -> Mean:
            return objective.loss(params, extras, batch, key, bucket, train=False).loss

        means: Mean = jax.lax.map(loss, jax.random.split(jax.random.key(0), self._num_draws))
        return means

    def _first_extras(self) -> Extras:
        bucket = self._set.plan.batch(0).bucket
        spec = batch_spec(bucket, self._set.plan.batch_size, self._fields)
        return self._objective.init(jax.random.key(0), spec)[1]


def _chosen(context: EvalContext, evaluator: str, name: str) -> Objective:
    """The objective of this name, or the only one."""
    found = {objective.name: objective for objective in context.objectives}
    if not name and len(found) == 1:
        [name] = found
    if name not in found:
        raise ConfigError(
            f"evals.{evaluator}.objective",
            f"{name!r} is no objective of this run" if name else "the run has several",
            f"Use one of {sorted(found)}",
        )
    return found[name]
