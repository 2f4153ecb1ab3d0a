"""The smallest config that does all a run does; tests and the subprocesses they start use it."""

from ml_collections import ConfigDict

from vlp_jax.train.config import default_config


def get_config(arg: str | None = None) -> ConfigDict:
    config = default_config("tiny")
    config.name = "tiny"
    config.total_steps = 100
    model = config.model
    model.dtype = "float32"
    model.image.width = model.text.width = 16
    model.image.heads = model.text.heads = 2
    model.image.mlp_width = model.text.mlp_width = 32
    model.image.depth = model.text.lower_depth = model.text.upper_depth = 1
    model.image.patch_size = 8
    model.image.stem = "patch"
    model.text.dropout = 0.1
    config.data.batch_size = 16
    config.data.image_size = 16
    config.data.max_text_length = 14
    config.data.text_edges = (14,)
    config.data.window_batches = 32
    config.data.threads = 1
    config.data.prefetch = 2
    with config.unlocked():
        config.data.sources.scenes = {"type": "scenes", "level": "easy", "num_records": 512}
        config.objectives.flm = {"weight": 1.0, "corruption_rate": 0.3}
        config.evals.reconstruction = {
            "type": "reconstruction",
            "source": "scenes",
            "split": "val",
            "num_examples": 16,
            "rates": (0.0, 0.3),
            "every_steps": 40,
        }
    config.optim.ema_decay = 0.9
    config.checkpoint.every_steps = 10
    config.checkpoint.best_metric = "reconstruction/base/accuracy"
    config.log.every_steps = 1
    config.log.tensorboard = False
    config.compile_cache = "off"  # the tests have one for all runs
    return config
