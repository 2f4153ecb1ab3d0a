"""Questions, statements and hypotheses: right answers, and none that the words give away."""

import collections
import itertools
import re

import numpy as np
import pytest

from tests.data.scenes_parser import NOUNS, SHAPE_OF, parse, tokens
from vlp_jax.data.scenes import ANSWERS, COLOURS, KINDS, LABELS, LEVELS, SHAPES, Scenes
from vlp_jax.data.scenes.world import MAX_COUNT

CHANCE = {
    "exist/object": 1 / 2,
    "count/all": 1 / 5,
    "count/some": 1 / 3,
    "colour/object": 1 / 8,  # each shape is seen in eight of the ten colours
    "shape/object": 1 / 8,
    "compare/size": 1 / 2,
    "compare/number": 1 / 2,
    "relation/direction": 1 / 2,
    "relation/where": 1 / 4,
    "relation/overlap": 1 / 2,
}


@pytest.fixture(scope="module")
def asked():
    source = Scenes()
    return [(source.scene(r), q) for r in range(4000) for q in source.questions(r)]


def fitting(scene, attributes):
    return [o for o in scene.objects if all(getattr(o, k) == v for k, v in attributes.items())]


def direction(a, b):
    """Where a lies from b, along the longer of the two axes."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def answer(scene, question):
    """The answer by reading the question's words, from coordinates alone."""
    text, variant = question.text, question.template
    found = [fitting(scene, attributes) for attributes in parse(text)]
    if variant == "exist/object":
        return "yes" if found[0] else "no"
    if variant.startswith("count"):
        return str(len(found[0]))
    if variant == "compare/number":
        return "yes" if len(found[0]) > len(found[1]) else "no"
    assert all(len(objects) == 1 for objects in found), "the question is ambiguous"
    first = found[0][0]
    if variant == "colour/object":
        return COLOURS[first.colour]
    if variant == "shape/object":
        return SHAPES[first.shape]
    second = found[1][0]
    if variant == "relation/where":
        return direction(first, second)
    if variant == "relation/overlap":
        near = np.hypot(first.x - second.x, first.y - second.y) < first.radius + second.radius
        return "yes" if near else "no"
    if variant == "compare/size":
        smaller = "smaller" in text
        return "yes" if (first.radius < second.radius) == smaller else "no"
    said = next(
        name
        for name, pattern in (
            ("left", "left of"),
            ("right", "right of"),
            ("above", "above|higher"),
            ("below", "below|beneath|lower"),
        )
        if re.search(pattern, text)
    )
    return "yes" if direction(first, second) == said else "no"


def test_answers_are_right(asked):
    for scene, question in asked:
        # "what shape is the red shape": the first noun is part of the question
        body = question._replace(text=re.sub("^what (shape|colour) is", "", question.text))
        assert answer(scene, body) == question.answer, question


def test_answers_are_in_the_list(asked):
    assert {question.answer for _, question in asked} <= set(ANSWERS)
    assert len(set(ANSWERS)) == len(ANSWERS)
    assert str(MAX_COUNT) in ANSWERS


def test_every_kind_and_template_occurs(asked):
    counts = collections.Counter(question.template for _, question in asked)
    assert set(counts) == set(CHANCE)
    assert {template.split("/")[0] for template in counts} == set(KINDS)
    assert min(counts.values()) > 500


@pytest.mark.parametrize("template", CHANCE)
def test_the_majority_answer_of_a_question_is_near_chance(asked, template):
    """Learns the majority by text on one half, by template where new, and guesses on the other."""
    questions = [q for _, q in asked if q.template == template]
    by_text = collections.defaultdict(collections.Counter)
    for question in questions[::2]:
        by_text[generic(question.text)][question.answer] += 1
        by_text[None][question.answer] += 1
    right = 0
    for question in questions[1::2]:
        seen = by_text.get(generic(question.text), by_text[None])
        right += seen.most_common(1)[0][0] == question.answer
    assert right / len(questions[1::2]) < CHANCE[template] + 0.06


def generic(text):
    """The question with all synonyms of shapes and generic nouns made alike."""
    named = [
        SHAPES[SHAPE_OF[w]] if w in SHAPE_OF else "object" if w in NOUNS else w
        for w in tokens(text)
    ]
    return " ".join(named)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", ["pair", "entailment"])
