"""Kernels and positions of another patch size."""

import numpy as np
import pytest
from PIL import Image

from vlp_jax.compress.patch_scaling import (
    bilinear,
    kernel_resize,
    position_resize,
    sincos_positions,
)

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("size", [16, 20, 24, 30, 40, 48])
def test_an_enlarged_patch_has_the_embedding_of_the_patch(size):
    """By an enlargement that Pillow has made."""
    patch = DRAW.standard_normal((16, 16)).astype(np.float32)
    kernel = DRAW.standard_normal((256, 8))
    enlarged = np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BILINEAR))
    embedded = enlarged.reshape(-1) @ (kernel_resize(16, size) @ kernel)
    np.testing.assert_allclose(embedded, patch.reshape(-1) @ kernel, atol=1e-5)


def test_a_smaller_patch_has_the_nearest_kernel():
    """No other kernel answers better, in the mean over white patches of the base size."""
    kernel = DRAW.standard_normal(64)
    shrunk = kernel_resize(8, 4) @ kernel
    along = bilinear(8, 4)
    both = np.einsum("ai,bj->abij", along, along).reshape(16, 64)
    nearest, *_ = np.linalg.lstsq(both.T, kernel, rcond=None)
    np.testing.assert_allclose(shrunk, nearest, atol=1e-10)


@pytest.mark.parametrize("side", [4, 7, 16])
def test_the_same_size_changes_nothing(side):
    np.testing.assert_array_equal(bilinear(side, side), np.eye(side))
    np.testing.assert_allclose(kernel_resize(side, side), np.eye(side**2), atol=1e-12)
    np.testing.assert_array_equal(position_resize(side, side), np.eye(side**2))


def test_positions_are_read_at_scaled_coordinates():
    """A table that is linear in the place stays so, where it is read inside the grid."""
    base, grid = 8, 4
    y, x = np.divmod(np.arange(base**2), base)
    read = position_resize(base, grid) @ np.stack([y, x], axis=1).astype(float)
    along = (np.arange(grid) + 0.5) * base / grid - 0.5
    expected = np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(read, expected, atol=1e-12)


def test_fixed_positions_of_the_base_grid():
    """Against the public code of MoCo v3, step by step; its meshgrid runs over rows first."""
    side, width = 3, 8
    first, second = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    omega = 1.0 / 10_000 ** (np.arange(width // 4) / (width // 4))
    one, other = (np.einsum("m,d->md", grid.ravel(), omega) for grid in (first, second))
    table = np.concatenate([np.sin(one), np.cos(one), np.sin(other), np.cos(other)], axis=1)
    np.testing.assert_allclose(sincos_positions(side, side, width), table, atol=1e-6)


def test_fixed_positions_of_another_grid_lie_where_its_patches_do():
    """Patches twice as large lie half-way between those they cover."""
    w = 10_000.0 ** -(np.arange(2) / 2)
    table = sincos_positions(4, 2, 8)
    for place, (row, column) in enumerate([(0.5, 0.5), (0.5, 2.5), (2.5, 0.5), (2.5, 2.5)]):
        np.testing.assert_allclose(table[place, :2], np.sin(row * w), atol=1e-6)
        np.testing.assert_allclose(table[place, 4:6], np.sin(column * w), atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(4, 2, 6)
