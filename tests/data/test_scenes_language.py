"""Captions: truth, variety, length, and the class of every word."""

import collections
import re
import time

import numpy as np
import pytest

from tests.data.scenes_parser import parse, tokens
from vlp_jax.data.scenes import LEVELS, VOCABULARY, Scenes, words
from vlp_jax.data.scenes.facts import Between, Count, Exists, Placed, Related

RECORDS = range(500)


def stated_phrases(fact):
    match fact:
        case Exists(a) | Count(a, _) | Placed(a, _):
            return [a]
        case Related(a, _, b):
            return [a, b]
        case Between(a, b, c):
            return [a, b, c]


def true_of(fact, scene):
    """An account of truth that shares no code with the package: from coordinates alone."""

    def fitting(phrase):
        wanted = {k: v for k, v in phrase._asdict().items() if v is not None}
        return [o for o in scene.objects if all(getattr(o, k) == v for k, v in wanted.items())]

    def across(a, b):
        return b.x - a.x

    def down(a, b):
        return b.y - a.y

    margin = 0.08
    tests = {
        "left": lambda a, b: across(a, b) >= margin and across(a, b) > abs(down(a, b)),
        "right": lambda a, b: across(b, a) >= margin and across(b, a) > abs(down(a, b)),
        "above": lambda a, b: down(a, b) >= margin and down(a, b) > abs(across(a, b)),
        "below": lambda a, b: down(b, a) >= margin and down(b, a) > abs(across(a, b)),
        "overlapping": lambda a, b: np.hypot(a.x - b.x, a.y - b.y) < a.radius + b.radius,
    }
    places = {
        "left": lambda o: o.x < 0.36,
        "right": lambda o: o.x > 0.64,
        "top": lambda o: o.y < 0.36,
        "bottom": lambda o: o.y > 0.64,
        "middle": lambda o: max(abs(o.x - 0.5), abs(o.y - 0.5)) < 0.11,
    }
    match fact:
        case Exists(phrase):
            return len(fitting(phrase)) > 0
        case Count(phrase, number):
            return len(fitting(phrase)) == number
        case Placed(phrase, place):
            return any(map(places[place], fitting(phrase)))
        case Related(first, relation, second):
            return any(
                a is not b and tests[relation](a, b)
                for a in fitting(first)
                for b in fitting(second)
            )
        case Between(middle, first, second):

            def near_the_line(m, a, b):
                whole = np.hypot(a.x - b.x, a.y - b.y)
                detour = np.hypot(m.x - a.x, m.y - a.y) + np.hypot(m.x - b.x, m.y - b.y)
                return detour < whole + 0.1

            return any(
                m is not a and m is not b and a is not b and near_the_line(m, a, b)
                for m in fitting(middle)
                for a in fitting(first)
                for b in fitting(second)
            )


@pytest.fixture(scope="module", params=LEVELS)
def described(request):
    source = Scenes(level=request.param)
    return source, [[source.describe(r, i) for i in range(5)] for r in RECORDS]


def test_every_stated_fact_is_true(described):
    source, captions = described
    for record, five in zip(RECORDS, captions, strict=True):
        scene = source.scene(record)
        for caption in five:
            assert caption.facts
            for fact in caption.facts:
                assert true_of(fact, scene), (record, caption)


def test_the_truth_test_can_fail(described):
    """Facts of one scene are mostly false of another."""
    source, captions = described
    facts = [fact for five in captions for caption in five for fact in caption.facts]
    other = source.scene(10_000)
    assert np.mean([true_of(fact, other) for fact in facts]) < 0.4


def test_the_words_say_what_the_facts_say(described):
    _, captions = described
    for five in captions:
        for caption in five:
            stated = [phrase for fact in caption.facts for phrase in stated_phrases(fact)]
            meant = [{k: v for k, v in p._asdict().items() if v is not None} for p in stated]
            assert parse(caption.text) == meant, caption


def test_relations_and_numbers_are_in_the_text(described):
    _, captions = described
    for five in captions:
        for caption in five:
            for fact in caption.facts:
                said = None
                if isinstance(fact, Related):
                    said = words.RELATION_WORDS[fact.relation]
                elif isinstance(fact, Placed):
                    said = words.PLACE_WORDS[fact.place]
                elif isinstance(fact, Between):
                    said = words.RELATION_WORDS["between"]
                elif isinstance(fact, Count):
                    said = (words.NUMBERS[fact.number - 1],)
                assert said is None or any(s in caption.text for s in said), caption


