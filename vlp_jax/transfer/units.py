"""Skippable units in a tree of parameters: switching them, and taking them out; see ``tuning``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.tuning import PARTS, Part, is_skipped, unit_name

_KEPT = re.compile(rf"(?P<block>.+)/(?P<part>{'|'.join(PARTS)})_kept")
_REPLACEMENT = re.compile(rf"(?P<block>.+?)/((?P<part>{'|'.join(PARTS)})_)?replacement/.+")


def gated_units(params: Any) -> tuple[str, ...]:
    """The units that a model of these parameters can switch, sorted."""
    return tuple(sorted(unit for path in by_path(params) if (unit := _unit(_KEPT, path))))


def with_kept(params: Any, kept: Mapping[str, jax.Array | float]) -> Any:
    """The parameters with units switched on (1) or off (0).

    Args:
        params: of a model with gated units.
        kept: unit -> float [], which may be traced; those that are not named stay as they are.

    Raises:
        ValueError: a unit is not gated.
    """
    leaves = by_path(params)
    places = {unit: path for path in leaves if (unit := _unit(_KEPT, path))}
    for unit, value in kept.items():
        if unit not in places:
            raise ValueError(f"{unit!r} is none of the gated units {', '.join(sorted(places))}")
        leaves[places[unit]] = jnp.asarray(value, leaves[places[unit]].dtype)
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

    def stays(path: str) -> bool:
        unit = _unit(_REPLACEMENT, path)
        if unit:
            return unit in skipped
        return not _KEPT.fullmatch(path) and not is_skipped(path, skipped)

    return nested({path: leaf for path, leaf in leaves.items() if stays(path)})


def _unit(pattern: re.Pattern[str], path: str) -> str:
    """The unit that a parameter belongs to; empty: none."""
    found = pattern.fullmatch(path)
    if not found:
        return ""
    part: Part = found["part"] or "block"  # type: ignore[assignment]
    return unit_name(found["block"], part)
