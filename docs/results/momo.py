"""The study of the shared encoder: stages of a small model, one factor changed at a time.

    python -m tools.compare_stages docs.results.momo --archive=docs/results/momo.jsonl --out=OUT

Data: `scenes`, level easy, 64 px, 50,000 pictures of each source, rendered once (synthetic), and
the texts of ../shared/data (WikiText-2, SST-2 without its labels). Of level hard, questions and
hypotheses need many times these updates (docs/results/momo.md). Of the words 40 % are masked. Every
cell is a chain of stages (configs/momo/), each with a fresh optimiser. What a cell differs in from
`shared` is its name; where stages are left out, the first that is there has what the others would
have cost, by FLOPs. Matching (ITM) more than doubles the FLOPs of an update of stage 3, so that it
has a cell of its own and no part in the others. The peak was chosen with the shared stack: half and
a quarter of it are tried with both models. `one update` has learned nothing before it is tuned. In
`stages 2, 1, 3` what stage 2 learned of words is lost: images alone have no part for them.
"""

import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tools.chains import Study
from tools.columns import Settings, asked, tasks_of

SIZE, TOWERS, SMALLER = "shared_small", "towers_small", "shared_mini"
LEVEL, IMAGES = "easy", 50_000
LANGUAGE = "mlm40"
PEAK = 1e-3
PAIRS = "language+mim+itc"
UPDATES = {1: 1_000, 2: 1_000, 3: 1_000}
BATCH = {"images": 256, "text": 64, "pairs": 128}
TEXTS = "../shared/data/text"
# What an update of stage 3 costs three towers, as a share of what it costs the shared stack, alone
# on an H200, by `tools.bench step --config=docs/results/momo.py:3,towers_small` and shared_small;
# absent until that is measured.
COSTS = pathlib.Path(__file__).parent / "momo_costs.json"
# What is compared with another cell than `shared`: the shared stack at the same peak.
AGAINST = {
    "three towers, half the peak": "half the peak",
    "three towers, half the peak, equal time": "half the peak",
    "stages 2, 3, half the peak": "half the peak",
    "three towers, a quarter of the peak": "a quarter of the peak",
}
# TFLOPs of an update of a stage, by formula (``tools.bench``).
TFLOPS = {1: 0.659, 2: 1.825, 3: 4.389}


def _tuned(source: str) -> dict[str, Any]:
    """Larger batches of more records, for what is learned last: to look at the picture."""
    return {
        "total_steps": 400,
        "data.batch_size": 256,
        f"data.sources.{source}.num_records": 20_000,
        "evals.test.num_examples": 2_000,
    }


# What is asked, with one way of reading pairs and texts for all: images alone have trained none.
TASKS: Mapping[str, Mapping[str, Any]] = {
    "neighbours": {},
    # A fifth of the default, in half of the time, and in the demo at most a point below it.
    "linear probe": {"evals.frozen.max_iterations": 200},
    "classification": {},
    "sst2": {"objectives.text_classification.readout": "bidirectional"},
    "vqa": {"objectives.vqa.readout": "bidirectional", **_tuned("questions")},
    "entailment": {"objectives.entailment.readout": "bidirectional", **_tuned("hypotheses")},
    "zero-shot retrieval": {},
}


def get_config(arg: str) -> ConfigDict:
    """The config of a stage, for ``tools.bench``; ``arg`` is NUMBER,SIZE."""
    number, _, size = arg.partition(",")
    return stage(int(number), size or SIZE)


