"""What happens to pixels on the device, inside the compiled step.

Random views of an image for invariance objectives are made here, from decoded uint8 pixels: a crop
of random place, size and shape, resampled to the size of the view; a flip; jitter of brightness,
contrast, saturation and hue in random order; grey; blur; solarisation (recipes: fact sheet of
accelerated invariance pretraining, section 7). Every draw is a function of the example's key.

Colours are changed plane by plane: with the channels as the last axis, every change would be passes
of its own over memory instead of one for all that happens to a pixel (docs/perf.md).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.infra.errors import ConfigError

# Mean and standard deviation of each colour channel in [0, 1], as in the CLIP towers.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue in a luminance, as in torchvision
_TRIES = 10  # crops that are drawn before the largest central one is taken, as in torchvision
_SOLAR = 0.5  # values from here on are inverted

Planes = tuple[jax.Array, jax.Array, jax.Array]  # red, green and blue: floating [B, S, S] each


def normalize(image: jax.Array) -> jax.Array:
    """Pixels to about zero mean and unit variance: uint8 [B, H, W, 3] -> float32 [B, H, W, 3]."""
    scale = 1.0 / (255.0 * jnp.asarray(PIXEL_STD))
    offset = jnp.asarray(PIXEL_MEAN) / jnp.asarray(PIXEL_STD)
    return image.astype(jnp.float32) * scale[None, None, None] - offset[None, None, None]


def resize(image: jax.Array, size: int) -> jax.Array:
    """Bilinear, antialiased where it shrinks: floating [B, H, W, C] -> [B, size, size, C]."""
    if image.shape[1:3] == (size, size):
        return image
    shape = (len(image), size, size, image.shape[-1])
    return jax.image.resize(image, shape, method="linear", antialias=True)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a random view of an image is made; the defaults are those of MoCo v3's first view.

    Attributes:
        crop: whether a random rectangle is cut out; else the view shows the whole image.
        scale: least and largest share of the image's area in a crop.
        ratio: least and largest width over height.
        flip: probability of a mirror image.
        jitter: probability that colours are changed.
        brightness, contrast, saturation: largest change of the factor, 1 +- x.
        hue: largest shift, as a share of the circle.
        grey: probability of a grey picture.
        blur: probability of a Gaussian blur.
        blur_sigma: least and largest standard deviation of it, in pixels of a view of the model's
            own size.
        solarize: probability that bright values are inverted.
    """

    crop: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def check(self, key: str) -> None:
        """Raise a ConfigError that names the key where a number makes no sense."""
        shares = ("flip", "jitter", "grey", "blur", "solarize", "brightness", "contrast")
        for name, most in (*dict.fromkeys((*shares, "saturation"), 1.0).items(), ("hue", 0.5)):
            share = getattr(self, name)
            if not _is_number(share) or not 0.0 <= share <= most:
                raise ConfigError(
                    f"{key}.{name}", f"{share!r} is no share", f"Use one in [0, {most:g}]"
                )
        if not isinstance(self.crop, bool):
            raise ConfigError(f"{key}.crop", f"{self.crop!r} says neither", "Use True or False")
        for name, high in (("scale", 1.0), ("ratio", 100.0), ("blur_sigma", 100.0)):
            ends = getattr(self, name)
            pair = isinstance(ends, tuple) and len(ends) == 2 and all(map(_is_number, ends))
            if not pair or not 0.0 < ends[0] <= ends[1] <= high:
                raise ConfigError(
                    f"{key}.{name}",
                    f"{ends!r} is no range",
                    f"Use two numbers above 0 and up to {high:g}, the smaller first",
                )


class Draws(NamedTuple):
    """What is random in a view: float32 [B], or [B, n] where it says so, uniform in [0, 1).

    All numbers of a view are one draw of the generator: each draw is compiled by itself, and where
    every change of a picture made several, they were a third of a small step's compile.
    """

    areas: jax.Array  # [B, 10], of which the first that fits counts
    ratios: jax.Array  # [B, 10]
    place: jax.Array  # [B, 2]
    flip: jax.Array
    jitter: jax.Array
    order: jax.Array  # [B, 4]
    factors: jax.Array  # [B, 4]
    grey: jax.Array
    blur: jax.Array
    sigma: jax.Array
    solarize: jax.Array

    @classmethod
    def of(cls, keys: jax.Array) -> "Draws":
        """Those of one view of every example, by its key: PRNG keys [B]."""
        counts = {"areas": _TRIES, "ratios": _TRIES, "place": 2, "order": 4, "factors": 4}
        widths = [counts.get(name, 1) for name in cls._fields]
        numbers = jax.vmap(lambda key: jax.random.uniform(key, (sum(widths),)))(keys)
        parts = jnp.split(numbers, list(itertools.accumulate(widths))[:-1], axis=1)
        return cls(*(part[:, 0] if part.shape[1] == 1 else part for part in parts))


class Crop(NamedTuple):
    """Rectangles in pixels, int32 [B] each."""

    top: jax.Array
    left: jax.Array
    height: jax.Array
    width: jax.Array


