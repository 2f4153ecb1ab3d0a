"""Skippable units in a tree of parameters: switching them, and taking them out; see ``tuning``."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.infra.sharding import by_path, leaf_path, nested
from vlp_jax.models.tuning import (
    PARTS,
    is_skipped,
    kept_name,
    replacement_name,
    split_unit,
    unit_name,
)


def gated_units(params: Any) -> tuple[str, ...]:
    """The units that a model of these parameters can switch, sorted."""
    return tuple(
        sorted(
            unit_name(path.removesuffix(f"/{kept_name(part)}"), part)
            for path in by_path(params)
            for part in PARTS
            if path.endswith(f"/{kept_name(part)}")
        )
    )


def with_kept(params: Any, kept: Mapping[str, jax.Array | float]) -> Any:
    """The parameters with units switched on (1) or off (0).

    Args:
        params: of a model with gated units.
        kept: unit -> float [], which may be traced; those that are not named stay as they are.

    Raises:
        ValueError: a unit is not gated.
    """
    leaves = by_path(params)
    for unit, value in kept.items():
        path = _switch(unit)
        if path not in leaves:
            raise ValueError(
                f"{unit!r} is none of the gated units {', '.join(gated_units(params))}"
            )
        leaves[path] = jnp.asarray(value, leaves[path].dtype)
    return nested(leaves)


def pruned(params: Any, skipped: Sequence[str]) -> dict[str, Any]:
    """The parameters of the network without some units, out of one in which they are gated.

    Neither the skipped units are there, nor the switches, nor what would stand in the place of
    units that are kept: a model with ``tuning.skip`` set to ``skipped`` and nothing gated has these
    parameters.

    Args:
        params: of a model with gated units.
        skipped: those that go.

    Raises:
        ValueError: a unit is not gated.
    """
    leaves = by_path(with_kept(params, dict.fromkeys(skipped, 0.0)))
    gated = gated_units(params)
    switches = {_switch(unit) for unit in gated}
    idle = tuple(replacement_path(unit) for unit in gated if unit not in skipped)
    return nested(
        {
            path: leaf
            for path, leaf in leaves.items()
            if path not in switches and not path.startswith(idle) and not is_skipped(path, skipped)
        }
    )


def moving(params: Any, kept: Mapping[str, jax.Array]) -> Any:
    """What an update may change while units are switched, for what is off has no part in it.

    Args:
        params: of a model with gated units.
        kept: unit -> bool [], which may be traced.

    Returns:
        A tree like the parameters: bool [] of what goes with a unit or with what stands in its
        place, True for the rest.
    """

    def moves(path: str) -> jax.Array | bool:
        inside = [on for unit, on in kept.items() if is_skipped(path, (unit,))]
        instead = [~on for unit, on in kept.items() if path.startswith(replacement_path(unit))]
        return functools.reduce(operator.and_, inside + instead, True)

    return jax.tree_util.tree_map_with_path(lambda path, _: moves(leaf_path(path)), params)


def _switch(unit: str) -> str:
    """Where a gated unit has its switch."""
    block, part = split_unit(unit)
    return f"{block}/{kept_name(part)}"


def replacement_path(unit: str) -> str:
    """What the paths of the adapter in a unit's place begin with."""
    block, part = split_unit(unit)
    return f"{block}/{replacement_name(part)}/"
