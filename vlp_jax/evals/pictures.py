"""Pictures for galleries: enlarged, and with heat laid over them."""

import math

import numpy as np
from PIL import Image

PICTURE_SIDE = 192  # pixels; smaller pictures are enlarged to at least this
HEAT_COLOUR = (235, 60, 20)
HEAT_OPACITY = 0.75  # of the colour where the heat is highest


def enlarge(image: np.ndarray) -> np.ndarray:
    """A small picture at a whole multiple of its size, at least ``PICTURE_SIDE`` pixels wide.

    Args:
        image: uint8 [H, H, 3].

    Returns:
        uint8 [S, S, 3]; pixels of a tiny picture stay squares, which is honest about its size.
    """
    factor = math.ceil(PICTURE_SIDE / len(image))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def heat_map(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A picture with attention laid over it, enlarged like ``enlarge``.

    Args:
        image: uint8 [H, H, 3].
        attention: [I], of the patches in rows; those above the mean are coloured, the highest in
            full.

    Returns:
        uint8 [S, S, 3].
    """
    picture = enlarge(image).astype(np.float32)
    grid = math.isqrt(len(attention))
    above = np.maximum(attention - attention.mean(), 0.0)
    above = above / max(float(above.max()), np.finfo(np.float32).tiny)
    heat = Image.fromarray(above.reshape(grid, grid).astype(np.float32))
    heat = heat.resize(picture.shape[:2], Image.Resampling.BICUBIC)
    opacity = HEAT_OPACITY * np.clip(np.asarray(heat), 0.0, 1.0)[..., None]
    blended = (1.0 - opacity) * picture + opacity * np.asarray(HEAT_COLOUR, np.float32)[None, None]
    return blended.round().astype(np.uint8)
