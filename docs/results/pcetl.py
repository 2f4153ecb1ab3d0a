"""The study of ways to tune: a base, three tasks, and what each way costs and scores.

    docs/results/pcetl.sh base OUT, and what else it does
    python -m tools.compare_stages docs.results.pcetl --archive=... --seeds=6 --max_seconds=0
    python -m tools.pareto docs.results.pcetl --archive=... --out=docs/results/pcetl_pareto.png

Data: `scenes`, level hard, 64 px (synthetic): 200,000 captioned pictures for the base, 50,000 of
each task, rendered once. The base is FLM's encoder of size `small`, whose 16 blocks (8 of the image
tower, 4 + 4 of texts) can all be skipped, and all have what a way adds. Every way of a task tunes
the same base (``BASE_SEEDS``), with the updates, the batch and the data of the others, and its own
rate, which was chosen on the validation split of each task (``rates``). Beside it stand every unit
left out alone (``alone``), searches by worse labels (``robustness``), a second base
(``second_base``), and what heads do at a higher rate (``faster_heads``).
"""

import dataclasses
import importlib
import json
import math
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from configs import scenes
from tools.columns import Settings
from tools.jobs import Run, read_archive
from tools.tuning_study import TuningStudy
from vlp_jax.infra.command import argument_parser, bad_input
from vlp_jax.models.sizes import build_model
from vlp_jax.transfer.methods import SEARCH

SIZE, IMAGES = "small", 200_000
BASE_UPDATES, BASE_PEAK = 5_000, 1e-3
# Task -> seed of the base that it tunes, 0 by default. Those of seeds 0 and 1 are no more: they
# were lost with the machines that held them before NLVR2 was done, and a GPU that adds up in any
# order does not make them again.
BASE_SEEDS = {"nlvr2": 2}
SECOND_BASE = 1  # seed of the base of ``second_base``
BATCH = 128
UPDATES = {"vqa": 1_500, "nlvr2": 2_500, "retrieval": 800}
FIGURES = {
    "vqa": ("test/accuracy",),
    "nlvr2": ("test/accuracy",),
    "retrieval": ("test/reranked/i2t_r1", "test/reranked/t2i_r1"),
}
# Task -> of a run's metrics, by whose mean ``choose`` takes one of the rates that were tried.
VALIDATED = {
    "vqa": ("val/accuracy",),
    "nlvr2": ("val/accuracy",),
    "retrieval": ("val/reranked/i2t_r1", "val/reranked/t2i_r1"),
}
# Method -> task -> peak learning rates that are tried, of which ``choose`` takes one. Full
# tuning of NLVR2 learns at lower ones than VQA (docs/results/transfer.md). What skips units has the
# rate of what it tunes, and the search that of adapters.
TRIED: dict[str, dict[str, tuple[float, ...]]] = {
    "full": {"vqa": (1e-4, 3e-4), "nlvr2": (3e-5, 1e-4), "retrieval": (1e-4, 3e-4)},
    "head": {"vqa": (3e-4, 1e-3), "nlvr2": (3e-4, 1e-3), "retrieval": (1e-3, 1e-2)},
    "bitfit": {"vqa": (1e-3, 3e-3), "nlvr2": (1e-3, 3e-3), "retrieval": (3e-3, 1e-2)},
    "lora": {"vqa": (1e-3, 3e-3), "nlvr2": (1e-3, 3e-3), "retrieval": (1e-3, 3e-3)},
    "adapter": {
        "vqa": (3e-4, 1e-3, 3e-3),
        "nlvr2": (3e-4, 1e-3),
        "retrieval": (1e-3, 3e-3),
    },
    "scaled_parallel": {
        "vqa": (3e-4, 1e-3, 3e-3),
        "nlvr2": (3e-4, 1e-3),
        "retrieval": (1e-3, 3e-3),
    },
    "shallow_prompt": {
        "vqa": (3e-4, 1e-3, 1e-2),
        "nlvr2": (1e-3, 3e-3),
        "retrieval": (1e-3, 1e-2),
    },
    "deep_prompt": {"vqa": (3e-4, 1e-3), "nlvr2": (1e-3, 3e-3), "retrieval": (1e-3, 3e-3)},
}
# Method -> task -> seeds that its rates are tried with, one by default. By one alone NLVR2 once had
# a rate at which another seed of scaled parallel adapters failed.
TRIED_SEEDS: dict[str, dict[str, int]] = {
    method: {"nlvr2": 2} for method in ("adapter", "scaled_parallel")
}
SEEDS, DRAWS = 3, 6  # of a way; of random units
MORE = {"vqa": 5}  # seeds of the ways that are compared most closely
CLOSE = (
    *("adapter", "scaled_parallel", "DAS 2", "DAS 4", "DAS 12%", "DAS 25%"),
    "similarity 4",
    *("DAS 4, scaled parallel", "DAS 25%, scaled parallel", "DAS 4, losses alone", "DAS 4, paper"),
)
TIMED = ("DAS 4",)  # of the ways
AGAIN = ("adapter", "scaled_parallel", "DAS 4", "DAS 12%", "DAS 25%")  # around a second base
PAPER = {"reward": "paper", "prior": 0.0, "split": "train", "every_steps": 10, "candidates": 3}
# The training labels of a search, see ``vlp_jax.data.worse_labels``.
WORSE: dict[str, dict[str, float]] = {
    "": {},
    ", 10 % noise": {"label_noise": 0.1},
    ", 30 % noise": {"label_noise": 0.3},
    ", imbalance 100": {"imbalance": 100.0},
}
WIDE = 144  # of an adapter in the place of a unit, for each branch of that: three times theirs
LONGER = 1.2  # times the updates: with the search, the training FLOPs of all blocks with adapters
HIGHER = 1e-3  # the next of the rates that were tried
PRIOR = 1.0  # of the search, in nats for each unit of dissimilarity
PROMPTS = 32  # a third of what a block reads, as METER's 200 beside 617 tokens
# Chosen around the base that a task tunes.
RATES_FILE = pathlib.Path(__file__).parent / "pcetl_rates.json"
RATES: dict[str, dict[str, float]] = (
    json.loads(RATES_FILE.read_text()) if RATES_FILE.exists() else {}
)
SETTINGS = Settings(  # of tasks that runs are scored in, of which there are none here
    seeds=(),
    steps=None,
    batch_size=None,
    records=None,
    examples=None,
    level="hard",
    rate=None,
    num_edges=None,
    selections=None,
    out=pathlib.Path(),
)


