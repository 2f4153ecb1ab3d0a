"""Image-text retrieval: a dual encoder (ITC), re-ranked by matching (ITM).

    python -m vlp_jax.main --config=configs/transfer/retrieval.py:scenes --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/retrieval.py:pack --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/retrieval.py:coco --config.data.root=COCO \
        --config.init_from=WORKDIR

Data: `scenes`, level hard; `pack`, 740 captioned photographs of ../shared/data (a smoke test);
`coco`, Karpathy's split, or Flickr30k's in the same format. Negatives are those of the global
batch. Hardware: one GPU; `pack` runs on a CPU in minutes. Scores to expect:
docs/results/transfer.md.
"""

from ml_collections import ConfigDict

from configs.transfer import base, captions, evaluate, num_images


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,METHOD]]."""
    config, which = base("retrieval", arg, ("scenes", "pack", "coco"))
    captions(config, which)
    with config.unlocked():
        config.objectives.itc = {"pool": "auto"}
        config.objectives.itm = {"readout": "auto"}
    evaluate(
        config,
        which,
        "t2i_r1",
        type="retrieval",
        source="captions",
        matching="itm",
        shortlist=16 if which == "pack" else 128,
        num_examples=num_images(which),
    )
    return config
