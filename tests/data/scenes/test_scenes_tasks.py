"""Tasks on scenes: right answers, none that the text gives away, and the contract of a source."""

import collections
import itertools
import pickle
import re
import time

import numpy as np
import pytest

from tests.data.scenes_parser import parse, tokens
from vlp_jax.data.batch import EXTRA_FIELDS
from vlp_jax.data.scenes import (
    COLOURS,
    LEVELS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scenes,
    ScenesEntailment,
    ScenesNLVR2,
    ScenesVQA,
)
from vlp_jax.data.source import Answered, Grouped, Templated

LEVEL = LEVELS["hard"]
TASKS = (ScenesVQA, ScenesNLVR2, ScenesEntailment)
NUM_EXAMPLES = {ScenesVQA: 15_000, ScenesNLVR2: 8000, ScenesEntailment: 9000}

DIRECTIONS = ("left", "right", "above", "below")
# What can be answered at level hard; colours and shapes are fewer where the text names the other.
ANSWERS = {
    "count": tuple(map(str, range(LEVEL.max_count))),
    **{f"colour/{kind}": COLOURS[: LEVEL.num_colours] for kind in ("object", "related")},
    **{f"shape/{kind}": SHAPES[: LEVEL.num_shapes] for kind in ("object", "related")},
    "size/object": SIZES,
    "texture/object": tuple(TEXTURES[i] for i in LEVEL.textures),
    "where": DIRECTIONS,
    **dict.fromkeys(("exist", "direction", "more", "larger"), ("yes", "no")),
}
CLASSES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    """A task at level hard and the first of its texts, kinds and classes."""
    source = request.param(level="hard")
    records = np.arange(NUM_EXAMPLES[request.param])
    examples = source.examples(records)
    texts, kinds, targets = zip(*[(e.text, e.template, e.target) for e in examples], strict=True)
    assert source.captions(records[:100], np.zeros(100, int)) == list(texts[:100])
    return source, texts, np.array(kinds), np.array(targets)


# Right answers, by reading the words and looking at coordinates.


def fitting(scene, attributes):
    return [o for o in scene.objects if all(getattr(o, k) == v for k, v in attributes.items())]


