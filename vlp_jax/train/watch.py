"""Whether one of the batches of a run degrades while the others improve.

Losses of several batches may pull parameters apart, and the sum of them does not show it. Of every
named batch the smoothed loss is kept, how much it wobbles, and the lowest it has been. The alarm is
how far it now lies above that, in standard errors of the smoothed loss: about 3 over a long run in
which nothing changes, since the lowest of many is looked at, and tens where a batch is forgotten.
What changes a loss by itself (another size of patches, another corruption rate) moves it as well.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

ALARM = 8.0  # standard errors from which on a run warns
_DECAY = 0.98
_WARMUP = 50  # updates before the lowest counts


class Watched(NamedTuple):
    """Of the loss of one batch; float32 [] each.

    Attributes:
        updates: seen.
        mean: decaying sum of losses.
        square: decaying sum of squared deviations from the smoothed loss.
        lowest: the lowest smoothed loss.
    """

    updates: jax.Array
    mean: jax.Array
    square: jax.Array
    lowest: jax.Array


def first_watched(names: Iterable[str]) -> dict[str, Watched]:
    """What is known before the first update, of each batch."""
    zero = jnp.zeros(())
    return {name: Watched(zero, zero, zero, jnp.full((), jnp.inf)) for name in names}


def watch(watched: Watched, loss: jax.Array) -> tuple[Watched, jax.Array]:
    """Add the loss of an update.

    Returns:
        What is known now, and the alarm, float32 []; 0 while there is nothing to compare with.
    """
    count = watched.updates + 1.0
    mean = _DECAY * watched.mean + (1.0 - _DECAY) * loss
    share = 1.0 - _DECAY**count  # of the weights of a mean, that are not of the zero at its start
    smoothed = mean / share
    square = _DECAY * watched.square + (1.0 - _DECAY) * jnp.square(loss - smoothed)
    lowest = jnp.where(count > _WARMUP, jnp.minimum(watched.lowest, smoothed), watched.lowest)
    error = jnp.sqrt(square / share * (1.0 - _DECAY) / (1.0 + _DECAY))
    # A loss that does not wobble at all has no error to measure by.
    error = jnp.maximum(error, 1e-4 * jnp.abs(smoothed) + 1e-12)
    alarm = jnp.where(jnp.isfinite(lowest), (smoothed - lowest) / error, 0.0)
    return Watched(count, mean, square, lowest), alarm


def alarmed(values: Mapping[str, float]) -> list[str]:
    """The batches whose alarm is above ``ALARM``, of an update's metrics."""
    found = []
    for name, value in values.items():
        parts = name.split("/")
        if parts[0] == "batch" and parts[-1] == "alarm" and value > ALARM:
            found.append(parts[1])
    return sorted(found)
