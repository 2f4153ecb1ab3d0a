"""The objective contract: pure functions over a parameter tree."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import Batch

Params = Any  # nested dict of float32 arrays
Extras = Any  # nested dict of whatever an objective carries beside its parameters


class Mean(NamedTuple):
    """A mean in two parts, so that micro-batches and devices divide by the global weight.

    Attributes:
        sum: float32 [].
        weight: float32 [], what the sum is divided by once all parts are added up.
    """

    sum: jax.Array
    weight: jax.Array


class LossOutput(NamedTuple):
    """What an objective returns for a batch or a part of one.

    Attributes:
        loss: the loss as a sum and a weight; the weight depends on the batch alone, never on the
            parameters.
        extras: new extras, same structure as those passed in.
        metrics: named means to log.
    """

    loss: Mean
    extras: Extras
    metrics: Mapping[str, Mean]


class Objective(Protocol):
    """A loss over one named batch.

    Attributes:
        name: key in ``config.objectives``; prefix of its metrics.
        batch_name: which of the run's named batches it reads.
        splittable: False where examples of a batch are coupled (contrastive losses, batch
            statistics), so that gradient accumulation must not cut the batch.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def batch_name(self) -> str: ...  # noqa: D102
    @property
    def splittable(self) -> bool: ...  # noqa: D102

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters and extras for batches of the given shapes."""
        ...

    def flops(self, text_length: float) -> float:
        """Forward FLOPs of one example; an update is counted as three times that."""
        ...

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Loss and metrics of a batch; ``rng`` is the step's key."""
        ...


def example_keys(rng: jax.Array, positions: jax.Array) -> jax.Array:
    """One key an example, from its global position: keys do not depend on how a batch is cut.

    Args:
        rng: key of the step.
        positions: int32 [B].

    Returns:
        keys [B].
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, positions)