def direction(a, b):
    """Where a lies from b, along the longer of the two axes."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def said_direction(text):
    patterns = {"left": "left of", "right": "right of", "above": "above|higher"}
    patterns["below"] = "below|beneath|lower"
    return next(name for name, pattern in patterns.items() if re.search(pattern, text))


def is_related(text, first, second):
    """Whether the relation that a text names holds."""
    if re.search("larger|bigger", text):
        return first.radius > second.radius
    if "smaller than" in text:
        return first.radius < second.radius
    return direction(first, second) == said_direction(text)


def only(objects):
    assert len(objects) == 1, "the text is ambiguous"
    return objects[0]


def answer(scene, text, kind):
    asked = re.sub("^what (shape|colour|size|pattern) (is|does)", "", text).removesuffix(" have?")
    phrases = parse(asked)
    found = [fitting(scene, phrase) for phrase in phrases]
    if kind == "count":
        return str(len(found[0]))
    if kind == "exist":
        return "yes" if found[0] else "no"
    if kind == "more":
        return "yes" if len(found[0]) > len(found[1]) else "no"
    if kind == "where":
        return direction(only(found[0]), only(found[1]))
    if kind in ("direction", "larger"):
        return "yes" if is_related(text, only(found[0]), only(found[1])) else "no"
    attribute, form = kind.split("/")
    assert all(attribute not in phrase for phrase in phrases)
    if form == "related":
        anchor = only(found[1])
        said = said_direction(text)
        found[0] = [o for o in found[0] if o is not anchor and direction(o, anchor) == said]
    return CLASSES[attribute][getattr(only(found[0]), attribute)]


def truth(scenes, text, kind):
    first, second = scenes
    phrases = parse(re.sub("the same shape as", "the same as", text))
    if kind in ("both", "only one", "same number", "more"):
        n, m = (len(fitting(scene, phrases[0])) for scene in scenes)
        if kind == "both":
            return n > 0 and m > 0
        if kind == "only one":
            return (n > 0) != (m > 0)
        if kind == "same number":
            return n == m
        named, other = (n, m) if text.endswith("than in the second") else (m, n)
        return named > other if " more " in text else named < other
    a, b = only(fitting(first, phrases[0])), only(fitting(second, phrases[1]))
    if kind == "larger":
        return is_related(text, a, b)
    attribute = kind.removeprefix("same ").replace("pattern", "texture")
    assert all(attribute not in phrase for phrase in phrases)
    return getattr(a, attribute) == getattr(b, attribute)


def entailment(scene, text, kind):
    if kind in CLASSES:
        subject, stated = text.rsplit(" is ", 1)
        found = [fitting(scene, phrase) for phrase in parse(subject)]
        words = stated if kind == "shape" else f"{stated} object"
        [value] = parse(words)
        assert list(value) == [kind]
    else:
        found = [fitting(scene, phrase) for phrase in parse(text)]
    if not all(found):
        return "neutral"
    objects = [only(objects) for objects in found]
    true = (
        getattr(objects[0], kind) == value[kind] if kind in CLASSES else is_related(text, *objects)
    )
    return "entailment" if true else "contradiction"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "compositional"])
@pytest.mark.parametrize("make", TASKS)
def test_every_record_has_the_right_answer(make, split, level):
    source = make(split, level=level, num_records=600)
    world = Scenes(split, level=level, num_records=2**63 - 1)
    for record in range(400):
        text, kind = source.caption(record, 0), source.template(record)
        numbers = [int(key.rsplit("/")[-1]) for key in source.image_key(record)]
        scenes = [world.scene(number) for number in numbers]
        if make is ScenesVQA:
            assert source.answers_of(record) == (answer(scenes[0], text, kind),), text
            continue
        label = source.classes[source.extras(record, 16)["label"]]
        if make is ScenesNLVR2:
            assert label == str(truth(scenes, text, kind)).lower(), text
        else:
            assert label == entailment(scenes[0], text, kind), text


# Nothing is given away.


def test_answers_are_balanced_within_each_kind(task):
    source, _, kinds, targets = task
    for kind in np.unique(kinds):
        answers = ANSWERS[kind] if isinstance(source, ScenesVQA) else source.classes
        counts = np.bincount(targets[kinds == kind], minlength=len(source.classes))
        own = counts[[source.classes.index(text) for text in answers]]
        assert own.sum() == counts.sum()
        freedom = len(answers) - 1
        chi_square = ((own - own.mean()) ** 2 / own.mean()).sum()
        # Four deviations above its mean for a fair draw: once in thousands of kinds.
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4, (kind, own)


def test_no_kind_is_rare(task):
    _, _, kinds, _ = task
    shares = collections.Counter(kinds.tolist())
    for kind, number in shares.items():
        assert number / len(kinds) > (0.005 if kind.startswith("same ") else 0.02), kind


def test_all_kinds_of_questions_occur():
    source = ScenesVQA(level="hard")
    assert {source.template(record) for record in range(600)} == set(ANSWERS)


def test_a_reader_of_the_text_alone_is_near_chance(task):
    source, texts, kinds, targets = task
    guesses, rest = naive_bayes(texts, targets, len(source.classes))
    assert (guesses == targets[rest]).mean() < source.chance() + 0.025

    # The same reader is good at what the text does say, the kinds being of similar frequency.
    names, numbers = np.unique(kinds, return_inverse=True)
    guesses, rest = naive_bayes(texts, numbers, len(names))
    assert (guesses == numbers[rest]).mean() > 0.6


def naive_bayes(texts, targets, num_classes):
    """Over words and pairs of words in order; learns on two thirds, guesses the rest."""
    features = []
    for text in texts:
        said = tokens(text)
        features.append({*said, *itertools.combinations(said, 2)})
    cut = len(texts) * 2 // 3
    counts = collections.defaultdict(lambda: np.full(num_classes, 0.5))
    for found, target in zip(features[:cut], targets, strict=False):
        for feature in found:
            counts[feature][target] += 1
    total = np.bincount(targets[:cut], minlength=num_classes) + 1.0
    logs = {feature: np.log(count / total) for feature, count in counts.items()}
    prior = np.log(total)
    guesses = [
        np.argmax(prior + sum(logs[f] for f in found if f in logs)) for found in features[cut:]
    ]
    return np.array(guesses), slice(cut, None)


def test_chance_is_that_of_uniform_answers_of_each_kind(task):
    source, _, kinds, _ = task
    if isinstance(source, ScenesVQA):
        expected = np.mean([1 / len(ANSWERS[kind]) for kind in kinds])
        assert 0.25 < expected < 0.35
    else:
        expected = 1 / len(source.classes)
    assert source.chance() == pytest.approx(expected, abs=0.025)


# The contract of a source.


@pytest.mark.parametrize("make", TASKS)
def test_extras_are_those_declared(make):
    source = make("val", level="hard")
    assert source.num_records == 2000
    assert make(level="hard").num_records is None
    for record in range(20):
        extras = source.extras(record, 32)
        assert tuple(extras) == source.extra_fields
        for name, value in extras.items():
            sizes = {"H": 32, "W": 32, "3": 3, "10": 10}
            assert value.shape == tuple(sizes[axis] for axis in EXTRA_FIELDS[name].shape[1:])
            assert value.dtype == EXTRA_FIELDS[name].dtype
    assert source.num_captions(np.arange(3)).tolist() == [1, 1, 1]
    assert isinstance(source, Templated)
    assert isinstance(source, Grouped)
    assert isinstance(source, Answered) == (make is ScenesVQA)


def test_a_question_has_one_answer_of_score_one():
    source = ScenesVQA("val", level="hard")
    for record in range(50):
        extras = source.extras(record, 32)
        assert extras["answer_score"].tolist() == [1.0] + [0.0] * 9
        assert extras["answer"][1:].tolist() == [-1] * 9
        assert source.answers_of(record) == (source.classes[extras["answer"][0]],)


def test_classes_are_those_of_the_published_tasks():
    assert ScenesNLVR2.classes == ("false", "true")
    assert ScenesEntailment.classes == ("contradiction", "neutral", "entailment")
    assert len(set(ScenesVQA.classes)) == len(ScenesVQA.classes)


@pytest.mark.parametrize("make", TASKS)
def test_a_record_depends_on_nothing_but_its_number(make):
    source = make("test", level="hard", seed=3)
    copy = pickle.loads(pickle.dumps(source))
    records = np.array([7, 3, 1999, 0, 3])
    texts = source.captions(records, np.zeros_like(records))
    for record, text in reversed(list(zip(records.tolist(), texts, strict=True))):
        assert copy.caption(record, 0) == text
        assert np.array_equal(copy.image(record, 32), source.image(record, 32))
        assert copy.image_key(record) == source.image_key(record)
        for name, value in source.extras(record, 32).items():
            assert np.array_equal(copy.extras(record, 32)[name], value)
    assert make("test", level="hard", seed=4).caption(7, 0) != source.caption(7, 0)


@pytest.mark.parametrize("make", TASKS)
def test_a_subset_is_the_beginning_of_the_unbounded_split(make):
    subset, whole = make(num_records=10), make()
    assert [subset.caption(r, 0) for r in range(10)] == [whole.caption(r, 0) for r in range(10)]
    with pytest.raises(IndexError, match="record 10 is outside the split of 10"):
        subset.image(10, 32)
    with pytest.raises(IndexError, match="record -1 is outside"):
        whole.caption(-1, 0)
    with pytest.raises(IndexError, match="one text, 0; asked for 1"):
        whole.caption(0, 1)


@pytest.mark.parametrize("make", TASKS)
def test_records_are_int64(make):
    source = make()
    texts = {source.caption(r, 0) for r in (2**61 + 1, 2**62 + 3, np.iinfo(np.int64).max)}
    assert len(texts) == 3


def test_pictures_are_those_of_scenes():
    world = Scenes("val", level="hard")
    pairs = ScenesNLVR2("val", level="hard")
    for record in range(20):
        assert np.array_equal(pairs.image(record, 32), world.image(2 * record, 32))
        second = pairs.extras(record, 32)["second_image"]
        assert np.array_equal(second, world.image(2 * record + 1, 32))
        assert pairs.image_key(record) == tuple(
            world.image_key(2 * record + side)[0] for side in (0, 1)
        )
        for make in (ScenesVQA, ScenesEntailment):
            source = make("val", level="hard")
            if source.image_key(record) == world.image_key(record):
                assert np.array_equal(source.image(record, 32), world.image(record, 32))


@pytest.mark.parametrize("level", ["easy", "hard"])
@pytest.mark.parametrize("make", TASKS)
def test_no_picture_is_in_two_splits_or_two_records(make, level):
    seen = collections.Counter(
        key
        for split in SPLITS
        for source in [make(split, level=level, num_records=300)]
        for record in range(300)
        for key in source.image_key(record)
    )
    assert max(seen.values()) == 1
    assert len(seen) == len(SPLITS) * 300 * (2 if make is ScenesNLVR2 else 1)


def test_pictures_that_nothing_can_be_said_of_are_passed_over():
    """Frequent at level easy, where two pictures of one object each have little in common."""
    source, world = ScenesNLVR2(level="easy"), Scenes(level="easy")
    numbers = [[int(k.rsplit("/")[-1]) for k in source.image_key(r)] for r in range(100)]
    substituted = [record for record, pair in enumerate(numbers) if pair[0] >= 2**53]
    assert 5 < len(substituted) < 40
    for record in substituted:
        assert np.array_equal(source.image(record, 32), world.image(numbers[record][0], 32))
    hard = [ScenesEntailment().image_key(r) for r in range(300)]
    assert sum(int(key.rsplit("/")[-1]) >= 2**53 for (key,) in hard) < 20


def test_groups_describe_the_first_picture():
    world = Scenes("val", level="hard")
    for make, step in ((ScenesVQA, 1), (ScenesNLVR2, 2)):
        source = make("val", level="hard")
        for record in range(20):
            scene = world.scene(step * record)
            largest = max(scene.objects, key=lambda obj: obj.radius)
            assert source.group(record) == {
                "objects": str(len(scene.objects)),
                **{name: CLASSES[name][getattr(largest, name)] for name in CLASSES},
            }


def test_every_word_has_a_class(task):
    source, texts, _, _ = task
    assert {word for text in texts for word in tokens(text)} <= set(source.word_classes())


@pytest.mark.parametrize("make", TASKS)
def test_bad_arguments_name_the_config_key(make):
    with pytest.raises(ValueError, match=r"data\.sources\.toy\.split must be one of"):
        make("dev", name="toy")
    with pytest.raises(ValueError, match=r"data\.sources\.toy\.num_records must be at least 1"):
        make(num_records=0, name="toy")


@pytest.mark.slow
@pytest.mark.parametrize("make", TASKS)
def test_texts_are_cheap_enough_to_plan_from(make):
    source = make(level="hard")
    records = np.arange(1000)
    rates = []
    for start in range(0, 8000, 1000):
        begin = time.perf_counter()
        source.captions(records + start, np.zeros_like(records))
        rates.append(1000 / (time.perf_counter() - begin))
    assert max(rates) >= 2000


def test_an_example_is_made_once(monkeypatch):
    made, source = [], ScenesVQA(level="hard")
    examples = source.examples
    monkeypatch.setattr(
        source, "examples", lambda records: made.extend(records) or examples(records)
    )
    for _ in range(2):  # as an evaluator reads a set, and then again by groups
        for record in (5, 6, 7):
            assert source.caption(record, 0)
            assert source.answers_of(record)
            assert source.template(record)
    assert made == [5, 6, 7]
