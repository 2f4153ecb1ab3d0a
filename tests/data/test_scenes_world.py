"""The world: purity, splits, held-out pairs, balance of the attributes, layouts."""

import collections
import itertools
import math

import numpy as np
import pytest

from vlp_jax.data.scenes import COLOURS, HELD_OUT, LEVELS, SHAPES, SPLITS, Scenes
from vlp_jax.data.scenes.draws import BLOCK, stream, stream_key, uniforms

MANY = range(1500)


@pytest.fixture(scope="module")
def full():
    return Scenes(level="full")


@pytest.fixture(scope="module")
def scenes(full):
    return [full.scene(record) for record in MANY]


def test_draws_depend_on_key_and_record_alone():
    key = stream_key(0, 1)
    together = uniforms(key, np.arange(100))
    assert np.array_equal(together[37], uniforms(key, np.array([37]))[0])
    assert np.array_equal(together[37, :3], list(itertools.islice(iter(stream(key, 37), None), 3)))
    assert not np.array_equal(together, uniforms(stream_key(0, 2), np.arange(100)))


def test_draws_continue_over_blocks_without_repeating():
    draw = stream(stream_key(3), 12)
    values = [draw() for _ in range(3 * BLOCK)]
    assert len(set(values)) == len(values)
    assert values[BLOCK : 2 * BLOCK] == uniforms(stream_key(3), np.array([12]), block=1)[0].tolist()


def test_draws_are_uniform_and_uncorrelated():
    values = uniforms(stream_key(0), np.arange(4000))
    assert values.min() >= 0
    assert values.max() < 1
    histogram = np.histogram(values, bins=64, range=(0, 1))[0]
    assert np.abs(histogram / values.size * 64 - 1).max() < 0.05
    correlation = np.corrcoef(values[:, :32].T) - np.eye(32)
    assert np.abs(correlation).max() < 0.08
    lagged = np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]
    assert abs(lagged) < 0.06


@pytest.mark.parametrize("level", LEVELS)
def test_a_record_is_independent_of_the_others(level):
    source, again = Scenes(level=level), Scenes(level=level, num_records=1000)
    backwards = {record: source.scene(record) for record in reversed(range(20))}
    assert all(again.scene(record) == backwards[record] for record in range(20))
    assert Scenes(level=level, seed=1).scene(0) != source.scene(0)


def test_records_are_int64():
    source = Scenes()
    last = np.iinfo(np.int64).max
    assert source.scene(np.int64(last)) == source.scene(last)
    assert source.scene(last) != source.scene(last - 1)


def test_splits_share_no_scene():
    layouts = collections.Counter(
        tuple((obj.x, obj.y) for obj in Scenes(split=split).scene(record).objects)
        for split in SPLITS
        for record in range(300)
    )
    assert max(layouts.values()) == 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_held_out_pairs_occur_in_the_compositional_split_only(level, split):
    source = Scenes(split=split, level=level, num_records=500)
    pairs = {(o.colour, o.shape) for r in range(500) for o in source.scene(r).objects}
    if split == "compositional":
        assert pairs <= HELD_OUT
    else:
        assert not pairs & HELD_OUT


@pytest.mark.parametrize("level", LEVELS)
def test_train_shows_every_colour_and_shape_of_the_level(level):
    source = Scenes(level=level)
    objects = [obj for record in range(500) for obj in source.scene(record).objects]
    assert {obj.colour for obj in objects} == set(range(LEVELS[level].num_colours))
    assert {obj.shape for obj in objects} == set(range(LEVELS[level].num_shapes))
    assert min(LEVELS[level].num_colours, LEVELS[level].num_shapes) >= 8


def test_every_colour_and_shape_misses_two_partners():
    for axis, classes in ((0, COLOURS), (1, SHAPES)):
        counts = collections.Counter(pair[axis] for pair in HELD_OUT)
        assert counts == dict.fromkeys(range(len(classes)), 2)


@pytest.mark.parametrize(
    ("name", "classes"), [("shape", 10), ("colour", 10), ("size", 3), ("texture", 4)]
)
def test_attributes_are_balanced(scenes, name, classes):
    values = [getattr(obj, name) for scene in scenes for obj in scene.objects]
    shares = np.bincount(values, minlength=classes) / len(values)
    np.testing.assert_allclose(shares, 1 / classes, rtol=0.2)


def test_counts_and_repeats_are_balanced(scenes):
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=6)[1:]
    np.testing.assert_allclose(counts / len(scenes), 1 / 5, rtol=0.2)
    repeats = np.bincount([scene.repeats for scene in scenes], minlength=4)[1:]
    np.testing.assert_allclose(repeats / len(scenes), 1 / 3, rtol=0.15)


def test_the_theme_is_shared_by_as_many_objects_as_it_says(scenes):
    for scene in scenes:
        values = [getattr(obj, scene.theme) for obj in scene.objects]
        assert values.count(scene.theme_value) == scene.repeats


@pytest.mark.parametrize("level", LEVELS)
def test_objects_lie_inside_and_apart_but_for_the_overlapping_pair(level):
    source = Scenes(level=level)
    for scene in map(source.scene, range(400)):
        assert [o.radius for o in scene.objects] == sorted(o.radius for o in scene.objects)[::-1]
        for obj in scene.objects:
            low, high = source.level.radii[obj.size]
            assert low <= obj.radius <= high
            assert obj.radius <= min(obj.x, obj.y, 1 - obj.x, 1 - obj.y)
        for (i, a), (j, b) in itertools.combinations(enumerate(scene.objects), 2):
            if scene.overlap != (i, j):
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_overlaps_are_frequent_but_not_the_rule(scenes):
    share = np.mean([scene.overlap is not None for scene in scenes])
    assert 0.2 < share < 0.5
