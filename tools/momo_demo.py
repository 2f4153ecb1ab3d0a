"""Three tiny stages of the shared encoder on a CPU, and the three columns after each.

    make momo-demo
    python -m tools.momo_demo --workdir=runs/momo

Stage 1 reads images, stage 2 images and texts, stage 3 texts and images with their captions
(configs/momo/). Data: `scenes`, level easy, 32 px, made as they are needed, and the text of
../shared/data. After each stage, and of the same model before the first, the table tells the image
column (the shape of the largest object), the text column (SST-2) and the multimodal one
(questions), each fine-tuned for a few updates, and retrieval by the run's own contrast. The frozen
class token would tell little: masked patches alone do not train what it says (MAE fine-tunes well
and probes badly, too). Hardware: 2 CPU cores; about a quarter of an hour.
"""

import contextlib
import importlib
import json
import pathlib
import time
from collections.abc import Sequence

import jax
import rich
from absl import app, flags, logging
from ml_collections import ConfigDict

from tools.columns import (
    Score,
    Settings,
    evaluate,
    header_of,
    markdown,
    rows_of,
    tasks_of,
    terminal,
)
from vlp_jax.infra.command import bad_input, parse_flags
from vlp_jax.infra.files import write_text
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare

STEPS = {1: 800, 2: 400, 3: 250}
BATCH = {"images": 64, "text": 16, "pairs": 32}
TASKS = ("classification", "sst2", "vqa", "zero-shot retrieval")
TEXTS = "../shared/data/text"

_WORKDIR = flags.DEFINE_string("workdir", "runs/momo", "folder of the runs")


def stage_config(stage: int) -> ConfigDict:
    """The config of a stage, small enough for a CPU.

    Args:
        stage: 1, 2 or 3.
    """
    config = importlib.import_module(f"configs.momo.stage{stage}").get_config("scenes,shared_tiny")
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
                section.level = "easy"
        for name, section in config.data.batches.items():
            section.batch_size = BATCH[name]
        if "text" in config.data.batches:
            config.data.batches.text.update(max_text_length=64, text_edges=(64,))
        if "pairs" in config.data.batches:
            config.data.batches.pairs.num_edges = 1
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
    with bad_input():
        if not pathlib.Path(TEXTS).is_dir():
            raise ValueError(f"{TEXTS} does not exist; the demo reads its texts: put some there")
        settings = Settings(
            seeds=1,
            steps=150,
            batch_size=64,
            records=2000,
            examples=500,
            level="easy",
            rate=1e-3,
            num_edges=1,
            out=out,
        )
        tasks = [task for task in tasks_of("scenes", TEXTS, ["sst2"]) if task.name in TASKS]
        scores: dict[str, dict[str, Score]] = {}
        previous: pathlib.Path | None = None
        for stage in (0, 1, 2, 3):
            workdir = out / ("untrained" if stage == 0 else f"stage{stage}")
            if stage == 0:
                _save_untrained(workdir)
            else:
                config = stage_config(stage)
                config.compile_cache = str(out / "compile_cache")
                config.init_from = str(previous or "")
                _train(config, workdir)
                previous = workdir
            found = {task.name: evaluate(workdir, task, settings) for task in tasks}
            scores[workdir.name] = {name: score for name, score in found.items() if score}
            header, rows = header_of(tasks), rows_of(scores, tasks, seeds=1)
            write_text(out / "table.md", markdown(header, rows))
            rich.print(terminal(header, rows))
            print(f"{time.perf_counter() - began:.0f} s", flush=True)
    print(json.dumps({"workdir": str(out), "table": str(out / "table.md")}))


def _save_untrained(workdir: pathlib.Path) -> None:
    """Keep the fresh parameters of the last stage, which has all parts of the model."""
    setup = prepare(stage_config(3), workdir)
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, setup.first_state()[0], {}, setup.checkpoint_extra())
        checkpoints.wait()


def _train(config: ConfigDict, workdir: pathlib.Path) -> None:
    setup = prepare(config, workdir)
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        train(setup)
    jax.clear_caches()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
