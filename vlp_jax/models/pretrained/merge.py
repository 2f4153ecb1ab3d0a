"""Parameters from a file into a model: what fits is used, what differs is named."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.infra.sharding import by_path, leaf_path
from vlp_jax.models.pretrained.files import WeightsError
from vlp_jax.models.pretrained.resize import grid_side, resize_grid
from vlp_jax.models.tuning import is_added, is_skipped

IMAGE_POSITIONS = "image_tower/position_embedding"
TEXT_POSITIONS = "text_embedding/position/embedding"

Status = Literal["used", "resized", "new", "unused"]
STATUSES: tuple[Status, ...] = ("used", "resized", "new", "unused")
_NAMED = 5  # parameters that an error names


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one tensor.

    Attributes:
        status: ``used`` as it is, ``resized``, ``new`` (a parameter that the file does not have),
            or ``unused`` (a tensor of the file that the model does not have).
        parameter: its path in our tree; empty for an unused public tensor.
        shape: in the model; of the file for unused ones.
        sources: names of the public tensors it was made of.
        note: what was done to it.
    """

    status: Status
    parameter: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every tensor of a file and of every parameter of a model.

    Attributes:
        rows: one of each.
        notes: what else the user should know.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def of(self, status: Status) -> list[Row]:
        """The rows of one status."""
        return [row for row in self.rows if row.status == status]

    def summary(self) -> str:
        """One line: how many tensors of each status."""
        counts = collections.Counter(row.status for row in self.rows)
        return ", ".join(f"{counts[status]} {status}" for status in STATUSES)


class NoPartFits(WeightsError):
    """The weights hold no part of the model."""


def merge(
    params: Any,
    loaded: Mapping[str, np.ndarray],
    origin: str = "the weights",
    skipped: Sequence[str] = (),
) -> tuple[Any, Report]:
    """Put loaded parameters in the place of freshly initialised ones.

    Strict: the parts of a model (``image_tower``, the blocks of ``text_lower``, ...) are loaded
    whole or not at all, and shapes must agree. Only the position tables may differ in length: that
    of the image is resized bicubically; that of the text is cut, or its rows beyond those loaded
    stay fresh. What tuning adds to a part (``models.tuning``) may be missing from the weights, and
    what it skips may be left over.

    Args:
        params: nested dicts of arrays, as a run initialises them.
        loaded: of ``load_parameters``.
        origin: the file, named in errors.
        skipped: units of the model that do not exist.

    Returns:
        A tree like ``params`` whose replaced leaves are NumPy arrays of the dtype there (put it
        where it belongs by ``jax.device_put``), and what became of every tensor.

    Raises:
        NoPartFits: the model has none of the loaded parts.
        WeightsError: parts lack parameters, or shapes differ.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in by_path(params).items()}
    fitted, report = fit(shapes, loaded, origin, skipped=skipped)

    def choose(keys: Any, leaf: Any) -> Any:
        array = fitted.get(leaf_path(keys))
        if array is None:
            return leaf
        if array.shape != leaf.shape:  # a text position table with fewer rows
            return jnp.asarray(leaf).at[: len(array)].set(array.astype(leaf.dtype))
        return array.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(choose, params), report


def fit(
    shapes: Mapping[str, tuple[int, ...]],
    loaded: Mapping[str, np.ndarray],
    origin: str,
    drop_blocks: bool = False,
    skipped: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], Report]:
    """Choose and resize what a model of these shapes can use; the rules are those of ``merge``.

    Args:
        shapes: of the model's parameters, by path.
        loaded: by path.
        origin: the file, named in errors.
        drop_blocks: whether a part may hold more than the model has, such as a last block.
        skipped: units of the model that do not exist, see ``models.tuning``; the weights may have
            them.

    Returns:
        The parameters to use, by path (a text position table may be short of rows), and what became
        of every tensor.

    Raises:
        WeightsError: see ``merge``.
    """
    parts = {_part(path) for path in loaded} & {_part(path) for path in shapes}
    if not parts:
        raise NoPartFits(
            origin,
            f"of another architecture: it holds {_listed(sorted({_part(p) for p in loaded}))}, and "
            "the model has none of these",
            "Give weights of the model that the config describes",
        )
    missing = [
        path
        for path in shapes
        if _part(path) in parts and path not in loaded and not is_added(path)
    ]
    if missing:
        raise WeightsError(
            origin,
            f"{len(missing)} parameters of the model are missing: {_listed(missing)}",
            "Set config.adopt_model=True, or check config.model (depths, norm, pre_norm, stem), or "
            "fetch the file again",
        )
    surplus = [
        path
        for path in loaded
        if _part(path) in parts and path not in shapes and not is_skipped(path, skipped)
    ]
    if surplus and not drop_blocks:
        remedy = "Set config.adopt_model=True, or check config.model (depths, norm, pre_norm, stem)"
        if all(is_added(path) for path in surplus):
            remedy = "Skip the units that these stand for, by config.skip_from"
        raise WeightsError(
            origin,
            f"{len(surplus)} parameters have no place in the model: {_listed(surplus)}",
            remedy,
        )
    fitted, rows, wrong = {}, [], []
    for path, shape in shapes.items():
        if path not in loaded:
            rows.append(Row("new", path, shape))
            continue
        array = loaded[path]
        if array.shape == shape:
            rows.append(Row("used", path, shape))
        elif _resizable(path, array.shape, shape):
            array, note = _resize(path, array, shape, origin)
            rows.append(Row("resized", path, shape, note=note))
        else:
            wrong.append(f"{path} {list(array.shape)} instead of {list(shape)}")
        fitted[path] = array
    if wrong:
        raise WeightsError(
            origin,
            f"of another architecture: {len(wrong)} parameters differ in shape: {_listed(wrong)}",
            "Set config.model (widths, heads, patch_size), config.tokenizer and the sizes of heads "
            "(config.objectives: num_classes, embedding_dim) to those of the weights",
        )
    rows += [Row("unused", path, loaded[path].shape) for path in loaded if path not in shapes]
    return fitted, Report(tuple(rows))


def _part(path: str) -> str:
    """The part of the model that a parameter belongs to: all blocks of a stack are one."""
    return re.sub(r"_\d+$", "", path.split("/")[0])


def _resizable(path: str, old: Sequence[int], new: Sequence[int]) -> bool:
    tables = (IMAGE_POSITIONS, TEXT_POSITIONS)
    return path in tables and len(old) == len(new) and old[-1] == new[-1]


def _resize(
    path: str, array: np.ndarray, shape: tuple[int, ...], origin: str
) -> tuple[np.ndarray, str]:
    if path == IMAGE_POSITIONS:
        try:
            old, new = grid_side(array.shape[1]), grid_side(shape[1])
        except ValueError as error:
            raise WeightsError(origin, str(error), "Give weights of a square image") from error
        return resize_grid(array, shape[1]), f"{old} x {old} -> {new} x {new}, bicubic"
    rows = min(len(array), shape[0])
    note = f"the first {rows} of {len(array)} rows"
    if rows < shape[0]:
        note = f"{rows} rows; the {shape[0] - rows} beyond them start fresh"
    return array[:rows], note


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
