"""Losses as pure functions over a parameter tree, one file each family."""

import inspect
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.errors import ConfigError, section_arguments
from vlp_jax.models.vision_language import VisionLanguageModel
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.classification import NLVR2, VQA, Classification
from vlp_jax.objectives.contrastive import ITC, ITM, check_shared
from vlp_jax.objectives.flm import FLM
from vlp_jax.objectives.single_stream import AR, MLM, PrefixLM

OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "flm": FLM,
    "mlm": MLM,
    "ar": AR,
    "prefix_lm": PrefixLM,
    "itc": ITC,
    "itm": ITM,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "entailment": Classification,
}

# Keys of a section that are read here or by the step, and arguments that are not keys.
_RESERVED = ("type", "weight", "batch")
_GIVEN = ("model", "name", "batch_name", "vocabulary", "total_examples")


def build_objectives(
    config: ConfigDict,
    model: VisionLanguageModel,
    vocabulary: Vocabulary,
    total_examples: int,
) -> tuple[Objective, ...]:
    """The objectives of ``config.objectives``, sorted by name.

    Args:
        config: name -> section; ``type`` is the name where absent, ``batch`` the named batch, and
            ``weight`` belongs to the step.
        model: the shared model.
        vocabulary: of the run's tokenizer.
        total_examples: of the run.

    Raises:
        ConfigError: no objective, an unknown one, an unknown key, or two that do not fit.
    """
    if not config:
        raise ConfigError("objectives", "there is none", f"Add one of {sorted(OBJECTIVES)}")
    built: list[Objective] = []
    for name, section in sorted(config.items()):
        kind = section.get("type", name)
        if kind not in OBJECTIVES:
            raise ConfigError(
                f"objectives.{name}",
                f"{kind!r} is no objective",
                f"Use one of {sorted(OBJECTIVES)}, or give `type`",
            )
        objective = OBJECTIVES[kind]
        parameters = inspect.signature(objective).parameters
        arguments = section_arguments(
            section, f"objectives.{name}", set(parameters) - set(_GIVEN), _RESERVED
        )
        for key, parameter in parameters.items():
            required = parameter.default is inspect.Parameter.empty and key not in _GIVEN
            if required and key not in arguments:
                raise ConfigError(f"objectives.{name}.{key}", "missing", "Add it")
        given = {
            "model": model,
            "name": name,
            "batch_name": section.get("batch", "pairs"),
            "vocabulary": vocabulary,
            "total_examples": total_examples,
        }
        built.append(
            objective(
                **{k: v for k, v in given.items() if k in parameters},
                **{
                    k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in arguments.items()
                },
            )
        )
    contrasts = [o for o in built if isinstance(o, ITC)]
    for matching in (o for o in built if isinstance(o, ITM)):
        check_shared(matching, contrasts[0] if contrasts else None)
    return tuple(built)
