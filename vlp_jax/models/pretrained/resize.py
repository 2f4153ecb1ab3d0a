"""Position tables of another size."""

import math

import numpy as np

# Keys' constant, as in torch.nn.functional.interpolate, by which the public checkpoints are resized
# in their own code.
_CUBIC = -0.75


def resize_grid(table: np.ndarray, tokens: int) -> np.ndarray:
    """Resize the position table of an image bicubically; the class token's row stays as it is.

    Half-pixel centres, edges repeated, no antialiasing: the rule of the reference implementations
    (and of the FLM recipe, fact sheet, section 5).

    Args:
        table: floating [1, 1 + g * g, D], the class token first.
        tokens: rows wanted, 1 + h * h.

    Returns:
        float32 [1, tokens, D].

    Raises:
        ValueError: rows that are no square and a class token.
    """
    old, new = grid_side(table.shape[1]), grid_side(tokens)
    cells = table[0, 1:].astype(np.float64).reshape(old, old, -1)
    along = _bicubic(old, new)
    cells = np.einsum("yi,xj,ijd->yxd", along, along, cells, optimize=True)
    resized = np.concatenate([table[0, :1], cells.reshape(new * new, -1)])
    return resized[None].astype(np.float32)


def grid_side(tokens: int) -> int:
    """Side of the grid of ``tokens`` minus the class token; ValueError if it is no square."""
    side = math.isqrt(max(tokens - 1, 0))
    if side == 0 or side * side != tokens - 1:
        raise ValueError(f"{tokens} image positions are no square grid and a class token")
    return side


def _bicubic(old: int, new: int) -> np.ndarray:
    """Weights from ``old`` samples to ``new`` ones: float64 [new, old]; rows sum to 1."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    below = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        index = below + tap
        # Samples beyond the edge are the edge: several taps may fall on it.
        np.add.at(weights, (np.arange(new), index.clip(0, old - 1)), _kernel(centre - index))
    return weights


def _kernel(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    d = np.abs(distance)
    near = (_CUBIC + 2) * d**3 - (_CUBIC + 3) * d**2 + 1
    far = _CUBIC * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
