"""How much the parts of blocks change the tokens that pass them."""

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlp_jax.models.block import Block
from vlp_jax.models.tuning import unit_name


def cosines(units: Collection[str], run: Callable[[], Any]) -> dict[str, jax.Array]:
    """How little units change the tokens: mean cosine of what enters and what leaves, float32 [].

    Args:
        units: gated ones.
        run: applies the model to a batch, with the units switched on; a unit that is met several
            times has the mean.
    """
    found: dict[str, list[jax.Array]] = {unit: [] for unit in units}

    def see(unit: str, before: jax.Array, after: jax.Array, _: Block) -> None:
        pair = (x.astype(jnp.float32) for x in (before, after))
        found[unit].append(optax.losses.cosine_similarity(*pair, epsilon=1e-6).mean())

    watched(units, run, see)
    return {unit: jnp.stack(seen).mean() for unit, seen in found.items()}


def watched(
    units: Collection[str],
    run: Callable[[], Any],
    see: Callable[[str, jax.Array, jax.Array, Block], None],
) -> None:
    """Run a model and look at its units.

    Args:
        units: that the model has, gated or not.
        run: applies the model to a batch.
        see: is given a unit, what enters it and what leaves it, and its block, whenever one is met.
    """

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        after = call(*args, **kwargs)
        if isinstance(context.module, Block) and context.method_name == Block._part.__name__:
            part, before = args[:2]
            prefix = context.module.config.tuning.prefix  # of a tower that runs by itself
            unit = unit_name(prefix + "/".join(context.module.path), part)
            if unit in units:
                see(unit, before, after, context.module)
        return after

    with nn.intercept_methods(watch):
        run()
