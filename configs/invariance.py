"""Pretraining on images alone: by invariance of random views, or by masked pixels.

    python -m vlp_jax.main --config=configs/invariance.py:moco_v3 --workdir=runs/moco
    python -m vlp_jax.main --config=configs/invariance.py:simclr,small --workdir=runs/simclr \\
        --config.compression.schedule=staged --config.compression.buckets="('p16@64','p8@64')"
    python -m tools.bench step --config=configs/invariance.py:moco_v3,base --batch=256

The argument is OBJECTIVE[,SIZE]: `moco_v3`, `simclr`, `simsiam`, `dino` or `mim` (MAE); a size of
models/sizes.py (`mini` by default; `base` is a ViT-B/16 at 224 px, `resnet50` a ResNet-50 at 224
px, `resnet18` one for small pictures; `mim` is for transformers alone). A run of FLM or of a task
starts from such a transformer by --config.init_from.

Data: `scenes`, level hard, whose captions are not read. Recipes of MoCo v3, SimCLR (SLIP's) and
DINO: fact sheet of accelerated invariance pretraining, section 7; MoCo v3's random patch projection
is frozen. Blurs are as wide in proportion to data.image_size, as the config sets it, as theirs to
224 px. A ResNet gets the same recipes, where the papers use LARS or SGD. DINO has two small crops
here, of three sevenths of the side, and 4,096 prototypes; `dino,base` its eight and 65,536; the
decoder of `mim` half the width here, `mim,base` that of MAE. SimSiam's with AdamW is a choice of
ours. The peak rate is that of a batch of 256: for another one, scale --config.schedule.peak with
it. Ours differ in how towers are initialised, and in that views are cut from pictures already
reduced to data.image_size. Colour jitter, blur and small crops hide colours and most of a scene:
what a tower is to tell apart must survive `augment`.
Hardware: one GPU. Score to expect: docs/results/compression.md, by
temperatures and crops that learn faster on scenes than the papers'.
"""

from ml_collections import ConfigDict

from vlp_jax.data.augment import Recipe
from vlp_jax.train.config import default_config

# Peak rate at a batch of 256, weight decay, second beta.
_RECIPES = {
    "moco_v3": (1.5e-4, 0.1, 0.999),
    "simclr": (1.9e-4, 0.1, 0.98),
    "simsiam": (1.5e-4, 0.1, 0.999),
    "dino": (5e-4, 0.04, 0.999),
    "mim": (1.5e-4, 0.05, 0.95),
}
# Keys that flags and searches may want to change; the values are the objectives' defaults.
_KEYS: dict[str, dict[str, float | str]] = {
    "moco_v3": {"temperature": 0.2, "momentum": 0.99},
    "simclr": {"temperature": 0.1},
    "simsiam": {},
    "dino": {
        "temperature": 0.1,
        "teacher_temperature": 0.04,
        "momentum": 0.996,
        "centring": "mean",
        "head_norm": False,
    },
    "mim": {"kept_share": 0.25},
}
# Least and largest area of crops, by the key of the views.
_SCALES: dict[str, dict[str, tuple[float, float]]] = {
    "moco_v3": {"augment": (0.08, 1.0)},
    "simclr": {"augment": (0.08, 1.0)},
    "simsiam": {"augment": (0.2, 1.0)},
    "dino": {"augment": (0.4, 1.0), "augment_small": (0.05, 0.4)},
    "mim": {},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is OBJECTIVE[,SIZE]."""
    objective, size, *more = [*(arg or "moco_v3").split(","), ""]
    if any(more):
        raise ValueError(f"--config=configs/invariance.py:{arg}: write OBJECTIVE or OBJECTIVE,SIZE")
    if objective not in _RECIPES:
        known = ", ".join(sorted(_RECIPES))
        raise ValueError(f"--config=configs/invariance.py:{arg}: {objective!r} is none of {known}")
    config = default_config(size or "mini")
    config.name = objective
    config.total_steps = 20_000
    image = config.model.image
    vit = image.get("type", "vit") == "vit"
    if vit:
        image.update(stem="patch", patch_size=8, pre_norm=False, activation="gelu", norm_eps=1e-6)
    config.data.image_size = 64
    config.data.batch_size = 256
    config.data.num_edges = 1  # no text is read
    config.data.threads = 16
    config.data.prefetch = 32
    large = size in ("base", "resnet50")
    if large:
        config.data.image_size = 224
    if size == "base":
        image.update(patch_size=16, depth=12)
    rate, decay, b2 = _RECIPES[objective]
    config.schedule.peak = rate
    config.schedule.decay = "cosine"
    config.schedule.warmup_percent = 10.0
    config.optim.update(weight_decay=decay, b2=b2, clip_norm=0.0)
    with config.unlocked():
        config.data.sources.scenes = {"type": "scenes", "level": "hard"}
        config.objectives[objective] = {"weight": 1.0, **_KEYS[objective]}
        config.evals.neighbours = {"source": "scenes", "every_percent": 25.0}
        if objective == "dino":
            config.optim.update(final_weight_decay=0.4, clip_norm=3.0)
            if vit:
                image.drop_path = 0.1
            if not large:
                config.objectives.dino.update(small_crops=2, prototypes=4_096)
        if objective == "mim" and vit:
            image.positions = "sincos"
            if not large:
                config.objectives.mim.update(decoder_width=128, decoder_depth=4, decoder_heads=4)
        share = config.data.image_size / 224
        sigma = tuple(round(share * sigma, 2) for sigma in Recipe().blur_sigma)
        for views, scale in _SCALES[objective].items():
            config.objectives[objective][views] = {"scale": scale, "blur_sigma": sigma}
        if objective == "moco_v3" and vit:
            image.positions = "sincos"
            frozen = {"pattern": "image_tower/patch_embedding", "rate_factor": 0.0}
            config.optim.groups.patch_projection = frozen
    config.checkpoint.best_metric = "neighbours/shape/knn_accuracy"
    return config
