"""Pictures and masks: agreement with each other, with the scene, and across sizes."""

import time

import numpy as np
import pytest

from vlp_jax.data.scenes import COLOURS, LEVELS, SHAPES, TEXTURES, Scenes
from vlp_jax.data.scenes import shapes as outlines
from vlp_jax.data.scenes.render import RGB, masks, render
from vlp_jax.data.scenes.world import Background, Object, Scene

PLAIN = Background("plain", (0.8, 0.8, 0.8), 0.0, 0.0, 0.2, 0.0, 0.0, 0.0)


def alone(shape, texture="filled", radius=0.3, angle=0.0, colour="red", x=0.5, y=0.5):
    obj = Object(
        shape=SHAPES.index(shape),
        colour=COLOURS.index(colour),
        size=2,
        texture=TEXTURES.index(texture),
        radius=radius,
        x=x,
        y=y,
        angle=angle,
        tint=0.0,
    )
    return Scene((obj,), PLAIN, None, None, -1, 0, 0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [32, 33, 64, 224])
def test_pictures_have_the_asked_size_and_repeat(level, size):
    source = Scenes(level=level)
    for record in range(5):
        picture = source.image(record, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous
        assert np.array_equal(picture, Scenes(level=level).image(record, size))


def test_nothing_wraps_around():
    """Without wrap-around no channel is far from all of: the ground, the paint, between them."""
    source = Scenes()
    for record in range(300):
        scene, picture = source.scene(record), source.image(record, 48).astype(int)
        tones = [RGB[COLOURS[obj.colour]] for obj in scene.objects]
        tones += [np.array(scene.background.rgb) * 255]
        low, high = np.min(tones, axis=0) - 45, np.max(tones, axis=0) + 45
        assert (picture >= low).all()
        assert (picture <= high).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_circle_and_have_unit_slope_at_the_edge(shape):
    side = np.linspace(-1.2, 1.2, 601)
    x, y = np.meshgrid(side, side)
    distance = outlines.OUTLINES[shape](x, y)
    inside = distance < 0
    assert np.hypot(x, y)[inside].max() <= 1.01
    assert inside.mean() * 2.4**2 > 0.75  # area, in squared radii
    slope = np.hypot(*np.gradient(distance, side[1] - side[0]))
    assert abs(np.median(slope[np.abs(distance) < 0.02]) - 1) < 0.02


def test_shapes_differ_from_one_another():
    """Any two shapes, each at its best shift, disagree on a sixth of their joint area."""
    silhouettes = [masks(alone(shape), 64)[0] for shape in SHAPES]
    for i, first in enumerate(silhouettes):
        for second in silhouettes[:i]:
            best = min(
                (first ^ np.roll(second, (dy, dx), (0, 1))).sum() / (first | second).sum()
                for dy in range(-6, 7, 2)
                for dx in range(-6, 7, 2)
            )
            assert best > 1 / 6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_picture_averages_to_a_small_one(shape):
    """Anti-aliasing: a pixel shows the share of it that the object covers."""
    scene = alone(shape, angle=0.15)
    small = render(scene, 32).astype(float)
    large = render(scene, 256).reshape(32, 8, 32, 8, 3).mean((1, 3))
    assert np.abs(small - large).mean() < 1.0
    assert np.abs(small - large).max() < 80


def test_textures_differ_in_how_much_they_colour():
    colour, ground = np.array(RGB["red"], float), 0.8 * 255
    shares = {}
    for texture in TEXTURES:
        picture = render(alone("square", texture), 128).astype(float)
        shares[texture] = ((ground - picture[..., 1]) / (ground - colour[1])).sum() / 128**2
    area = masks(alone("square"), 128).mean()
    assert shares["filled"] == pytest.approx(area, rel=0.02)
    for texture in ("striped", "outlined", "dotted"):
        assert 0.4 * area < shares[texture] < 0.8 * area


def test_a_turn_is_clockwise():
    """The tip of a triangle moves to the right when it is turned by a quarter."""
    upright, turned = (masks(alone("triangle", angle=a), 64)[0] for a in (0.0, np.pi / 2))
    assert np.array_equal(np.rot90(upright, -1), turned)


@pytest.mark.parametrize("level", LEVELS)
def test_masks_are_disjoint_and_mark_what_the_object_changes(level):
    source = Scenes(level=level)
    for record in range(100):
        scene = source.scene(record)
        visible = masks(scene, 128)
        assert visible.shape == (len(scene.objects), 128, 128)
        assert visible.sum(axis=0).max() <= 1
        quiet = scene._replace(background=PLAIN)
        painted = np.abs(render(quiet, 128).astype(int) - 204).max(-1) > 100
        if scene.overlap is None:  # two half covers of one pixel make more than a half
            assert not (painted & ~visible.any(axis=0)).any()
        for obj, mask in zip(scene.objects, visible, strict=True):
            if TEXTURES[obj.texture] == "filled":
                paint = np.clip(np.array(RGB[COLOURS[obj.colour]]) + 10 * obj.tint, 0, 255)
                assert np.abs(np.median(render(quiet, 128)[mask], axis=0) - paint).max() < 3


@pytest.mark.parametrize("level", LEVELS)
def test_at_least_three_fifths_of_each_object_are_visible(level):
    source = Scenes(level=level)
    hidden = 0
    for record in range(800):
        scene = source.scene(record)
        for obj, mask in zip(scene.objects, masks(scene, 96), strict=True):
            whole = masks(scene._replace(objects=(obj,)), 96).sum()
            assert mask.sum() >= 0.6 * whole
            hidden += mask.sum() < 0.98 * whole
    assert (hidden > 100) == (level == "full")


def test_overlapping_objects_hide_something():
    source = Scenes()
    for scene in map(source.scene, range(300)):
        if scene.overlap is None:
            continue
        back, front = (scene.objects[i] for i in scene.overlap)
        whole = [masks(scene._replace(objects=(obj,)), 192)[0] for obj in (back, front)]
        assert (whole[0] & whole[1]).any()


def test_small_objects_of_the_easy_level_can_be_told_at_32_px():
    source = Scenes(level="easy")
    assert min(source.masks(r, 32).sum((1, 2)).min() for r in range(300)) >= 20


def test_masks_scale_with_the_picture():
    source = Scenes()
    for record in range(20):
        fine = source.masks(record, 192).reshape(-1, 64, 3, 64, 3)[:, :, 1, :, 1]
        assert np.array_equal(fine, source.masks(record, 64))  # the same points are asked


def test_sizes_outside_the_range_are_refused():
    with pytest.raises(ValueError, match="16 to 512 px; asked for 8"):
        Scenes().image(0, 8)
    with pytest.raises(ValueError, match="asked for 1024"):
        Scenes().masks(0, 1024)


@pytest.mark.slow
def test_a_core_renders_a_thousand_pictures_a_second():
    """The best of several short runs, so that a busy machine does not decide."""
    source = Scenes()
    source.image(0, 64)
    rates = []
    for start in range(0, 2000, 200):
        begin = time.perf_counter()
        for record in range(start, start + 200):
            source.image(record, 64)
        rates.append(200 / (time.perf_counter() - begin))
    assert max(rates) >= 1000
