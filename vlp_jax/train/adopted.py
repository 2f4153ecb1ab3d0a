"""What a config takes over from an origin or an earlier run, before anything is built from it.

From the weights it starts from: their geometry (``config.adopt_model``), with what is cut out of
their blocks, and what of their tokens they were trained to be read at. From a search: the units
that are skipped (``config.skip_from``). A run that has begun keeps what it took over then, which
the ``config.json`` of its workdir says.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.report import CONFIG_FILE
from vlp_jax.models.sizes import kind_of
from vlp_jax.models.tuning_config import pruned_blocks, tuning_config
from vlp_jax.objectives.readout import READOUT_OF
from vlp_jax.train.initial import HOW_COMPUTED, Origin
from vlp_jax.train.searching import SEARCH_FILE


def adopt(config: ConfigDict, begun: pathlib.Path | None, origin: Origin | None) -> None:
    """Fill in what the config leaves to the origin: the geometry, and what is ``auto``.

    A readout is what the pretraining objective has trained. A run that was itself fine-tuned hands
    on the readout it was given. The pool of a contrast is that of the contrast which has trained
    the origin; without one the mean, where the origin predicts words or patches, which asks nothing
    of first tokens, else ``class`` (imported towers, views of images). A run that has begun keeps
    what the config.json in its workdir says.
    """
    file = None if begun is None else begun / CONFIG_FILE
    kept = json.loads(file.read_text()) if file and file.exists() else {}
    model = kept.get("model", {}) if origin is None else origin.config.get("model", {})
    if config.adopt_model and model:
        adopt_model(config, model)
    kinds = [section.get("type", name) for name, section in config.objectives.items()]
    kinds += origin.objectives if origin else ()
    trained = [READOUT_OF[kind] for kind in kinds if kind in READOUT_OF]
    earlier = origin.config.get("objectives", {}) if origin else {}
    trained += [section["readout"] for section in earlier.values() if section.get("readout")]
    for name, section in config.objectives.items():
        if section.get("readout", "") == "auto":
            settled = kept.get("objectives", {}).get(name, {}).get("readout")
            if origin and not trained:
                logging.warning(
                    "config.objectives.%s.readout: %s does not say which readout it has trained; "
                    "'query' is used, which is that of FLM",
                    name,
                    origin.where,
                )
            section.readout = settled or (trained[0] if trained else "query")
    contrasts = [section for name, section in earlier.items() if section.get("type", name) == "itc"]
    unasked = bool(trained) or "mim" in kinds
    for name, section in config.objectives.items():
        if section.get("pool", "") == "auto":
            begun_with = kept.get("objectives", {}).get(name)
            known = contrasts if begun_with is None else [begun_with]
            if known:
                section.pool = known[0].get("pool", "class")  # older ones do not say
            else:
                section.pool = "mean" if unasked else "class"


def adopt_model(config: ConfigDict, model: Mapping[str, Any]) -> None:
    """Take a geometry: all of ``config.model`` but how it is computed and tuned.

    What is cut out of blocks (``tuning.prune``) is taken as well: no model of another cut has
    parameters of these shapes. Of a model that is whole nothing is, so that a config that asks for
    a cut is told that there is none.

    Keys that a checkpoint is too old to have keep the values of the config, where that describes a
    model of the same kind; of another kind, it has nothing to say.
    """
    if kind_of(config.model) == kind_of(model):
        for part, section in config.model.items():
            if isinstance(section, ConfigDict) and part != "tuning":
                section.update(model.get(part, {}))
        _adopt_cut(config, model)
        return
    own = (*HOW_COMPUTED, "tuning")
    geometry = {key: value for key, value in model.items() if key not in own}
    kept = {key: config.model[key] for key in own if key in config.model}
    with config.unlocked():
        config.model = ConfigDict({**geometry, **kept})
    _adopt_cut(config, model)


def _adopt_cut(config: ConfigDict, model: Mapping[str, Any]) -> None:
    tuning = model.get("tuning", {})
    cut = tuning.get("prune", {})
    if not cut.get("heads") and not cut.get("mlp"):
        return
    with config.unlocked():
        if "tuning" not in config.model:
            config.model.tuning = tuning_config()
        config.model.tuning.prune = ConfigDict({**cut, "blocks": pruned_blocks(tuning)})


def adopt_skipped(config: ConfigDict, begun: pathlib.Path | None) -> None:
    """Skip what the run of ``skip_from`` has chosen; a run that has begun, what it skipped then.

    Raises:
        ConfigError: there is no such choice, or the config has another.
    """
    if not config.skip_from:
        return
    key, file = "skip_from", pathlib.Path(config.skip_from) / SEARCH_FILE
    if begun is not None:
        skipped = json.loads((begun / CONFIG_FILE).read_text())["model"]["tuning"]["skip"]
    elif file.exists():
        skipped = json.loads(file.read_text())["skipped"]
    else:
        raise ConfigError(
            key,
            f"{file} is not there, so that nothing has been chosen",
            "Give the workdir of a run with config.search.method that has come to its end",
        )
    if "tuning" not in config.model:
        with config.unlocked():
            config.model.tuning = tuning_config()
    if config.model.tuning.skip:
        raise ConfigError(key, "beside model.tuning.skip, which is another choice", "Give one")
    config.model.tuning.skip = tuple(skipped)
