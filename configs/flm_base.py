"""FLM at the geometry of the released recipe: ViT-B/32 at 288 px, 6 + 6 text layers.

    python -m vlp_jax.main --config=configs/flm_base.py --config.data.root=COCO --workdir=DIR
    python -m tools.bench step --config=configs/flm_base.py:mlm15 --batch=512

The argument puts another language objective of configs/__init__.py in FLM's place, all else equal.

Data: COCO captions in Karpathy's split by default (the recipe pretrains on CC3M, SBU, COCO and VG
together: add a source for each). Its `restval` are pictures of val2014, on which
configs/transfer/vqa.py tests: --config.data.sources.coco.restval=False leaves them out. Recipe
after the fact sheet of the paper, section 3: batch 4096, 30,000 updates, AdamW (0.9, 0.98), weight
decay 0.01, rate 8e-5 and five times that for the parts that are new on top of the pretrained
towers, 5 % warm-up, linear decay to 0, no clipping, base corruption (the query's own token alone).
Ours starts all parts from scratch, so that all take the higher rate.

Hardware: 344M parameters; one H200 holds batch 512 in 34 GB, so that one GPU needs
--config.optim.accumulation=8. The 122.9M samples of the recipe take about 8.0 GPU-hours at the
4,290 samples/s of docs/perf.md. Score to expect: not measured yet.
"""

from ml_collections import ConfigDict

from configs import language_objective
from vlp_jax.train.config import default_config


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is a language objective, FLM by default."""
    name = arg or "flm"
    config = default_config("base")
    config.name = f"{name}_base"
    config.total_steps = 30_000

    config.data.batch_size = 4096
    config.data.image_size = 288
    config.data.max_text_length = 48
    config.data.edge_multiple = 4
    config.data.threads = 16
    config.data.prefetch = 32

    config.tokenizer.kind = "bpe"
    config.tokenizer.vocab_size = 50_265

    with config.unlocked():
        config.data.sources.coco = {
            "type": "folder",
            "weight": 1.0,
            "root": config.data.get_oneway_ref("root"),
            "missing_images": "error",
            "restval": True,
        }
        config.objectives.language = language_objective(name, f"configs/flm_base.py:{arg}")
        if name == "flm":
            config.objectives.language.corruption_rate = 0.0
        if name.startswith("flm"):
            config.evals.reconstruction = {
                "source": "coco",
                "objective": "language",
                "num_examples": 5000,
                "every_steps": 1000,
            }
            config.checkpoint.best_metric = "reconstruction/base/loss"
            config.checkpoint.best_mode = "min"
    config.optim.clip_norm = 0.0
    config.schedule.peak = 4e-4
    config.checkpoint.every_steps = 1000
    return config
