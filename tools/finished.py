"""A finished run, built once more from its checkpoint: for tools that measure its parameters."""

import pathlib
from collections.abc import Collection

from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.checks import completed
from vlp_jax.train.config import default_config
from vlp_jax.train.initial import Origin
from vlp_jax.train.setup import Setup, prepare


def set_up_again(
    origin: Origin,
    checkpoint: str,
    scratch: pathlib.Path,
    evaluators: Collection[str] = (),
) -> Setup:
    """What the run was, with the parameters that its evaluators saw as its first.

    Images are whole, nothing is frozen, no units are searched for, and there is no moving average
    besides. The devices are those that are here.

    Args:
        origin: of ``read_origin``, of a run or of a file that was exported of one.
        checkpoint: that it was read from: ``latest``, ``best`` or a step.
        scratch: takes the place of the workdir, which is left as it is.
        evaluators: those of the run that are built.

    Raises:
        ConfigError: no run of this project has made the parameters, or it has no such evaluator.
        ValueError, OSError: of ``train.setup.prepare``.
    """
    if not origin.objectives:
        raise ConfigError(
            "init_from",
            f"{origin.where} holds imported weights, which no objective of this project has "
            "trained",
            "Fine-tune from it (configs/transfer/) and use the checkpoint of that run",
        )
    made = {key: value for key, value in origin.config.items() if key != "classes"}
    config, default = ConfigDict(completed(made)), default_config()
    missing = sorted(set(evaluators) - set(config.evals))
    if missing:
        raise ConfigError(
            f"evals.{missing[0]}",
            f"{origin.where} has no evaluator of that name",
            f"Use some of {sorted(config.evals)}",
        )
    config.evals = {name: config.evals[name] for name in evaluators}
    for section in config.evals.values():
        section.on = "last"
    config.init_from, config.init_checkpoint = origin.where, checkpoint
    config.init_base = "" if origin.base is None else origin.base.where
    config.adopt_model, config.debug = False, False
    # What was chosen by a search is in model.tuning.skip, or in the switches of the parameters.
    config.skip_from, config.search = "", default.search
    config.checkpoint.tunables_only = False  # where nothing is frozen, all are tunables
    config.checkpoint.best_metric, config.tokenizer.path = "", ""
    config.log.tensorboard, config.log.wandb = False, ""
    config.mesh, config.compression = default.mesh, default.compression
    config.optim.ema_decay, config.optim.groups = 0.0, ConfigDict()
    return prepare(config, scratch)
