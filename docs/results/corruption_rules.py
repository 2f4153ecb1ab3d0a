"""Rules of corruption on easy scenes, small enough for a CPU: see flm_time_to_quality.md.

    for rule in flm0 flm15 flm flm50 flm_bandit; do for seed in 0 1 2; do
        python -m vlp_jax.main --config=docs/results/corruption_rules.py:$rule \\
            --config.seed=$seed --workdir=runs/${rule}_$seed
    done; done

The argument is a name of configs/__init__.py. The bandit chooses every 4 % of the run, judged by
the loss at rate 0.3 on the 256 pictures that all are scored on.
"""

from ml_collections import ConfigDict

from configs import scenes


def get_config(rule: str) -> ConfigDict:
    """The config of the run."""
    config = scenes.get_config(f"{rule},tiny")
    config.total_steps = 600
    config.model.image.patch_size = 4
    config.model.dtype = "float32"
    config.data.image_size = 32
    config.data.batch_size = 64
    config.data.max_text_length = 16
    config.data.threads = 1
    config.data.prefetch = 4
    config.data.num_edges = 2
    config.data.edge_multiple = 1
    config.schedule.peak = 2e-3
    config.checkpoint.every_percent = 100.0
    with config.unlocked():
        config.data.sources.scenes.level = "easy"
        del config.evals["heldout"]
        config.evals.reconstruction.num_examples = 256
        config.evals.reconstruction.rates = (0.0, 0.3)
        config.evals.reconstruction.every_percent = 4.0 if rule == "flm_bandit" else 25.0
    return config
