"""What the runs of compression.md share: small models on hard scenes, whole or compressed images.

    python -m vlp_jax.main --config=docs/results/compression.py:moco_v3,derived+20 --workdir=DIR

The argument is OBJECTIVE[,ARM[+TAIL][,photographs]]. OBJECTIVE: `moco_v3`, `simclr` or `dino` on
images alone; `flm` or `ar` on images and their captions. With `photographs` it trains on the
1,090 training pictures of ../shared/data, those with captions and those with labels, and is read by
the ten classes of the latter. TAIL is how many percent of the budget, at its end, go to whole
images, and ARM how they are encoded before, by what compression.sh has measured and derived in
compression/OBJECTIVE/:

    whole          all of them (by default); its run is the pilot whose gradients are looked at
    whole8         the same by a tower whose own patches have 8 px, not 4: do larger patches help
                   for being fewer, or because these pictures want no smaller ones?
    derived        the schedule that follows from their errors
    reversed       the buckets of that schedule from the last to the first
    random         the same, drawn for each update
    p4@64k64       a constant bucket, one whose cost was measured
    small_first    half of the budget on small pictures, half on large ones, a third of the patches
                   of both (the order of OpenVision 2, arXiv 2509.01644, which is AR's own recipe)
"""

import itertools
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from configs import invariance, scenes

_STAGED = {"small_first": ("p4@32k21", "p4@64k80")}
_BUCKETS = ("p16@64", "p8@64k32", "p8@64", "p4@64k64", "p4@64k128", "whole")
_KEY_WHOLE = "p4@64k64/p4@64"  # patches of one of two views are dropped
_ORDERS = {"derived": "staged", "reversed": "reversed", "random": "random"}
_PEAKS = {"moco_v3": 6e-4, "simclr": 7e-4, "dino": 7e-4, "flm": 1e-3, "ar": 1e-3}
# Chosen after `compression.sh recipe`; those of moco_v3 and dino are none of its candidates
# (compression.md).
_RECIPES: dict[str, dict[str, Any]] = {
    "moco_v3": {"temperature": 0.1, "momentum": 0.9, "augment": {"scale": (0.3, 1.0)}},
    "simclr": {"temperature": 0.05, "augment": {"scale": (0.3, 1.0)}},
    "dino": {
        "centring": "sinkhorn",
        "prototypes": 8192,
        "temperature": 0.1,
        "teacher_temperature": 0.02,
        "first_teacher_temperature": 0.02,
        "teacher_warmup": 0.0,
        "momentum": 0.9,
        "head_norm": True,
        "augment": {"scale": (0.3, 1.0)},
        "augment_small": {"scale": (0.15, 0.5)},
    },
}
# Of a pilot: what whole images have in the budget of compression.sh, on an H100.
_UPDATES = {"moco_v3": 5_700, "simclr": 6_100, "dino": 4_100, "flm": 3_500, "ar": 4_700}
LANGUAGE = ("flm", "ar")
PHOTOGRAPHS = "photographs"
FOLDER = pathlib.Path("docs/results/compression")  # from the repository's root, as all commands


def buckets_of(objective: str) -> tuple[str, ...]:
    """The buckets whose costs and gradient errors are measured."""
    own = {"ar": _STAGED["small_first"], "flm": ()}.get(objective, (_KEY_WHOLE,))
    return (*own, *_BUCKETS)


def arms_of(objective: str) -> tuple[str, ...]:
    """What is compared with whole images; a derived schedule of one bucket has one order."""
    if objective in LANGUAGE:
        return ("derived", "p8@64+20", "whole8")
    buckets, _ = _derived(FOLDER / objective)
    others = ["p8@64+20", "p4@64k64+20", "whole8"]
    if len(buckets) == 1:
        return ("derived+20", *(arm for arm in others if arm != f"{buckets[0]}+20"))
    return ("derived+20", "reversed+20", "random+20", *others)


def costs_of(objective: str) -> tuple[float, ...]:
    """What an update of each of ``buckets_of`` costs, as a share of one of whole images."""
    known = _costs(FOLDER / objective)
    return tuple(known[bucket] for bucket in buckets_of(objective))


