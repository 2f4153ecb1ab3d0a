"""Naming one object among others that share its attributes, and naming one that is not there.

A name is the shortest description that fits its object and no other, so that where objects share
attributes every word of it is needed.
"""

import functools
import itertools
from collections.abc import Sequence

from vlp_jax.data.scenes.draws import Draw
from vlp_jax.data.scenes.facts import Phrase
from vlp_jax.data.scenes.world import Level, Scene, allowed_pairs, pick

ATTRIBUTES: tuple[str, ...] = Phrase._fields
_TRIES = 8  # changes tried to describe something that a scene does not show


class Namer:
    """Names the objects of the scenes of one split at one level.

    Attributes:
        varying: the attributes that have more than one value at the level.
    """

    def __init__(self, level: Level, split: str):
        self._pairs = allowed_pairs(level, split)
        self._least = level.bound
        self._values: dict[str, Sequence[int]] = {
            "shape": range(level.num_shapes),
            "colour": range(level.num_colours),
            "size": [size for size, radii in enumerate(level.radii) if radii],
            "texture": level.textures,
        }
        self._crowded = level.palette is not None
        self.varying = tuple(name for name in ATTRIBUTES if len(self._values[name]) > 1)

    def name(self, scene: Scene, index: int, hidden: str | None, draw: Draw) -> Phrase | None:
        """The name of an object, of at least ``level.bound`` attributes.

        Args:
            scene: the scene.
            index: of the object.
            hidden: an attribute that the name must not give away.
            draw: decides between names that are equally short.

        Returns:
            The name, or None if another object is just like it.
        """
        own = scene.objects[index]
        # Bit i is set where attribute i tells the two objects apart.
        differences = {
            (own.shape != other.shape)
            | (own.colour != other.colour) << 1
            | (own.size != other.size) << 2
            | (own.texture != other.texture) << 3
            for i, other in enumerate(scene.objects)
            if i != index
        }
        for masks in _masks(self.varying, hidden, self._least):
            fitting = [mask for mask in masks if all(mask & other for other in differences)]
            if fitting:
                mask = pick(draw, fitting)
                return Phrase(
                    own.shape if mask & 1 else None,
                    own.colour if mask & 2 else None,
                    own.size if mask & 4 else None,
                    own.texture if mask & 8 else None,
                )
        return None

    def absent(self, phrase: Phrase, scenes: tuple[Scene, ...], draw: Draw) -> Phrase | None:
        """A description that fits nothing, made from one that fits by exchanging one value.

        Args:
            phrase: fits an object of the first scene.
            scenes: in which nothing must fit.
            draw: decides what is exchanged for what, see ``values``.

        Returns:
            The description, or None if a few tries found none.
        """
        fixed = [i for i, value in enumerate(phrase) if value is not None]
        own = [phrase[i] for i in fixed]
        objects = [obj[: len(ATTRIBUTES)] for scene in scenes for obj in scene.objects]
        shown = {tuple([values[i] for i in fixed]) for values in objects}
        for _ in range(_TRIES):
            place = int(draw() * len(fixed))
            changed = own.copy()
            changed[place] = pick(draw, self.values(scenes[0], ATTRIBUTES[fixed[place]]))
            if tuple(changed) not in shown:
                found = Phrase(**{ATTRIBUTES[i]: v for i, v in zip(fixed, changed, strict=True)})
                if self.possible(found):
                    return found
        return None

    def values(self, scene: Scene, attribute: str) -> Sequence[int]:
        """Values to exchange one of a scene for.

        Those of its objects, so that everything named is seen somewhere; any where a level has so
        few objects that nothing could be exchanged.
        """
        if not self._crowded:
            return self._values[attribute]
        return [getattr(obj, attribute) for obj in scene.objects]

    def possible(self, phrase: Phrase) -> bool:
        """Whether the split has objects of such a colour and shape."""
        return (
            phrase.colour is None
            or phrase.shape is None
            or (phrase.colour, phrase.shape) in self._pairs
        )


@functools.cache
def _masks(varying: tuple[str, ...], hidden: str | None, least: int) -> tuple[tuple[int, ...], ...]:
    """Sets of attributes as bits, by their size from ``least`` on, without the hidden one."""
    bits = [1 << i for i, name in enumerate(ATTRIBUTES) if name in varying and name != hidden]
    least = min(least, len(bits))
    return tuple(
        tuple(sum(chosen) for chosen in itertools.combinations(bits, number))
        for number in range(least, len(bits) + 1)
    )
