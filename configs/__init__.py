"""Run configurations: each module has get_config(arg) -> ml_collections.ConfigDict."""

from typing import Any

# The language objectives that configs compare, each a section of `objectives`.
_LANGUAGE: dict[str, dict[str, Any]] = {
    "flm": {"type": "flm", "corruption_rate": 0.3},
    "flm0": {"type": "flm", "corruption_rate": 0.0},
    "flm15": {"type": "flm", "corruption_rate": 0.15},
    "flm50": {"type": "flm", "corruption_rate": 0.5},
    "flm_range": {
        "type": "flm",
        "corruption_rate": {"kind": "range", "low": 0.0, "high": 0.6},
    },
    "flm_bandit": {
        "type": "flm",
        "corruption_rate": {
            "kind": "bandit",
            "arms": (0.0, 0.15, 0.3, 0.5),
            "metric": "reconstruction/0.3/loss",
        },
    },
    "mlm15": {"type": "mlm", "rate": 0.15},
    "mlm40": {"type": "mlm", "rate": 0.4},
    "ar": {"type": "ar"},
    "prefix_lm": {"type": "prefix_lm"},
}


def language_objective(name: str, source: str) -> dict[str, Any]:
    """The section of a language objective.

    Args:
        name: ``flm`` (at rate 0.3; ``flm0``, ``flm15``, ``flm50``: at others; ``flm_range``,
            ``flm_bandit``), ``mlm15``, ``mlm40``, ``ar`` or ``prefix_lm``.
        source: the config file, for the message.

    Raises:
        ValueError: the name is none of these.
    """
    if name not in _LANGUAGE:
        raise ValueError(f"--config={source}: {name!r} is none of {', '.join(_LANGUAGE)}")
    return dict(_LANGUAGE[name])
