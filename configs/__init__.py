"""Run configurations: each module has get_config(arg) -> ml_collections.ConfigDict."""

from typing import Any

# The language objectives that configs compare, each a section of `objectives`.
_LANGUAGE: dict[str, dict[str, Any]] = {
    "flm": {"type": "flm", "corruption_rate": 0.3},
    "mlm15": {"type": "mlm", "rate": 0.15},
    "mlm40": {"type": "mlm", "rate": 0.4},
    "ar": {"type": "ar"},
    "prefix_lm": {"type": "prefix_lm"},
}


def language_objective(name: str, source: str) -> dict[str, Any]:
    """The section of a language objective.

    Args:
        name: ``flm``, ``mlm15``, ``mlm40``, ``ar`` or ``prefix_lm``.
        source: the config file, for the message.

    Raises:
        ValueError: the name is none of these.
    """
    if name not in _LANGUAGE:
        raise ValueError(f"--config={source}: {name!r} is none of {', '.join(_LANGUAGE)}")
    return dict(_LANGUAGE[name])
