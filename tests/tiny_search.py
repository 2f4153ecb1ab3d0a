"""The smallest run that searches for units to skip: shared by tests of training and of tools."""

from ml_collections import ConfigDict
from tiny import towers_config

from tests.tiny_config import get_config
from vlp_jax.transfer.methods import set_method

UNITS = tuple(
    f"fusion_tower/{of}_block_{layer:02d}" for of in ("image", "text") for layer in (0, 1)
)


def search_config(**overrides) -> ConfigDict:
    """Of co-attention with two layers in each stream."""
    config = get_config()
    config.total_steps = 24
    with config.unlocked():
        config.model = towers_config(co_attention=True, **{"fusion.depth": 2})
        config.objectives = {"mlm": {}}
        config.evals = {}
        config.optim.groups = {}
    config.checkpoint.best_metric = ""
    config.checkpoint.every_steps = 6
    config.checkpoint.keep_latest = 99
    set_method(config, "das")
    config.search.update(
        {"skipped": 2, "percent": 100.0, "every_steps": 4, "candidates": 3, "final_batches": 2}
    )
    config.update_from_flattened_dict(overrides)
    return config
