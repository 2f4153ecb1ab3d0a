"""The state of a run: one plain pytree, and nothing else changes while it runs."""

from typing import Any

import flax.struct
import jax


class TrainState(flax.struct.PyTreeNode):
    """Everything that is saved and restored.

    Attributes:
        step: int32 [], updates attempted; also the index of the next global batch.
        params: float32 tree.
        extras: ``objectives`` (by name, what each carries), ``ema`` (moving average of ``params``,
            or empty), ``decided`` int32 [decisions] where the schedule of buckets is an online one
            (the bucket of each part of the budget, -1 before it is decided), ``skipped`` int32 []
            updates skipped so far, ``skipped_in_a_row`` int32 [], ``replaced`` int32 [] damaged
            records replaced so far.
        opt_state: of the optimiser.
        rng: PRNG key of the run; steps fold their number into it.
    """

    step: jax.Array
    params: Any
    extras: Any
    opt_state: Any
    rng: jax.Array
