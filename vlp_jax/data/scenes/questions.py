"""Questions with answers that no reader of the question alone can guess.

Each template first finds something the scene can be asked, then tosses a coin for the answer, or
asks what is equally likely to be anything: for each question text the answers are as frequent as
one another (up to the absence of held-out pairs).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlp_jax.data.scenes import facts, words
from vlp_jax.data.scenes.draws import Draw
from vlp_jax.data.scenes.facts import Phrase
from vlp_jax.data.scenes.world import COLOURS, MAX_COUNT, SHAPES, Level, Scene, pick

DIRECTIONS: tuple[str, ...] = ("left", "right", "above", "below")
ANSWERS: tuple[str, ...] = (
    *("yes", "no"),
    *map(str, range(MAX_COUNT + 1)),
    *COLOURS,
    *SHAPES,
    *DIRECTIONS,
)
Pairs = frozenset[tuple[int, int]]


class Question(NamedTuple):
    """A question; ``template`` is ``kind/variant``, the kinds being those of ``KINDS``."""

    text: str
    answer: str
    template: str


KINDS: tuple[str, ...] = ("exist", "count", "colour", "shape", "compare", "relation")


class Asker:
    """Asks about the scenes of one split at one level.

    Args:
        level: the level of the scenes.
        pairs: the (colour, shape) pairs of the split; a question about an absent pair must be
            about one that could be there, or the pair itself would give the answer away.
    """

    def __init__(self, level: Level, pairs: Pairs):
        self.level, self.pairs = level, pairs
        self._classes = {
            "shape": range(level.num_shapes),
            "colour": range(level.num_colours),
            "size": [size for size, radii in enumerate(level.radii) if radii],
            "texture": level.textures,
        }
        self._templates: dict[str, Callable[[Scene, Draw], tuple[str, str] | None]] = {
            "exist/object": self._exist,
            "count/all": self._count_all,
            "count/some": self._count_some,
            "colour/object": self._colour,
            "shape/object": self._shape,
            "compare/size": self._compare_size,
            "compare/number": self._compare_number,
            "relation/direction": self._direction,
            "relation/where": self._where,
            "relation/overlap": self._overlap,
        }

    def ask(self, scene: Scene, draw: Draw) -> list[Question]:
        """One question of each template that the scene has something for, at least one."""
        questions = []
        for template, make in self._templates.items():
            made = make(scene, draw)
            if made is not None:
                questions.append(Question(*made, template))
        return questions

    def _exist(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        pairs = [("shape", "colour")]
        if self.level.rich:
            pairs += [("colour", "texture"), ("shape", "texture"), ("shape", "size")]
        names = pick(draw, pairs)
        # Both must be at hand before the coin falls, or one answer would be dropped more often.
        obj, absent = pick(draw, scene.objects), self._absent(scene, names, draw)
        if absent is None:
            return None
        answer = "yes" if draw() < 0.5 else "no"
        present = Phrase(**{name: getattr(obj, name) for name in names})
        phrase = present if answer == "yes" else absent
        return f"is there {words.indefinite(phrase, draw, self.level.rich)}?", answer

    def _count_all(self, scene: Scene, draw: Draw) -> tuple[str, str]:
        return "how many objects are there?", str(len(scene.objects))

    def _count_some(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        """Asks for the theme of the scene, or for a value that is absent; 0 to 3 objects.

        Sizes and textures are so few that often none is absent, so zero is never the answer there.
        """
        if scene.theme is None:
            return None
        value, number = scene.theme_value, scene.repeats
        if scene.theme in ("colour", "shape") and draw() < 0.25:
            present = {getattr(obj, scene.theme) for obj in scene.objects}
            value = pick(draw, [v for v in self._classes[scene.theme] if v not in present])
            number = 0
        phrase = Phrase(**{scene.theme: value})
        noun_phrase = words.plural_of(phrase, draw, synonyms=True)
        return f"how many {noun_phrase} are there?", str(number)

    def _colour(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        obj = pick(draw, scene.objects)
        phrase = _singled_out(scene, Phrase(shape=obj.shape), Phrase(size=obj.size))
        if phrase is None:
            return None
        text = words.definite(phrase, draw, self.level.rich)
        return f"what colour is {text}?", COLOURS[obj.colour]

    def _shape(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        obj = pick(draw, scene.objects)
        phrase = _singled_out(scene, Phrase(colour=obj.colour), Phrase(size=obj.size))
        if phrase is None:
            return None
        text = words.definite(phrase, draw, self.level.rich)
        return f"what shape is {text}?", SHAPES[obj.shape]

    def _compare_size(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        couple = distinct_couple(
            scene, draw, lambda a, b: scene.objects[a].size != scene.objects[b].size
        )
        if couple is None:
            return None
        first, second = couple
        asked = pick(draw, ("larger", "smaller"))
        answer = "yes" if facts.related(scene, first, asked, second) else "no"
        return self._is_related(scene, first, asked, second, draw), answer

    def _compare_number(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        """Two values of one attribute that are not equally frequent, in either order."""
        name = pick(draw, ("colour", "shape"))
        present = [getattr(obj, name) for obj in scene.objects]
        couples = [
            (a, b)
            for a, b in itertools.permutations(sorted(set(present)), 2)
            if present.count(a) != present.count(b)
        ]
        if not couples:
            return None
        first, second = pick(draw, couples)
        more, fewer = (
            words.plural_of(Phrase(**{name: value}), draw, self.level.rich)
            for value in (first, second)
        )
        answer = "yes" if present.count(first) > present.count(second) else "no"
        return f"are there more {more} than {fewer}?", answer

    def _direction(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        couple = distinct_couple(scene, draw, _has_direction(scene))
        if couple is None:
            return None
        first, second = couple
        asked = facts.direction(scene.objects[first], scene.objects[second])
        assert asked is not None
        answer = "yes"
        if draw() < 0.5:
            asked, answer = facts.OPPOSITE[asked], "no"
        return self._is_related(scene, first, asked, second, draw), answer

    def _where(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        couple = distinct_couple(scene, draw, _has_direction(scene))
        if couple is None:
            return None
        first, second = (scene.objects[i] for i in couple)
        answer = facts.direction(first, second)
        assert answer is not None
        names = [
            words.definite(Phrase(obj.shape, obj.colour), draw, self.level.rich)
            for obj in (first, second)
        ]
        return f"where is {names[0]} as seen from {names[1]}?", answer

    def _overlap(self, scene: Scene, draw: Draw) -> tuple[str, str] | None:
        """Only where one couple overlaps and another does not, so that both answers can be had."""

        def overlapping(a: int, b: int) -> bool:
            return facts.related(scene, a, "overlapping", b)

        yes = distinct_couple(scene, draw, overlapping)
        no = distinct_couple(scene, draw, lambda a, b: not overlapping(a, b))
        if yes is None or no is None:
            return None
        couple, answer = (yes, "yes") if draw() < 0.5 else (no, "no")
        return self._is_related(scene, couple[0], "overlapping", couple[1], draw), answer

    def _absent(self, scene: Scene, names: Sequence[str], draw: Draw) -> Phrase | None:
        """A phrase that fits no object but nearly does, None if a few tries found none.

        One of the attributes ``names`` of an object is changed to a value drawn at random.
        """
        for _ in range(8):
            obj = pick(draw, scene.objects)
            values = {name: getattr(obj, name) for name in names}
            changed = pick(draw, names)
            values[changed] = pick(draw, self._classes[changed])
            phrase = Phrase(**values)
            possible = (
                phrase.colour is None
                or phrase.shape is None
                or (phrase.colour, phrase.shape) in self.pairs
            )
            if possible and not facts.matching(scene, phrase):
                return phrase
        return None

    def _is_related(self, scene: Scene, first: int, relation: str, second: int, draw: Draw) -> str:
        names = [
            words.definite(Phrase(obj.shape, obj.colour), draw, self.level.rich)
            for obj in (scene.objects[first], scene.objects[second])
        ]
        relation_words = words.relation(relation, draw, self.level.rich)
        return f"is {names[0]} {relation_words} {names[1]}?"


def distinct_couple(
    scene: Scene, draw: Draw, wanted: Callable[[int, int], bool]
) -> tuple[int, int] | None:
    """Two objects as wanted, in random order, each the only one of its colour and shape.

    Returns:
        Their indices, or None if the scene has no such couple.
    """
    names = [Phrase(obj.shape, obj.colour) for obj in scene.objects]
    single = [i for i, phrase in enumerate(names) if names.count(phrase) == 1]
    couples = [(a, b) for a, b in itertools.permutations(single, 2) if wanted(a, b)]
    return pick(draw, couples) if couples else None


def _has_direction(scene: Scene) -> Callable[[int, int], bool]:
    return lambda a, b: facts.direction(scene.objects[a], scene.objects[b]) is not None


def _singled_out(scene: Scene, phrase: Phrase, more: Phrase) -> Phrase | None:
    """The phrase if it fits one object only, else with its size added, else None."""
    for candidate in (phrase, phrase._replace(size=more.size)):
        if len(facts.matching(scene, candidate)) == 1:
            return candidate
    return None
