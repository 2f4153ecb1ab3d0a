"""What the runs of compression.md share: small models on hard scenes, whole or compressed images.

    python -m vlp_jax.main --config=docs/results/compression.py:moco_v3,derived+20 --workdir=DIR

The argument is OBJECTIVE[,ARM[+TAIL]]. OBJECTIVE: `moco_v3`, `simclr` or `dino` on images alone;
`flm` or `ar` on images and their captions. ARM is how images are encoded, by the costs in
compression/OBJECTIVE/ (of `tools.gradient_error`, see compression.sh), and TAIL how many percent of
the budget, at its end, go to whole images:

    whole          all of them (by default); its run is the pilot whose gradients are looked at
    derived        the schedule derived there
    reversed       the buckets of that schedule from the last to the first
    random         the same, drawn for each update
    p4@64k64       a constant bucket, one of those that were measured
    patches        half of the budget on patches of 16 px, half on those of 8
    small_first    half of the budget on small pictures, half on large ones, a third of the patches
                   of both (the order of OpenVision 2, arXiv 2509.01644, which is AR's own recipe)
"""

import itertools
import json
import pathlib

from ml_collections import ConfigDict

from configs import invariance, scenes

_STAGED = {"patches": ("p16@64", "p8@64"), "small_first": ("p4@32k21", "p4@64k80")}
_BUCKETS = ("p16@64", "p8@64k32", "p8@64", "p4@64k64", "p4@64k128", "whole")
_KEY_WHOLE = ("p4@64k64/whole",)  # patches of one of two views are dropped
PEAKS = {"moco_v3": 6e-4, "simclr": 1e-3, "dino": 1e-3, "flm": 1e-3, "ar": 1e-3}
LANGUAGE = ("flm", "ar")
FOLDER = pathlib.Path("docs/results/compression")  # from the repository's root, as all commands


def buckets_of(objective: str) -> tuple[str, ...]:
    """The buckets whose costs and gradient errors are measured."""
    own = {"ar": _STAGED["small_first"], "flm": ()}.get(objective, _KEY_WHOLE)
    return (*own, *_BUCKETS)


def get_config(arg: str) -> ConfigDict:
    """The config of a run; ``arg`` is OBJECTIVE or OBJECTIVE,ARM or OBJECTIVE,ARM+TAIL."""
    objective, _, arm = arg.partition(",")
    if objective in LANGUAGE:
        config = scenes.get_config(f"{objective},mini,100000")
        # A patch that is dropped costs nothing only where no convolution reads it.
        config.model.image.stem = "patch"
        config.data.num_edges = 2
    else:
        config = invariance.get_config(f"{objective},mini")
    config.total_steps = 2_500
    config.schedule.peak = PEAKS[objective]
    config.model.image.patch_size = 4
    config.data.threads = 8
    config.data.prefetch = 16
    config.log.every_steps = 100
    config.checkpoint.best_metric = ""
    with config.unlocked():
        if objective in LANGUAGE:
            config.evals = {"heldout": {"source": "scenes", "num_examples": 1000}}
        else:
            config.data.sources.scenes.update(num_records=100_000, cache=True)
            probe = {"labels": ("shape", "texture"), "max_iterations": 100}
            config.evals = {
                "neighbours": {"source": "scenes"},
                "linear_probe": {"source": "scenes", **probe},
            }
    arm, _, tail = (arm or "whole").partition("+")
    _compress(config.compression, FOLDER / objective, arm)
    config.compression.tail_percent = float(tail or 0)
    return config


def _compress(section: ConfigDict, folder: pathlib.Path, arm: str) -> None:
    """Fill in ``config.compression``."""
    if arm == "whole":
        return
    if not (folder / "schedule.json").exists():
        raise ValueError(
            f"{folder} holds no costs and no schedule; make them by "
            f"docs/results/compression.sh errors {folder.name} OUT"
        )
    if arm == "derived":
        section.file = str(folder / "schedule.json")
    elif arm in ("reversed", "random"):
        derived = json.loads((folder / "schedule.json").read_text())
        shares = [0.0] * len(derived["buckets"])
        for (start, _), (end, number) in itertools.pairwise([(0.0, None), *derived["stages"]]):
            shares[number] += end - start
        section.update(schedule=arm, buckets=tuple(derived["buckets"]), shares=tuple(shares))
        section.costs = tuple(derived["costs"])
    else:
        costs = json.loads((folder / "results.json").read_text())["costs"]
        buckets = _STAGED.get(arm, (arm,))
        if not costs.keys() >= set(buckets):
            raise ValueError(
                f"--config=docs/results/compression.py: {arm!r} is no arm, nor a bucket that "
                f"{folder}/results.json has measured ({', '.join(costs)}); what is measured now is "
                f"added by docs/results/compression.sh errors {folder.name} OUT"
            )
        section.update(schedule="staged", buckets=buckets)
        section.costs = tuple(costs[bucket] for bucket in buckets)
