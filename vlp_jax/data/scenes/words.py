"""The words of the scenes world: synonyms, plurals, phrases, and the class of every word."""

from collections.abc import Mapping, Sequence

from vlp_jax.data.scenes.draws import Draw
from vlp_jax.data.scenes.facts import Phrase
from vlp_jax.data.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, pick

# The first word is the name of the class; the others are always true where the first is.
SHAPE_WORDS: Mapping[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
    "crescent": ("crescent", "moon"),
    "diamond": ("diamond", "rhombus"),
    "arrow": ("arrow",),
    "hourglass": ("hourglass",),
}
COLOUR_WORDS: Mapping[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "orange": ("orange",),
    "black": ("black",),
    "pink": ("pink", "rosy"),
    "cyan": ("cyan", "turquoise"),
    "brown": ("brown",),
}
SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "big"),
}
TEXTURE_WORDS: Mapping[str, tuple[str, ...]] = {
    "filled": ("filled", "solid"),
    "striped": ("striped", "stripy"),
    "outlined": ("outlined", "hollow"),
    "dotted": ("dotted", "spotted"),
}
RELATION_WORDS: Mapping[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "beneath", "lower than"),
    "overlapping": ("overlapping", "partly overlapping"),
    "between": ("between", "in between"),
    "larger": ("larger than", "bigger than"),
    "smaller": ("smaller than",),
}
PLACE_WORDS: Mapping[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "near the centre"),
}
NUMBERS: tuple[str, ...] = ("one", "two", "three", "four", "five")
GENERIC: tuple[str, ...] = ("object", "shape", "thing")

_PLURALS = {"cross": "crosses", "rhombus": "rhombuses", "hourglass": "hourglasses"}
_PLURALS["plus"] = "pluses"

_RELATIONAL = (
    *("left", "right", "above", "higher", "below", "beneath", "lower", "overlapping", "between"),
    *("top", "bottom", "middle", "centre", "larger", "bigger", "smaller"),
)
_COUNTING = (*NUMBERS, "more", "fewer", "many", "both")
_FUNCTION = (
    *("a", "an", "the", "of", "to", "on", "in", "at", "with", "and", "than", "from", "as"),
    *("is", "are", "has", "there", "this", "we", "can", "see", "seen", "show", "shows", "shown"),
    *("picture", "image", "images", "scene", "side", "view", "near", "partly", "only", "other"),
    *("object", "objects", "shape", "shapes", "thing", "things", "colour"),
    *("what", "how", "where", "first", "second"),
)


def synonym(words: Sequence[str], draw: Draw, synonyms: bool) -> str:
    """The first word in two cases of three, one of the others otherwise; or always the first."""
    if not synonyms or len(words) == 1 or draw() < 2 / 3:
        return words[0]
    return words[1 + int(draw() * (len(words) - 1))]


def plural(noun: str) -> str:
    """The plural of a shape word or generic noun."""
    return _PLURALS.get(noun, noun + "s")


def article(word: str) -> str:
    """The indefinite article in front of a word."""
    return "an" if word[0] in "aeiou" else "a"


def adjectives(phrase: Phrase, draw: Draw, synonyms: bool) -> list[str]:
    """The words for size, texture and colour that a phrase fixes, in this order."""
    words = []
    if phrase.size is not None:
        words.append(synonym(SIZE_WORDS[SIZES[phrase.size]], draw, synonyms))
    if phrase.texture is not None:
        words.append(synonym(TEXTURE_WORDS[TEXTURES[phrase.texture]], draw, synonyms))
    if phrase.colour is not None:
        words.append(synonym(COLOUR_WORDS[COLOURS[phrase.colour]], draw, synonyms))
    return words


def noun(phrase: Phrase, draw: Draw, synonyms: bool) -> str:
    """The word for the shape that a phrase fixes, or a generic one."""
    if phrase.shape is None:
        return pick(draw, GENERIC) if synonyms else GENERIC[0]
    return synonym(SHAPE_WORDS[SHAPES[phrase.shape]], draw, synonyms)


def indefinite(phrase: Phrase, draw: Draw, synonyms: bool) -> str:
    """The phrase in the singular with its article, such as "a small red circle"."""
    words = [*adjectives(phrase, draw, synonyms), noun(phrase, draw, synonyms)]
    return f"{article(words[0])} {' '.join(words)}"


def definite(phrase: Phrase, draw: Draw, synonyms: bool) -> str:
    """The phrase in the singular with "the"."""
    words = [*adjectives(phrase, draw, synonyms), noun(phrase, draw, synonyms)]
    return f"the {' '.join(words)}"


def plural_of(phrase: Phrase, draw: Draw, synonyms: bool) -> str:
    """The phrase in the plural without an article, such as "red circles"."""
    return " ".join((*adjectives(phrase, draw, synonyms), plural(noun(phrase, draw, synonyms))))


def counted(phrase: Phrase, number: int, draw: Draw, synonyms: bool) -> str:
    """The phrase after a number, such as "two red circles"."""
    if number != 1:
        return f"{NUMBERS[number - 1]} {plural_of(phrase, draw, synonyms)}"
    words = [*adjectives(phrase, draw, synonyms), noun(phrase, draw, synonyms)]
    return f"{NUMBERS[0]} {' '.join(words)}"


def relation(name: str, draw: Draw, synonyms: bool) -> str:
    """Words for a relation."""
    return synonym(RELATION_WORDS[name], draw, synonyms)


def word_classes() -> dict[str, str]:
    """Class of every word of the world: colour, shape, size, texture, relation, count, function."""
    classes = dict.fromkeys(_FUNCTION, "function")
    classes |= dict.fromkeys(_COUNTING, "count")
    classes |= dict.fromkeys(_RELATIONAL, "relation")
    for name, groups in (
        ("texture", TEXTURE_WORDS),
        ("size", SIZE_WORDS),
        ("shape", SHAPE_WORDS),
        ("colour", COLOUR_WORDS),
    ):
        classes |= {word: name for words in groups.values() for word in words}
    classes |= {plural(w): "shape" for words in SHAPE_WORDS.values() for w in words}
    return classes


VOCABULARY: tuple[str, ...] = tuple(sorted(word_classes()))
