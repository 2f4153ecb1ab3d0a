"""What comes out of a conversion, and how it is made: shared by images and text.

converted = convert_image(weights, config, fed=Pixels(PIXEL_MEAN, PIXEL_STD))
arrays, report = converted.fit(shapes)
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from vlp_jax.models.pretrained.files import Weights, WeightsError
from vlp_jax.models.pretrained.merge import Report, Row, fit
from vlp_jax.models.pretrained.naming import Leaf


@dataclasses.dataclass(frozen=True)
class Converted:
    """A public checkpoint in our naming, at its own depth and with its own position tables.

    Attributes:
        weights: it was made of.
        family: what the checkpoint is, for the user.
        params: path in our tree -> float32 array.
        sources: the same paths -> names of the public tensors.
        notes: what the user should know.
    """

    weights: Weights
    family: str
    params: dict[str, np.ndarray]
    sources: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], Report]:
        """Cut and resize to a model: last blocks that it lacks are left out.

        Args:
            shapes: of the model's parameters, by path.

        Returns:
            The parameters it takes from the checkpoint, and what became of every tensor: each
            parameter of the model, and each public tensor that was not used.

        Raises:
            WeightsError: what is there does not fit; see ``merge``.
        """
        origin = str(self.weights.file)
        fitted, report = fit(shapes, self.params, origin, drop_blocks=True)
        rows = [
            dataclasses.replace(row, sources=self.sources.get(row.parameter, ()))
            for row in report.rows
            if row.status != "unused"
        ]
        taken = {name for row in rows for name in row.sources}
        rows += [
            Row("unused", "", array.shape, (name,))
            for name, array in self.weights.arrays.items()
            if name not in taken
        ]
        return fitted, Report(tuple(rows), self.notes)


def make_parameters(
    weights: Weights, leaves: Iterable[Leaf]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """Make every parameter.

    Args:
        weights: what the leaves are made of.
        leaves: the parameters wanted.

    Returns:
        Path -> float32 array, and path -> names of the tensors it was made of.

    Raises:
        WeightsError: tensors are missing, all of which it names, or have shapes that do not fit.
    """
    leaves = list(leaves)
    absent = {name: None for leaf in leaves for name in leaf.sources if name not in weights.arrays}
    if absent:
        raise missing_tensors(weights, list(absent))
    params = {leaf.path: _make_one(weights, leaf) for leaf in leaves}
    return params, {leaf.path: leaf.sources for leaf in leaves}


def refuse_surplus(
    weights: Weights, leaves: Iterable[Leaf], prefix: str, depth: int, separator: str = "."
) -> None:
    """Refuse blocks that compute what ours do not, such as layer scales or cross-attention.

    Left out, such a tensor would leave a model with other outputs than the checkpoint's.

    Args:
        weights: of the checkpoint.
        leaves: all that is made of it.
        prefix: of the names of blocks, up to their number.
        depth: how many blocks there are.
        separator: between the number of a block and the names of its parts.
    """
    known = {name for leaf in leaves for name in leaf.sources}
    blocks = tuple(f"{prefix}{layer}{separator}" for layer in range(depth))
    surplus = [name for name in weights.arrays if name.startswith(blocks) and name not in known]
    if surplus:
        raise other_architecture(
            weights, f"its blocks hold {len(surplus)} tensors that ours lack: {some_of(surplus)}"
        )


def count_blocks(there: Iterable[str], prefix: str, suffix: str, separator: str = ".") -> int:
    """Number of blocks: one more than the highest that is there."""
    number = re.compile(re.escape(prefix) + r"(\d+)" + re.escape(separator + suffix))
    found = [match for match in map(number.fullmatch, there) if match]
    return max((int(match[1]) for match in found), default=-1) + 1


def other_architecture(weights: Weights, problem: str) -> WeightsError:
    """The error, to be raised, that weights compute what our model does not."""
    return WeightsError(
        weights.file,
        f"of another architecture: {problem}",
        "Give weights of CLIP's ViT, ViT (augreg), MAE, RoBERTa or BERT",
    )


def missing_tensors(weights: Weights, names: list[str]) -> WeightsError:
    """The error, to be raised, that a file lacks what its kind of checkpoint has."""
    return WeightsError(
        weights.file,
        f"{len(names)} tensors are missing: {some_of(names)}",
        "Fetch the file again, or give the whole checkpoint",
    )


def some_of(names: Iterable[str], count: int = 5) -> str:
    """The first names, for a message, and how many more there are."""
    names = list(names)
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")


def _make_one(weights: Weights, leaf: Leaf) -> np.ndarray:
    there = [weights.arrays[name] for name in leaf.sources]
    try:
        made = leaf.make(*(array.astype(np.float32) for array in there))
    except ValueError as error:
        shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in zip(leaf.sources, there, strict=True))
        raise other_architecture(
            weights, f"{shapes} cannot become {leaf.path} ({error})"
        ) from error
    return np.ascontiguousarray(made, np.float32)
