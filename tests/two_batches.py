"""The smallest run that reads two named batches."""

import os
from typing import Any

from ml_collections import ConfigDict
from tiny_config import get_config

from vlp_jax.infra.metrics import read_metrics


def run_config(**overrides: Any) -> ConfigDict:
    """A run that reads two batches: AR on pairs, and on as many other captions of its own."""
    config = get_config()
    with config.unlocked():
        config.objectives = {"ar": {"type": "ar"}, "other": {"type": "ar", "batch": "text"}}
        config.data.sources.captions = {
            "type": "scenes",
            "level": "easy",
            "num_records": 256,
            "batch": "text",
        }
        config.data.batches.text = {"batch_size": 8}
        config.evals = {}
    config.checkpoint.best_metric = ""
    config.optim.ema_decay = 0.0
    config.total_steps = 12
    config.checkpoint.every_steps = 6
    config.update_from_flattened_dict(overrides)
    return config


def logged(workdir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """What was logged of every update."""
    return [record for record in read_metrics(workdir) if "train/loss" in record]