def random_view(
    image: jax.Array, keys: jax.Array, recipe: Recipe, size: int, own_size: int = 0
) -> jax.Array:
    """One random view of every image.

    Args:
        image: uint8 [B, H, W, 3].
        keys: PRNG keys [B], one an example.
        recipe: how.
        size: side of the view in pixels.
        own_size: side of the model's own views, to which a blur is measured, so that another size
            shows the same; 0: ``size``.

    Returns:
        float32 [B, size, size, 3] in [0, 1].
    """
    draws = Draws.of(keys)
    flip = draws.flip < recipe.flip
    pixels = image.astype(jnp.float32) / 255.0
    if recipe.crop:
        crop = random_crops(draws, image.shape[1], image.shape[2], recipe)
        view = crop_and_resize(pixels, crop, flip, size)
    else:
        whole = jnp.moveaxis(resize(pixels, size), -1, 1)
        view = _planes(jnp.where(flip[:, None, None, None], whole[..., ::-1], whole))
    if recipe.jitter:
        view = _where(draws.jitter < recipe.jitter, _jitter(view, draws, recipe), view)
    if recipe.grey:
        view = _where(draws.grey < recipe.grey, grey(view), view)
    if recipe.blur:
        low, high = recipe.blur_sigma
        sigma = (low + (high - low) * draws.sigma) * (size / (own_size or size))
        view = blur(view, sigma, draws.blur < recipe.blur)
    if recipe.solarize:
        view = _where(draws.solarize < recipe.solarize, solarize(view), view)
    return jnp.stack(view, axis=-1)


def standardize(view: jax.Array) -> jax.Array:
    """Values in [0, 1] to about zero mean and unit variance: float32 [B, S, S, 3]."""
    mean, std = jnp.asarray(PIXEL_MEAN), jnp.asarray(PIXEL_STD)
    return (view - mean[None, None, None]) / std[None, None, None]


