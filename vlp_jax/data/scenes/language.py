"""Captions: a grammar over true facts of a scene.

The five captions of a scene begin in five different ways, so no two of them are equal, and say
between one and three things, so that their lengths vary.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from vlp_jax.data.scenes import facts, words
from vlp_jax.data.scenes.draws import Draw
from vlp_jax.data.scenes.facts import Between, Count, Exists, Fact, Phrase, Placed, Related
from vlp_jax.data.scenes.world import Level, Object, Scene, pick

NUM_CAPTIONS = 5

_OPENERS = ("", "a picture of", "an image with", "this scene shows", "we can see")
_EASY_OPENERS = ("", "a picture of", "there is", "we see", None)  # None: the number of objects


class Caption(NamedTuple):
    """A sentence and the facts it states."""

    text: str
    facts: tuple[Fact, ...]


class Clause(NamedTuple):
    """A part of a caption; ``verb`` is the one that makes a sentence of it without an opener."""

    subject: str
    verb: str
    rest: str
    facts: tuple[Fact, ...]

    def nominal(self) -> str:
        """As a noun phrase: "a star left of a square"."""
        return f"{self.subject} {self.rest}" if self.rest else self.subject

    def sentence(self) -> str:
        """As a sentence: "a star is left of a square", "a star is shown"."""
        return f"{self.subject} {self.verb} {self.rest or 'shown'}"


Maker = Callable[[Scene, Draw], Clause]


def describe(scene: Scene, index: int, level: Level, draw: Draw) -> Caption:
    """Caption ``index`` of a scene.

    Args:
        scene: the scene.
        index: 0 <= index < NUM_CAPTIONS.
        level: sets the style and the length.
        draw: the stream of this caption alone.
    """
    deal = int(scene.variant * NUM_CAPTIONS**2)
    opener = (index + deal) % NUM_CAPTIONS
    if not level.rich:
        return _easy(scene, _EASY_OPENERS[opener], draw)
    clauses = level.clauses[(index + deal // NUM_CAPTIONS) % NUM_CAPTIONS]
    if len(scene.objects) == 1:
        clauses = 1  # a second clause would sound as if it spoke of a second object
    return _full(scene, _OPENERS[opener], clauses, level.max_words, draw)


def _easy(scene: Scene, opener: str | None, draw: Draw) -> Caption:
    """Names colour and shape of every object, and where one lies from the other."""
    first = int(draw() * len(scene.objects))
    # At most one size, or the longest captions would exceed the level's length.
    sized = draw() < 0.4
    phrases = [
        Phrase(obj.shape, obj.colour, obj.size if sized and i == first else None)
        for i, obj in enumerate(scene.objects)
    ]
    subject = words.indefinite(phrases[first], draw, synonyms=False)
    if len(phrases) == 1:
        clause = Clause(subject, "is", "", (Exists(phrases[0]),))
    else:
        clause = _easy_pair(scene, phrases, first, subject, draw)
    if opener is None:
        number = len(phrases)
        text = f"{words.counted(Phrase(), number, draw, synonyms=False)}, {clause.nominal()}"
        return Caption(text, (Count(Phrase(), number), *clause.facts))
    text = f"{opener} {clause.nominal()}" if opener else clause.sentence()
    return Caption(text, clause.facts)


def _easy_pair(scene: Scene, phrases: list[Phrase], first: int, subject: str, draw: Draw) -> Clause:
    second = 1 - first
    other = words.indefinite(phrases[second], draw, synonyms=False)
    direction = facts.direction(scene.objects[first], scene.objects[second])
    if direction is None or draw() < 0.15:
        stated = (Exists(phrases[first]), Exists(phrases[second]))
        return Clause(f"{subject} and {other}", "are", "", stated)
    rest = f"{words.relation(direction, draw, synonyms=False)} {other}"
    return Clause(subject, "is", rest, (Related(phrases[first], direction, phrases[second]),))


def _full(scene: Scene, opener: str, num_clauses: int, max_words: int, draw: Draw) -> Caption:
    """Joins clauses of random kinds as long as the sentence stays within ``max_words``."""
    makers = _makers(scene)
    start = int(draw() * len(makers))
    text = ""
    stated: tuple[Fact, ...] = ()
    for number in range(num_clauses):
        clause = makers[(start + number) % len(makers)](scene, draw)
        if number == 0:
            text = f"{opener} {clause.nominal()}" if opener else clause.sentence()
            stated = clause.facts
            continue
        joint = pick(draw, (", ", " and ", ", and "))
        longer = text + joint + (clause.nominal() if opener else clause.sentence())
        if longer.count(" ") < max_words:
            text, stated = longer, stated + clause.facts
    return Caption(text, stated)


def _makers(scene: Scene) -> list[Maker]:
    """The kinds of clauses that a scene has something for, relations more than once."""
    if len(scene.objects) == 1:
        return [_listed, _placed]
    makers: list[Maker] = [_relation, _listed, _counted, _relation, _placed]
    if scene.crowd is not None:
        makers += [_crowded, _total, _relation]
    elif len(scene.objects) > 2:
        makers += [_total, _between]
    if scene.overlap:
        makers.insert(2, _overlapping)
    return makers


def _phrase(obj: Object, draw: Draw) -> Phrase:
    """Some of the attributes of an object, at least its shape or its colour."""
    naming = draw()
    return Phrase(
        shape=obj.shape if naming < 0.88 else None,
        colour=obj.colour if naming < 0.7 or naming >= 0.88 else None,
        size=obj.size if draw() < 0.3 else None,
        texture=obj.texture if draw() < 0.35 else None,
    )


def _noun_phrase(obj: Object, draw: Draw) -> tuple[Phrase, str]:
    phrase = _phrase(obj, draw)
    return phrase, words.indefinite(phrase, draw, synonyms=True)


def _listed(scene: Scene, draw: Draw) -> Clause:
    """One to four objects, each named once."""
    most = min(len(scene.objects), 4)
    number = 1 + int(draw() * most)
    start = int(draw() * len(scene.objects))
    chosen = [scene.objects[(start + i) % len(scene.objects)] for i in range(number)]
    phrases, texts = zip(*(_noun_phrase(obj, draw) for obj in chosen), strict=True)
    text = texts[0] if number == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
    return Clause(text, "is" if number == 1 else "are", "", tuple(map(Exists, phrases)))


def _placed(scene: Scene, draw: Draw) -> Clause:
    """An object and the part of the image it lies in."""
    obj = pick(draw, scene.objects)
    phrase, text = _noun_phrase(obj, draw)
    name = facts.place(obj)
    if name is None:
        return Clause(text, "is", "", (Exists(phrase),))
    return Clause(text, "is", pick(draw, words.PLACE_WORDS[name]), (Placed(phrase, name),))


def _relation(scene: Scene, draw: Draw) -> Clause:
    """Two objects and the direction from one to the other."""
    count = len(scene.objects)
    first = int(draw() * count)
    second = (first + 1 + int(draw() * (count - 1))) % count
    direction = facts.direction(scene.objects[first], scene.objects[second])
    if direction is None:
        return _listed(scene, draw)
    return _joined(scene, first, direction, second, draw)


def _overlapping(scene: Scene, draw: Draw) -> Clause:
    """The two objects that overlap."""
    assert scene.overlap is not None
    first, second = scene.overlap if draw() < 0.5 else scene.overlap[::-1]
    return _joined(scene, first, "overlapping", second, draw)


def _joined(scene: Scene, first: int, relation: str, second: int, draw: Draw) -> Clause:
    phrase, subject = _noun_phrase(scene.objects[first], draw)
    other, text = _noun_phrase(scene.objects[second], draw)
    rest = f"{words.relation(relation, draw, synonyms=True)} {text}"
    return Clause(subject, "is", rest, (Related(phrase, relation, other),))


def _counted(scene: Scene, draw: Draw) -> Clause:
    """How many objects share one or two attributes."""
    obj = pick(draw, scene.objects)
    kind = int(draw() * 5)
    phrase = (
        Phrase(shape=obj.shape),
        Phrase(colour=obj.colour),
        Phrase(shape=obj.shape, colour=obj.colour),
        Phrase(texture=obj.texture),
        Phrase(size=obj.size),
    )[kind]
    return _number_of(scene, phrase, draw)


def _crowded(scene: Scene, draw: Draw) -> Clause:
    """How many objects are of the crowd, if any."""
    if scene.crowd is None or scene.repeats == 0:
        return _counted(scene, draw)
    return _number_of(scene, Phrase(*scene.crowd), draw)


def _number_of(scene: Scene, phrase: Phrase, draw: Draw) -> Clause:
    number = len(facts.matching(scene, phrase))
    text = words.counted(phrase, number, draw, synonyms=True)
    return Clause(text, "is" if number == 1 else "are", "", (Count(phrase, number),))


def _total(scene: Scene, draw: Draw) -> Clause:
    """How many objects there are."""
    number = len(scene.objects)
    text = words.counted(Phrase(), number, draw, synonyms=True)
    return Clause(text, "are", "in view", (Count(Phrase(), number),))


def _between(scene: Scene, draw: Draw) -> Clause:
    """An object that lies between two others, if any does."""
    indices = range(len(scene.objects))
    triples = [
        (middle, first, second)
        for first, second in itertools.combinations(indices, 2)
        for middle in indices
        if middle not in (first, second)
        and facts.is_between(scene.objects[middle], scene.objects[first], scene.objects[second])
    ]
    if not triples:
        return _relation(scene, draw)
    phrases, texts = zip(
        *(_noun_phrase(scene.objects[i], draw) for i in pick(draw, triples)), strict=True
    )
    rest = f"{words.relation('between', draw, synonyms=True)} {texts[1]} and {texts[2]}"
    return Clause(texts[0], "is", rest, (Between(*phrases),))
