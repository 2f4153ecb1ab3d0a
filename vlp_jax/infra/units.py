"""How a number is written for a reader: its unit follows from its name.

Metric names and table columns follow one convention, so that the terminal and the report format
any number without knowing what it measures: the last part of the name ends in what it counts
(``_per_second``, ``_bytes``, ``_seconds``, ``_accuracy``, ...).
"""

import math
import re
from typing import Literal

Unit = Literal["", "percent", "points", "bytes", "seconds", "rate", "tflops", "count"]

PER_SECOND = "_per_second"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

# The last word that is listed here decides: "reconstruction_accuracy" is a percentage,
# "accuracy_gap" is points. A path part that is no unit word inherits from the part before it, so
# "grounding_gap/colour" is points and "seconds/text16" is seconds.
UNIT_OF_WORD: dict[str, Unit] = {
    "accuracy": "percent",
    "fraction": "percent",
    "mfu": "percent",
    "precision": "percent",
    "probability": "percent",
    "recall": "percent",
    "share": "percent",
    "waste": "percent",
    "gap": "points",
    "points": "points",
    "tflops": "tflops",
    "bytes": "bytes",
    "seconds": "seconds",
    "parameters": "count",
    "samples": "count",
    "skipped": "count",
    "steps": "count",
    "tokens": "count",
    "per_second": "rate",
    "entropy": "",
    "loss": "",
    "norm": "",
    "perplexity": "",
    "rate": "",
}


def unit_word(name: str) -> str:
    """The word of ``name`` that says what it measures, such as ``loss`` or ``per_second``.

    Args:
        name: a path of words such as ``speed/samples_per_second`` or ``Probability``.

    Returns:
        The word in lower case; empty if no word of ``name`` is known.
    """
    for part in reversed(name.lower().split("/")):
        if part.endswith(PER_SECOND):
            return PER_SECOND.lstrip("_")
        for word in reversed(re.split(r"[^a-z0-9]+", part)):
            if word in UNIT_OF_WORD:
                return word
    return ""


def unit_of(name: str) -> Unit:
    """The unit that a metric name or a column name implies.

    Args:
        name: see `unit_word`.

    Returns:
        ``percent`` and ``points`` (differences of percentages), both of fractions of one;
        ``bytes``, ``seconds``, ``rate`` (somethings per second), ``tflops`` (10^12 operations per
        second), ``count`` or ``""``.
    """
    return UNIT_OF_WORD.get(unit_word(name), "")


def format_number(value: float) -> str:
    """``value`` with about four significant digits, thousands separated: 1,234 or 0.0123."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    magnitude = abs(value)
    if magnitude >= 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif value == int(value):
        text = f"{int(value):,}"
    elif magnitude >= 1000:
        text = f"{value:,.0f}"
    elif magnitude >= 100:
        text = f"{value:.1f}"
    elif magnitude >= 1:
        text = f"{value:.3f}" if magnitude < 10 else f"{value:.2f}"
    elif magnitude >= 1e-3:
        text = f"{value:.3g}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−")


def format_bytes(value: float) -> str:
    """Bytes in decimal units: 12.3 GB."""
    exponent = 0
    while abs(value) >= 999.5 and exponent < len(BYTE_UNITS) - 1:
        value, exponent = value / 1000, exponent + 1
    digits = 0 if exponent == 0 or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f} {BYTE_UNITS[exponent]}"


def format_seconds(value: float) -> str:
    """A duration: 12 ms, 3.2 s, 4 min 05 s or 2 h 07 min."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_value(name: str, value: float) -> str:
    """``value`` with the unit that ``name`` implies: ``57.1 %``, ``1,234 samples/s``, ``12.3 GB``.

    Args:
        name: metric or column name, see `unit_of`.
        value: the number; a non-finite one is written without a unit.
    """
    unit = unit_of(name)
    if not math.isfinite(value):
        return format_number(value)
    if unit == "percent":
        return f"{value * 100:.1f} %".replace("-", "−")
    if unit == "points":
        return f"{value:.1f} points".replace("-", "−")
    if unit == "bytes":
        return format_bytes(value)
    if unit == "seconds":
        return format_seconds(value)
    if unit == "tflops":
        return f"{format_number(value)} TFLOP/s"
    if unit == "rate":
        noun = name.rsplit("/", 1)[-1].removesuffix(PER_SECOND).replace("_", " ")
        return f"{format_number(value)} {noun}/s"
    if unit == "count" and value == int(value):
        return f"{int(value):,}"
    return format_number(value)
