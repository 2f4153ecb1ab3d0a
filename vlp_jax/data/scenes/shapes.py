"""Outlines of the ten shapes as signed distances in units of the object's radius.

Each function maps local coordinates (x to the right, y down, the circumscribed circle has radius
1) to a value that is negative inside, positive outside, and has unit slope at the outline, so
that one clip of it gives an anti-aliased edge at any size. Corners are mitred: away from the
outline the values are bounds, not exact distances. Constants balance the areas by eye.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]

DIRECTIONS = 128  # angles of the table of extents


def circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disc."""
    return np.sqrt(x * x + y * y) - 0.84


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An upright square."""
    return np.maximum(np.abs(x), np.abs(y)) - 0.7


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An isosceles triangle, tip up."""
    normal = _unit(1.46, 0.83)  # the sides run from (0, -0.92) to (0.83, 0.54)
    side = np.abs(x) * normal[0] - (y + 0.92) * normal[1]
    return np.maximum(side, y - 0.54)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A five-pointed star, tip up, folded onto half of one point by mirrors."""
    x, y = np.abs(x), -y
    for angle in (-math.pi * 0.2, -math.pi * 0.8):  # mirrors between neighbouring points
        nx, ny = math.cos(angle), math.sin(angle)
        beyond = 2 * np.maximum(nx * x + ny * y, 0)
        x, y = x - beyond * nx, y - beyond * ny
    valley = (0.46 * math.sin(math.pi * 0.2), 0.46 * math.cos(math.pi * 0.2))
    normal = _unit(1 - valley[1], valley[0])
    return np.abs(x) * normal[0] + (y - 1) * normal[1]


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An upright plus sign."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.86, np.minimum(x, y) - 0.3)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner with a half disc on each upper side."""
    x, y, q = np.abs(x), y - 0.08, 0.74
    lobe_x, lobe_y = x - q / 2, y + q / 2
    lobe = np.sqrt(lobe_x * lobe_x + lobe_y * lobe_y) - q / math.sqrt(2)
    return np.minimum(lobe, (x + np.abs(y) - q) / math.sqrt(2))


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disc with a bite, open to the right."""
    bite_x = x - 0.46
    outer = np.sqrt(x * x + y * y) - 0.92
    return np.maximum(outer, 0.7 - np.sqrt(bite_x * bite_x + y * y))


def diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A rhombus taller than wide, so that no turned square resembles it."""
    nx, ny = 1 / 0.6, 1 / 0.98
    return (np.abs(x) * nx + np.abs(y) * ny - 1) / math.hypot(nx, ny)


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An arrow, tip up."""
    x = np.abs(x)
    normal = _unit(1.0, 0.82)
    head = np.maximum(x * normal[0] - (y + 0.96) * normal[1], y - 0.06)
    shaft = np.maximum(x - 0.27, np.abs(y - 0.42) - 0.5)
    return np.minimum(head, shaft)


def hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two triangles that meet at their tips."""
    x, y = np.abs(x), np.abs(y)
    normal = _unit(1.0, 0.72)
    return np.maximum(y - 0.78, (x - 0.06) * normal[0] - y * normal[1])


OUTLINES: dict[str, Outline] = {
    outline.__name__: outline
    for outline in (
        *(circle, square, triangle, star, cross),
        *(heart, crescent, diamond, arrow, hourglass),
    )
}


@functools.cache
def extents(shape: str) -> tuple[float, ...] | None:
    """How far a shape reaches from its centre in each of ``DIRECTIONS`` angles, in radii.

    Returns:
        The radii, or None for a shape of which some ray from the centre leaves and re-enters.
    """
    angles = np.arange(DIRECTIONS) * (2 * math.pi / DIRECTIONS)
    radii = np.linspace(0, 1.1, 441)
    inside = OUTLINES[shape](np.outer(np.cos(angles), radii), np.outer(np.sin(angles), radii)) < 0
    if np.any(np.diff(inside.astype(np.int8), axis=1) > 0) or not inside[:, 0].all():
        return None
    return tuple(radii[inside.sum(axis=1) - 1].tolist())


def _unit(x: float, y: float) -> tuple[float, float]:
    norm = math.hypot(x, y)
    return x / norm, y / norm
