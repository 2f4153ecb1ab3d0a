"""The search of a run: which units its updates do without, and what the state has learned of them.

    config.model.tuning.gated = ("fusion",)
    config.search.method = "learned"
    config.search.skipped = 4           # or flops_saved = 0.12

Every update draws units and trains the network without them (``transfer.search``); which the run
shall do without at last is compared between updates (``train.searching``) and kept in the switches
of the parameters, so that evaluators and checkpoints have the network as it is chosen so far. A
fine-tuned run without them follows (``config.skip_from``).

Methods: ``learned``, from losses as the run goes; and what it is measured against: ``random``, by
the seed alone; ``similarity``, of units that leave the tokens most as they enter; ``greedy``, of
units whose absence alone does least harm to the model that the run has trained.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.tuning import check_apart
from vlp_jax.train.state import TrainState
from vlp_jax.transfer.search import Choice, Learner, learner

Method = Literal["learned", "random", "similarity", "greedy"]
_DRAWN = 0x5C1  # folded into a step's key


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched for, and how.

    Attributes:
        method: see the module.
        choice: among which units, and how many.
        learner: of ``learned``; else units are drawn alike, and nothing is learned.
        paper: whether choices are compared as in the paper's code: on one batch, always the same,
            with dropout.
        split: whose batches choices are compared on.
        every: updates between two comparisons.
        warmup: updates before the first.
        prior: loss that the absence of a unit is expected to add for each unit of dissimilarity (1
            less the cosine of what enters and what leaves it), beside what comparisons tell.
        candidates: choices in a comparison.
        final_batches: on which ``greedy`` is compared, and the choices of every number of units.
    """

    method: Method
    choice: Choice
    learner: Learner | None
    paper: bool
    split: str
    every: int
    warmup: int
    prior: float
    candidates: int
    final_batches: int

    @classmethod
    def of(
        cls, section: ConfigDict, costs: Mapping[str, float], trained: Collection[str], steps: int
    ) -> "Search":
        """What ``config.search`` says.

        Args:
            section: of the config, with a method.
            costs: gated units of the model -> share of its forward FLOPs that each saves.
            trained: splits that the run trains on.
            steps: of the run.

        Raises:
            ConfigError: a value cannot be used, or the units are not apart.
        """
        if section.method not in get_args(Method):
            raise ConfigError(
                "search.method",
                f"{section.method!r}",
                f"Use one of {', '.join(get_args(Method))}, or leave it empty",
            )
        check_apart(tuple(costs), "model.tuning.gated")
        idle = [unit for unit, cost in costs.items() if cost <= 0]
        if idle:
            raise ConfigError(
                "model.tuning.gated",
                f"{', '.join(idle)}: without them no FLOPs are saved, as where the objectives of "
                "the run do not run them",
                "Gate others, by name or by the name of their stack, such as image_tower",
            )
        choice = Choice(
            tuple(costs),
            tuple(costs.values()),
            section.skipped,
            section.flops_saved,
            section.cost,
        )
        if section.method == "learned":
            choice.draws(jax.random.key(0), jnp.zeros(len(costs)), section.candidates)
        found = learner(section.reward, choice, section.rate, section.forget)
        paper = section.reward == "paper"
        if section.split in trained and not paper:
            raise ConfigError(
                "search.split",
                f"the run trains on {section.split!r}, and what it knows by heart would count",
                "Use a split that is neither trained on nor tested, such as 'val'",
            )
        if paper and section.prior > 0:
            raise ConfigError(
                "search.prior",
                f"{section.prior}, but reward='paper' expects nothing",
                "Use 0, or search.reward='held_out'",
            )
        for key, least in (("every_steps", 1), ("candidates", 2), ("final_batches", 1)):
            if section[key] < least:
                raise ConfigError(f"search.{key}", f"{section[key]}", f"Use {least} or more")
        if not 0 <= section.warmup_percent < 100:
            raise ConfigError(
                "search.warmup_percent", f"{section.warmup_percent}", "Use 0 to below 100"
            )
        warmup = round(steps * section.warmup_percent / 100)
        if section.method == "learned" and warmup + section.every_steps > steps:
            raise ConfigError(
                "search.every_steps",
                f"of {steps} updates, {warmup} are warm-up, so that nothing is ever compared",
                "Lower it or search.warmup_percent, or raise search.percent or the run's length",
            )
        return cls(
            section.method,
            choice,
            found if section.method == "learned" else None,
            paper,
            section.split,
            section.every_steps,
            warmup,
            section.prior,
            section.candidates,
            section.final_batches,
        )

    @property
    def measures_similarity(self) -> bool:
        """Whether it asks how much units change the tokens."""
        return self.method == "similarity" or (self.learner is not None and self.prior > 0)

    def init(self) -> dict[str, jax.Array]:
        """Of the state: nothing is learned yet."""
        if self.learner is None:
            return {}
        return {k: jnp.asarray(v) for k, v in self.learner.init(len(self.choice.units)).items()}

    def log_weights(self, learned: Mapping[str, Any]) -> jax.Array:
        """By which units are drawn: float32 [n]."""
        if self.learner is None:
            return jnp.zeros(len(self.choice.units))
        return self.learner.log_weights(learned)

    def kept(self, state: TrainState) -> dict[str, jax.Array]:
        """What the update of a state has: unit -> bool []; drawn from its key and its step."""
        key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), _DRAWN)
        skipped = self.choice.draw(key, self.log_weights(state.extras["search"]))
        return {unit: ~skipped[index] for index, unit in enumerate(self.choice.units)}
