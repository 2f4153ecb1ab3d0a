"""The demo: FLM learns to read pictures of one or two objects, on a CPU, in minutes.

    make demo
    python -m vlp_jax.main --config=configs/demo.py --workdir=runs/demo

Data: `scenes`, level easy, 32 px, made as they are needed. Hardware: 2 CPU cores, one device.
"""

from ml_collections import ConfigDict

from vlp_jax.train.config import default_config


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run."""
    config = default_config("tiny")
    config.name = "demo"
    config.total_steps = 900
    config.model.dtype = "float32"
    config.model.image.depth = 1
    config.model.text.lower_depth = config.model.text.upper_depth = 1
    config.model.image.activation = config.model.text.activation = "gelu_tanh"

    config.data.batch_size = 64
    config.data.image_size = 32
    config.data.max_text_length = 16
    config.data.num_edges = 2
    config.data.edge_multiple = 1
    config.data.threads = 1
    config.data.prefetch = 4

    with config.unlocked():
        config.data.sources.scenes = {"type": "scenes", "level": "easy"}
        config.objectives.flm = {"weight": 1.0, "corruption_rate": 0.0}
        config.evals.reconstruction = {
            "type": "reconstruction",
            "source": "scenes",
            "split": "val",
            "num_examples": 512,
            "every_percent": 20.0,
        }
        config.evals.cloze = {"type": "cloze", "source": "scenes", "split": "val", "rate": 0.0}
    config.schedule.peak = 2e-3
    config.checkpoint.every_percent = 20.0
    config.checkpoint.best_metric = "reconstruction/grounding_gap"
    config.log.every_steps = 25
    return config
