"""Stage 2 of the shared encoder: images and texts, each alone, both in every update.

    python -m vlp_jax.main --config=configs/momo/stage2.py --config.init_from=runs/momo1 \\
        --workdir=runs/momo2
    python -m vlp_jax.main --config=configs/momo/stage2.py:pictures,shared_base,flm30 \\
        --config.data.root=PHOTOGRAPHS --config.data.sources.prose.root=TEXTS \\
        --config.init_from=runs/momo1 --workdir=runs/momo2

The argument is DATA[,SIZE[,LANGUAGE]]: as of stage 1, and the objective of texts, `mlm15` by
default (`flm30`: Free Language Modeling at rate 0.3). Texts are packed into rows of 128 tokens. A
stage starts from another by --config.init_from, with the whole stack and the decoder of images; the
workdir's init_from.tsv says what became of every tensor. Hardware and scores: as of stage 1.
"""

from ml_collections import ConfigDict

from configs import momo


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,LANGUAGE]]."""
    config, given = momo.base(2, arg)
    momo.images(config, given)
    momo.text(config, given)
    return config