def base(updates: int = BASE_UPDATES, seed: int = 0) -> Run:
    """One training of what is tuned."""
    config = scenes.get_config(f"flm,{SIZE},{IMAGES}")
    config.name = "base"
    config.seed = seed
    config.total_steps = updates
    config.schedule.peak = BASE_PEAK
    config.data.num_edges = 2
    config.data.threads, config.data.prefetch = 8, 16  # nothing else is trained meanwhile
    config.checkpoint.every_percent = 100.0
    config.log.tensorboard = False
    with config.unlocked():
        config.evals = {}
    return Run(config)


def base_of(task: str) -> Run:
    """The one that all ways of this task tune."""
    return base(seed=BASE_SEEDS.get(task, 0))


def task_config(task: str, method: str, seed: int, rate: float | None = None) -> ConfigDict:
    """The config of one tuning.

    Args:
        task: of ``UPDATES``.
        method: of ``transfer.methods``.
        seed: of what is drawn.
        rate: of learning, in the place of that in ``RATES``.
    """
    module = importlib.import_module(f"configs.transfer.{task}")
    config: ConfigDict = module.get_config(f"scenes,{SIZE},{method}")
    config.name = f"{task}, {method}"
    config.seed = seed
    config.total_steps = UPDATES[task]
    config.data.batch_size = BATCH
    config.data.num_edges = 1
    config.schedule.peak = rate or _rate(task, method)
    config.checkpoint.every_percent = 100.0
    config.log.tensorboard = False
    if method not in ("full", "head"):
        config.model.tuning.blocks = "all"
    if method.endswith("prompt"):
        config.model.tuning.prompt.length = PROMPTS
    with config.unlocked():
        config.evals = {name: config.evals[name] for name in ("val", "test")}
        for section in config.evals.values():
            if "every_percent" in section:
                section.every_percent = 100.0
            if section.type == "task":
                section.controls = False
            else:
                section.update(num_examples=500, shortlist=16)
    return config


