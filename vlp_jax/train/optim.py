"""AdamW with rates and decay by parameter group."""

import collections
import functools
import math
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError, section_arguments
from vlp_jax.infra.sharding import leaf_path


def optimizer(config: ConfigDict, params: Any) -> optax.GradientTransformationExtraArgs:
    """Clip, Adam, decoupled decay, and each group's factor; the step applies the rate.

    It sees what is trained: what ``rate_factors`` freezes has no moments, and None in the place of
    its gradient and of its update.

    Args:
        config: ``config.optim``: ``b1``, ``b2``, ``eps``, ``weight_decay``,
            ``final_weight_decay`` (None: the same all along; else it is reached along a cosine over
            the budget), ``no_decay`` (regular expression of paths without decay, beside all
            vectors), ``clip_norm`` (0: none), ``groups``, see ``rate_factors``.
        params: tree of arrays or shapes.

    Returns:
        A transformation whose updates, times minus the learning rate, are added to the parameters;
        ``update`` takes ``progress``, the share of the budget that is spent, float32 [], and
        ``moving``, a tree of bool [] like the parameters: what is False there neither moves nor
        decays, and keeps its moments. (Adam's count is one for all: where a parameter has missed
        updates, its moments are taken to be nearer to their means than they are.)

    Raises:
        ConfigError: ``no_decay`` is no regular expression, or a group is wrong.
    """
    factors = rate_factors(config, params)
    trained = trained_only(factors, factors)
    parts = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        _decayed(config, trained_only(decay_mask(config, params), factors)),
        optax.stateless(
            lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, trained)
        ),
    ]
    if config.clip_norm:
        parts.insert(0, optax.stateless(lambda updates, _: _clipped(updates, config.clip_norm)))
    chain = optax.chain(*parts)

    def update(
        updates: Any, state: optax.OptState, params: Any, moving: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        params = trained_only(params, factors)
        updates, new_state = chain.update(updates, state, params, **extra)
        if moving is None:
            return updates, new_state
        moving = trained_only(moving, factors)
        kept = {
            name: _chosen(moving, optax.tree.get(new_state, name), optax.tree.get(state, name))
            for name in ("mu", "nu")
        }
        still = jax.tree.map(jnp.zeros_like, updates)
        return _chosen(moving, updates, still), optax.tree.set(new_state, **kept)

    return optax.GradientTransformationExtraArgs(
        lambda params: chain.init(trained_only(params, factors)), update
    )


def trained_only(tree: Any, factors: Any) -> Any:
    """A tree like the parameters, with None in the place of what is frozen.

    Args:
        tree: like the parameters; it may have these None already.
        factors: of ``rate_factors``.
    """
    return jax.tree.map(
        lambda leaf, factor: leaf if factor else None, tree, factors, is_leaf=_absent
    )


def with_frozen(trained: Any, params: Any) -> Any:
    """What ``trained_only`` has kept, and the rest as it is in ``params``."""
    return jax.tree.map(
        lambda leaf, old: old if leaf is None else leaf, trained, params, is_leaf=_absent
    )


def _chosen(moving: Any, new: Any, old: Any) -> Any:
    """The new leaf where ``moving`` is True, the old one elsewhere."""
    return jax.tree.map(lambda on, n, o: jnp.where(on, n, o), moving, new, old)


def _absent(leaf: Any) -> bool:
    return leaf is None


def _decayed(config: ConfigDict, mask: Any) -> optax.GradientTransformation:
    """Adds each parameter, times the decay of the moment, where the mask is True."""
    first, last = config.weight_decay, config.final_weight_decay
    if last is None:
        return optax.add_decayed_weights(first, mask=mask)

    def update(
        updates: Any, state: optax.OptState, params: Any, *, progress: jax.Array
    ) -> tuple[Any, optax.OptState]:
        decay = last + optax.cosine_decay_schedule(first - last, 1)(progress)
        decayed = jax.tree.map(lambda u, p, on: u + decay * p if on else u, updates, params, mask)
        return decayed, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


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
    """The factor on the learning rate of every parameter; 1.0 where no group matches.

    Args:
        config: ``config.optim``; its ``groups`` are name -> ``pattern`` (regular expression of
            paths) and ``rate_factor`` (0 or more; 0: frozen, that is, its gradient is not even
            taken). The first group that matches counts.
        params: tree of arrays or shapes.

    Returns:
        A float for each leaf.

    Raises:
        ConfigError: a group has other keys than these two, or values that cannot be used; or its
            pattern matches nothing; or all is frozen.
    """
    groups = {name: _group(f"optim.groups.{name}", group) for name, group in config.groups.items()}
    used = set()

    def factor(path: jax.tree_util.KeyPath, leaf: Any) -> float:
        for name, (pattern, value) in groups.items():
            if pattern.search(leaf_path(path)):
                used.add(name)
                return value
        return 1.0

    factors = jax.tree_util.tree_map_with_path(factor, params)
    for name in groups:
        if name not in used:
            top = sorted({leaf_path(p[:1]) for p, _ in jax.tree_util.tree_leaves_with_path(params)})
            raise ConfigError(
                f"optim.groups.{name}.pattern",
                f"{config.groups[name].pattern!r} matches no parameter (or only those of a group "
                "before it)",
                f"Match paths below {', '.join(top)}",
            )
    if not any(jax.tree.leaves(factors)):
        raise ConfigError(
            "optim.groups", "they freeze every parameter", "Leave some a rate_factor above 0"
        )
    return factors


def _group(path: str, section: Any) -> tuple[re.Pattern[str], float]:
    """The pattern and the factor of a group; ``path`` is its dotted name."""
    if not isinstance(section, ConfigDict):
        raise ConfigError(path, f"{section!r} is no section", "Set `pattern` and `rate_factor`")
    group = section_arguments(section, path, ("pattern", "rate_factor"), ())
    for key in ("pattern", "rate_factor"):
        if group.get(key) in (None, ""):
            raise ConfigError(f"{path}.{key}", "missing", "Add it")
    factor = group["rate_factor"]
    if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise ConfigError(
            f"{path}.rate_factor", f"{factor!r} cannot multiply a rate", "Use a number from 0 on"
        )
    return _compile(f"{path}.pattern", group["pattern"]), factor


def moving_average(average: Any, params: Any, decay: float | jax.Array) -> Any:
    """One step of the exponential moving average, in float32."""
    return jax.tree.map(
        lambda a, p: a + (1.0 - decay) * (p.astype(jnp.float32) - a), average, params
    )


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(
            key, f"{pattern!r} is no regular expression ({error})", "Mend the pattern"
        ) from error
