"""What the configs of downstream tasks share.

The recipe follows the fact sheet of Free Language Modeling, section 5: AdamW with weight decay
0.01, 10 % warm-up, linear decay to 0, new heads at a higher rate than the pretrained parts.
Selection is on the validation split, for classification on its first 2,000 examples in the order of
the file; the test split is scored once, whole, on the best checkpoint.
"""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.train.config import default_config
from vlp_jax.transfer.methods import METHODS, SEARCH, set_method

NUM_EXAMPLES = 2000  # of the validation split; of the test split, where that is made and has no end


def base(
    name: str, arg: str | None, data: Collection[str], size: str = "small"
) -> tuple[ConfigDict, str]:
    """A config without source, objective and evaluators.

    Args:
        name: of the task.
        arg: ``DATA[,SIZE[,METHOD]]``: one of ``data``, the model's size where nothing is pretrained
            (``init_from`` brings its own geometry), and what is tuned, a key of
            ``transfer.methods.METHODS``; by default, all.
        data: what the task can be trained on; the first is the default.
        size: of the model, where the argument names none.

    Returns:
        The config, and which data.

    Raises:
        ValueError: the argument names something else.
    """
    given = (arg or "").split(",")
    which = given[0] or next(iter(data))
    chosen, method = [*given[1:], "", ""][:2]
    if which not in data or len(given) > 3 or (method and method not in METHODS):
        raise ValueError(
            f"--config=configs/transfer/{name}.py:{arg}: write DATA[,SIZE[,METHOD]], with DATA one "
            f"of {', '.join(data)} and METHOD one of {', '.join(METHODS)}"
        )
    config = default_config(chosen or size)
    config.name = f"{name}_{which}"
    config.adopt_model = True
    config.data.max_text_length = 48
    config.schedule.warmup_percent = 10.0
    config.schedule.peak = 1e-4
    config.optim.clip_norm = 1.0
    config.checkpoint.every_percent = 20.0
    config.log.every_steps = 20
    with config.unlocked():
        config.optim.groups.heads = {
            "pattern": "(_head|_image_type)(/|$)",
            "rate_factor": 5.0,
        }
    if method:
        set_method(config, method)
        if method == SEARCH:
            config.search.skipped = 2  # some sizes have four blocks of fusion
            config.search.prior = 1.0  # docs/results/pcetl.md, "Retrieval around the first base"
    if which == "scenes":
        config.data.image_size = 64
        config.data.batch_size = 256
        config.total_steps = 3000
        config.schedule.peak = 3e-4
    elif which == "pack":
        config.data.root = "../shared/data"
        config.data.image_size = 64
        config.data.batch_size = 64
        config.total_epochs = 10.0
    else:
        config.data.batch_size = 256
        config.data.image_size = 384
        config.data.threads = 16
        config.data.prefetch = 32
        config.total_epochs = 10.0
        config.schedule.peak = 1e-5
        config.optim.groups.heads.rate_factor = 10.0
    return config, which


def evaluate(config: ConfigDict, which: str, best: str, **section: Any) -> None:
    """Add the same evaluator on the validation split, as it goes, and on the test split, at last.

    Args:
        config: changed.
        which: data; the test split of listed data is scored whole, for a part of it in the order
            of the file is no score to compare with others'.
        best: the metric that selects, such as ``accuracy``.
        section: of the evaluator; its ``num_examples`` is ``NUM_EXAMPLES`` by default.
    """
    section = {"num_examples": NUM_EXAMPLES, **section}
    test = section if which == "scenes" else {**section, "num_examples": 0}
    with config.unlocked():
        config.evals.val = {**section, "split": "val", "every_percent": 20.0}
        config.evals.test = {**test, "split": "test", "on": "best"}
    config.checkpoint.best_metric = f"val/{best}"


def explain(config: ConfigDict, source: str, objective: str) -> None:
    """Add maps of what the answers of the best checkpoint depend on, to the report."""
    with config.unlocked():
        config.evals.explain = {"source": source, "objective": objective, "on": "best"}


def scenes(kind: str) -> dict[str, Any]:
    """The section of a source of hard scenes, rendered once."""
    return {"type": kind, "level": "hard", "num_records": 50_000, "cache": True}


def captions(config: ConfigDict, which: str) -> None:
    """Add the source ``captions`` of captioning and retrieval: hard scenes, or a folder."""
    with config.unlocked():
        if which == "scenes":
            config.data.sources.captions = scenes("scenes")
        else:
            config.data.sources.captions = {
                "type": "folder",
                "root": config.data.get_oneway_ref("root"),
                "missing_images": "error",
            }


def num_images(which: str) -> int:
    """Images of the validation split that are captioned or ranked, at most; of scenes also of test.

    These are all that the pack (130), Karpathy's split of COCO (5,000) and that of Flickr30k (some
    1,000) have.
    """
    return {"scenes": 1000, "pack": 130, "coco": 5000}[which]
