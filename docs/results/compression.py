"""What the runs of compression.md share: small models on hard scenes, whole or compressed images.

    python -m vlp_jax.main --config=docs/results/compression.py:moco_v3,derived --workdir=DIR

The argument is OBJECTIVE[,ARM]: `moco_v3`, `simclr` or `dino`, and how its images are encoded, by
the costs in compression/OBJECTIVE/ (of `tools.gradient_error`, see compression.sh):

    whole          all of them (by default); its run is the pilot whose gradients are looked at
    derived        the schedule derived there; derived20: its last 20 % on whole images
    reversed       the buckets of that schedule from the last to the first
    random         the same, drawn for each update
    p4@64k64       a constant bucket, one of BUCKETS
"""

import itertools
import json
import pathlib
import re

from ml_collections import ConfigDict

from configs import invariance

BUCKETS = ("p16@64", "p8@64k32", "p8@64", "p4@64k64", "p4@64k128", "whole")
PEAKS = {"moco_v3": 6e-4, "simclr": 1e-3, "dino": 1e-3}
FOLDER = pathlib.Path("docs/results/compression")  # from the repository's root, as all commands


def get_config(arg: str) -> ConfigDict:
    """The config of a run; ``arg`` is OBJECTIVE or OBJECTIVE,ARM."""
    objective, _, arm = arg.partition(",")
    config = invariance.get_config(f"{objective},mini")
    config.total_steps = 2_500
    config.schedule.peak = PEAKS[objective]
    config.model.image.patch_size = 4
    config.data.threads = 8
    config.data.prefetch = 16
    config.log.every_steps = 100
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.data.sources.scenes.update(num_records=100_000, cache=True)
        config.evals = {
            "neighbours": {"source": "scenes"},
            "linear_probe": {
                "source": "scenes",
                "labels": ("shape", "texture"),
                "max_iterations": 100,
            },
        }
    _compress(config.compression, FOLDER / objective, arm or "whole")
    return config


def _compress(section: ConfigDict, folder: pathlib.Path, arm: str) -> None:
    """Fill in ``config.compression``."""
    if arm == "whole":
        return
    if match := re.fullmatch(r"derived(\d*)", arm):
        section.file = str(folder / "schedule.json")
        section.tail_percent = float(match.group(1) or 0)
    elif arm in ("reversed", "random"):
        derived = json.loads((folder / "schedule.json").read_text())
        shares = [0.0] * len(derived["buckets"])
        for (start, _), (end, number) in itertools.pairwise([(0.0, None), *derived["stages"]]):
            shares[number] += end - start
        section.update(schedule=arm, buckets=tuple(derived["buckets"]), shares=tuple(shares))
        section.costs = tuple(derived["costs"])
    elif arm in BUCKETS:
        costs = json.loads((folder / "results.json").read_text())["costs"]
        section.update(schedule="constant", buckets=(arm,), costs=(costs[arm],))
    else:
        raise ValueError(f"--config=docs/results/compression.py: {arm!r} is no arm")
