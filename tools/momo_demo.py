"""Three tiny stages of the shared encoder on a CPU, and the three columns after each.

    make momo-demo
    python -m tools.momo_demo --workdir=runs/momo

Stage 1 reads images, stage 2 images and texts, stage 3 texts and images with their captions
(configs/momo/). Data: `scenes`, level easy, 32 px, rendered once (synthetic), and the text of
../shared/data. After each stage, and of the same model before the first, the table tells the image
column (a linear probe of the frozen stack), the text column (SST-2) and the multimodal one
(questions), fine-tuned for a few updates, and retrieval by the run's own contrast. Hardware: 2 CPU
cores; eight minutes, more where others use them. Scores: docs/results/momo.md.
"""

import importlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich
from absl import app, flags, logging
from ml_collections import ConfigDict

from tools.columns import (
    Score,
    Settings,
    asked,
    evaluate,
    tasks_of,
    train_to_end,
    write_table,
)
from vlp_jax.infra.command import bad_input, parse_flags
from vlp_jax.infra.compilation import enable_compile_cache
from vlp_jax.train.setup import prepare

STEPS = {1: 1200, 2: 400, 3: 200}
# Masked words learn no more than how often words occur in so few updates.
LANGUAGE = "ar"
# Matching (ITM) more than doubles what an update costs.
PAIRS = "language+mim+itc"
BATCH = {"images": 32, "text": 32, "pairs": 32}
# What is asked after each stage, with keys of its config: of all runs in the same way, of those too
# that have read no text yet.
TASKS: Mapping[str, Mapping[str, Any]] = {
    "linear probe": {"evals.frozen.max_iterations": 200},
    "sst2": {
        "data.max_text_length": 32,
        "objectives.text_classification.readout": "forward",
        "evals.test.num_examples": 500,
    },
    "vqa": {"objectives.vqa.readout": "forward"},
    "zero-shot retrieval": {},
}
TEXTS = "../shared/data/text"

_WORKDIR = flags.DEFINE_string("workdir", "runs/momo", "folder of the runs")


def stage_config(stage: int) -> ConfigDict:
    """The config of a stage, small enough for a CPU.

    Args:
        stage: 1, 2 or 3.
    """
    config = importlib.import_module(f"configs.momo.stage{stage}").get_config(
        f"scenes,shared_tiny,{LANGUAGE},{PAIRS}"
    )
    config.total_steps = STEPS[stage]
    config.model.dtype = "float32"
    config.model.image.update(depth=2, patch_size=8, activation="gelu_tanh")
    config.model.text.max_positions = 64
    config.data.image_size = 32
    config.data.max_text_length = 24
    config.data.threads, config.data.prefetch = 1, 4
    config.schedule.peak = 2e-3
    config.tokenizer.vocab_size = 2048
    with config.unlocked():
        for section in config.data.sources.values():
            if section.type == "scenes":
                section.update(level="easy", num_records=8000, cache=True)
        for name, section in config.data.batches.items():
            section.batch_size = BATCH[name]
        if "text" in config.data.batches:
            config.data.batches.text.update(max_text_length=64, text_edges=(64,))
        if "pairs" in config.data.batches:
            config.data.batches.pairs.num_edges = 1
        if "mim" in config.objectives and stage < 3:
            # Of 16 patches a quarter says too little of the others; crops keep objects whole.
            config.objectives.mim.update(kept_share=0.5, augment={"scale": (0.6, 1.0)})
        config.evals = {}
    config.checkpoint.every_percent = 100.0
    config.log.tensorboard = False
    return config


def main(argv: Sequence[str]) -> None:
    """Train the stages one after the other, and print the table after each."""
    del argv
    logging.set_verbosity(logging.ERROR)
    began = time.perf_counter()
    out = pathlib.Path(_WORKDIR.value)
    enable_compile_cache(out / "compile_cache")
    with bad_input():
        if not pathlib.Path(TEXTS).is_dir():
            raise ValueError(
                f"{TEXTS} does not exist; the demo reads its texts: put WikiText-2 and SST-2 "
                "there, as wikitext*.txt, sst2_train.tsv and sst2_validation.tsv"
            )
        settings = Settings(
            seeds=(0,),
            steps=100,
            batch_size=64,
            records=1000,
            examples=500,
            level="easy",
            rate=1e-3,
            num_edges=1,
            selections=1,
            out=out,
        )
        # One vocabulary for all: images alone have no text to train one on.
        tokenizer = {"tokenizer.path": str(out / "untrained")}
        changes = {name: {**keys, **tokenizer} for name, keys in TASKS.items()}
        tasks = asked(tasks_of("scenes", TEXTS, ["sst2"]), changes)
        scores: dict[str, dict[str, Score]] = {}
        previous: pathlib.Path | None = None
        for stage in (0, 1, 2, 3):
            workdir = out / ("untrained" if stage == 0 else f"stage{stage}")
            if stage == 0:
                _save_untrained(workdir)
            else:
                config = stage_config(stage)
                config.compile_cache = str(out / "compile_cache")
                config.data.cache_dir = str(out / "data")
                config.init_from = str(previous or "")
                config.tokenizer.path = str(out / "untrained")
                train_to_end(config, workdir)
                jax.clear_caches()
                previous = workdir
            found = {task.name: evaluate(workdir, task, settings) for task in tasks}
            scores[workdir.name] = {name: score for name, score in found.items() if score}
            rich.print(write_table(out / "table.md", scores, tasks))
            print(f"{time.perf_counter() - began:.0f} s", flush=True)
    print(json.dumps({"workdir": str(out), "table": str(out / "table.md")}))


def _save_untrained(workdir: pathlib.Path) -> None:
    """Keep the fresh parameters of stage 2: of the stack, whatever it is to read."""
    setup = prepare(stage_config(2), workdir)
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, setup.first_state()[0], {}, setup.checkpoint_extra())
        checkpoints.wait()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
