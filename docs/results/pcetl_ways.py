"""Ways to tune a base, and to skip its units, as runs: what ``docs.results.pcetl`` compares.

The base is FLM's encoder of size `small`, whose 16 blocks (8 of the image tower, 4 + 4 of texts)
can all be skipped, and all have what a way adds. Data: `scenes`, level hard, 64 px (synthetic):
200,000 captioned pictures for the base, 50,000 of each task, rendered once. Every way tunes a base
with the updates, the batch and the data of the others, and its own rate.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import scenes
from tools.columns import Settings
from tools.jobs import Run
from tools.tuning_study import TuningStudy
from vlp_jax.models.sizes import build_model
from vlp_jax.transfer.methods import SEARCH

SIZE, IMAGES = "small", 200_000
BASE_UPDATES, BASE_PEAK = 5_000, 1e-3
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
CLOSE = (
    *("adapter", "scaled_parallel", "DAS 2", "DAS 4", "DAS 12%", "DAS 25%"),
    "similarity 4",
    *("DAS 4, scaled parallel", "DAS 25%, scaled parallel", "DAS 4, losses alone", "DAS 4, paper"),
)
PAPER = {"reward": "paper", "prior": 0.0, "split": "train", "every_steps": 10, "candidates": 3}
PRIOR = 1.0  # of the search, in nats for each unit of dissimilarity
PROMPTS = 32  # a third of what a block reads, as METER's 200 beside 617 tokens
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


Way = Callable[[str, int], Run | None]  # task and seed -> what is run; None: nothing


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


def task_config(task: str, method: str, seed: int, rate: float) -> ConfigDict:
    """The config of one tuning.

    Args:
        task: of ``UPDATES``.
        method: of ``transfer.methods``.
        seed: of what is drawn.
        rate: the peak of the learning rate.
    """
    module = importlib.import_module(f"configs.transfer.{task}")
    config: ConfigDict = module.get_config(f"scenes,{SIZE},{method}")
    config.name = f"{task}, {method}"
    config.seed = seed
    config.total_steps = UPDATES[task]
    config.data.batch_size = BATCH
    config.data.num_edges = 1
    config.schedule.peak = rate
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


@dataclasses.dataclass(frozen=True)
class Around:
    """Ways around a base.

    Attributes:
        base: that is tuned.
        rates: method -> task -> peak learning rate that was chosen.
    """

    base: Run
    rates: Mapping[str, Mapping[str, float]]

    def config(self, task: str, method: str, seed: int, rate: float | None = None) -> ConfigDict:
        """Of a run that tunes, see ``task_config``.

        By default at the chosen rate; until there is one, at the second of those that are tried.
        """
        like = method if method in TRIED else "adapter"
        chosen = self.rates.get(like, {}).get(task, TRIED[like][task][1])
        return task_config(task, method, seed, rate or chosen)

    def tuned(self, method: str, rate: float | None = None, **changes: Any) -> Way:
        """A way that tunes the base by a method, with keys of its config changed."""

        def of(task: str, seed: int) -> Run:
            config = self.config(task, method, seed, rate)
            config.update_from_flattened_dict(changes)
            return Run(config, self.base)

        return of

    def searched(
        self,
        of: Mapping[str, Any],
        method: str = "adapter",
        updates: float = 1.0,
        then: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Way:
        """A way that tunes by a method without the units that a search has found.

        Args:
            of: keys of ``config.search``.
            method: with what is tuned, and searched.
            updates: of what follows, as a multiple of the task's.
            then: keys of the config of what follows.
            changes: keys of the config of the search.
        """

        def run(task: str, seed: int) -> Run:
            config = self.config(task, SEARCH, seed)
            if method != "adapter":
                adapter = self.config(task, method, seed).model.tuning.adapter
                config.model.tuning.adapter.update(adapter)
            config.name = f"{task}, search"
            config.model.tuning.gated = ("all",)
            config.search.update({"skipped": 0, "prior": PRIOR, **of})
            with config.unlocked():  # a source has the keys that it is given
                config.update_from_flattened_dict(changes)
                config.evals = {}
            config.checkpoint.best_metric = ""
            follows = self.config(task, method, seed)
            follows.name = f"{task}, {method}, skipped"
            follows.total_steps = round(updates * UPDATES[task])
            follows.update_from_flattened_dict(then or {})
            return Run(follows, self.base, Run(config, self.base))

        return run

    def random(self, task: str, seed: int) -> Run:
        """Units drawn without a search, others for every seed."""
        found = self.searched({"skipped": 4, "method": "random", "percent": 0.1})(task, seed)
        assert found is not None
        assert found.search is not None
        found.search.config.seed = 100 + seed  # apart from what is drawn in the tuning
        return Run(found.config, found.parent, Run(found.search.config, found.parent))

    def cut(self, share: float, way: Way | None = None) -> Way:
        """Tuning of what is left once heads and channels of all blocks are cut: by a way, or full.

        Args:
            share: of both.
            way: by default full tuning.
        """

        def run(task: str, seed: int) -> Run:
            whole = (way or self.tuned("full"))(task, seed)
            assert whole is not None
            return dataclasses.replace(whole, cut=(share, share))

        return run

    def ways(self) -> dict[str, Way]:
        """All that are compared, by name."""
        ways: dict[str, Way] = {name: self.tuned(name) for name in TRIED}
        ways |= {f"DAS {k}": self.searched({"skipped": k}) for k in (2, 4, 6)}
        for share in (0.12, 0.25):
            ways[f"DAS {share:.0%}"] = self.searched({"flops_saved": share})
        ways["DAS 25%, scaled parallel"] = self.searched({"flops_saved": 0.25}, "scaled_parallel")
        ways["DAS 4, scaled parallel"] = self.searched({"skipped": 4}, "scaled_parallel")
        ways["DAS 4, losses alone"] = self.searched({"skipped": 4, "prior": 0.0})
        ways["DAS 4, paper"] = self.searched({"skipped": 4, **PAPER})
        for kind in ("similarity", "greedy"):
            ways[f"{kind} 4"] = self.searched({"skipped": 4, "method": kind})
        for share in (1 / 6, 1 / 3):  # whole heads
            ways[f"pruned {share:.0%}"] = self.cut(share)
        ways["DAS 4, pruned 17%"] = self.cut(1 / 6, ways["DAS 4"])
        for name in ("full", "adapter", "DAS 4"):
            ways[f"{name}, int8"] = _eight(ways[name])
        ways["random 4"] = self.random
        return ways

    def study(self, tasks: Sequence[str], more: Mapping[str, int]) -> TuningStudy:
        """All ways with ``SEEDS`` seeds, and with ``DRAWS`` draws of random units.

        Args:
            tasks: of which it is.
            more: task -> seeds of the ways that are compared most closely.
        """
        seeds = {**dict.fromkeys(CLOSE, more), "random 4": dict.fromkeys(tasks, DRAWS)}
        ways = {name: below(seeds.get(name, {}), way) for name, way in self.ways().items()}
        figures = {task: FIGURES[task] for task in tasks}
        return TuningStudy(ways, figures, SETTINGS, ("adapter", "scaled_parallel"))

    def tried(self, tasks: Sequence[str]) -> TuningStudy:
        """How rates are chosen: on the validation splits, with ``TRIED_SEEDS``."""
        ways = {
            f"{task}, {method}, {rate:g}": self._tried(task, method, rate)
            for method, tried in TRIED.items()
            for task in tasks
            for rate in tried[task]
        }
        return TuningStudy(ways, {task: VALIDATED[task] for task in tasks}, SETTINGS, ())

    def _tried(self, task: str, method: str, rate: float) -> Way:
        way, seeds = self.tuned(method, rate), tried_seeds(task, method)
        return lambda of, seed: way(of, seed) if of == task and seed < seeds else None


def units() -> tuple[str, ...]:
    """Of the base: its blocks."""
    config = base().config
    model = build_model(config.model, config.tokenizer.vocab_size, 0, config.data.image_size)
    return tuple(block for stack in model.config.stacks.values() for block in stack)


def _eight(way: Way) -> Way:
    """Another way with eight bits a weight: nothing is trained."""

    def run(task: str, seed: int) -> Run | None:
        whole = way(task, seed)
        return None if whole is None else Run(whole.config, whole, eight=True)

    return run


def below(seeds: Mapping[str, int], way: Way) -> Way:
    """A way that is done with so many seeds of a task, ``SEEDS`` where none are given."""
    return lambda task, seed: way(task, seed) if seed < seeds.get(task, SEEDS) else None


def tried_seeds(task: str, method: str) -> int:
    """With how many seeds each rate of a method is tried."""
    return TRIED_SEEDS.get(method, {}).get(task, 1)
