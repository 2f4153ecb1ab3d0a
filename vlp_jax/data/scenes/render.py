"""Pictures and masks of scenes, anti-aliased at any size.

Channels are planes while painting, since NumPy is slow on a last axis of three, and each object
touches the pixels of its bounding box only.
"""

import functools
import math

import numpy as np

from vlp_jax.data.scenes import shapes as outlines
from vlp_jax.data.scenes.world import COLOURS, SHAPES, TEXTURES, Background, Object, Scene

RGB: dict[str, tuple[int, int, int]] = {
    "red": (212, 30, 38),
    "green": (30, 146, 50),
    "blue": (32, 72, 214),
    "yellow": (232, 208, 26),
    "purple": (122, 38, 168),
    "orange": (234, 124, 24),
    "black": (28, 28, 32),
    "pink": (234, 118, 186),
    "cyan": (26, 190, 212),
    "brown": (120, 72, 34),
}

_PAINTS = np.array([RGB[colour] for colour in COLOURS], np.float32)[:, :, None, None]
_TINT = 10.0  # grey levels by which an object's tint of 1 lightens it
_NOISE_TILE = 512
_OUTLINE_WIDTH = 0.25  # widths and periods of textures, in radii of the object
_EDGE = 0.12  # a line around stripes and dots keeps the shape readable
_STRIPE_PERIOD, _STRIPE_SHARE = 0.46, 0.5
_DOT_PERIOD, _DOT_RADIUS = 0.5, 0.17


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture of a scene: uint8 [size, size, 3] RGB."""
    ground = _ground(scene.background, size)
    canvas = ground.copy()
    for obj in scene.objects:
        _paint(canvas, ground, obj, size)
    picture = np.empty((size, size, 3), np.uint8)
    # Paints and grounds keep clear of 0 and 255 by more than the noise, so nothing overflows.
    np.add(
        canvas,
        _noise_patch(scene.background, size),
        out=picture.transpose(2, 0, 1),
        casting="unsafe",
    )
    return picture


def masks(scene: Scene, size: int) -> np.ndarray:
    """The visible part of each object, in the order of ``scene.objects``: bool [n, size, size].

    A pixel belongs to the frontmost object whose outline encloses its centre. Gaps of a texture
    belong to the object.
    """
    visible = np.zeros((len(scene.objects), size, size), np.bool_)
    for index, obj in enumerate(scene.objects):
        rows, columns, x, y = _local(obj, size)
        inside = outlines.OUTLINES[SHAPES[obj.shape]](x, y) < 0
        visible[:index, rows, columns] &= ~inside
        visible[index, rows, columns] = inside
    return visible


def _paint(canvas: np.ndarray, ground: np.ndarray, obj: Object, size: int) -> None:
    """Paint an object over ``canvas`` [3, size, size]; gaps of its texture show ``ground``."""
    rows, columns, x, y = _local(obj, size)
    distance = outlines.OUTLINES[SHAPES[obj.shape]](x, y)
    pixels = np.float32(obj.radius * size)  # pixels per unit of local coordinates
    cover = _step(distance * -pixels)
    paint = _PAINTS[obj.colour] + np.float32(_TINT * obj.tint)
    texture = TEXTURES[obj.texture]
    if texture != "filled":
        behind = ground[:, rows, columns]
        paint = behind + (paint - behind) * _texture(texture, distance, x, y, pixels)
    patch = canvas[:, rows, columns]
    patch += (paint - patch) * cover


def _texture(
    texture: str, distance: np.ndarray, x: np.ndarray, y: np.ndarray, pixels: np.float32
) -> np.ndarray:
    """How much of each pixel the object's colour takes, the rest being gaps: float32 [h, w]."""
    if texture == "outlined":
        return _step((distance + _OUTLINE_WIDTH) * pixels)
    if texture == "striped":
        phase = (x + y) * np.float32(math.sqrt(0.5) / _STRIPE_PERIOD)
        inked = np.abs(phase - np.floor(phase) - 0.5) - np.float32((1 - _STRIPE_SHARE) / 2)
        inked *= np.float32(_STRIPE_PERIOD)
    else:
        u, v = x * np.float32(1 / _DOT_PERIOD), y * np.float32(1 / _DOT_PERIOD)
        u, v = u - np.rint(u), v - np.rint(v)
        inked = np.sqrt(u * u + v * v) * np.float32(_DOT_PERIOD) - np.float32(_DOT_RADIUS)
    return _step(np.maximum(inked, distance + np.float32(_EDGE)) * pixels)


