"""Losses as pure functions over a parameter tree, one file each family."""

import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.data.batch import PAIRS
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.errors import ConfigError, section_arguments
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.image_tower import as_vit
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.classification import NLVR2, VQA, Classification
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.objectives.dino import DINO
from vlp_jax.objectives.flm import FLM
from vlp_jax.objectives.image_classification import ImageClassification
from vlp_jax.objectives.invariance import Invariance, MoCoV3, SimCLR, SimSiam
from vlp_jax.objectives.mim import MIM
from vlp_jax.objectives.single_stream import AR, MLM, PrefixLM
from vlp_jax.objectives.text_tasks import TextClassification, TextRegression

OBJECTIVES: Mapping[str, type[Any]] = {  # each an ``Objective``
    "flm": FLM,
    "mlm": MLM,
    "ar": AR,
    "prefix_lm": PrefixLM,
    "itc": ITC,
    "itm": ITM,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "entailment": Classification,
    "text_classification": TextClassification,
    "text_regression": TextRegression,
    "image_classification": ImageClassification,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "moco_v3": MoCoV3,
    "dino": DINO,
    "mim": MIM,
}

# Keys of a section that are read here or by the step, and arguments that are not keys.
_RESERVED = ("type", "weight", "batch")
_GIVEN = ("model", "name", "batch_name", "vocabulary", "itc")


def build_objectives(
    config: ConfigDict,
    model: Encoder,
    vocabulary: Vocabulary,
) -> tuple[Objective, ...]:
    """The objectives of ``config.objectives``, sorted by name.

    Args:
        config: name -> section; ``type`` is the name where absent, ``batch`` the named batch, and
            ``weight`` belongs to the step.
        model: the shared model.
        vocabulary: of the run's tokenizer.

    Raises:
        ConfigError: no objective, an unknown one, an unknown key, or two that do not fit.
    """
    if not config:
        raise ConfigError("objectives", "there is none", f"Add one of {sorted(OBJECTIVES)}")
    types = {name: _type(name, section) for name, section in config.items()}
    given = {"model": model, "vocabulary": vocabulary}
    built: dict[str, Objective] = {}
    for name in sorted(config, key=lambda name: (types[name] is ITM, name)):  # it takes the ITC
        if types[name] is ITM:
            given["itc"] = _only_itc(name, built)
        built[name] = _build(types[name], name, config[name], given)
    _check_decoders(built)
    return tuple(built[name] for name in sorted(built))


def learns_from(config: ConfigDict) -> dict[str, tuple[str, ...]]:
    """What each objective of ``config.objectives`` learns from; see ``Objective.learns_from``.

    Raises:
        ConfigError: an objective is unknown, or its section cannot work.
    """
    return {
        name: _type(name, section).learns_from(section.to_dict())
        for name, section in config.items()
    }


def captioner(objective: Objective) -> Encoder | None:
    """The model whose forward stream an objective trains on images, for captions.

    None: it trains none.
    """
    if isinstance(objective, FLM) and not objective.loss_weights["forward"]:
        return None
    if isinstance(objective, AR | PrefixLM | FLM) and objective.with_image:
        return objective.model
    return None


def _type(name: str, section: ConfigDict) -> type[Any]:
    kind = section.get("type", name)
    if kind not in OBJECTIVES:
        raise ConfigError(
            f"objectives.{name}",
            f"{kind!r} is no objective",
            f"Use one of {sorted(OBJECTIVES)}, or give `type`",
        )
    return OBJECTIVES[kind]


def _only_itc(name: str, built: Mapping[str, Objective]) -> ITC:
    """The one by which the ITM of this name draws its negatives."""
    contrasts = [objective for objective in built.values() if isinstance(objective, ITC)]
    if len(contrasts) != 1:
        found = ", ".join(contrast.name for contrast in contrasts)
        raise ConfigError(
            f"objectives.{name}",
            "draws its negatives by the similarities of an `itc`, and the run has "
            + (f"several ({found})" if found else "none"),
            "Keep one" if found else "Add objectives.itc",
        )
    return contrasts[0]


def _check_decoders(built: Mapping[str, Objective]) -> None:
    """Refuse a decoder of patches that is not there, or that is of another geometry."""
    for name, objective in built.items():
        if not isinstance(objective, MIM) or not objective.decoder_of:
            continue
        owner = built.get(objective.decoder_of)
        if not isinstance(owner, MIM) or owner.decoder_of or owner.decoder != objective.decoder:
            raise ConfigError(
                f"objectives.{name}.decoder_of",
                f"{objective.decoder_of!r} is no `mim` of this run that has a decoder of its own, "
                "as wide and as deep",
                "Name one that is, or leave it out",
            )


def _build(
    objective: type[Any], name: str, section: ConfigDict, given: Mapping[str, Any]
) -> Objective:
    parameters = inspect.signature(objective).parameters
    if not issubclass(objective, Invariance | ImageClassification):
        as_vit(given["model"].config.image, f"objectives.{name}")
    arguments = section_arguments(
        section, f"objectives.{name}", set(parameters) - set(_GIVEN), _RESERVED
    )
    for key, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and key not in _GIVEN
        if required and key not in arguments:
            raise ConfigError(f"objectives.{name}.{key}", "missing", "Add it")
    if arguments.get("chunk_rows", 1) < 1:
        raise ConfigError(
            f"objectives.{name}.chunk_rows", f"{arguments['chunk_rows']} rows", "Use 1 or more"
        )
    given = {**given, "name": name, "batch_name": section.get("batch", PAIRS)}
    return objective(
        **{k: v for k, v in given.items() if k in parameters},
        **{k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in arguments.items()},
    )
