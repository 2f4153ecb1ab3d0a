"""Stage 1 of the shared encoder: images alone, masked (MAE).

    python -m vlp_jax.main --config=configs/momo/stage1.py --workdir=runs/momo1
    python -m vlp_jax.main --config=configs/momo/stage1.py:pictures,shared_base \\
        --config.data.root=PHOTOGRAPHS --workdir=runs/momo1

The argument is DATA[,SIZE]: `scenes` (level hard, 64 px), `pictures` (all below a folder, 224 px)
or `folder` (pictures with a captions.json, which says what is held out; captions are not read); a
shared size of models/sizes.py (`shared_small` by default). Hardware: one GPU; `shared_tiny` learns
on a CPU (`make momo-demo`). Scores to expect: docs/results/momo.md, of easier scenes.
"""

from ml_collections import ConfigDict

from configs import momo


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE]."""
    config, given = momo.base(1, arg)
    momo.images(config, given)
    return config
