"""AdamW with rates and decay by parameter group."""

import collections
import functools
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import leaf_path


def optimizer(config: ConfigDict, params: Any) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, and each group's factor; the step applies the rate.

    Args:
        config: ``config.optim``: ``b1``, ``b2``, ``eps``, ``weight_decay``, ``no_decay`` (regular
            expression of paths without decay, beside all vectors), ``clip_norm`` (0: none),
            ``groups`` (name -> ``pattern`` and ``rate_factor``; the first match counts).
        params: tree of arrays or shapes.

    Returns:
        A transformation whose updates, times minus the learning rate, are added to the parameters.

    Raises:
        ConfigError: a group's pattern is no regular expression or matches nothing.
    """
    factors = rate_factors(config, params)
    parts = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config, params)),
        optax.stateless(
            lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, factors)
        ),
    ]
    if config.clip_norm:
        parts.insert(0, optax.stateless(lambda updates, _: _clipped(updates, config.clip_norm)))
    return optax.chain(*parts)


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together: float32 [].

    As ``optax.tree.norm``, in a tenth of the kernels: squares of leaves of one shape are added up
    before they are reduced. Reduced one by one, the gradients and the parameters of the base model
    took 1,770 of the 6,200 kernels of an update (docs/perf.md).
    """
    squares: dict[tuple[int, ...], list[jax.Array]] = collections.defaultdict(list)
    for leaf in jax.tree.leaves(tree):
        squares[leaf.shape].append(jnp.square(leaf.astype(jnp.float32)))
    sums = [jnp.sum(functools.reduce(operator.add, same)) for same in squares.values()]
    return jnp.sqrt(jnp.sum(jnp.stack(sums)))


def _clipped(updates: Any, limit: float) -> Any:
    """Updates scaled down to a norm of at most ``limit``."""
    norm = global_norm(updates)
    return jax.tree.map(lambda u: jnp.where(norm < limit, u, u / norm * limit), updates)


def decay_mask(config: ConfigDict, params: Any) -> Any:
    """True where weight decay applies: matrices whose path ``no_decay`` does not match."""
    pattern = _compile("optim.no_decay", config.no_decay)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.ndim > 1
            and not leaf_path(path).endswith("bias")  # the bias of fused heads is a matrix in shape
            and not (config.no_decay and pattern.search(leaf_path(path)))
        ),
        params,
    )


def rate_factors(config: ConfigDict, params: Any) -> Any:
    """The factor on the learning rate of every parameter; 1.0 where no group matches."""
    groups = {
        name: (_compile(f"optim.groups.{name}.pattern", group.pattern), group.rate_factor)
        for name, group in config.groups.items()
    }
    used = set()

    def factor(path: jax.tree_util.KeyPath, leaf: Any) -> float:
        for name, (pattern, value) in groups.items():
            if pattern.search(leaf_path(path)):
                used.add(name)
                return value
        return 1.0

    factors = jax.tree_util.tree_map_with_path(factor, params)
    for name in set(groups) - used:
        top = sorted({leaf_path(p[:1]) for p, _ in jax.tree_util.tree_leaves_with_path(params)})
        raise ConfigError(
            f"optim.groups.{name}.pattern",
            f"{config.groups[name].pattern!r} matches no parameter (or only those of a group "
            "before it)",
            f"Match paths below {', '.join(top)}",
        )
    return factors


def moving_average(average: Any, params: Any, decay: float) -> Any:
    """One step of the exponential moving average, in float32."""
    return jax.tree.map(
        lambda a, p: a + (1.0 - decay) * (p.astype(jnp.float32) - a), average, params
    )


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            key, f"{pattern!r} is no regular expression ({error})", "Mend the pattern"
        ) from error
