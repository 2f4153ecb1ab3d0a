"""Compiles the programs of a comparison before anything is measured, several at the same time.

Calibrations have the device to themselves, one after the other; without this each would compile
while the device idles, and then every fine-tuning run of the first cells. Each config is run for a
few updates with all its evaluators, which fills the compile cache that all cells share, and the
caches of pictures too.
"""

import itertools
import time

from ml_collections import ConfigDict

from tools.compare.cells import MIN_STEPS, Cells
from tools.compare.configs import shortened
from tools.compare.rows import Settings

POLL_SECONDS = 0.5


def prepare(settings: Settings, cells: Cells) -> None:
    """Run every config, and every fine-tuning config from each kind of them, for a few updates.

    What a fine-tuning run compiles depends on the run that it starts from: the objective there
    decides how the model is read. Those that differ in other sections alone, such as the schedule
    of what they encode, are read alike, and one of them stands for all. Several processes may
    prepare one folder: each run is made by one of them, and those that start from a checkpoint
    wait for it.

    Args:
        settings: of the comparison.
        cells: of its folder.
    """
    pretraining = {
        named.label: named.run(
            steps=MIN_STEPS, seed=0, step_seconds=1.0, save_seconds=MIN_STEPS, overrides={}
        )
        for named in settings.configs
    }
    if settings.scratch:
        for tune in settings.finetunes:
            config = tune.from_scratch(seed=0, pretraining=settings.pretraining)
            cells.prepare(f"{tune.label} from scratch", shortened(config, MIN_STEPS))
    for label, config in pretraining.items():
        cells.prepare(label, config)
    alike: dict[tuple[str, ...], list[str]] = {}
    for label, config in pretraining.items():
        alike.setdefault(_read_by_finetuning(config), []).append(label)
    pending = list(itertools.product(alike, settings.finetunes))
    while pending and cells.can_start():
        waiting = []
        cells.busy.clear()
        for kind, tune in pending:
            label = alike[kind][0]
            start = cells.prepare(label, pretraining[label])
            if start is None:
                waiting.append((kind, tune))
                continue
            config = shortened(tune.finetuning(seed=0, init_from=start), MIN_STEPS)
            cells.prepare(f"{tune.label} from {label}", config, parent=pretraining[label])
        if waiting == pending:
            if cells.busy:
                time.sleep(POLL_SECONDS)
            else:  # nobody is at it: it has brought a worker down, and the next one stands in
                for kind in {kind for kind, _ in waiting}:
                    alike[kind].pop(0)
        pending = [(kind, tune) for kind, tune in waiting if alike[kind]]


def _read_by_finetuning(config: ConfigDict) -> tuple[str, ...]:
    """What of a pretraining config a fine-tuning run takes over, as JSON."""
    sections = ("model", "objectives", "data", "tokenizer")
    return tuple(config[section].to_json_best_effort() for section in sections)
