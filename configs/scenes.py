"""Pretraining on hard scenes: the same encoder and data under any of the language objectives.

    python -m vlp_jax.main --config=configs/scenes.py:flm --workdir=runs/flm
    python -m vlp_jax.main --config=configs/scenes.py:mlm40,tiny,20000 --workdir=runs/mlm40
    python -m tools.compare configs/scenes.py:flm configs/scenes.py:mlm15 --seeds=3 ...

The argument is OBJECTIVE[,SIZE[,IMAGES]]: a name of configs/__init__.py; a size of models/sizes.py
(`small` by default; patches of 8 px in all of them); and how many images there are (unbounded by
default). Data: `scenes`, level hard, 64 px, made as they are needed or, if their number is given,
rendered once into memory, or into files that runs share (`data.cache_dir`).
Hardware: one GPU; `tiny` learns on a CPU within the hour. Scores to expect:
docs/results/transfer.md (after fine-tuning).
"""

from ml_collections import ConfigDict

from configs import language_objective
from vlp_jax.train.config import default_config


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is OBJECTIVE[,SIZE[,IMAGES]]."""
    objective, size, images = [*(arg or "flm").split(","), "", ""][:3]
    config = default_config(size or "small")
    config.name = f"scenes_{objective}"
    config.total_steps = 20_000
    config.model.image.patch_size = 8
    config.data.batch_size = 256
    config.data.image_size = 64
    config.data.max_text_length = 48
    # Rendering keeps cores busy; pictures that are there are copied, and more threads would only
    # compete with the train loop for the interpreter.
    config.data.threads = 2 if images else 16
    config.data.prefetch = 4 if images else 32
    config.schedule.peak = 5e-4
    with config.unlocked():
        config.data.sources.scenes = {"type": "scenes", "level": "hard"}
        if images:
            config.data.sources.scenes.update(num_records=int(images), cache=True)
        config.objectives.language = language_objective(objective, f"configs/scenes.py:{arg}")
        config.evals.heldout = {"source": "scenes", "num_examples": 1000, "every_percent": 25.0}
        if objective.startswith("flm"):
            config.evals.reconstruction = {
                "source": "scenes",
                "objective": "language",
                "every_percent": 2.0 if objective == "flm_bandit" else 25.0,  # it decides each time
            }
    return config