def test_the_captions_of_a_record_differ(described):
    _, captions = described
    assert all(len({caption.text for caption in five}) == 5 for five in captions)


def test_captions_are_lower_case_and_have_the_length_of_the_level(described):
    source, captions = described
    texts = [caption.text for five in captions for caption in five]
    lengths = np.array([len(text.split()) for text in texts])
    assert all(text == text.lower() for text in texts)
    assert lengths.min() >= 4
    assert lengths.max() <= source.level.max_words
    if source.level.rich:
        assert np.percentile(lengths, 90) > 3 * np.percentile(lengths, 10)


def test_articles_agree(described):
    _, captions = described
    for five in captions:
        for caption in five:
            for first, second in re.findall(r"\b(an?) (\w+)", caption.text):
                assert (first == "an") == (second[0] in "aeiou"), caption


def test_all_relations_and_kinds_of_facts_occur():
    source = Scenes()
    facts = [f for r in RECORDS for i in range(5) for f in source.describe(r, i).facts]
    kinds = collections.Counter(type(fact) for fact in facts)
    assert min(kinds[kind] for kind in (Exists, Count, Placed, Related, Between)) > 20
    relations = {fact.relation for fact in facts if isinstance(fact, Related)}
    assert relations == {"left", "right", "above", "below", "overlapping"}


def test_the_vocabulary_is_what_the_grammars_say():
    """No word is missing from it and none is in it without use."""
    said = set()
    for level in LEVELS:
        source = Scenes(level=level)
        for record in range(1500):
            texts = [source.caption(record, i) for i in range(5)]
            texts += [question.text for question in source.questions(record)]
            texts += [source.pair(record).text, source.entailment(record).text]
            said.update(word for text in texts for word in tokens(text))
    assert said == set(VOCABULARY)


def test_every_word_has_a_class():
    classes = Scenes().word_classes()
    assert set(classes) == set(VOCABULARY)
    names = {"colour", "shape", "size", "texture", "relation", "count", "function"}
    assert set(classes.values()) == names
    examples = {
        "red": "colour",
        "stars": "shape",
        "tiny": "size",
        "striped": "texture",
        "left": "relation",
        "three": "count",
        "of": "function",
        "objects": "function",
    }
    assert {word: classes[word] for word in examples} == examples


def test_the_colour_cannot_be_told_from_the_rest_of_an_easy_caption():
    source = Scenes(level="easy")
    seen = collections.defaultdict(collections.Counter)
    for record in range(4000):
        named = [n for n in parse(source.caption(record, 0)) if "shape" in n]
        if len(named) == 2:
            seen[named[0]["shape"], named[1]["shape"]][named[0]["colour"]] += 1
    best = sum(counter.most_common(1)[0][1] for counter in seen.values())
    assert best / sum(counter.total() for counter in seen.values()) < 0.3


def test_many_captions_at_once_equal_one_by_one():
    for level in LEVELS:
        source = Scenes(level=level)
        records = np.array([5, 0, 123_456_789_012, 5, 77])
        indices = np.array([0, 4, 2, 3, 1])
        single = [source.caption(int(r), int(i)) for r, i in zip(records, indices, strict=True)]
        assert source.captions(records, indices) == single


def test_captions_are_pinned():
    """If this fails on purpose, raise ``scenes.source.VERSION``: caches show another world."""
    easy, full = Scenes(level="easy"), Scenes()
    assert easy.caption(1, 0) == "a small yellow square and an orange heart are shown"
    assert easy.caption(1, 1) == "a picture of an orange heart above a yellow square"
    assert full.caption(1, 1) == (
        "a green moon, a medium brown arrow, a dotted disc and a medium golden star are shown"
    )


def test_a_caption_that_does_not_exist_is_refused():
    with pytest.raises(IndexError, match=r"captions are 0\.\.4; asked for 5"):
        Scenes().caption(0, 5)
    with pytest.raises(IndexError, match="asked for -1"):
        Scenes().captions(np.array([0]), np.array([-1]))


@pytest.mark.slow
def test_captions_are_cheap_enough_to_plan_from():
    source = Scenes()
    records = np.arange(2000)
    rates = []
    for start in range(0, 20_000, 2000):
        begin = time.perf_counter()
        source.captions(records + start, records % 5)
        rates.append(2000 / (time.perf_counter() - begin))
    assert max(rates) >= 8000