def test_words_do_not_tell_the_label(level, task):
    """Naive Bayes over words and neighbouring words does not beat chance by more than 4 points."""
    source = Scenes(level=level)
    samples = [getattr(source, task)(index) for index in range(6000)]
    labels = np.array([s.truth if task == "pair" else LABELS.index(s.label) for s in samples], int)
    classes = labels.max() + 1
    np.testing.assert_allclose(np.bincount(labels) / len(labels), 1 / classes, atol=0.025)

    features = [tokens(s.text) for s in samples]
    features = [set(f) | set(itertools.pairwise(f)) for f in features]
    counts = collections.defaultdict(lambda: np.ones(classes))
    half = len(samples) // 2
    for feature, label in zip(features[:half], labels, strict=False):
        for item in feature:
            counts[item][label] += 1
    total = np.bincount(labels[:half], minlength=classes) + 2.0
    guesses = [
        np.argmax(sum((np.log(counts[i] / total) for i in f if i in counts), np.zeros(classes)))
        for f in features[half:]
    ]
    assert np.mean(guesses == labels[half:]) < 1 / classes + 0.04


def holds(text, phrases, found):
    """Whether a hypothesis about objects that exist is true, by its words."""
    first = found[0]
    if len(found) == 1:
        body = text.rsplit(" is ", 1)[1]
        stated = parse(f"{body} object")[0]
        return all(getattr(first, name) == value for name, value in stated.items())
    second = found[1]
    if "larger" in text or "bigger" in text:
        return first.radius > second.radius
    if "smaller" in text:
        return first.radius < second.radius
    names = {"left of": "left", "right of": "right", "above": "above", "higher": "above"}
    names |= {"below": "below", "beneath": "below", "lower": "below"}
    return direction(first, second) == next(name for key, name in names.items() if key in text)


@pytest.mark.parametrize("level", LEVELS)
def test_hypotheses_have_the_right_label(level):
    source = Scenes(level=level)
    for index in range(1500):
        record, text, label = source.entailment(index)
        scene = source.scene(record)
        subject = text if " the " in text[4:] else text.rsplit(" is ", 1)[0]
        phrases = parse(subject)
        found = [fitting(scene, phrase) for phrase in phrases]
        if label == "neutral":
            assert not all(found)
            continue
        assert all(len(objects) == 1 for objects in found)
        true = holds(text, phrases, [objects[0] for objects in found])
        assert true == (label == "entailment"), (scene, text)


@pytest.mark.parametrize("level", LEVELS)
def test_statements_about_pairs_are_labelled_right(level):
    source = Scenes(level=level)
    kinds = collections.Counter()
    for index in range(1500):
        records, text, truth = source.pair(index)
        first, second = (source.scene(record) for record in records)
        phrases = parse(text)
        numbers = [[len(fitting(s, p)) for s in (first, second)] for p in phrases]
        kind = tokens(text)[0]
        kinds[kind if kind in ("only", "both") else "more" if " has " in text else "across"] += 1
        if kind == "only":
            expected = [bool(n) for n in numbers[0]] == (
                [True, False] if "first" in text else [False, True]
            )
        elif kind == "both":
            expected = all(numbers[0])
        elif " has " in text:
            more, fewer = numbers[0] if "the first" in text else numbers[0][::-1]
            assert more != fewer
            expected = more > fewer if "more" in text else more < fewer
        else:
            one, other = fitting(first, phrases[0])[0], fitting(second, phrases[1])[0]
            expected = (one.radius > other.radius) == ("smaller" not in text)
        assert expected == truth, (first, second, text)
    assert min(kinds[k] for k in ("only", "both", "more", "across")) > 50


def test_statements_and_hypotheses_stay_in_their_split():
    source = Scenes(split="val", num_records=150)
    for index in range(100):
        assert max(source.pair(index).records) < 150
        assert source.entailment(index).record < 150
    with pytest.raises(ValueError, match=r"data\.sources\.scenes\.num_records = 1 is too small"):
        Scenes(split="val", num_records=1).pair(0)