def _rate(task: str, method: str) -> float:
    """The one that was chosen; until then, the second of those that are tried."""
    like = method if method in TRIED else "adapter"
    return RATES.get(like, {}).get(task, TRIED[like][task][1])


def tuned(method: str, rate: float | None = None, **changes: Any) -> Callable[[str, int], Run]:
    """A way that tunes the base by a method, with keys of its config changed."""

    def of(task: str, seed: int) -> Run:
        config = task_config(task, method, seed, rate)
        config.update_from_flattened_dict(changes)
        return Run(config, base_of(task))

    return of


def searched(
    of: Mapping[str, Any],
    method: str = "adapter",
    updates: float = 1.0,
    then: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Callable[[str, int], Run]:
    """A way that tunes by a method without the units that a search has found.

    Args:
        of: keys of ``config.search``.
        method: with what is tuned, and searched.
        updates: of what follows, as a multiple of the task's.
        then: keys of the config of what follows.
        changes: keys of the config of the search.
    """

    def run(task: str, seed: int) -> Run:
        config = task_config(task, SEARCH, seed)
        if method != "adapter":
            config.model.tuning.adapter.update(task_config(task, method, seed).model.tuning.adapter)
        config.name = f"{task}, search"
        config.model.tuning.gated = ("all",)
        config.search.update({"skipped": 0, "prior": PRIOR, **of})
        with config.unlocked():  # a source has the keys that it is given
            config.update_from_flattened_dict(changes)
            config.evals = {}
        config.checkpoint.best_metric = ""
        follows = task_config(task, method, seed)
        follows.name = f"{task}, {method}, skipped"
        follows.total_steps = round(updates * UPDATES[task])
        follows.update_from_flattened_dict(then or {})
        parent = base_of(task)
        return Run(follows, parent, Run(config, parent))

    return run


def units() -> tuple[str, ...]:
    """Of the base: its blocks."""
    config = base().config
    model = build_model(config.model, config.tokenizer.vocab_size, 0, config.data.image_size)
    return tuple(block for stack in model.config.stacks.values() for block in stack)


def study() -> TuningStudy:
    """What ``tools.compare_stages --seeds=6`` does: more draws of random units than seeds."""
    ways: dict[str, Callable[[str, int], Run | None]] = {name: tuned(name) for name in TRIED}
    ways |= {f"DAS {k}": searched({"skipped": k}) for k in (2, 4, 6)}
    ways |= {f"DAS {share:.0%}": searched({"flops_saved": share}) for share in (0.12, 0.25)}
    ways["DAS 25%, scaled parallel"] = searched({"flops_saved": 0.25}, "scaled_parallel")
    ways["DAS 4, scaled parallel"] = searched({"skipped": 4}, "scaled_parallel")
    ways["DAS 4, losses alone"] = searched({"skipped": 4, "prior": 0.0})
    ways["DAS 4, paper"] = searched({"skipped": 4, **PAPER})
    for kind in ("similarity", "greedy"):
        ways[f"{kind} 4"] = searched({"skipped": 4, "method": kind})
    for share in (1 / 6, 1 / 3):  # whole heads
        ways[f"pruned {share:.0%}"] = _cut(share)
    ways["DAS 4, pruned 17%"] = _cut(1 / 6, ways["DAS 4"])
    for way in ("full", "adapter", "DAS 4"):
        ways[f"{way}, int8"] = _eight(ways[way])
    ways = {name: _below(MORE if name in CLOSE else {}, way) for name, way in ways.items()}
    ways["random 4"] = _below(dict.fromkeys(FIGURES, DRAWS), _random)
    return TuningStudy(ways, FIGURES, SETTINGS, ("adapter", "scaled_parallel"))


def timed() -> TuningStudy:
    """What a search costs beside what follows it, where each has the device for itself.

    On a base of one update: how long updates take does not depend on what they make of it, so that
    scores say nothing here.
    """

    ways, parent = study().ways, base(1)
    return TuningStudy(
        {name: _from(parent, ways[name]) for name in TIMED},
        FIGURES,
        SETTINGS,
        less=(),
        one_base=False,
    )


def second_base() -> TuningStudy:
    """VQA around another training of the base: what is told of ways, and not of one base.

    With what may lift searches, by themselves or beside adapters, where they lose: adapters that
    are wider in the place of what is skipped, more updates, and the next rate.
    """
    whole, parent = study().ways, base(seed=SECOND_BASE)
    ways: dict[str, Callable[[str, int], Run | None]] = {name: whole[name] for name in AGAIN}
    ways["DAS 4, wide"] = searched({"skipped": 4}, then={"model.tuning.replacement": WIDE})
    ways["DAS 4, longer"] = searched({"skipped": 4}, updates=LONGER)
    plain = ("adapter", "scaled_parallel")
    ways |= {f"{name}, at {HIGHER:g}": tuned(name, HIGHER) for name in plain}
    for name, of in {
        "DAS 4": {"skipped": 4},
        "DAS 12%": {"flops_saved": 0.12},
        "DAS 25%": {"flops_saved": 0.25},
    }.items():
        ways[f"{name}, at {HIGHER:g}"] = searched(of, then={"schedule.peak": HIGHER})
    ways = {name: _below({}, _from(parent, way)) for name, way in ways.items()}
    less = (*plain, *(f"{name}, at {HIGHER:g}" for name in plain))
    return TuningStudy(ways, {"vqa": FIGURES["vqa"]}, SETTINGS, less)


def faster_heads() -> TuningStudy:
    """NLVR2 by heads at five times the rate of what is tuned, as other tasks have them."""
    faster = {"optim.groups.heads.rate_factor": 5.0}
    ways: dict[str, Callable[[str, int], Run | None]] = {
        "adapter": tuned("adapter", **faster),
        "DAS 4": searched({"skipped": 4}, then=faster),
    }
    return TuningStudy(ways, {"nlvr2": FIGURES["nlvr2"]}, SETTINGS, ("adapter",))


def alone() -> TuningStudy:
    """The reference of a search for one unit: each that there is, left out in the same way."""
    ways = {"adapter": tuned("adapter")} | {
        f"without {unit}": tuned("adapter", **{"model.tuning.skip": (unit,)}) for unit in units()
    }
    ways["DAS 1"] = searched({"skipped": 1})
    for kind in ("similarity", "greedy"):
        ways[f"{kind} 1"] = searched({"skipped": 1, "method": kind})
    return TuningStudy(ways, {"vqa": FIGURES["vqa"]}, SETTINGS, ("adapter",))


def robustness() -> TuningStudy:
    """What is chosen where the labels that a search trains on are worse (five seeds of each).

    What follows is tuned on the labels as they are, so that what is lost is lost by the choice.
    """
    ways: dict[str, Callable[[str, int], Run | None]] = {}
    for name, changes in WORSE.items():
        for reward, of in (("", {}), (", paper", PAPER)):
            key = {f"data.sources.questions.{k}": value for k, value in changes.items()}
            ways[f"DAS 4{reward}{name}"] = searched({"skipped": 4, **of}, **key)
    return TuningStudy(ways, {"vqa": FIGURES["vqa"]}, SETTINGS, tuple(ways)[:2])


def _cut(
    share: float, way: Callable[[str, int], Run | None] | None = None
) -> Callable[[str, int], Run]:
    """Tuning of what is left once heads and channels of all blocks are cut: by a way, or full."""

    def run(task: str, seed: int) -> Run:
        whole = way(task, seed) if way else Run(task_config(task, "full", seed), base_of(task))
        assert whole is not None
        return dataclasses.replace(whole, cut=(share, share))

    return run


def _eight(way: Callable[[str, int], Run | None]) -> Callable[[str, int], Run | None]:
    """Another way with eight bits a weight: nothing is trained."""

    def run(task: str, seed: int) -> Run | None:
        whole = way(task, seed)
        return None if whole is None else Run(whole.config, whole, eight=True)

    return run


def _random(task: str, seed: int) -> Run:
    """Units drawn without a search, others for every seed."""
    found = searched({"skipped": 4, "method": "random", "percent": 0.1})(task, seed)
    assert found.search is not None
    found.search.config.seed = 100 + seed  # apart from what is drawn in the tuning
    return Run(found.config, found.parent, Run(found.search.config, found.parent))


def _from(parent: Run, way: Callable[[str, int], Run | None]) -> Callable[[str, int], Run | None]:
    """A way from another base."""

    def run(task: str, seed: int) -> Run | None:
        whole = way(task, seed)
        if whole is None:
            return None
        assert not whole.eight, "its parent is no base"
        search = whole.search and dataclasses.replace(whole.search, parent=parent)
        return dataclasses.replace(whole, parent=parent, search=search)

    return run


def _below(
    seeds: Mapping[str, int], way: Callable[[str, int], Run | None]
) -> Callable[[str, int], Run | None]:
    """A way that is done with so many seeds of a task, ``SEEDS`` where none are given."""
    return lambda task, seed: way(task, seed) if seed < seeds.get(task, SEEDS) else None


def rates() -> TuningStudy:
    """How the rates were chosen: on the validation splits, with ``TRIED_SEEDS``."""
    ways = {
        f"{task}, {method}, {rate:g}": _tried(task, method, rate)
        for method, tried in TRIED.items()
        for task, of in tried.items()
        for rate in of
    }
    return TuningStudy(ways, VALIDATED, SETTINGS, ())


def _tried(task: str, method: str, rate: float) -> Callable[[str, int], Run | None]:
    way = tuned(method, rate)
    seeds = _tried_seeds(task, method)
    return lambda of, seed: way(of, seed) if of == task and seed < seeds else None


def _tried_seeds(task: str, method: str) -> int:
    return TRIED_SEEDS.get(method, {}).get(task, 1)


def choose(archive: pathlib.Path) -> dict[str, dict[str, float]]:
    """Of every method and task, where all rates that were tried are done, the lowest that is good.

    Good is what scores within a standard error of the best: rates at the upper end train most runs
    as well, and make of some nothing at all. Scores are means over the seeds of ``TRIED_SEEDS``.
    """
    known, study = read_archive(archive), rates()
    found: dict[str, dict[str, float]] = {}
    for method, task in ((method, task) for method, of in TRIED.items() for task in of):
        tried, seeds = TRIED[method][task], range(_tried_seeds(task, method))
        scores = study.scores(known, seeds)
        names = [f"{task}, {method}, {rate:g}" for rate in tried]
        runs = [scores.get(name, {}).get(task, {}) for name in names]
        if all(len(run) == len(seeds) for run in runs):
            mine = [statistics.mean(run.values()) for run in runs]
            best = max(mine)
            examples = int(task_config(task, method, 0).evals.val.num_examples)  # of all seeds
            least = best - math.sqrt(best * (1 - best) / examples)
            good = [rate for rate, score in zip(tried, mine, strict=True) if score >= least]
            found.setdefault(method, {})[task] = min(good)
    return found


def chosen_anew(archive: pathlib.Path) -> dict[str, dict[str, float]]:
    """``RATES`` with what ``choose`` finds; where not all were tried, a rate stays as it was."""
    found = choose(archive)
    return {method: RATES.get(method, {}) | found.get(method, {}) for method in TRIED}


def tell_of_base(program: str, description: str, table: Callable[[str, str], str]) -> None:
    """The command of a figure beside the study: prints a table of the base that it is given.

    Args:
        program: as ``python -m`` has it.
        description: its help.
        table: from the base, a workdir or a parameter file, and a folder for what is made.
    """
    logging.set_verbosity(logging.ERROR)
    parser = argument_parser(program, description)
    parser.add_argument("base", help="workdir or parameter file")
    with tempfile.TemporaryDirectory() as folder, bad_input():
        print(table(parser.parse_args().base, folder))


if __name__ == "__main__":
    chosen = chosen_anew(pathlib.Path(sys.argv[1]))
    RATES_FILE.write_text(json.dumps(chosen, indent=1) + "\n")
    print(chosen)
