"""Reads sentences of the scenes world by their words alone, for the tests of its language."""

import re

from vlp_jax.data.scenes import COLOURS, SHAPES, SIZES, TEXTURES, words


def lookup(groups, classes):
    return {word: classes.index(name) for name, ws in groups.items() for word in ws}


SHAPE_OF = lookup(words.SHAPE_WORDS, SHAPES)
SHAPE_OF |= {words.plural(word): shape for word, shape in SHAPE_OF.items()}
COLOUR_OF = lookup(words.COLOUR_WORDS, COLOURS)
SIZE_OF = lookup(words.SIZE_WORDS, SIZES)
TEXTURE_OF = lookup(words.TEXTURE_WORDS, TEXTURES)
NOUNS = {*SHAPE_OF, *words.GENERIC, *map(words.plural, words.GENERIC)}


def tokens(text):
    return re.findall(r"[^\s,?]+", text)


def parse(text):
    """The attributes of each noun phrase of a sentence, in order."""
    found, pending = [], {}
    for word in tokens(text):
        for name, table in (("colour", COLOUR_OF), ("size", SIZE_OF), ("texture", TEXTURE_OF)):
            if word in table:
                pending[name] = table[word]
        if word in NOUNS:
            if word in SHAPE_OF:
                pending["shape"] = SHAPE_OF[word]
            found.append(pending)
            pending = {}
    assert not pending
    return found
