"""Losses as pure functions over a parameter tree, one file each."""

import inspect
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError, section_arguments
from vlp_jax.models.vision_language import VisionLanguageModel
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.flm import FLM

OBJECTIVES: Mapping[str, Callable[..., Objective]] = {"flm": FLM}

# Keys of a section that are read here or by the step, and arguments that are not keys.
_RESERVED = ("type", "weight", "batch")
_GIVEN = ("model", "name", "batch_name", "splittable")


def build_objectives(config: ConfigDict, model: VisionLanguageModel) -> tuple[Objective, ...]:
    """The objectives of ``config.objectives``, sorted by name.

    Args:
        config: name -> section; ``type`` is the name where absent, ``batch`` the named batch, and
            ``weight`` belongs to the step.
        model: the shared model.

    Raises:
        ConfigError: no objective, an unknown one, or an unknown key.
    """
    if not config:
        raise ConfigError("objectives", "there is none", f"Add one of {sorted(OBJECTIVES)}")
    built = []
    for name, section in sorted(config.items()):
        kind = section.get("type", name)
        if kind not in OBJECTIVES:
            raise ConfigError(
                f"objectives.{name}",
                f"{kind!r} is no objective",
                f"Use one of {sorted(OBJECTIVES)}, or give `type`",
            )
        objective = OBJECTIVES[kind]
        known = set(inspect.signature(objective).parameters) - set(_GIVEN)
        arguments = section_arguments(section, f"objectives.{name}", known, _RESERVED)
        built.append(
            objective(
                model=model,
                name=name,
                batch_name=section.get("batch", "pairs"),
                **{k: dict(v) if isinstance(v, ConfigDict) else v for k, v in arguments.items()},
            )
        )
    return tuple(built)
