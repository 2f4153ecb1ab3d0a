"""Visual question answering, fine-tuned from a pretrained run.

    python -m vlp_jax.main --config=configs/transfer/vqa.py:scenes --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/vqa.py:pack --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/vqa.py:vqa_v2 --config.data.root=VQA \
        --config.init_from=WORKDIR

A search for four blocks that the task does without, among those of the towers as well, and what
follows it:

    python -m vlp_jax.main --config=configs/transfer/vqa.py:scenes,small,das \
        --config.model.tuning.blocks=all --config.model.tuning.gated="('all',)" \
        --config.search.skipped=4 --config.init_from=WORKDIR --workdir=SEARCH
    python -m vlp_jax.main --config=configs/transfer/vqa.py:scenes,small,adapter \
        --config.model.tuning.blocks=all --config.skip_from=SEARCH --config.init_from=WORKDIR

Data: `scenes`, level hard; `pack`, the photographs of ../shared/data (a smoke test of 1,231
questions); `vqa_v2`, the official files with the images of COCO. Its test split is val2014, whose
answers are public: pretrain on captions of COCO without `restval` (configs/flm_base.py). Answers
are 3,129 classes with soft targets (fact sheet of FLM, section 5). Hardware: one GPU; `pack` runs
on a CPU in minutes. Scores to expect: docs/results/transfer.md. Scores are told by type of answer
and of question (`vqa_v2`), or by the set that a question is from (`pack`), as well.
"""

from ml_collections import ConfigDict

from configs.transfer import base, evaluate, explain, scenes
from vlp_jax.data.scenes.tasks import ScenesVQA


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,METHOD]]."""
    config, which = base("vqa", arg, ("scenes", "pack", "vqa_v2"))
    classes = {"scenes": len(ScenesVQA.classes), "pack": 400, "vqa_v2": 3129}[which]
    with config.unlocked():
        if which == "scenes":
            config.data.sources.questions = scenes("scenes_vqa")
        else:
            config.data.sources.questions = {
                "type": "vqa",
                "root": config.data.get_oneway_ref("root"),
                "missing_images": "error",
                "num_answers": classes,
                "groups": {"pack": ("source",), "vqa_v2": ("answer_type", "question_type")}[which],
            }
        config.objectives.vqa = {"num_classes": classes, "readout": "auto"}
    if which == "vqa_v2":
        config.data.image_size = 576
        config.data.batch_size = 512
        config.schedule.peak = 5e-6
        config.optim.groups.heads.rate_factor = 50.0
    evaluate(config, which, "accuracy", type="task", source="questions", objective="vqa")
    explain(config, source="questions", objective="vqa")
    return config