def get_config(arg: str) -> ConfigDict:
    """The config of a run; ``arg`` is OBJECTIVE[,ARM[+TAIL][,photographs]]."""
    parts = arg.split(",")
    objective, arm, data = [*parts, "", ""][:3]
    if len(parts) > 3 or data not in ("", PHOTOGRAPHS) or (data and objective in LANGUAGE):
        raise ValueError(
            f"--config=docs/results/compression.py:{arg}: write OBJECTIVE[,ARM[+TAIL]"
            f"[,{PHOTOGRAPHS}]]; {' and '.join(LANGUAGE)} learn from scenes alone"
        )
    if objective in LANGUAGE:
        config = scenes.get_config(f"{objective},mini,100000")
        # A patch that is dropped costs nothing only where no convolution reads it.
        config.model.image.stem = "patch"
        config.data.num_edges = 2
    else:
        config = invariance.get_config(f"{objective},mini")
    config.total_steps = _UPDATES[objective]
    config.schedule.peak = _PEAKS[objective]
    config.model.image.patch_size = 4
    config.data.threads = 8
    config.data.prefetch = 16
    config.log.every_steps = 100
    config.checkpoint.best_metric = ""
    with config.unlocked():
        if objective in LANGUAGE:
            config.evals = {"heldout": {"source": "scenes", "num_examples": 1000}}
        else:
            config.objectives[objective].update(_RECIPES[objective])
            if objective == "dino":  # without what held it back on a CPU
                config.model.image.drop_path = 0.0
                config.optim.final_weight_decay = None
            if objective == "moco_v3":  # a frozen projection cannot adapt to larger patches
                config.optim.groups.patch_projection.rate_factor = 1.0
            labelled, probe = "scenes", {"labels": ("shape", "texture"), "max_iterations": 100}
            config.data.sources.scenes.update(num_records=100_000, cache=True)
            if data:
                labelled, probe = "labels", {"max_iterations": 100}
                config.data.root = "../shared/data"
                config.data.sources = {
                    # The weights are the numbers of pictures, so that all are seen alike.
                    source: {
                        "type": kind,
                        "root": config.data.get_oneway_ref("root"),
                        "missing_images": "error",
                        "weight": weight,
                        "cache": True,
                    }
                    for source, kind, weight in (
                        (PHOTOGRAPHS, "folder", 740.0),
                        ("labels", "image_labels", 350.0),
                    )
                }
            config.evals = {
                "neighbours": {"source": labelled},
                "linear_probe": {"source": labelled, **probe},
            }
    if data:
        config.name = f"{config.name}_{data}"
    if arm == "whole8":
        config.model.image.patch_size, arm = 8, "whole"
    arm, _, tail = (arm or "whole").partition("+")
    _compress(config.compression, FOLDER / objective, arm)
    config.compression.tail_percent = float(tail or 0)
    return config


def _compress(section: ConfigDict, folder: pathlib.Path, arm: str) -> None:
    """Fill in ``config.compression``."""
    if arm == "whole":
        return
    buckets, shares = _STAGED.get(arm, (arm,)), ()
    if arm in _ORDERS:
        buckets, shares = _derived(folder)
    known = _costs(folder)
    if not known.keys() >= set(buckets):
        raise ValueError(
            f"--config=docs/results/compression.py: {arm!r} is no arm, nor a bucket whose cost "
            f"{folder}/costs.json has ({', '.join(known)})"
        )
    section.update(schedule=_ORDERS.get(arm, "staged"), buckets=buckets, shares=shares)
    section.costs = tuple(known[bucket] for bucket in buckets)


def _costs(folder: pathlib.Path) -> dict[str, float]:
    """What was measured of an update of each bucket."""
    costs = _read(folder, "costs")
    return dict(zip(costs["buckets"], costs["costs"], strict=True))


def _derived(folder: pathlib.Path) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The buckets of the schedule that was derived for an objective, and the share of each."""
    schedule = _read(folder, "schedule")
    shares = dict.fromkeys(schedule["buckets"], 0.0)
    for (start, _), (end, number) in itertools.pairwise([(0.0, None), *schedule["stages"]]):
        shares[schedule["buckets"][number]] += end - start
    return tuple(shares), tuple(shares.values())


def _read(folder: pathlib.Path, what: str) -> dict[str, Any]:
    """What was measured for an objective: its costs, or the schedule."""
    file = folder / f"{what}.json"
    if not file.exists():
        command = {"costs": "costs", "schedule": "errors"}[what]
        raise ValueError(
            f"{file} is absent; make it by docs/results/compression.sh {command} {folder.name} OUT"
        )
    return dict(json.loads(file.read_text()))
