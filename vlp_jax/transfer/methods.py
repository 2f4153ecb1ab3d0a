"""Ways to tune a pretrained model for a task, by name: what is added to it, and what is trained.

    config = default_config()
    set_method(config, "adapter")

Geometries after the fact sheet of PCETL (section 5): low-rank updates of rank 4 of queries and
values; serial adapters of an eighth of the width after every branch; parallel ones of the same
width beside the attentions, scaled by 4; 200 prompts for the attention of every block, or 200 that
pass all blocks as tokens, in two streams 200 in either. All in the blocks that read both
modalities; ``config.model.tuning.blocks`` changes that, but for prompts that pass all of these.
Every method trains the heads, what a fusion tower of two streams gives them of the image (METER's
poolers), and the vectors that tell streams and modalities apart. ``das`` is ``adapter`` in a search
for the units that are skipped afterwards (``train.search``).
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.tuning import ADDITIONS
from vlp_jax.models.tuning_config import tuning_config

SEARCH = "das"  # a method that looks for units to skip in the blocks where adapters are
FROZEN = "frozen"  # group of ``config.optim.groups``
_ATTENTIONS = ("self_attention", "cross_attention")
# What every method trains: tables of methods count what is trained with and without it.
ALWAYS = r"(_head|_image_type)(/|$)|^(type|stream)_embedding$|/modality_embedding$|/image_to_text/"

# Name -> what ``config.model.tuning`` says, and which parameters are trained beside the above;
# None: all are.
METHODS: dict[str, tuple[dict[str, Any], str | None]] = {
    "full": ({}, None),
    "head": ({}, ""),
    "bitfit": ({}, r"bias$"),
    "lora": ({"lora": {"rank": 4}}, ADDITIONS),
    "adapter": ({"adapter": {"kind": "serial"}}, ADDITIONS),
    "das": ({"adapter": {"kind": "serial"}, "gated": ("fusion",)}, ADDITIONS),
    "scaled_parallel": (
        {"adapter": {"kind": "parallel", "scale": 4.0, "norm": True, "branches": _ATTENTIONS}},
        ADDITIONS,
    ),
    "shallow_prompt": ({"prompt": {"kind": "shallow"}}, ADDITIONS),
    "deep_prompt": ({"prompt": {"kind": "deep"}}, ADDITIONS),
}


_ADDED = ("adapter", "lora", "prompt")  # sections of the tuning that methods differ in


def set_method(config: ConfigDict, method: str) -> None:
    """Add what a method adds to the model, and freeze what it does not train.

    Args:
        config: of a run, with its objectives; ``config.model.tuning`` and the group ``frozen`` of
            ``config.optim.groups`` are replaced, and ``config.checkpoint.tunables_only`` is set:
            what is frozen is in the base already.
        method: a key of ``METHODS``.

    Raises:
        ConfigError: it is none of these.
    """
    if method not in METHODS:
        raise ConfigError("method", f"{method!r}", f"Use one of {', '.join(METHODS)}")
    tuning, trained = METHODS[method]
    with config.unlocked():
        config.model.tuning = tuning_config()
        config.model.tuning.update(ConfigDict(tuning))
        config.search.method = "learned" if method == SEARCH else ""
        if FROZEN in config.optim.groups:
            del config.optim.groups[FROZEN]
        if trained is not None:
            config.optim.groups[FROZEN] = {"pattern": _frozen(trained), "rate_factor": 0.0}
    config.checkpoint.tunables_only = trained is not None


def method_of(config: Mapping[str, Any]) -> str:
    """The method that a config has been given, wherever it puts its additions.

    Args:
        config: of a run, as JSON holds it.

    Returns:
        A key of ``METHODS``, and how many units are skipped, if any are; ``own`` for adapters,
        low-rank updates or frozen parameters that no method has.
    """
    plain: dict[str, Any] = json.loads(tuning_config().to_json_best_effort())
    tuning = {**plain, **config["model"].get("tuning", {})}
    group = config["optim"]["groups"].get(FROZEN, {})
    skipped = f", {len(tuning['skip'])} skipped" if tuning["skip"] else ""
    searches = bool(config.get("search", {}).get("method"))
    for name, (values, trained) in METHODS.items():
        parts = {part: {**plain[part], **values.get(part, {})} for part in _ADDED}
        same = json.loads(json.dumps(parts)) == {part: tuning[part] for part in parts}
        if name == "adapter" and searches:
            continue  # das
        if same and group.get("pattern") == (None if trained is None else _frozen(trained)):
            return f"{name}{skipped}"
    return f"own{skipped}"


def _frozen(trained: str) -> str:
    """The pattern of what is frozen where ``trained`` and what always is are not."""
    return rf"^(?!.*({'|'.join(filter(None, (ALWAYS, trained)))}))"