def _step(pixels: np.ndarray) -> np.ndarray:
    """Cover of a pixel whose centre lies so many pixels inside an edge, in [0, 1]."""
    return np.minimum(np.maximum(pixels + np.float32(0.5), 0), 1)


def _local(obj: Object, size: int) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The bounding box of an object and its local coordinates there: float32 [h, w] each."""
    reach = obj.radius + 1 / size
    left, right = max(int((obj.x - reach) * size), 0), min(int((obj.x + reach) * size) + 1, size)
    top, bottom = max(int((obj.y - reach) * size), 0), min(int((obj.y + reach) * size) + 1, size)
    centres = _centres(size)
    across = (centres[left:right] - np.float32(obj.x)) * np.float32(1 / obj.radius)
    down = ((centres[top:bottom] - np.float32(obj.y)) * np.float32(1 / obj.radius))[:, None]
    cos, sin = np.float32(math.cos(obj.angle)), np.float32(math.sin(obj.angle))
    return (
        slice(top, bottom),
        slice(left, right),
        across * cos + down * sin,
        down * cos - across * sin,
    )


def _ground(background: Background, size: int) -> np.ndarray:
    """The ground without noise: float32 [3, size, size], in grey levels."""
    rgb = np.array(background.rgb, np.float32)[:, None, None] * 255
    change = np.float32(background.change * 255)
    if background.kind == "plain":
        return np.broadcast_to(rgb, (3, size, size))
    return rgb + _pattern(background, size) * change


def _pattern(background: Background, size: int) -> np.ndarray:
    """Strength of the pattern, in [0, 1]: float32 [size, size] or broadcastable to it."""
    across, down = _centres(size), _centres(size)[:, None]
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    if background.kind == "gradient":
        along = (across - 0.5) * np.float32(cos) + (down - 0.5) * np.float32(sin)
        return along * np.float32(1 / math.sqrt(2)) + np.float32(0.5)
    pitch = np.float32(2 * math.pi / background.period)
    if background.kind == "bands":
        return np.sin((across * np.float32(cos) + down * np.float32(sin)) * pitch) * 0.5 + 0.5
    if background.kind == "checks":
        return np.sin(across * pitch) * np.sin(down * pitch) * 0.5 + 0.5
    bent = np.sin(across * np.float32(2 * math.pi)) * np.float32(0.08)
    return np.sin((down + bent) * pitch) * 0.5 + 0.5


def _noise_patch(background: Background, size: int) -> np.ndarray:
    """Pixel noise plus one half, so that a cast to uint8 rounds: float32 [3, size, size]."""
    span = _NOISE_TILE - size + 1
    if span < 1:
        raise ValueError(f"image size must be at most {_NOISE_TILE} px, got {size}")
    top, left = int(background.noise_y * span), int(background.noise_x * span)
    tile = _noise()[:, top : top + size, left : left + size]
    return tile * np.float32(background.noise) + np.float32(0.5)


@functools.cache
def _noise() -> np.ndarray:
    """Unit Gaussian noise, cut off at two deviations: float32 [3, tile, tile]."""
    rng = np.random.Generator(np.random.Philox(key=0))
    noise = rng.standard_normal((3, _NOISE_TILE, _NOISE_TILE), np.float32)
    return np.clip(noise, -2, 2)


@functools.cache
def _centres(size: int) -> np.ndarray:
    """Pixel centres along one side: float32 [size] in (0, 1)."""
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
