"""Statements about two pictures (true or false) and hypotheses about one (entailment).

Both outcomes of a statement come from one generator that is symmetric in them, so the words tell
nothing of the label.
"""

from collections.abc import Callable
from typing import NamedTuple

from vlp_jax.data.scenes import facts, words
from vlp_jax.data.scenes.draws import Draw
from vlp_jax.data.scenes.facts import Phrase
from vlp_jax.data.scenes.questions import distinct_couple
from vlp_jax.data.scenes.world import SIZES, TEXTURES, Level, Object, Scene, pick

LABELS: tuple[str, ...] = ("entailment", "neutral", "contradiction")
_SIDES = ("first", "second")


class Statement(NamedTuple):
    """A sentence about the pictures of two records, and whether it is true of them."""

    records: tuple[int, int]
    text: str
    truth: bool


class Hypothesis(NamedTuple):
    """A sentence about the picture of a record; ``label`` is one of ``LABELS``.

    Neutral sentences speak of an object that the picture does not show, so the picture neither
    supports nor contradicts them.
    """

    record: int
    text: str
    label: str


def compare(scenes: tuple[Scene, Scene], truth: bool, level: Level, draw: Draw) -> str | None:
    """A sentence about two scenes that is true or false as asked, None if none was found."""
    makers: list[Callable[[tuple[Scene, Scene], bool, Level, Draw], str | None]]
    makers = [_only, _more, _both, _across]
    start = int(draw() * len(makers))
    for number in range(len(makers)):
        text = makers[(start + number) % len(makers)](scenes, truth, level, draw)
        if text is not None:
            return text
    return None


def suppose(
    scene: Scene, truth: bool, level: Level, draw: Draw
) -> tuple[str, tuple[Phrase, ...]] | None:
    """A sentence about the objects of a scene, true or false as asked, and the objects it names.

    Returns:
        The sentence and descriptions, or None if the scene has no couple or object for it.
    """
    kind = pick(draw, (_supposed_attribute, _supposed_direction, _supposed_size))
    return kind(scene, truth, level, draw)


def _only(scenes: tuple[Scene, Scene], truth: bool, level: Level, draw: Draw) -> str | None:
    """An object that one picture shows and the other does not."""
    side = int(draw() * 2)
    obj = pick(draw, scenes[side].objects)
    phrase = Phrase(obj.shape, obj.colour)
    if facts.matching(scenes[1 - side], phrase):
        return None
    named = _SIDES[side if truth else 1 - side]
    return f"only the {named} image has {words.indefinite(phrase, draw, level.rich)}"


def _more(scenes: tuple[Scene, Scene], truth: bool, level: Level, draw: Draw) -> str | None:
    """The picture with more objects, or with more objects of one colour, shape or texture."""
    side = int(draw() * 2)
    obj = pick(draw, scenes[side].objects)
    kinds = [Phrase(), Phrase(colour=obj.colour), Phrase(shape=obj.shape)]
    if level.rich:
        kinds.append(Phrase(texture=obj.texture))
    phrase = pick(draw, kinds)
    first, second = (len(facts.matching(scene, phrase)) for scene in scenes)
    if first == second:
        return None
    # "more in the first" and "fewer in the first" are equally frequent, true or false.
    more_in_first = (first > second) == truth
    noun = words.plural_of(phrase, draw, level.rich)
    if draw() < 0.5:
        named = "first" if more_in_first else "second"
        return f"the {named} image has more {noun} than the other"
    named = "second" if more_in_first else "first"
    return f"the {named} image has fewer {noun} than the other"


def _both(scenes: tuple[Scene, Scene], truth: bool, level: Level, draw: Draw) -> str | None:
    """A colour, shape or texture that both pictures show, or only one of them."""
    name = pick(draw, ("colour", "shape", "texture") if level.rich else ("colour", "shape"))
    first, second = ({getattr(obj, name) for obj in scene.objects} for scene in scenes)
    shared, single = sorted(first & second), sorted(first ^ second)
    if not shared or not single:
        return None
    phrase = Phrase(**{name: pick(draw, shared if truth else single)})
    return f"both images show {words.indefinite(phrase, draw, level.rich)}"


