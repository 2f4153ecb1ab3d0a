"""Run configurations: each module has get_config(arg) -> ml_collections.ConfigDict."""

import re
from typing import Any

# The language objectives that configs compare, each a section of `objectives`.
_LANGUAGE: dict[str, dict[str, Any]] = {
    "flm": {"type": "flm", "corruption_rate": 0.3},
    "flm_range": {
        "type": "flm",
        "corruption_rate": {"kind": "range", "low": 0.0, "high": 0.6},
    },
    # First what the picture tells, then what the text tells as well.
    "flm_falling": {
        "type": "flm",
        "corruption_rate": {"kind": "schedule", "points": ((0.0, 0.9), (1.0, 0.1))},
    },
    "flm_bandit": {
        "type": "flm",
        "corruption_rate": {
            "kind": "bandit",
            "arms": (0.0, 0.15, 0.3, 0.5),
            "metric": "reconstruction/0.3/loss",
        },
    },
    "ar": {"type": "ar"},
    "prefix_lm": {"type": "prefix_lm"},
}
# Those with a rate in percent behind the name, and the key that it is the value of.
_RATES = {"flm": "corruption_rate", "mlm": "rate"}


def language_objective(name: str, source: str) -> dict[str, Any]:
    """The section of a language objective.

    Args:
        name: ``flm`` (at rate 0.3; ``flm15``: at 0.15, or any other percentage; ``flm_range``,
            ``flm_falling``, ``flm_bandit``), ``mlm15`` or any other percentage, ``ar`` or
            ``prefix_lm``.
        source: the config file, for the message.

    Raises:
        ValueError: the name is none of these.
    """
    if rated := re.fullmatch(r"(flm|mlm)(\d|[1-9]\d|100)", name):
        kind, percent = rated.groups()
        return {"type": kind, _RATES[kind]: int(percent) / 100}
    if name not in _LANGUAGE:
        known = ", ".join([*_LANGUAGE, *(f"{kind}PERCENT" for kind in _RATES)])
        raise ValueError(f"--config={source}: {name!r} is none of {known}")
    return dict(_LANGUAGE[name])
