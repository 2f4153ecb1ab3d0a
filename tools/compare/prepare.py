"""Compiles the programs of a comparison before anything is measured, several at the same time.

Calibrations have the device to themselves, one after the other; without this each would compile
while the device idles, and then every fine-tuning run of the first cells. Each config is run for a
few updates with all its evaluators, which fills the compile cache that all cells share, and the
caches of pictures too.
"""

import time

from tools.compare.cells import MIN_STEPS, Cells
from tools.compare.configs import shortened
from tools.compare.rows import Settings

POLL_SECONDS = 0.5


def prepare(settings: Settings, cells: Cells) -> None:
    """Run every config, and every fine-tuning config, for a few updates.

    Several processes may do so on one folder: each run is made by one of them. Runs that start
    from a checkpoint wait for that of the first config.

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
            pretraining[f"{tune.label} from scratch"] = shortened(config, MIN_STEPS)
    for label, config in pretraining.items():
        cells.prepare(label, config)
    if not settings.finetunes:
        return
    first = next(iter(pretraining))
    start = cells.prepare(first, pretraining[first])
    while start is None and cells.can_start():
        time.sleep(POLL_SECONDS)
        start = cells.prepare(first, pretraining[first])
    if start is not None:
        for tune in settings.finetunes:
            config = tune.finetuning(seed=0, init_from=start)
            cells.prepare(tune.label, shortened(config, MIN_STEPS), parent=pretraining[first])