def _across(scenes: tuple[Scene, Scene], truth: bool, level: Level, draw: Draw) -> str | None:
    """The sizes of two objects in different pictures."""
    candidates = [_nameable(scene) if level.palette else scene.objects for scene in scenes]
    if not all(candidates):
        return None
    first, second = (pick(draw, objects) for objects in candidates)
    if first.size == second.size:
        return None
    phrases = [Phrase(obj.shape, obj.colour) for obj in (first, second)]
    if any(
        len(facts.matching(scene, phrase)) > 1
        for scene, phrase in zip(scenes, phrases, strict=True)
    ):
        return None
    larger = (first.size > second.size) == truth
    relation = words.relation("larger" if larger else "smaller", draw, level.rich)
    one, other = (words.definite(phrase, draw, level.rich) for phrase in phrases)
    return f"{one} in the first image is {relation} {other} in the second"


def _nameable(scene: Scene) -> list[Object]:
    """The objects that no other equals in both colour and shape; few where there is a palette."""
    names = [(obj.shape, obj.colour) for obj in scene.objects]
    return [obj for obj, name in zip(scene.objects, names, strict=True) if names.count(name) == 1]


def _supposed_attribute(
    scene: Scene, truth: bool, level: Level, draw: Draw
) -> tuple[str, tuple[Phrase, ...]] | None:
    """The size or texture of one object."""
    obj = pick(draw, scene.objects)
    phrase = Phrase(obj.shape, obj.colour)
    if len(facts.matching(scene, phrase)) > 1:
        return None
    if level.rich and draw() < 0.5:
        value, values = obj.texture, list(level.textures)
        names, synonyms = TEXTURES, words.TEXTURE_WORDS
    else:
        value, values = obj.size, [size for size, radii in enumerate(level.radii) if radii]
        names, synonyms = SIZES, words.SIZE_WORDS
    if not truth:
        value = pick(draw, [v for v in values if v != value])
    stated = words.synonym(synonyms[names[value]], draw, level.rich)
    return f"{words.definite(phrase, draw, level.rich)} is {stated}", (phrase,)


def _supposed_direction(
    scene: Scene, truth: bool, level: Level, draw: Draw
) -> tuple[str, tuple[Phrase, ...]] | None:
    couple = distinct_couple(
        scene,
        draw,
        lambda a, b: facts.direction(scene.objects[a], scene.objects[b]) is not None,
    )
    if couple is None:
        return None
    direction = facts.direction(*(scene.objects[i] for i in couple))
    assert direction is not None
    stated = direction if truth else facts.OPPOSITE[direction]
    return _supposed_relation(scene, couple, stated, level, draw)


def _supposed_size(
    scene: Scene, truth: bool, level: Level, draw: Draw
) -> tuple[str, tuple[Phrase, ...]] | None:
    couple = distinct_couple(
        scene, draw, lambda a, b: scene.objects[a].size != scene.objects[b].size
    )
    if couple is None:
        return None
    first, second = (scene.objects[i] for i in couple)
    stated = "larger" if (first.size > second.size) == truth else "smaller"
    return _supposed_relation(scene, couple, stated, level, draw)


def _supposed_relation(
    scene: Scene, couple: tuple[int, int], relation: str, level: Level, draw: Draw
) -> tuple[str, tuple[Phrase, ...]]:
    phrases = tuple(Phrase(scene.objects[i].shape, scene.objects[i].colour) for i in couple)
    one, other = (words.definite(phrase, draw, level.rich) for phrase in phrases)
    return f"{one} is {words.relation(relation, draw, level.rich)} {other}", phrases
