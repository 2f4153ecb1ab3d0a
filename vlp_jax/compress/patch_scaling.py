"""Patch scaling: larger patches, and so fewer, by one and the same parameters.

One base kernel is resized to each patch size by the pseudo-inverse of a bilinear enlargement
(FlexiViT, arXiv 2212.08013, section 3.4): a patch and its enlargement then have the same embedding,
where nothing but the kernel stands before it (not behind the convolutions of a stem).
A learned position table is read at scaled coordinates; fixed sines and cosines are computed there.
All matrices are constants of a size, made once in float64; none is made from another's result.
"""

import functools

import numpy as np


@functools.cache
def bilinear(old: int, new: int) -> np.ndarray:
    """Weights of a linear resampling from ``old`` samples to ``new``: float64 [new, old].

    Half-pixel centres, edges repeated, no antialiasing; rows sum to 1, and with ``new`` = ``old``
    it is the identity.
    """
    centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    below = np.minimum(np.floor(centre).astype(int), max(old - 2, 0))
    share = centre - below
    weights = np.zeros((new, old))
    rows = np.arange(new)
    weights[rows, below] += 1.0 - share
    weights[rows, np.minimum(below + 1, old - 1)] += share
    weights.setflags(write=False)
    return weights


@functools.cache
def kernel_resize(base: int, size: int) -> np.ndarray:
    """What takes the rows of a base kernel to those of another patch size: float64 [s * s, b * b].

    With B the bilinear enlargement of a patch of side b to side s, the kernel w becomes
    pinv(B)^T w, so that <B x, pinv(B)^T w> = <x, w> for every patch x, as long as s is at least b.
    For smaller patches it is the nearest kernel in the least squares of white patches.

    Args:
        base: b, side of the patch that the kernel belongs to.
        size: s, side of the patch wanted.
    """
    along = np.linalg.pinv(bilinear(base, size)).T  # the pseudo-inverse of a product of axes
    weights = np.einsum("ai,bj->abij", along, along).reshape(size * size, base * base)
    weights.setflags(write=False)
    return weights


@functools.cache
def position_resize(base: int, grid: int) -> np.ndarray:
    """Reads a table of b x b positions at g x g scaled coordinates: float64 [g * g, b * b]."""
    along = bilinear(base, grid)
    weights = np.einsum("ai,bj->abij", along, along).reshape(grid * grid, base * base)
    weights.setflags(write=False)
    return weights


@functools.cache
def sincos_positions(base: int, grid: int, width: int) -> np.ndarray:
    """Fixed positions of a g x g grid, in the coordinates of a base grid: float32 [g * g, D].

    Sines, then cosines of the row, then the same of the column, at the D / 4 frequencies
    10,000^-(4 i / D), as in MoCo v3 (fact sheet, section 7): its code numbers patches by rows and
    puts the row first.

    Args:
        base: b, side of the grid whose patches lie at 0, 1, ..., b - 1.
        grid: g, side of the grid wanted.
        width: D, a multiple of 4.

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine and cosine positions need a width of a multiple of 4, not {width}")
    along = (np.arange(grid) + 0.5) * base / grid - 0.5
    frequency = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angle = along[:, None] * frequency
    y, x = (a.reshape(-1, width // 4) for a in np.broadcast_arrays(angle[:, None], angle[None]))
    table = np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], axis=1)
    table = table.astype(np.float32)
    table.setflags(write=False)
    return table
