"""Names of metrics and columns as words."""

import re
from collections.abc import Mapping

# Words of names that read better written out, or in capitals.
SPELLINGS: Mapping[str, str] = {
    "bytes": "memory",
    "ema": "EMA",
    "flops": "FLOPs",
    "grad": "gradient",
    "mfu": "MFU",
    "param": "parameter",
    "tflops": "throughput",
}


def as_words(name: str) -> str:
    """A name as words: ``grad_norm`` as ``gradient norm``, ``speed/mfu`` as ``speed · MFU``."""
    words = name.replace("/", " · ").replace("_", " ").split(" ")
    return " ".join(SPELLINGS.get(word, word) for word in words)


def as_title(name: str) -> str:
    """`as_words` with a capital first letter."""
    text = as_words(name)
    return text[:1].upper() + text[1:]


def as_anchor(name: str) -> str:
    """A name as an identity within the page: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
