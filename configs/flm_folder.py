"""FLM on a folder of photographs with captions, small enough for a CPU.

    python -m vlp_jax.main --config=configs/flm_folder.py --config.data.root=FOLDER --workdir=DIR

FOLDER holds images and `captions.json`, or Karpathy's `dataset_coco.json` /
`dataset_flickr30k.json`; the formats are described in the README. Written for about a thousand
photographs: the split `train` is read for training and `val` for evaluation.

Hardware: 2 CPU cores, minutes. What to expect: with so few photographs the model learns the
language of captions and little of what is in the pictures; the reconstruction loss at rate 0.3 ends
below the unigram entropy of the training captions.
"""

from ml_collections import ConfigDict

from vlp_jax.train.config import default_config


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run."""
    config = default_config("tiny")
    config.name = "flm_folder"
    config.total_steps = 500
    config.model.dtype = "float32"
    config.model.image.patch_size = 16
    config.model.image.activation = config.model.text.activation = "gelu_tanh"
    config.model.text.dropout = 0.1

    config.data.batch_size = 64
    config.data.image_size = 96
    config.data.max_text_length = 32
    config.data.num_edges = 3
    config.data.threads = 2
    config.tokenizer.vocab_size = 2000

    with config.unlocked():
        config.data.sources.photographs = {
            "type": "folder",
            "root": config.data.get_oneway_ref("root"),
            "missing_images": "error",
        }
        config.objectives.flm = {"weight": 1.0, "corruption_rate": 0.3}
        config.evals.reconstruction = {
            "type": "reconstruction",
            "source": "photographs",
            "split": "val",
            "num_examples": 130,
            "every_percent": 20.0,
        }
        config.evals.cloze = {"type": "cloze", "source": "photographs", "split": "val"}
    config.optim.weight_decay = 0.1
    config.checkpoint.best_metric = "reconstruction/0.3/loss"
    config.checkpoint.best_mode = "min"
    config.log.every_steps = 20
    return config