def stage(
    number: int,
    size: str = SIZE,
    pairs: str = PAIRS,
    updates: int = 0,
    weights: Mapping[str, float] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """The config of a stage.

    Args:
        number: 1, 2 or 3.
        size: of the model.
        pairs: what is learned of pairs.
        updates: 0: those of ``UPDATES``.
        weights: of batches.
        changes: by dotted key.
    """
    module = importlib.import_module(f"configs.momo.stage{number}")
    config: ConfigDict = module.get_config(f"scenes,{size},{LANGUAGE},{pairs},{IMAGES}")
    config.name = f"stage {number}"
    config.total_steps = updates or UPDATES[number]
    config.schedule.peak = PEAK
    config.data.num_edges = 1
    config.checkpoint.every_percent = 100.0
    config.log.tensorboard = False
    for source in config.data.sources.values():
        if source.type == "scenes":
            source.level = LEVEL
    with config.unlocked():
        for name, section in config.data.batches.items():
            section.update(batch_size=BATCH[name])
            if name == "pairs":
                section.num_edges = 1
        for name, weight in (weights or {}).items():
            config.data.batches[name].weight = weight
        for section in config.evals.values():
            section.update(num_draws=1)
    config.update_from_flattened_dict(changes or {})
    return config


def cells() -> dict[str, Sequence[ConfigDict]]:
    """Name -> the configs of its stages; the first is the base."""
    first, second, third = stage(1), stage(2), stage(3)
    before = (first, second)
    half, quarter = ({"schedule.peak": PEAK / part} for part in (2, 4))
    found: dict[str, Sequence[ConfigDict]] = {
        "shared": (*before, third),
        "three towers": [stage(number, TOWERS) for number in (1, 2, 3)],
        "without ITC": (*before, stage(3, pairs="language+mim")),
        "with ITM": (*before, stage(3, pairs=f"{PAIRS}+itm")),
        "stages 2, 3": (stage(2, updates=_of_cost(1, 2)), third),
        "stage 3": (stage(3, updates=_of_cost(1, 2, 3)),),
        "stages 2, 1, 3": (second, first, third),
        "alternating": (*before, _alternating()),
        "images in stage 3": (*before, stage(3, pairs=f"{PAIRS}+images")),
        "a third of the pairs": (*before, _fewer_pairs()),
        "mini": [stage(number, SMALLER) for number in (1, 2, 3)],
        "text 1/3": (*before, stage(3, weights={"text": 1 / 3})),
        "text 3": (*before, stage(3, weights={"text": 3.0})),
        "automatic": (*before, _automatic()),
        "half the peak": [stage(number, changes=half) for number in (1, 2, 3)],
        "three towers, half the peak": [
            stage(number, TOWERS, changes=half) for number in (1, 2, 3)
        ],
        "one update": (stage(3, updates=1),),
        "a quarter of the peak": [stage(number, changes=quarter) for number in (1, 2, 3)],
        "three towers, a quarter of the peak": [
            stage(number, TOWERS, changes=quarter) for number in (1, 2, 3)
        ],
        "stages 2, 3, half the peak": (
            stage(2, updates=_of_cost(1, 2), changes=half),
            stage(3, changes=half),
        ),
    }
    if COSTS.exists():
        share = json.loads(COSTS.read_text())["towers_per_shared"]
        updates = round(UPDATES[3] / share)
        found["three towers, equal time"] = [
            *(stage(number, TOWERS) for number in (1, 2)),
            stage(3, TOWERS, updates=updates),
        ]
        found["three towers, half the peak, equal time"] = [
            *(stage(number, TOWERS, changes=half) for number in (1, 2)),
            stage(3, TOWERS, updates=updates, changes=half),
        ]
    return found


def _of_cost(*stages: int) -> int:
    """Updates of the last of these stages that cost what all of them cost."""
    return round(sum(UPDATES[n] * TFLOPS[n] for n in stages) / TFLOPS[stages[-1]])


def _alternating() -> ConfigDict:
    """As many samples of each batch, one batch an update."""
    return stage(3, updates=2 * UPDATES[3], changes={"data.alternate": "uniform"})


def _fewer_pairs() -> ConfigDict:
    """The same updates on a third of the records."""
    return stage(3, changes={"data.sources.captions.num_records": IMAGES // 3})


def _automatic() -> ConfigDict:
    """Weights that follow what is gained on held-out records, twenty times."""
    config = stage(3)
    with config.unlocked():
        for name in ("pairs", "text"):
            config.mixture.metrics[name] = f"heldout_{name}/loss"
        for section in config.evals.values():
            section.every_percent = 5.0
    return config


def study() -> Study:
    """What ``tools.compare_stages`` does."""
    tasks = asked(tasks_of("scenes", TEXTS, ["sst2"]), TASKS)
    settings = Settings(
        seeds=(),
        steps=400,
        batch_size=128,
        records=8_000,
        examples=1_000,
        level=LEVEL,
        rate=3e-4,
        num_edges=1,
        selections=1,
        out=pathlib.Path(),
    )
    throughout = ("shared", "three towers")
    return Study(cells(), tasks, throughout, settings, early=("image", "text"), against=AGAINST)
