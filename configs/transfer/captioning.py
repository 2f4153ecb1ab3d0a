"""Captioning in the forward stream, fine-tuned from a pretrained run.

    python -m vlp_jax.main --config=configs/transfer/captioning.py:scenes --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/captioning.py:pack --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/captioning.py:coco --config.data.root=COCO \
        --config.init_from=WORKDIR

Training and decoding use the same stream: row i sees tokens 0 to i and predicts token i + 1. Data:
`scenes`, level hard; `pack`, 740 captioned photographs of ../shared/data (a smoke test); `coco`,
Karpathy's split. Hardware: one GPU; `pack` runs on a CPU in minutes. Scores to expect:
docs/results/transfer.md.
"""

from ml_collections import ConfigDict

from configs.transfer import base, captions, evaluate, num_images


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,METHOD]]."""
    config, which = base("captioning", arg, ("scenes", "pack", "coco"))
    captions(config, which)
    with config.unlocked():
        config.objectives.ar = {}
    if which == "coco":
        config.schedule.peak = 3e-6
        config.total_epochs = 20.0
    evaluate(
        config,
        which,
        "cider",
        type="captioning",
        source="captions",
        objective="ar",
        beams=1 if which == "pack" else 3,
        max_length=32,
        num_examples=num_images(which),
    )
    return config
