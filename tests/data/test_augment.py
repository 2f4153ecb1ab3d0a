"""Random views: every operation against Pillow or NumPy, and draws that belong to the example."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vlp_jax.data import augment
from vlp_jax.data.augment import Crop, Draws, Recipe, random_crops, random_view
from vlp_jax.infra.errors import ConfigError

DRAW = np.random.default_rng(0)
PICTURES = DRAW.integers(0, 256, (4, 40, 32, 3), np.uint8)
KEYS = jax.random.split(jax.random.key(0), 4)
NO_FLIP = jnp.zeros(4, bool)


def smooth() -> np.ndarray:
    """Pictures whose neighbours are alike, as those of photographs are."""
    small = Image.fromarray(DRAW.integers(0, 256, (6, 6, 3), np.uint8))
    return np.stack([np.asarray(small.rotate(90 * i).resize((32, 32))) for i in range(4)])


def planes(view: np.ndarray | jax.Array) -> augment.Planes:
    """[B, S, S, 3] -> three of [B, S, S]."""
    red, green, blue = (jnp.asarray(view)[..., channel] for channel in range(3))
    return red, green, blue


def stacked(view: augment.Planes) -> np.ndarray:
    """What ``planes`` takes apart."""
    return np.stack(view, axis=-1)


VIEWS = jnp.asarray(smooth(), jnp.float32) / 255.0
PLANES = planes(VIEWS)
EVERY = jnp.ones(4, bool)


def pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(255 * np.asarray(image)).astype(np.uint8))


def assert_near_pillow(
    found: augment.Planes, expected: list[Image.Image], levels: float = 1.01
) -> None:
    """Within so many of 255 levels: Pillow rounds after each axis."""
    for row, image in zip(stacked(found), expected, strict=True):
        np.testing.assert_allclose(255 * row, np.asarray(image, np.float32), atol=levels)


@pytest.mark.parametrize("size", [16, 48])
def test_crops_are_resampled_as_pillow_does(size):
    crop = Crop(
        *(jnp.array(v) for v in ([0, 3, 7, 10], [0, 5, 1, 8], [40, 20, 33, 9], [32, 20, 11, 24]))
    )
    found = augment.crop_and_resize(jnp.asarray(PICTURES) / 255.0, crop, NO_FLIP, size)
    expected = []
    for row, (top, left, height, width) in enumerate(np.stack(crop, axis=1).tolist()):
        cut = Image.fromarray(PICTURES[row]).crop((left, top, left + width, top + height))
        expected.append(cut.resize((size, size), Image.Resampling.BILINEAR))
    assert_near_pillow(found, expected)
    flip = augment.crop_and_resize(jnp.asarray(PICTURES) / 255.0, crop, ~NO_FLIP, size)
    np.testing.assert_allclose(stacked(flip), stacked(found)[:, :, ::-1], atol=1e-6)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_jitter_is_that_of_pillow(factor):
    factors = jnp.full(4, factor)
    for ours, theirs, levels in (
        (augment.adjust_brightness, ImageEnhance.Brightness, 1.0),
        (augment.adjust_contrast, ImageEnhance.Contrast, 1.5),  # its mean is rounded
        (augment.adjust_saturation, ImageEnhance.Color, 1.5),
    ):
        expected = [theirs(pillow(view)).enhance(factor) for view in VIEWS]
        assert_near_pillow(ours(PLANES, factors), expected, levels)


@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.1, 0.5])
def test_hue_is_that_of_the_standard_library(shift):
    found = stacked(augment.adjust_hue(PLANES, jnp.full(4, shift)))[0].reshape(-1, 3)
    pixels = np.asarray(VIEWS)[0].reshape(-1, 3).tolist()
    for pixel, turned in zip(pixels[::7], found[::7], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value)
        np.testing.assert_allclose(turned, expected, atol=2e-5)


def test_grey_pixels_keep_their_value_under_a_turn_of_hue():
    flat = planes(jnp.full((4, 2, 2, 3), 0.4))
    np.testing.assert_array_equal(augment.adjust_hue(flat, jnp.full(4, 0.3)), flat)


def test_grey_and_solarisation_are_those_of_pillow():
    expected = [ImageOps.grayscale(pillow(view)).convert("RGB") for view in VIEWS]
    assert_near_pillow(augment.grey(PLANES), expected)
    expected = [ImageOps.solarize(pillow(view), 128) for view in VIEWS]
    assert_near_pillow(augment.solarize(PLANES), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_gaussian(sigma):
    found = stacked(augment.blur(PLANES, jnp.full(4, sigma), EVERY))
    view = np.asarray(VIEWS, np.float64)[0]
    place = np.arange(32)
    for y, x in ((0, 0), (5, 31), (16, 16)):
        rows = np.exp(-((place - y) ** 2) / (2 * sigma**2))
        columns = np.exp(-((place - x) ** 2) / (2 * sigma**2))
        expected = np.einsum("h,w,hwc->c", rows / rows.sum(), columns / columns.sum(), view)
        np.testing.assert_allclose(found[0, y, x], expected, atol=1e-5)


def test_blur_is_near_pillows():
    """Which approximates the Gaussian by three boxes, and repeats the edge."""
    expected = [pillow(view).filter(ImageFilter.GaussianBlur(1.5)) for view in VIEWS]
    inner = slice(6, -6)
    found = stacked(augment.blur(PLANES, jnp.full(4, 1.5), EVERY))
    for row, image in zip(found, expected, strict=True):
        near = np.asarray(image, np.float32)[inner, inner]
        np.testing.assert_allclose(255 * row[inner, inner], near, atol=4)


def mean_share(height: int, width: int, recipe: Recipe) -> float:
    """By the same rule, one crop after the other: large ones fit less often."""
    low, high = np.log(recipe.ratio)
    shares = []
    for _ in range(10_000):
        for _ in range(10):
            area = DRAW.uniform(*recipe.scale) * height * width
            ratio = np.exp(DRAW.uniform(low, high))
            wide, tall = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if wide <= width and tall <= height:
                shares.append(wide * tall / (height * width))
                break
    return float(np.mean(shares))


def test_crops_have_the_areas_and_ratios_asked_for():
    recipe = Recipe(scale=(0.2, 0.8))
    draws = Draws.of(jax.random.split(KEYS[0], 4000))
    crop = jax.tree.map(np.asarray, random_crops(draws, 64, 96, recipe))
    assert (crop.top >= 0).all()
    assert (crop.left >= 0).all()
    assert (crop.top + crop.height <= 64).all()
    assert (crop.left + crop.width <= 96).all()
    share = crop.height * crop.width / (64 * 96)
    assert share.min() > 0.18
    assert share.max() < 0.82
    assert share.mean() == pytest.approx(mean_share(64, 96, recipe), abs=0.01)
    ratio = np.log(crop.width / crop.height)
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.06
    assert ratio.min() < -0.25
    assert ratio.max() > 0.25
    assert crop.top.min() == 0
    assert (crop.top + crop.height).max() == 64


def test_where_no_crop_fits_the_largest_central_one_is_taken():
    recipe = Recipe(scale=(1.0, 1.0), ratio=(2.0, 2.0))
    crop = random_crops(Draws.of(KEYS), 60, 90, recipe)
    for row in range(4):
        assert [int(part[row]) for part in crop] == [7, 0, 45, 90]


def test_views_belong_to_their_example():
    recipe = Recipe(solarize=0.2)
    make = jax.jit(lambda image, keys: random_view(image, keys, recipe, 16))
    whole = make(jnp.asarray(PICTURES), KEYS)
    assert whole.shape == (4, 16, 16, 3)
    assert whole.min() >= 0.0
    assert whole.max() <= 1.0 + 1e-6
    part = make(jnp.asarray(PICTURES)[2:], KEYS[2:])
    np.testing.assert_allclose(whole[2:], part, atol=1e-6)
    again = make(jnp.asarray(PICTURES), jax.random.split(jax.random.key(1), 4))
    assert float(jnp.abs(whole - again).mean()) > 0.02


def test_probabilities_are_those_of_the_recipe():
    keys = jax.random.split(jax.random.key(5), 2000)
    pictures = jnp.broadcast_to(jnp.asarray(smooth()[:1]), (2000, 32, 32, 3))
    plain = Recipe(
        **{"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "blur_sigma": (1.0, 2.0)},
        **dict.fromkeys(("flip", "jitter", "grey", "blur"), 0.0),
    )
    unchanged = random_view(pictures[:1], keys[:1], plain, 32)[0]
    np.testing.assert_allclose(255 * unchanged, pictures[0], atol=1e-3)
    for name, probability in (
        *(("flip", 0.5), ("grey", 0.2), ("solarize", 0.3)),
        *(("jitter", 0.8), ("blur", 0.5)),
    ):
        recipe = Recipe(**{**vars(plain), name: probability})
        views = random_view(pictures, keys, recipe, 32)
        changed = jnp.abs(views - unchanged[None]).max(axis=(1, 2, 3)) > 1e-3
        assert float(changed.mean()) == pytest.approx(probability, abs=0.035), name


@pytest.mark.parametrize("size", [16, 32])
def test_without_a_crop_the_view_is_the_picture_or_its_mirror_image(size):
    still = Recipe(**{"crop": False}, **dict.fromkeys(("jitter", "grey", "blur"), 0.0))
    keys = jax.random.split(jax.random.key(5), 4)
    pictures = jnp.asarray(smooth())
    expected = augment.resize(pictures / 255.0, size)
    found = random_view(pictures, keys, still, size)
    same, mirrored = (
        jnp.abs(found - other).max(axis=(1, 2, 3)) < 1e-5
        for other in (expected, expected[:, :, ::-1])
    )
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_blur_is_measured_in_pixels_of_the_models_own_size():
    """A view of half the size is blurred half as far: it shows the same."""
    pictures = jnp.asarray(smooth())
    plain = {**vars(Recipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0))}
    recipe = Recipe(**{**plain, "blur": 1.0, "blur_sigma": (2.0, 2.0)})
    sharp = augment.resize(pictures / 255.0, 16)
    found = random_view(pictures, KEYS, recipe, 16, own_size=32)
    blurred = augment.blur(planes(sharp), jnp.ones(4), EVERY)
    np.testing.assert_allclose(found, stacked(blurred), atol=0.02)


def test_jitter_applies_each_change_once_in_some_order():
    """Of grey pictures contrast and brightness alone are seen; both orders occur."""
    recipe = Recipe(brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0)
    draws = Draws.of(jax.random.split(jax.random.key(3), 200))
    view = jnp.linspace(0.2, 0.6, 16).reshape(1, 4, 4, 1)
    view = planes(jnp.broadcast_to(view, (200, 4, 4, 3)))
    jittered = np.asarray(augment._jitter(view, draws, recipe)[0], np.float64).reshape(200, -1)
    inside = (jittered.min(axis=1) > 1e-3) & (jittered.max(axis=1) < 1 - 1e-3)
    assert inside.sum() > 100
    x = np.linspace(0.2, 0.6, 16)
    # y = b c x + b (1 - c) m either way, for the mean of a brighter picture is brighter.
    slope = np.polyfit(x, jittered[inside].T, 1)
    contrast_times_brightness, rest = slope
    brightness = contrast_times_brightness + rest / x.mean()
    contrast = contrast_times_brightness / brightness
    for factor in (brightness, contrast):
        assert factor.min() > 0.599
        assert factor.max() < 1.401
        assert factor.std() > 0.15


def test_jitter_is_the_same_where_its_turns_are_no_loop(monkeypatch):
    """As on accelerators; on CPUs, where the other tests run, it is one."""
    draws = Draws.of(jax.random.split(jax.random.key(5), 4))
    looped = jax.jit(augment._jitter, static_argnums=2)(PLANES, draws, Recipe())
    taken = []

    def accelerator(view, *, cpu, default):
        taken.append(cpu)
        return default(view)

    monkeypatch.setattr(jax.lax, "platform_dependent", accelerator)
    unrolled = augment._jitter(PLANES, draws, Recipe())
    assert taken
    np.testing.assert_allclose(stacked(unrolled), stacked(looped), atol=1e-6)


def test_standardised_views_are_normalised_pixels():
    pixels = jnp.asarray(smooth())
    np.testing.assert_allclose(
        augment.standardize(pixels / 255.0), augment.normalize(pixels), atol=1e-5
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": (0.5, 0.2)}, r"scale: \(0.5, 0.2\) is no range"),
        ({"scale": (0.0, 1.0)}, r"scale: "),
        ({"blur": 1.5}, r"blur: 1.5 is no share"),
        ({"hue": 0.7}, r"hue: 0.7"),
        ({"hue": None}, r"hue: None is no share"),
        ({"crop": 0}, r"crop: 0 says neither"),
        ({"scale": (0.2,)}, r"scale: \(0.2,\) is no range"),
    ],
)
def test_bad_recipes_name_the_key(values, message):
    with pytest.raises(ConfigError, match=rf"objectives\.simclr\.augment\.{message}"):
        Recipe(**values).check("objectives.simclr.augment")
