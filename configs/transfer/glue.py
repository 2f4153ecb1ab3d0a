"""The nine tasks of GLUE, fine-tuned on text alone from a pretrained run with a shared stack.

    python -m vlp_jax.main --config=configs/transfer/glue.py:pack --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/glue.py:mrpc --config.data.root=GLUE \\
        --config.init_from=WORKDIR
    python -m vlp_jax.main --config=configs/transfer/glue.py:rte,shared_base \\
        --config.data.root=GLUE

Data: `pack`, the 20,000 sentences of SST-2 in ../shared/data/text; or a task, `cola`, `sst2`,
`mrpc`, `stsb`, `qqp`, `mnli`, `qnli`, `rte` or `wnli`, of which GLUE holds the official files (see
vlp_jax/data/tasks/glue.py). Selection is on a tenth of the training file; `test` is the published
dev set, for the labels of the official test files are secret, and `mismatched` MNLI's second.
Without --config.init_from it trains from scratch.

No recipe of MoMo for GLUE could be read. What its fact sheet (section 5) names in its place is
FLAVA's preset for QNLI: batch 32, 33,112 updates (ten epochs), 6 % of them warm-up, AdamW
(0.9, 0.98), weight decay 0.1, rate 1e-5. Substituted here: every task has ten epochs, and no more
updates than that preset (MNLI and QQP: some three epochs); the decay is linear; a fresh head has
ten times the rate. `pack` is for small models: rate 1e-4, five times that for the head, three
epochs. `python -m tools.predict classify --checkpoint=WORKDIR --text="..."` (`score` of stsb) uses
what is learned. Hardware: one GPU; with the size shared_tiny `pack` takes two CPU cores about a
quarter of an hour. Score to expect: not measured yet.
"""

from ml_collections import ConfigDict

from configs.transfer import base, evaluate
from vlp_jax.data.tasks.glue import CLASSES, MAX_SCORE

MOST_UPDATES = 33_112  # of FLAVA's preset for QNLI
_LARGE = ("mnli", "qqp")  # ten epochs would be more


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of the run; ``arg`` is DATA[,SIZE[,METHOD]], DATA being ``pack`` or a task."""
    config, which = base("glue", arg, ("pack", *CLASSES), size="shared_small")
    task = "sst2" if which == "pack" else which
    config.data.batch_size = 32
    config.data.image_size = 64  # no image is read
    config.data.max_text_length = 64 if task == "sst2" else 128
    config.schedule.warmup_percent = 6.0
    config.optim.weight_decay = 0.1
    if which == "pack":
        config.data.root = "../shared/data/text"
        config.total_epochs = 3.0
    if which in _LARGE:
        config.total_epochs = None
        config.total_steps = MOST_UPDATES
    classes = len(CLASSES[task])
    objective = "text_classification" if classes else "text_regression"
    with config.unlocked():
        config.data.sources.sentences = {
            "type": "glue",
            "root": config.data.get_oneway_ref("root"),
            "task": task,
        }
        section = {"num_classes": classes} if classes else {"scale": MAX_SCORE}
        config.objectives[objective] = {**section, "readout": "auto"}
    evaluate(config, which, "score", type="text_task", source="sentences", objective=objective)
    if task == "mnli":
        with config.unlocked():
            config.evals.mismatched = {**config.evals.test, "split": "test_mismatched"}
    return config
