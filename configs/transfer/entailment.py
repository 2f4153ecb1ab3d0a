"""Visual entailment, fine-tuned from a pretrained run.

    python -m vlp_jax.main --config=configs/transfer/entailment.py:scenes --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/entailment.py:pack --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/entailment.py:snli_ve \
        --config.data.root=SNLI_VE --config.init_from=WORKDIR

Data: `scenes`, level hard; `pack`, the 3,502 training pairs of ../shared/data (a smoke test);
`snli_ve`, the official files with the images of Flickr30k. Hardware: one GPU; `pack` runs on a CPU
in minutes. Scores to expect: docs/results/transfer.md. Scores are told by label as well.
"""

from ml_collections import ConfigDict

from configs.transfer import base, evaluate, explain, scenes


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,METHOD]]."""
    config, which = base("entailment", arg, ("scenes", "pack", "snli_ve"))
    with config.unlocked():
        if which == "scenes":
            config.data.sources.hypotheses = scenes("scenes_entailment")
        else:
            config.data.sources.hypotheses = {
                "type": "visual_entailment",
                "root": config.data.get_oneway_ref("root"),
                "missing_images": "error",
                "groups": {"pack": ("label",), "snli_ve": ("gold_label",)}[which],
            }
        config.objectives.entailment = {"num_classes": 3, "readout": "auto"}
    evaluate(config, which, "accuracy", type="task", source="hypotheses", objective="entailment")
    explain(config, source="hypotheses", objective="entailment")
    return config
