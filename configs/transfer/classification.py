"""Classification of images, fine-tuned from a tower that any objective has pretrained.

    python -m vlp_jax.main --config=configs/transfer/classification.py:scenes \\
        --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/classification.py:pack \\
        --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/classification.py:folder \\
        --config.data.root=FOLDER --config.objectives.image_classification.num_classes=C \\
        --config.init_from=WORKDIR

Data: `scenes`, level hard, by the shape of the largest object (--config.data.sources.images.label:
another attribute, with its number of classes); `pack`, the 350 training pictures of ten classes of
../shared/data (a smoke test); `folder`, train/CLASS/*.jpg, val/... and test/..., or a labels.json.
What is tuned by a METHOD lies in the image tower, the only one that is run; there are no shallow
prompts, which texts read. Without --config.init_from, and with --config.adopt_model=False, it
trains from scratch. Hardware: one GPU; `pack` runs on a CPU in minutes. Score to expect: not
measured yet.
"""

from ml_collections import ConfigDict

from configs.transfer import base, evaluate, scenes


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,METHOD]]."""
    config, which = base("classification", arg, ("scenes", "pack", "folder"))
    config.data.num_edges = 1  # no text is read
    with config.unlocked():
        if which == "scenes":
            config.data.sources.images = {**scenes("scenes_labels"), "label": "shape"}
        else:
            config.data.sources.images = {
                "type": "image_labels",
                "root": config.data.get_oneway_ref("root"),
                "missing_images": "error",
            }
        classes = {"scenes": 8, "pack": 10, "folder": 1000}[which]
        config.objectives.image_classification = {"num_classes": classes}
    tuning = config.model.get("tuning")
    if tuning and (tuning.adapter.kind or tuning.lora.rank or tuning.prompt.kind):
        if tuning.prompt.kind == "shallow":
            raise ValueError(
                f"--config=configs/transfer/classification.py:{arg}: shallow prompts are read by "
                "texts, and there are none here. Use deep_prompt"
            )
        tuning.blocks = "image_tower/.*"  # no other block is run
        if tuning.gated:
            tuning.gated = ("image_tower",)
    evaluate(
        config, which, "accuracy", type="task", source="images", objective="image_classification"
    )
    return config
