"""Questions, statements and hypotheses of the downstream tasks, whose words give nothing away.

Whatever could have come out otherwise is at hand before the outcome is drawn: an object that is
there and a description of one that is not, a value that is right and one that is wrong. Words are
the same under every outcome, and values are exchanged for others of the same scene, so that
neither the text alone nor a picture of another scene helps.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlp_jax.data.scenes import facts, words
from vlp_jax.data.scenes.draws import Draw
from vlp_jax.data.scenes.facts import Phrase
from vlp_jax.data.scenes.questions import ANSWERS
from vlp_jax.data.scenes.references import Namer
from vlp_jax.data.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, Level, Object, Scene, pick

TASK_ANSWERS: tuple[str, ...] = (*ANSWERS, *SIZES, *TEXTURES)
ENTAILMENT_LABELS: tuple[str, ...] = ("contradiction", "neutral", "entailment")
# Words of tasks that captions do not use.
TASK_WORDS: tuple[str, ...] = ("size", "pattern", "does", "have", "same", "number")

_CLASSES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
_WORDS = {
    "shape": words.SHAPE_WORDS,
    "colour": words.COLOUR_WORDS,
    "size": words.SIZE_WORDS,
    "texture": words.TEXTURE_WORDS,
}
_OTHER_SIZE = {"larger": "smaller", "smaller": "larger"}
_COUNTED = 0.1  # share of the questions that ask for a number
_TRIES = 6  # objects or couples tried
_ROUNDS = 3  # times that every kind of text is tried


class Text(NamedTuple):
    """A text, its kind, and what is right: an answer, a label, or ``true`` or ``false``."""

    text: str
    template: str
    target: str


class Writer:
    """Writes about the scenes of one split at one level.

    Each of ``question``, ``statement`` and ``hypothesis`` tries the kinds of text in turn from a
    random one on, a few times over, and returns None if that found nothing to say.
    """

    def __init__(self, level: Level, split: str):
        self._level = level
        self._namer = Namer(level, split)
        self._asked: tuple[Callable[[Scene, Draw], Text | None], ...] = (
            functools.partial(self._ask_related, "colour"),
            functools.partial(self._ask_value, "colour"),
            self._ask_exist,
            self._ask_where,
            functools.partial(self._ask_value, "size"),
            functools.partial(self._ask_related, "shape"),
            functools.partial(self._ask_value, "shape"),
            self._ask_direction,
            functools.partial(self._ask_value, "texture"),
            self._ask_more,
            self._ask_larger,
        )
        self._stated: tuple[Callable[[Scene, Scene, bool, Draw], Text | None], ...] = (
            *(self._state_more, self._state_same, self._state_both),
            *(self._state_same_number, self._state_larger, self._state_one),
        )
        self._supposed: tuple[Callable[[Scene, str, Draw], Text | None], ...] = (
            *(self._suppose_value, self._suppose_direction),
            *(self._suppose_value, self._suppose_larger),
        )

    def question(self, scene: Scene, draw: Draw) -> Text | None:
        """A question about a scene; answers are those of ``TASK_ANSWERS``."""
        # Never in place of another kind, or numbers would be asked for most where crowds are so
        # large that little can be singled out.
        if draw() < _COUNTED:
            return self._ask_count(scene, draw)
        return _first_of([functools.partial(make, scene) for make in self._asked], draw)

    def statement(self, first: Scene, second: Scene, draw: Draw) -> Text | None:
        """A sentence about two scenes that is true in one case of two."""
        truth = draw() < 0.5
        makers = [functools.partial(make, first, second, truth) for make in self._stated]
        return _first_of(makers, draw)

    def hypothesis(self, scene: Scene, draw: Draw) -> Text | None:
        """A sentence about a scene; the ``ENTAILMENT_LABELS`` are equally frequent.

        Neutral sentences speak of an object that the scene does not show, so that it neither
        supports nor contradicts them.
        """
        label = pick(draw, ENTAILMENT_LABELS)
        return _first_of([functools.partial(make, scene, label) for make in self._supposed], draw)

    # Questions.

    def _ask_count(self, scene: Scene, draw: Draw) -> Text:
        """How many are of the crowd, or share the theme, or are there at all."""
        if scene.crowd is not None:
            phrase, number = Phrase(*scene.crowd), scene.repeats
        elif scene.theme is not None:
            phrase, number = Phrase(**{scene.theme: scene.theme_value}), scene.repeats
        else:
            phrase, number = Phrase(), len(scene.objects)
        return Text(f"how many {self._plural(phrase, draw)} are there?", "count", str(number))

    def _ask_value(self, attribute: str, scene: Scene, draw: Draw) -> Text | None:
        """An attribute of an object that its other attributes single out."""
        if attribute not in self._namer.varying:
            return None
        found = self._named(scene, attribute, draw)
        if found is None:
            return None
        obj, name = found
        answer = _CLASSES[attribute][getattr(obj, attribute)]
        text = self._what(attribute, self._definite(name, draw))
        return Text(text, f"{attribute}/object", answer)

    def _ask_related(self, attribute: str, scene: Scene, draw: Draw) -> Text | None:
        """An attribute of an object that its place tells from others of its kind."""
        for _ in range(_TRIES):
            target, anchor = _couple(scene, draw)
            relation = facts.direction(scene.objects[target], scene.objects[anchor])
            if relation is None:
                continue
            kind = pick(draw, [name for name in self._namer.varying if name != attribute])
            phrase = Phrase(**{kind: getattr(scene.objects[target], kind)})
            # Others of the kind lie clearly elsewhere, and there are some, or the relation would
            # be idle.
            elsewhere = [
                facts.direction(scene.objects[i], scene.objects[anchor])
                for i in facts.matching(scene, phrase)
                if i not in (target, anchor)
            ]
            if not elsewhere or None in elsewhere or relation in elsewhere:
                continue
            name = self._namer.name(scene, anchor, attribute, draw)
            if name is None:
                continue
            answer = _CLASSES[attribute][getattr(scene.objects[target], attribute)]
            place = words.relation(relation, draw, self._level.rich)
            whole = f"{self._definite(phrase, draw)} {place} {self._definite(name, draw)}"
            return Text(self._what(attribute, whole), f"{attribute}/related", answer)
        return None

    def _ask_exist(self, scene: Scene, draw: Draw) -> Text | None:
        varying = self._namer.varying
        number = min(2 + int(draw() * 2), len(varying))
        names = pick(draw, list(itertools.combinations(varying, number)))
        there, model = (
            Phrase(**{name: getattr(obj, name) for name in names})
            for obj in (pick(draw, scene.objects), pick(draw, scene.objects))
        )
        absent = self._namer.absent(model, (scene,), draw)
        if absent is None:
            return None
        phrase, answer = (there, "yes") if draw() < 0.5 else (absent, "no")
        return Text(f"is there {self._indefinite(phrase, draw)}?", "exist", answer)

    def _ask_where(self, scene: Scene, draw: Draw) -> Text | None:
        found = self._placed_couple(scene, draw)
        if found is None:
            return None
        first, relation, second = found
        names = f"{self._definite(first, draw)} as seen from {self._definite(second, draw)}"
        return Text(f"where is {names}?", "where", relation)

    def _ask_direction(self, scene: Scene, draw: Draw) -> Text | None:
        found = self._placed_couple(scene, draw)
        if found is None:
            return None
        first, relation, second = found
        answer = "yes" if draw() < 0.5 else "no"
        asked = relation if answer == "yes" else facts.OPPOSITE[relation]
        return Text(self._is_related(first, asked, second, draw), "direction", answer)

    def _ask_larger(self, scene: Scene, draw: Draw) -> Text | None:
        found = self._unequal_couple(scene, draw)
        if found is None:
            return None
        first, relation, second = found
        answer = "yes" if draw() < 0.5 else "no"
        asked = relation if answer == "yes" else _OTHER_SIZE[relation]
        return Text(self._is_related(first, asked, second, draw), "larger", answer)

    def _ask_more(self, scene: Scene, draw: Draw) -> Text | None:
        """Two values of one attribute that are not equally frequent, in either order."""
        attribute = pick(draw, self._namer.varying)
        present = [getattr(obj, attribute) for obj in scene.objects]
        couples = [
            (a, b)
            for a, b in itertools.permutations(sorted(set(present)), 2)
            if present.count(a) != present.count(b)
        ]
        if not couples:
            return None
        first, second = pick(draw, couples)
        answer = "yes" if present.count(first) > present.count(second) else "no"
        more, fewer = (
            self._plural(Phrase(**{attribute: value}), draw) for value in (first, second)
        )
        return Text(f"are there more {more} than {fewer}?", "more", answer)

    # Statements about two scenes.

    def _state_more(self, first: Scene, second: Scene, truth: bool, draw: Draw) -> Text | None:
        """More or fewer of what both scenes show."""
        attribute = pick(draw, self._namer.varying)
        unequal = [value for value, n, m in _shared_counts(first, second, attribute) if n != m]
        if not unequal:
            return None
        phrase = Phrase(**{attribute: pick(draw, unequal)})
        n, m = (len(facts.matching(scene, phrase)) for scene in (first, second))
        comparison = "more" if draw() < 0.5 else "fewer"
        named, other = ("first", "second") if n > m else ("second", "first")
        if truth != (comparison == "more"):
            named, other = other, named
        noun = self._plural(phrase, draw)
        text = f"there are {comparison} {noun} in the {named} image than in the {other}"
        return _judged(text, "more", truth)

    def _state_same_number(
        self, first: Scene, second: Scene, truth: bool, draw: Draw
    ) -> Text | None:
        """As many of what both scenes show, or not as many."""
        for _ in range(_TRIES):
            attribute = pick(draw, self._namer.varying)
            shared = _shared_counts(first, second, attribute)
            equal = [value for value, n, m in shared if n == m]
            unequal = [value for value, n, m in shared if n != m]
            if equal and unequal:
                phrase = Phrase(**{attribute: pick(draw, equal if truth else unequal)})
                text = f"both images have the same number of {self._plural(phrase, draw)}"
                return _judged(text, "same number", truth)
        return None

    def _state_both(self, first: Scene, second: Scene, truth: bool, draw: Draw) -> Text | None:
        """Two attributes of one object that both scenes show, or only one of them."""
        found = self._shared(first, second, draw)
        if found is None:
            return None
        shared, single = found
        phrase = pick(draw, shared if truth else single)
        return _judged(f"both images have {self._indefinite(phrase, draw)}", "both", truth)

    def _state_one(self, first: Scene, second: Scene, truth: bool, draw: Draw) -> Text | None:
        """Two attributes of one object that one scene shows, or both, or neither."""
        found = self._shared(first, second, draw)
        if found is None:
            return None
        shared, single = found
        neither = self._namer.absent(pick(draw, shared), (first, second), draw)
        if neither is None:
            return None
        if truth:
            phrase = pick(draw, single)
        else:
            phrase = pick(draw, shared) if draw() < 0.5 else neither
        text = f"only one image has {self._indefinite(phrase, draw)}"
        return _judged(text, "only one", truth)

    def _state_larger(self, first: Scene, second: Scene, truth: bool, draw: Draw) -> Text | None:
        """The sizes of two objects in different scenes."""
        i, j = (int(draw() * len(scene.objects)) for scene in (first, second))
        sizes = first.objects[i].size, second.objects[j].size
        names = self._names(((first, i), (second, j)), "size", draw)
        if sizes[0] == sizes[1] or names is None:
            return None
        relation = "larger" if (sizes[0] > sizes[1]) == truth else "smaller"
        one, other = (self._definite(name, draw) for name in names)
        stated = words.relation(relation, draw, self._level.rich)
        text = f"{one} in the first image is {stated} {other} in the second"
        return _judged(text, "larger", truth)

    def _state_same(self, first: Scene, second: Scene, truth: bool, draw: Draw) -> Text | None:
        """An attribute of two objects in different scenes, which the others single out."""
        for _ in range(_TRIES):
            attribute = pick(draw, self._namer.varying)
            noun = "pattern" if attribute == "texture" else attribute
            i = int(draw() * len(first.objects))
            value = getattr(first.objects[i], attribute)
            alike = [getattr(obj, attribute) == value for obj in second.objects]
            if len(set(alike)) < 2:
                continue
            couples = [
                ((first, i), (second, pick(draw, [j for j, a in enumerate(alike) if a == same])))
                for same in (True, False)
            ]
            equal, unequal = (self._names(couple, attribute, draw) for couple in couples)
            if equal is None or unequal is None:
                continue
            one, other = (self._definite(name, draw) for name in (equal if truth else unequal))
            text = f"{one} in the first image has the same {noun} as {other} in the second"
            return _judged(text, f"same {noun}", truth)
        return None

    # Hypotheses.

    def _suppose_value(self, scene: Scene, label: str, draw: Draw) -> Text | None:
        """An attribute of an object that its other attributes single out."""
        attribute = pick(draw, self._namer.varying)
        found = self._named(scene, attribute, draw)
        if found is None:
            return None
        obj, name = found
        absent = self._namer.absent(name, (scene,), draw)
        own = getattr(obj, attribute)
        others = self._possible_values(scene, name, attribute)
        wrong = [value for value in others if value != own]
        if absent is None or not wrong:
            return None
        stated = {"entailment": own, "contradiction": pick(draw, wrong)}
        unsupported = [
            value
            for value in stated.values()
            if self._namer.possible(absent._replace(**{attribute: value}))
        ]
        if not unsupported:
            return None
        stated["neutral"] = pick(draw, unsupported)
        subject = self._definite(absent if label == "neutral" else name, draw)
        text = f"{subject} is {self._predicate(attribute, stated[label], draw)}"
        return Text(text, attribute, label)

    def _suppose_direction(self, scene: Scene, label: str, draw: Draw) -> Text | None:
        found = self._placed_couple(scene, draw)
        return None if found is None else self._suppose_related(scene, *found, label, draw)

    def _suppose_larger(self, scene: Scene, label: str, draw: Draw) -> Text | None:
        found = self._unequal_couple(scene, draw)
        return None if found is None else self._suppose_related(scene, *found, label, draw)

    def _suppose_related(
        self, scene: Scene, first: Phrase, relation: str, second: Phrase, label: str, draw: Draw
    ) -> Text | None:
        side = int(draw() * 2)
        absent = self._namer.absent((first, second)[side], (scene,), draw)
        if absent is None:
            return None
        template = "larger" if relation in _OTHER_SIZE else "direction"
        if label == "neutral":
            first, second = (absent, second) if side == 0 else (first, absent)
        if label == "contradiction" or (label == "neutral" and draw() < 0.5):
            relation = {**_OTHER_SIZE, **facts.OPPOSITE}[relation]
        one, other = (self._definite(phrase, draw) for phrase in (first, second))
        text = f"{one} is {words.relation(relation, draw, self._level.rich)} {other}"
        return Text(text, template, label)

    # What they have in common.

    def _names(
        self, objects: Sequence[tuple[Scene, int]], hidden: str | None, draw: Draw
    ) -> list[Phrase] | None:
        """The names of objects, each in its scene; None if one has none."""
        names = [self._namer.name(scene, index, hidden, draw) for scene, index in objects]
        found = [name for name in names if name is not None]
        return found if len(found) == len(names) else None

    def _named(self, scene: Scene, hidden: str, draw: Draw) -> tuple[Object, Phrase] | None:
        """An object and its name without the hidden attribute."""
        for _ in range(_TRIES):
            index = int(draw() * len(scene.objects))
            name = self._namer.name(scene, index, hidden, draw)
            if name is not None:
                return scene.objects[index], name
        return None

    def _placed_couple(self, scene: Scene, draw: Draw) -> tuple[Phrase, str, Phrase] | None:
        """Two objects by name and the direction between them."""
        return self._related_couple(scene, None, facts.direction, draw)

    def _unequal_couple(self, scene: Scene, draw: Draw) -> tuple[Phrase, str, Phrase] | None:
        """Two objects by name, not by size, and which is larger."""
        return self._related_couple(scene, "size", _size_relation, draw)

    def _related_couple(
        self,
        scene: Scene,
        hidden: str | None,
        relation_of: Callable[[Object, Object], str | None],
        draw: Draw,
    ) -> tuple[Phrase, str, Phrase] | None:
        if len(scene.objects) < 2:
            return None
        for _ in range(_TRIES):
            couple = _couple(scene, draw)
            relation = relation_of(*(scene.objects[i] for i in couple))
            if relation is None:
                continue
            names = self._names([(scene, i) for i in couple], hidden, draw)
            if names is not None:
                return names[0], relation, names[1]
        return None

    def _shared(
        self, first: Scene, second: Scene, draw: Draw
    ) -> tuple[list[Phrase], list[Phrase]] | None:
        """Values of two attributes that objects of both scenes have, and of only one of them."""
        for _ in range(_TRIES):
            names = pick(draw, list(itertools.combinations(self._namer.varying, 2)))
            shown = [
                {tuple(getattr(obj, name) for name in names) for obj in scene.objects}
                for scene in (first, second)
            ]
            shared, single = sorted(shown[0] & shown[1]), sorted(shown[0] ^ shown[1])
            if shared and single:
                both, one = (
                    [Phrase(**dict(zip(names, values, strict=True))) for values in found]
                    for found in (shared, single)
                )
                return both, one
        return None

    def _possible_values(self, scene: Scene, name: Phrase, attribute: str) -> list[int]:
        """Values to exchange that an object of this name could have."""
        return [
            value
            for value in self._namer.values(scene, attribute)
            if self._namer.possible(name._replace(**{attribute: value}))
        ]

    def _what(self, attribute: str, name: str) -> str:
        if attribute == "texture":
            return f"what pattern does {name} have?"
        return f"what {attribute} is {name}?"

    def _is_related(self, first: Phrase, relation: str, second: Phrase, draw: Draw) -> str:
        one, other = (self._definite(phrase, draw) for phrase in (first, second))
        return f"is {one} {words.relation(relation, draw, self._level.rich)} {other}?"

    def _predicate(self, attribute: str, value: int, draw: Draw) -> str:
        name = _CLASSES[attribute][value]
        word = words.synonym(_WORDS[attribute][name], draw, self._level.rich)
        return f"{words.article(word)} {word}" if attribute == "shape" else word

    def _definite(self, phrase: Phrase, draw: Draw) -> str:
        return words.definite(phrase, draw, self._level.rich)

    def _indefinite(self, phrase: Phrase, draw: Draw) -> str:
        return words.indefinite(phrase, draw, self._level.rich)

    def _plural(self, phrase: Phrase, draw: Draw) -> str:
        return words.plural_of(phrase, draw, self._level.rich)


def _first_of(makers: Sequence[Callable[[Draw], Text | None]], draw: Draw) -> Text | None:
    """The first text that is made, from a random kind on."""
    start = int(draw() * len(makers))
    for number in range(_ROUNDS * len(makers)):
        text = makers[(start + number) % len(makers)](draw)
        if text is not None:
            return text
    return None


def _couple(scene: Scene, draw: Draw) -> tuple[int, int]:
    """Two different objects in random order; of one object, the same twice."""
    count = len(scene.objects)
    first = int(draw() * count)
    return first, (first + 1 + int(draw() * (count - 1))) % count


def _size_relation(first: Object, second: Object) -> str | None:
    if first.size == second.size:
        return None
    return "larger" if first.size > second.size else "smaller"


def _shared_counts(first: Scene, second: Scene, attribute: str) -> list[tuple[int, int, int]]:
    """Values that both scenes show, with how many objects of each scene have them."""
    values = [[getattr(obj, attribute) for obj in scene.objects] for scene in (first, second)]
    shared = sorted(set(values[0]) & set(values[1]))
    return [(value, values[0].count(value), values[1].count(value)) for value in shared]


def _judged(text: str, template: str, truth: bool) -> Text:
    return Text(text, template, "true" if truth else "false")