def random_crops(draws: Draws, height: int, width: int, recipe: Recipe) -> Crop:
    """Crops of random place, size and shape, by the rule of torchvision.

    The area is uniform, the logarithm of the ratio as well; the first of ten draws that fits into
    the image counts, or the largest central crop of an allowed ratio.
    """
    low, high = recipe.ratio
    least, most = recipe.scale
    area = (least + (most - least) * draws.areas) * (height * width)
    ratio = low * jnp.power(high / low, draws.ratios)
    wide = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    tall = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    found, first = fits.any(axis=1), fits.argmax(axis=1)[:, None]
    # Where none fits: whole, or cut to the nearest ratio that is allowed.
    central_width = min(width, round(height * high))
    central_height = min(height, round(width / low))
    wide = jnp.where(found, jnp.take_along_axis(wide, first, axis=1)[:, 0], central_width)
    tall = jnp.where(found, jnp.take_along_axis(tall, first, axis=1)[:, 0], central_height)

    def start(share: jax.Array, room: jax.Array) -> jax.Array:
        placed = jnp.minimum(jnp.floor(share * (room + 1)).astype(jnp.int32), room)
        return jnp.where(found, placed, room // 2)

    top, left = start(draws.place[:, 0], height - tall), start(draws.place[:, 1], width - wide)
    return Crop(top, left, tall, wide)


def crop_and_resize(image: jax.Array, crop: Crop, flip: jax.Array, size: int) -> Planes:
    """Cut rectangles out and resample them: two products for each image.

    Bilinear, with a kernel as wide as the pixels of the view where it shrinks, as Pillow resizes;
    nothing outside the rectangle has an influence.

    Args:
        image: floating [B, H, W, 3].
        crop: rectangles inside the images.
        flip: bool [B], mirrored.
        size: side of the result in pixels.

    Returns:
        [B, size, size] of each channel.
    """
    rows = _resampling(crop.top, crop.height, image.shape[1], size)
    columns = _resampling(crop.left, crop.width, image.shape[2], size)
    columns = jnp.where(flip[:, None, None], columns[:, ::-1], columns)
    return _planes(jnp.einsum("byh,bxw,bhwc->bcyx", rows, columns, image, optimize="optimal"))


def _resampling(start: jax.Array, length: jax.Array, old: int, new: int) -> jax.Array:
    """Weights of ``length`` samples from ``start`` on to ``new`` ones: float32 [B, new, old]."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / new
    centre = (jnp.arange(new) + 0.5)[None, :, None] * scale
    sample = jnp.arange(old)[None, None, :] - start
    distance = jnp.abs(sample + 0.5 - centre) / jnp.maximum(scale, 1.0)
    inside = (sample >= 0) & (sample < length)
    weights = jnp.where(inside, jnp.maximum(0.0, 1.0 - distance), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def grey(view: Planes) -> Planes:
    """The luminance in all three channels."""
    luminance = _luminance(view)
    return luminance, luminance, luminance


def blur(view: Planes, sigma: jax.Array, where: jax.Array) -> Planes:
    """Gaussian blur of some pictures.

    What of the kernel lies outside the picture is left out, and the rest weighs more.

    Args:
        view: pictures.
        sigma: standard deviation of the kernel in pixels, float32 [B].
        where: bool [B], which pictures are blurred; the others are multiplied by ones.
    """
    size = view[0].shape[-1]
    kernel = jnp.where(where[:, None, None], _gaussian(sigma, size), jnp.eye(size)[None])
    pictures = jnp.stack(view, axis=1)
    return _planes(jnp.einsum("byh,bxw,bchw->bcyx", kernel, kernel, pictures, optimize="optimal"))


def solarize(view: Planes) -> Planes:
    """Values of a half and more are inverted."""
    return _each(lambda x: jnp.where(x < _SOLAR, x, 1.0 - x), view)


def adjust_brightness(view: Planes, factor: jax.Array) -> Planes:
    """Every value times a factor, float32 [B]."""
    return _each(lambda x: _mixed(x, jnp.zeros((1, 1, 1)), factor), view)


def adjust_contrast(view: Planes, factor: jax.Array) -> Planes:
    """Away from the picture's mean luminance, or towards it."""
    mean = _luminance(view).mean(axis=(1, 2), keepdims=True)
    return _each(lambda x: _mixed(x, mean, factor), view)


def adjust_saturation(view: Planes, factor: jax.Array) -> Planes:
    """Away from each pixel's luminance, or towards it."""
    luminance = _luminance(view)
    return _each(lambda x: _mixed(x, luminance, factor), view)


def adjust_hue(view: Planes, shift: jax.Array) -> Planes:
    """Turn the hue by a share of the circle, float32 [B]."""
    red, green, blue = view
    largest = jnp.maximum(jnp.maximum(red, green), blue)
    span = largest - jnp.minimum(jnp.minimum(red, green), blue)
    coloured = span > 0
    safe = jnp.where(coloured, span, 1.0)
    sector = jnp.where(
        largest == red,
        (green - blue) / safe,  # of [-1, 1]: below zero, a turn is added with the shift
        jnp.where(largest == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    sector = sector + 6.0 * shift[:, None, None]

    def channel(offset: float, old: jax.Array) -> jax.Array:
        # The value of a hue at a channel: HSV to RGB without branches.
        k = offset + sector
        k = k - 6.0 * jnp.floor(k / 6.0)
        new = largest - span * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)
        return jnp.where(coloured, new, old)

    return channel(5.0, red), channel(3.0, green), channel(1.0, blue)


def _jitter(view: Planes, draws: Draws, recipe: Recipe) -> Planes:
    """The four changes of colour in an order of each example's own."""
    order, factor = draws.order.argsort(axis=1), 2.0 * draws.factors - 1.0
    changes = (
        (adjust_brightness, recipe.brightness, 1.0),
        (adjust_contrast, recipe.contrast, 1.0),
        (adjust_saturation, recipe.saturation, 1.0),
        (adjust_hue, recipe.hue, 0.0),
    )

    def turn(number: int | jax.Array, view: Planes) -> Planes:
        changed = view
        for index, (adjust, most, none) in enumerate(changes):
            if most:
                mine = order[:, number] == index
                changed = _where(mine, adjust(view, none + most * factor[:, index]), changed)
        return changed

    # XLA for CPUs computes a turn again for every value of the next that reads it, hundreds of
    # times in all, unless a loop parts them.
    return jax.lax.platform_dependent(
        view,
        cpu=lambda view: jax.lax.fori_loop(0, 4, turn, view),
        default=lambda view: functools.reduce(lambda v, number: turn(number, v), range(4), view),
    )


def _planes(pictures: jax.Array) -> Planes:
    """[B, 3, S, S] -> three of [B, S, S]."""
    return pictures[:, 0], pictures[:, 1], pictures[:, 2]


def _each(change: Callable[[jax.Array], jax.Array], view: Planes) -> Planes:
    red, green, blue = view
    return change(red), change(green), change(blue)


def _luminance(view: Planes) -> jax.Array:
    red, green, blue = (weight * plane for weight, plane in zip(GREY, view, strict=True))
    return red + green + blue


def _mixed(plane: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    """``factor`` of one picture and the rest of another, cut to [0, 1]."""
    factor = factor[:, None, None]
    return jnp.clip(factor * plane + (1.0 - factor) * other, 0.0, 1.0)


def _gaussian(sigma: jax.Array, size: int) -> jax.Array:
    """Weights of a blur along one axis: [B] -> float32 [B, size, size]; rows sum to 1."""
    distance = jnp.arange(size)[:, None] - jnp.arange(size)[None]
    weights = jnp.exp(-0.5 * jnp.square(distance[None] / sigma[:, None, None]))
    return weights / weights.sum(axis=-1, keepdims=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _where(condition: jax.Array, yes: Planes, no: Planes) -> Planes:
    mine = condition[:, None, None]
    red, green, blue = (jnp.where(mine, y, n) for y, n in zip(yes, no, strict=True))
    return red, green, blue
