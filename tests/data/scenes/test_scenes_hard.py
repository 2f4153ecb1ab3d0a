"""Level hard: crowds whose size nothing gives away, shared attributes, pictures one can read."""

import collections
import itertools
import time

import numpy as np
import pytest

from vlp_jax.data.scenes import LEVELS, SHAPES, SIZES, TEXTURES, Scenes
from vlp_jax.data.scenes.facts import Count, Phrase, Related, matching
from vlp_jax.data.scenes.render import masks, render
from vlp_jax.data.scenes.world import Background, Object, Scene

LEVEL = LEVELS["hard"]
PLAIN = Background("plain", (0.8, 0.8, 0.8), 0.0, 0.0, 0.2, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def scenes():
    return Scenes(level="hard").scenes(np.arange(6000))


def chi_square(counts):
    """Against equal frequencies; its mean is the number of classes less one."""
    counts = np.asarray(counts, float)
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_exactly_so_many_objects_are_of_the_crowd(scenes):
    for scene in scenes[:2000]:
        assert len(matching(scene, Phrase(*scene.crowd))) == scene.repeats
        assert scene.repeats < len(scene.objects) <= LEVEL.max_count
        assert len(scene.objects) >= 3
        assert scene.theme is None


def test_the_size_of_a_crowd_is_uniform_whatever_the_crowd_is(scenes):
    by_kind, by_value = collections.defaultdict(list), collections.defaultdict(list)
    for scene in scenes:
        by_kind[tuple(value is not None for value in scene.crowd)].append(scene.repeats)
        for attribute, value in enumerate(scene.crowd):
            by_value[attribute, value].append(scene.repeats)
    assert len(by_kind) == 10
    for repeats in (*by_kind.values(), *by_value.values()):
        # 99.9 % of the values of chi-square with 4 degrees of freedom are below 18.5.
        assert chi_square(np.bincount(repeats, minlength=LEVEL.max_count)) < 22


def test_objects_share_a_palette_and_cannot_be_told_by_one_attribute(scenes):
    alike = collections.Counter()
    for scene in scenes[:2000]:
        for attribute in ("shape", "colour"):
            values = [getattr(obj, attribute) for obj in scene.objects]
            assert len(set(values)) <= LEVEL.palette
            alike[attribute] += np.mean([values.count(value) > 1 for value in values])
    assert min(alike.values()) / 2000 > 0.7


def test_most_crowds_of_two_attributes_have_near_misses(scenes):
    near = []
    for scene in scenes:
        fixed = [i for i, value in enumerate(scene.crowd) if value is not None]
        if len(fixed) == 2:
            shared = [sum(obj[i] == scene.crowd[i] for i in fixed) for obj in scene.objects]
            near.append(1 in shared)
    assert np.mean(near) > 0.7


def test_the_compositional_split_has_crowds_too():
    source = Scenes("compositional", level="hard", num_records=300)
    assert {source.scene(record).repeats for record in range(300)} == set(range(LEVEL.max_count))


def test_captions_bind_attributes_relate_and_count():
    source = Scenes(level="hard")
    captions = [source.describe(record, index) for record in range(600) for index in range(5)]
    lengths = [len(caption.text.split()) for caption in captions]
    assert np.percentile(lengths, 10) >= 7
    assert np.percentile(lengths, 90) >= 30
    assert max(lengths) <= LEVEL.max_words == 40
    stated = [fact for caption in captions for fact in caption.facts]
    assert {fact.number for fact in stated if isinstance(fact, Count)} == set(
        range(1, LEVEL.max_count + 1)
    )
    assert sum(isinstance(fact, Related) for fact in stated) > len(captions) / 2
    bound = [f for f in stated if isinstance(f, Count) and sum(v is not None for v in f.phrase) > 1]
    assert len(bound) > len(captions) / 20


def test_captions_of_the_level_are_pinned():
    """If this fails on purpose, raise ``scenes.source.VERSION``: caches show another world."""
    source = Scenes(level="hard")
    assert source.caption(0, 0) == (
        "an image with four shapes in view and a large rosy diamond lower than a blue rhombus, "
        "an orange square left of a rosy diamond, and an orange square, and four outlined objects"
    )
    assert source.caption(7, 2) == (
        "an image with two small shapes and five shapes in view, and a big yellow diamond right "
        "of a rhombus, a tiny blue star"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_patterns_of_the_smallest_objects_differ_by_more_than_the_noise(shape):
    radius = LEVEL.radii[0][0]
    pixels = 3 * (2 * radius * 64) ** 2
    pictures = {
        texture: [alone(shape, texture, radius, shift / 640) for shift in range(0, 10, 3)]
        for texture in range(len(TEXTURES))
    }
    for first, second in itertools.combinations(pictures, 2):
        nearest = min(
            np.linalg.norm(a - b) for a, b in itertools.product(pictures[first], pictures[second])
        )
        assert nearest > 2 * LEVEL.noise * np.sqrt(pixels)


def test_sizes_are_well_apart_and_no_object_hides_another():
    for smaller, larger in itertools.pairwise(LEVEL.radii):
        assert larger[0] ** 2 > 1.4 * smaller[1] ** 2
    assert len(LEVEL.radii) == len(SIZES)
    source = Scenes(level="hard")
    for record in range(100):
        scene = source.scene(record)
        for obj, visible in zip(scene.objects, source.masks(record, 64), strict=True):
            whole = masks(scene._replace(objects=(obj,)), 64)[0]
            assert np.array_equal(visible, whole)
            assert visible.sum() >= 18


def alone(shape, texture, radius, shift):
    obj = Object(SHAPES.index(shape), 2, 0, texture, radius, 0.5 + shift, 0.5, 0.1, 0.0)
    return render(Scene((obj,), PLAIN, None, None, -1, 0, 0.0), 64).astype(float)


@pytest.mark.slow
def test_a_core_renders_a_thousand_hard_pictures_a_second():
    source = Scenes(level="hard")
    source.image(0, 64)
    rates = []
    for start in range(0, 2000, 200):
        begin = time.perf_counter()
        for record in range(start, start + 200):
            source.image(record, 64)
        rates.append(200 / (time.perf_counter() - begin))
    assert max(rates) >= 1000
