"""Losses as pure functions over a parameter tree, one file each."""

import dataclasses

from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError, unknown_key
from vlp_jax.models.vision_language import VisionLanguageModel
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.flm import FLM

OBJECTIVES: dict[str, type[Objective]] = {"flm": FLM}


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
        fields = {field.name for field in dataclasses.fields(objective)} - {"model", "name"}  # type: ignore[arg-type]
        arguments = {k: v for k, v in section.items() if k not in ("type", "weight", "batch")}
        for key in arguments:
            if key not in fields:
                raise unknown_key(f"objectives.{name}.{key}", [*fields, "type", "weight", "batch"])
        built.append(
            objective(
                model=model,
                name=name,
                batch_name=section.get("batch", "pairs"),
                **{k: dict(v) if isinstance(v, ConfigDict) else v for k, v in arguments.items()},
            )
        )
    return tuple(built)
