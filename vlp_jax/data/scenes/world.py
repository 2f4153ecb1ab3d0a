"""What is in a scene: classes, levels of difficulty, held-out pairs, and the sampling of one scene.

Lengths are fractions of the image side, x runs to the right and y down. Objects are ordered from
large to small and painted in that order, so that what hides is never larger than what is hidden.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from vlp_jax.data.scenes import shapes as outlines
from vlp_jax.data.scenes.draws import Draw

SHAPES: tuple[str, ...] = tuple(outlines.OUTLINES)
COLOURS: tuple[str, ...] = (
    *("red", "green", "blue", "yellow", "purple"),
    *("orange", "black", "pink", "cyan", "brown"),
)
SIZES: tuple[str, ...] = ("small", "medium", "large")
TEXTURES: tuple[str, ...] = ("filled", "striped", "outlined", "dotted")
BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "bands", "checks", "waves")
SPLITS: tuple[str, ...] = ("train", "val", "test", "compositional")
MAX_COUNT = 5

T = TypeVar("T")
Attributes = tuple[int, int, int, int]  # shape, colour, size, texture, as in ``Object``
Crowd = tuple[int | None, int | None, int | None, int | None]  # likewise, None for any

# Each colour misses two shapes and each shape two colours in train, val and test; the
# compositional split has these pairs and no others.
HELD_OUT: frozenset[tuple[int, int]] = frozenset(
    (colour, (colour + shift) % len(SHAPES)) for colour in range(len(COLOURS)) for shift in (2, 7)
)

_GAP = 0.012  # clear distance between the circumscribed circles of objects that do not overlap
_BORDER = 0.015  # clear distance to the edge of the image
_NEAREST = 0.54  # least distance of overlapping centres, in sums of radii: 60 % stays visible
_CROWDED = 0.125  # most of the sum of squared radii of a scene
_TRIES = 24  # positions tried for one object before the layout is started again

# The attributes that the objects of a crowd share: one, or two of which each other object may
# have either but not both.
_CROWDS: tuple[tuple[str, ...], ...] = (
    *(("shape",), ("colour",), ("size",), ("texture",)),
    *(("shape", "colour"), ("shape", "size"), ("shape", "texture")),
    *(("colour", "size"), ("colour", "texture"), ("size", "texture")),
)
_LEAST_CROWDED = 3  # objects of a scene with a crowd, at least


class Object(NamedTuple):
    """One object; the attributes index the class tuples of this module.

    ``radius`` is that of the circumscribed circle, ``angle`` turns clockwise in radians, ``tint``
    in [-1, 1] lightens or darkens the colour a little.
    """

    shape: int
    colour: int
    size: int
    texture: int
    radius: float
    x: float
    y: float
    angle: float
    tint: float


class Background(NamedTuple):
    """A light, weakly coloured ground; RGB in [0, 1].

    ``change`` is added in full where the pattern ``kind`` is 1 and not at all where it is 0.
    """

    kind: str
    rgb: tuple[float, float, float]
    change: float
    angle: float
    period: float
    noise: float
    noise_x: float
    noise_y: float


class Scene(NamedTuple):
    """All that a picture shows.

    ``overlap`` names the one pair of objects that overlap, back one first; the circumscribed
    circles of all other pairs are apart. ``theme`` is the attribute of which ``repeats`` objects
    share the value ``theme_value`` (no other object has it), None where levels have no themes.
    ``variant`` in [0, 1) deals out the styles of the scene's captions. ``crowd`` holds shape,
    colour, size and texture, None for those left open: exactly ``repeats`` objects, maybe none,
    fit all that it fixes. It is None where levels have no crowds.
    """

    objects: tuple[Object, ...]
    background: Background
    overlap: tuple[int, int] | None
    theme: str | None
    theme_value: int
    repeats: int
    variant: float
    crowd: Crowd | None = None


@dataclasses.dataclass(frozen=True)
class Level:
    """A level of difficulty.

    Attributes:
        max_count: at most so many objects; the count is uniform.
        num_colours: the first so many of ``COLOURS``.
        num_shapes: the first so many of ``SHAPES``.
        radii: lowest and highest radius of each size; None for a size that does not occur.
        textures: the textures that occur.
        overlap: share of the scenes with two objects or more of which two overlap.
        themes: whether objects share attributes more often than by chance, so that one can count.
        turn: largest turn in radians; small enough to leave "tip up" meaningful.
        noise: largest standard deviation of the pixel noise, in grey levels of 255.
        rich: captions of every length with synonyms, all kinds of clauses, sizes and textures;
            otherwise short ones that name colour and shape of every object in the same words.
        max_words: the longest caption.
        palette: so many colours and as many shapes occur in one scene, so that objects share
            them; None: any number. Scenes with a palette have a crowd and no theme, and more
            objects the larger the crowd.
        clauses: things said by the five captions of one scene, before they are dealt out in a
            random order.
        bound: tasks name an object by so many of its attributes or more.
    """

    max_count: int
    num_colours: int
    num_shapes: int
    radii: tuple[tuple[float, float] | None, ...]
    textures: tuple[int, ...]
    overlap: float
    themes: bool
    turn: float
    noise: float
    rich: bool
    max_words: int
    palette: int | None = None
    clauses: tuple[int, ...] = (1, 1, 1, 2, 3)
    bound: int = 1


LEVELS: dict[str, Level] = {
    "easy": Level(
        max_count=2,
        num_colours=8,
        num_shapes=8,
        radii=((0.15, 0.17), None, (0.23, 0.255)),
        textures=(TEXTURES.index("filled"),),
        overlap=0.0,
        themes=False,
        turn=0.1,
        noise=2.0,
        rich=False,
        max_words=12,
    ),
    "full": Level(
        max_count=5,
        num_colours=10,
        num_shapes=10,
        radii=((0.085, 0.095), (0.118, 0.13), (0.158, 0.172)),
        textures=(0, 1, 2, 3),
        overlap=0.5,
        themes=True,
        turn=0.2,
        noise=4.0,
        rich=True,
        max_words=40,
    ),
    "hard": Level(
        max_count=5,
        num_colours=8,
        num_shapes=8,
        radii=((0.085, 0.095), (0.118, 0.13), (0.158, 0.172)),
        textures=(0, 1, 2),
        overlap=0.0,
        themes=False,
        turn=0.2,
        noise=2.0,
        rich=True,
        max_words=40,
        palette=3,
        clauses=(1, 2, 3, 4, 5),
        bound=2,
    ),
}


def allowed_pairs(level: Level, split: str) -> frozenset[tuple[int, int]]:
    """The (colour, shape) pairs that occur in a split at a level."""
    return frozenset(
        (colour, shape)
        for colour in range(level.num_colours)
        for shape in range(level.num_shapes)
        if ((colour, shape) in HELD_OUT) == (split == "compositional")
    )


class World:
    """Samples the scenes of one split at one level."""

    def __init__(self, level: Level, split: str):
        self.level = level
        self.pairs = allowed_pairs(level, split)
        self._shapes_of = [
            [s for c, s in sorted(self.pairs) if c == colour] for colour in range(level.num_colours)
        ]
        self._colours_of = [
            [c for c, s in sorted(self.pairs) if s == shape] for shape in range(level.num_shapes)
        ]
        self._squares = {
            size: (sum(radii) / 2) ** 2
            for size, radii in enumerate(level.radii)
            if radii is not None
        }
        self._sizes = list(self._squares)

    def sample(self, draw: Draw) -> Scene:
        """The scene that an endless stream of uniform draws describes."""
        theme: str | None = None
        theme_value, crowd = -1, None
        if self.level.palette:
            crowd, repeats, drawn = self._crowded(draw, self.level.palette)
            shapes, colours, sizes, textures = (list(column) for column in zip(*drawn, strict=True))
        else:
            count = 1 + int(draw() * self.level.max_count)
            theme, repeats = self._theme(draw, count)
            colours, shapes = self._colours_and_shapes(draw, count, theme, repeats)
            sizes = self._draw_sizes(draw, count, repeats if theme == "size" else None)
            textures = _values(
                draw, self.level.textures, count, repeats if theme == "texture" else None
            )
            values = {"colour": colours, "shape": shapes, "size": sizes, "texture": textures}
            theme_value = values[theme][0] if theme else -1
        radii = [_between(draw, *self._radii(size)) for size in sizes]
        angles = [_between(draw, -self.level.turn, self.level.turn) for _ in sizes]
        tints = [_between(draw, -1, 1) for _ in sizes]
        background, variant = self._background(draw), draw()
        order = sorted(range(len(radii)), key=radii.__getitem__, reverse=True)
        bare = [
            Object(
                shapes[i], colours[i], sizes[i], textures[i], radii[i], 0, 0, angles[i], tints[i]
            )
            for i in order
        ]
        overlap = self._overlap(draw, bare)
        centres = None
        while centres is None:
            centres = _place(draw, bare, overlap)
        objects = tuple(o._replace(x=x, y=y) for o, (x, y) in zip(bare, centres, strict=True))
        return Scene(objects, background, overlap, theme, theme_value, repeats, variant, crowd)

    def _crowded(self, draw: Draw, palette: int) -> tuple[Crowd, int, list[Attributes]]:
        """A crowd, how many objects are of it, and the attributes of every object.

        How many is drawn before anything else and from all numbers alike, so that nothing that a
        question says of the crowd tells its answer.
        """
        repeats = int(draw() * self.level.max_count)
        fewest = max(repeats + 1, _LEAST_CROWDED)
        count = fewest + int(draw() * (self.level.max_count + 1 - fewest))
        pairs = self._palette(draw, palette)
        sizes, textures = self._sizes, self.level.textures

        shared = pick(draw, _CROWDS)
        colour, shape = pick(draw, pairs)
        crowd = (
            shape if "shape" in shared else None,
            colour if "colour" in shared else None,
            pick(draw, sizes) if "size" in shared else None,
            pick(draw, textures) if "texture" in shared else None,
        )
        shape_of, colour_of, size_of, texture_of = crowd
        fitting = [p for p in pairs if colour_of in (None, p[0]) and shape_of in (None, p[1])]
        drawn = []
        for _ in range(repeats):
            colour, shape = pick(draw, fitting)
            size = pick(draw, sizes) if size_of is None else size_of
            texture = pick(draw, textures) if texture_of is None else texture_of
            drawn.append((shape, colour, size, texture))
        while len(drawn) < count:
            colour, shape = pick(draw, pairs)
            other = (shape, colour, pick(draw, sizes), pick(draw, textures))
            if any(wanted not in (None, own) for wanted, own in zip(crowd, other, strict=True)):
                drawn.append(other)
        return crowd, repeats, drawn

    def _palette(self, draw: Draw, number: int) -> list[tuple[int, int]]:
        """The (colour, shape) pairs of ``number`` colours and as many shapes, each in a pair."""
        colours: list[int] = []
        shapes: list[int] = []
        while len(colours) < number:
            colour = pick(draw, range(self.level.num_colours))
            shape = pick(draw, self._shapes_of[colour])
            if colour not in colours and shape not in shapes:
                colours.append(colour)
                shapes.append(shape)
        return [(c, s) for c in colours for s in shapes if (c, s) in self.pairs]

    def _radii(self, size: int) -> tuple[float, float]:
        radii = self.level.radii[size]
        assert radii is not None
        return radii

    def _theme(self, draw: Draw, count: int) -> tuple[str | None, int]:
        """The attribute that objects share, and how many share it.

        The shares are such that 1, 2 and 3 are equally frequent over counts uniform in 1..5, so
        that "how many red objects" has no likeliest answer.
        """
        if not self.level.themes:
            return None, 0
        theme = ("colour", "shape", "size", "texture")[int(draw() * 4)]
        shares = {1: (1.0,), 2: (1 / 3, 2 / 3)}.get(count, (1 / 9, 1 / 3, 5 / 9))
        chance = draw()
        repeats = 1
        while repeats < len(shares) and chance >= sum(shares[:repeats]):
            repeats += 1
        return theme, repeats

    def _colours_and_shapes(
        self, draw: Draw, count: int, theme: str | None, repeats: int
    ) -> tuple[list[int], list[int]]:
        if theme == "shape":
            shapes = _values(draw, range(self.level.num_shapes), count, repeats)
            return [pick(draw, self._colours_of[shape]) for shape in shapes], shapes
        colours = _values(
            draw, range(self.level.num_colours), count, repeats if theme == "colour" else None
        )
        return colours, [pick(draw, self._shapes_of[colour]) for colour in colours]

    def _draw_sizes(self, draw: Draw, count: int, repeats: int | None) -> list[int]:
        """Sizes for which a layout is soon found; about one in a thousand is too crowded."""
        while True:
            sizes = _values(draw, self._sizes, count, repeats)
            if sum(self._squares[size] for size in sizes) <= _CROWDED:
                return sizes

    def _overlap(self, draw: Draw, objects: Sequence[Object]) -> tuple[int, int] | None:
        """The pair that is to overlap, if any; both shapes must be seen whole from their centre."""
        if len(objects) < 2 or draw() >= self.level.overlap:
            return None
        front = 1 + int(draw() * (len(objects) - 1))
        back = int(draw() * front)
        solid = all(outlines.extents(SHAPES[objects[i].shape]) for i in (back, front))
        return (back, front) if solid else None

    def _background(self, draw: Draw) -> Background:
        kind = pick(draw, BACKGROUNDS)
        grey = _between(draw, 0.66, 0.9)
        red, green, blue = (grey + _between(draw, -0.06, 0.06) for _ in range(3))
        change = _between(draw, 0.03, 0.07) * (1 if draw() < 0.5 else -1)
        if kind == "gradient":
            change *= 2
        return Background(
            kind,
            (red, green, blue),
            min(change, 0.97 - max(red, green, blue)),
            angle=draw() * 2 * math.pi,
            period=_between(draw, 0.12, 0.3),
            noise=_between(draw, 0.25, 1.0) * self.level.noise,
            noise_x=draw(),
            noise_y=draw(),
        )


def pick(draw: Draw, values: Sequence[T]) -> T:
    """One of ``values``, all equally likely."""
    return values[int(draw() * len(values))]


def _between(draw: Draw, low: float, high: float) -> float:
    return low + draw() * (high - low)


def _values(draw: Draw, classes: Sequence[int], count: int, repeats: int | None) -> list[int]:
    """Independent values, or one value ``repeats`` times followed by values other than it."""
    if repeats is None:
        return [pick(draw, classes) for _ in range(count)]
    value = pick(draw, classes)
    others = [c for c in classes if c != value]
    return [value] * repeats + [pick(draw, others) for _ in range(count - repeats)]


def _place(
    draw: Draw, objects: Sequence[Object], overlap: tuple[int, int] | None
) -> list[tuple[float, float]] | None:
    """Centres of the objects, or None if one of them found no room."""
    centres: list[tuple[float, float]] = []
    back, front = overlap or (-1, -1)
    for index, obj in enumerate(objects):
        margin = obj.radius + _BORDER
        partner = back if index == front else -1
        apart = [
            (x, y, obj.radius + other.radius + _GAP)
            for k, (other, (x, y)) in enumerate(zip(objects, centres, strict=False))
            if k != partner
        ]
        for _ in range(_TRIES):
            if partner < 0:
                x = margin + draw() * (1 - 2 * margin)
                y = margin + draw() * (1 - 2 * margin)
            else:
                x, y = _beside(draw, objects[partner], centres[partner], obj)
                # Deep notches of two outlines facing each other would bring centres too near.
                nearest = _NEAREST * (obj.radius + objects[partner].radius)
                if math.dist((x, y), centres[partner]) < nearest:
                    continue
                if not (margin <= x <= 1 - margin and margin <= y <= 1 - margin):
                    continue
            for other_x, other_y, distance in apart:
                if math.hypot(x - other_x, y - other_y) < distance:
                    break
            else:
                centres.append((x, y))
                break
        else:
            return None
    return centres


def _beside(
    draw: Draw, back: Object, centre: tuple[float, float], front: Object
) -> tuple[float, float]:
    """A centre from which ``front`` reaches into ``back`` by 30 to 65 % of its own radius.

    The depth is measured between the outlines along the line of centres, so the two really meet.
    """
    angle = draw() * 2 * math.pi
    depth = _between(draw, 0.3, 0.65) * front.radius
    reach = _extent(back, angle) + _extent(front, angle + math.pi)
    return (
        centre[0] + (reach - depth) * math.cos(angle),
        centre[1] + (reach - depth) * math.sin(angle),
    )


def _extent(obj: Object, angle: float) -> float:
    """How far an object reaches from its centre at an angle of the image."""
    table = outlines.extents(SHAPES[obj.shape])
    assert table is not None, "only shapes with extents overlap"
    step = 2 * math.pi / outlines.DIRECTIONS
    return obj.radius * table[round((angle - obj.angle) / step) % outlines.DIRECTIONS]
