"""What can be said of a scene in structured form, and whether it is true.

Captions, questions and statements are built from these facts, so that each sentence carries its
own meaning and a test can hold it against the scene.
"""

from typing import NamedTuple

from vlp_jax.data.scenes.world import Object, Scene

# A direction counts only if it is clear: at least so far apart, and so many times farther apart
# along its own axis than along the other.
MARGIN = 0.08
DOMINANCE = 1.3

OPPOSITE: dict[str, str] = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES: tuple[str, ...] = ("left", "right", "top", "bottom", "middle")


class Phrase(NamedTuple):
    """A description of objects; None leaves an attribute open."""

    shape: int | None = None
    colour: int | None = None
    size: int | None = None
    texture: int | None = None

    def matches(self, obj: Object) -> bool:
        """Whether an object fits the description."""
        return (
            (self.shape is None or self.shape == obj.shape)
            and (self.colour is None or self.colour == obj.colour)
            and (self.size is None or self.size == obj.size)
            and (self.texture is None or self.texture == obj.texture)
        )


class Count(NamedTuple):
    """Exactly ``number`` objects match."""

    phrase: Phrase
    number: int


class Exists(NamedTuple):
    """At least one object matches."""

    phrase: Phrase


class Placed(NamedTuple):
    """A matching object lies in the part of the image called ``place``."""

    phrase: Phrase
    place: str


class Related(NamedTuple):
    """Matching objects are related: left, right, above, below, overlapping, larger or smaller."""

    first: Phrase
    relation: str
    second: Phrase


class Between(NamedTuple):
    """An object that matches ``middle`` lies between two others."""

    middle: Phrase
    first: Phrase
    second: Phrase


Fact = Count | Exists | Placed | Related | Between


def matching(scene: Scene, phrase: Phrase) -> list[int]:
    """Indices of the objects that fit a description."""
    return [i for i, obj in enumerate(scene.objects) if phrase.matches(obj)]


def direction(first: Object, second: Object) -> str | None:
    """Where ``first`` lies as seen from ``second``; None if no direction is clear."""
    dx, dy = first.x - second.x, first.y - second.y
    across, down = abs(dx), abs(dy)
    if across >= MARGIN and across >= DOMINANCE * down:
        return "left" if dx < 0 else "right"
    if down >= MARGIN and down >= DOMINANCE * across:
        return "above" if dy < 0 else "below"
    return None


def place(obj: Object) -> str | None:
    """The part of the image an object clearly lies in, None if in none or in two."""
    dx, dy = obj.x - 0.5, obj.y - 0.5
    if max(abs(dx), abs(dy)) <= 0.1:
        return "middle"
    if abs(dx) >= 0.15 and abs(dx) >= DOMINANCE * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 0.15 and abs(dy) >= DOMINANCE * abs(dx):
        return "top" if dy < 0 else "bottom"
    return None


def is_between(middle: Object, first: Object, second: Object) -> bool:
    """Whether ``middle`` lies in the central half of the line from ``first`` to ``second``.

    Its centre may be off the line by at most 0.08 of the image side.
    """
    dx, dy = second.x - first.x, second.y - first.y
    mx, my = middle.x - first.x, middle.y - first.y
    length_squared = dx * dx + dy * dy
    along = (mx * dx + my * dy) / length_squared
    off_squared = (mx * dy - my * dx) ** 2 / length_squared
    return 0.25 <= along <= 0.75 and off_squared <= 0.08**2


def related(scene: Scene, first: int, relation: str, second: int) -> bool:
    """Whether a relation clearly holds between two different objects."""
    a, b = scene.objects[first], scene.objects[second]
    if relation == "overlapping":
        return scene.overlap in ((first, second), (second, first))
    if relation == "larger":
        return a.size > b.size
    if relation == "smaller":
        return a.size < b.size
    return direction(a, b) == relation


def holds(fact: Fact, scene: Scene) -> bool:
    """Whether a fact is true of a scene."""
    match fact:
        case Count(phrase, number):
            return len(matching(scene, phrase)) == number
        case Exists(phrase):
            return bool(matching(scene, phrase))
        case Placed(phrase, name):
            return any(place(scene.objects[i]) == name for i in matching(scene, phrase))
        case Related(first, relation, second):
            return any(
                i != j and related(scene, i, relation, j)
                for i in matching(scene, first)
                for j in matching(scene, second)
            )
        case Between(middle, first, second):
            objects = scene.objects
            return any(
                len({i, j, k}) == 3 and is_between(objects[i], objects[j], objects[k])
                for i in matching(scene, middle)
                for j in matching(scene, first)
                for k in matching(scene, second)
            )
