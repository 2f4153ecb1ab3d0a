"""Stage 3 of the shared encoder: texts alone, and images with their texts, in every update.

    python -m vlp_jax.main --config=configs/momo/stage3.py --config.init_from=runs/momo2 \\
        --workdir=runs/momo3
    python -m vlp_jax.main --config=configs/momo/stage3.py:scenes,shared_small,flm30,language+itc \\
        --config.init_from=runs/momo2 --workdir=runs/momo3

The argument is DATA[,SIZE[,LANGUAGE[,PAIRS]]]: as of stage 2, and what is learned of pairs:
`language` (masked words with the image), `mim` (masked patches with the text), `itc` and `itm`
(which brings `itc` along), joined by +; all by default. Images alone are not among the data of this
stage in the paper; `images` brings them back. Hardware and scores: as of stage 1.
"""

from ml_collections import ConfigDict

from configs import momo


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,LANGUAGE[,PAIRS]]]."""
    config, given = momo.base(3, arg)
    momo.text(config, given)
    momo.pairs(config, given)
    if momo.IMAGES_ALONE in given["pairs"]:
        momo.images(config, given)
    return config
