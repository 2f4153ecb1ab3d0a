"""Which parameter lives where: ordered rules from parameter paths to mesh axes.

A path is the keys from the root of a tree to a leaf, joined by ``/``. Rules are searched in the
path, so those written for ``params`` apply equally to optimiser moments and moving averages, whose
paths end with the path of their parameter.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import BATCH_AXES

AxisSpec = str | tuple[str, ...] | None
Spec = tuple[AxisSpec, ...]
# From a leaf's shape and the sizes of the mesh axes to one mesh axis (or none) per dimension.
Policy = Callable[[tuple[int, ...], Mapping[str, int]], Spec]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where the leaves go whose path matches.

    Attributes:
        pattern: regular expression, searched anywhere in the leaf's path.
        spec: mesh axes per dimension (missing ones are whole), or a policy that decides by shape.
    """

    pattern: str
    spec: Spec | Policy


def largest_dimension(min_size: int) -> Policy:
    """Shard the largest dimension that the fsdp axis divides, the last one among equals.

    Args:
        min_size: leaves with fewer elements stay whole: gathering them would cost more in latency
            than it saves in memory.
    """

    def policy(shape: tuple[int, ...], axes: Mapping[str, int]) -> Spec:
        fitting = [i for i, size in enumerate(shape) if size > 1 and size % axes["fsdp"] == 0]
        if axes["fsdp"] == 1 or not fitting or math.prod(shape) < min_size:
            return ()
        chosen = max(fitting, key=lambda i: (shape[i], i))
        return (None,) * chosen + ("fsdp",)

    return policy


def one_dimension(index: int, min_size: int) -> Policy:
    """Shard dimension ``index`` where the fsdp axis divides it, and never another one.

    Args:
        index: the dimension; negative ones count from the end.
        min_size: leaves with fewer elements stay whole.
    """

    def policy(shape: tuple[int, ...], axes: Mapping[str, int]) -> Spec:
        absent = not -len(shape) <= index < len(shape)
        if axes["fsdp"] == 1 or absent or math.prod(shape) < min_size:
            return ()
        chosen = index % len(shape)
        return (None,) * chosen + ("fsdp",) if shape[chosen] % axes["fsdp"] == 0 else ()

    return policy


def fsdp_rules(min_size: int = 2**14) -> tuple[Rule, ...]:
    """The default rules: parameters and optimiser state over the fsdp axis.

    Embedding tables [V, D] and the kernel of the vocabulary head [D, V] are cut along the
    vocabulary only: cut along D, a lookup would leave its result cut along D as well, and the
    compiler would move whole activations to undo it.

    Args:
        min_size: leaves with fewer elements are replicated.
    """
    return (
        Rule(r"(^|/)embedding$", one_dimension(0, min_size)),
        Rule(r"(^|/)decoder[_/]kernel$", one_dimension(-1, min_size)),
        Rule(r"", largest_dimension(min_size)),
    )


def leaf_path(keys: jax.tree_util.KeyPath) -> str:
    """Join the keys to a leaf with ``/``: dict keys, attributes and positions alike."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path."""
    return {leaf_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def shardings(mesh: Mesh, tree: Any, rules: Sequence[Rule] | None = None) -> Any:
    """A sharding for every leaf of a state; the first rule that matches decides.

    Args:
        mesh: a mesh with the axes of ``vlp_jax.infra.mesh``.
        tree: any pytree whose leaves have a ``shape``.
        rules: ``fsdp_rules()`` by default. Leaves that no rule matches are replicated.

    Returns:
        The same tree with a ``NamedSharding`` in place of every leaf.

    Raises:
        ConfigError: a rule does not fit the shape of a leaf.
    """
    rules = fsdp_rules() if rules is None else rules
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(
            mesh, PartitionSpec(*_spec(leaf_path(keys), leaf.shape, mesh, rules))
        ),
        tree,
    )


def describe(
    mesh: Mesh, tree: Any, rules: Sequence[Rule] | None = None
) -> list[tuple[str, tuple[int, ...], Spec]]:
    """(path, shape, mesh axes) of every leaf in the order of the tree, for goldens and logs."""
    rules = fsdp_rules() if rules is None else rules
    return [
        (
            leaf_path(keys),
            tuple(leaf.shape),
            _spec(leaf_path(keys), leaf.shape, mesh, rules),
        )
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keep the leading dimension over (data, fsdp) and the others whole, at a block boundary.

    Does nothing where no mesh is set (one device, no ``jax.set_mesh``).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> Spec:
    """The mesh axes of one leaf, checked against its shape."""
    axes = dict(mesh.shape)
    rule = next((rule for rule in rules if re.search(rule.pattern, path)), None)
    if rule is None or not shape:
        return ()
    spec = rule.spec(tuple(shape), axes) if callable(rule.spec) else rule.spec
    if len(spec) > len(shape):
        raise ConfigError(
            "mesh.rules",
            f"{rule.pattern!r} gives {spec} to {path}, which has only the shape {tuple(shape)}",
            "Shorten the spec or narrow the pattern",
        )
    for size, axis in zip(shape, spec, strict=False):
        names = (axis,) if isinstance(axis, str) else axis or ()
        parts = math.prod(axes[name] for name in names)
        if size % parts:
            raise ConfigError(
                "mesh.rules",
                f"{rule.pattern!r} cuts {path} of shape {tuple(shape)} along {axis} into {parts} "
                f"parts, which do not divide {size}",
                "Choose another dimension or another mesh",
            )
    return spec
