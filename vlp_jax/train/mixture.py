"""Weights of a run's batches that follow what each has gained on held-out records.

    config.mixture.metrics = {"images": "heldout_images/loss", "text": "heldout_text/loss"}

At every evaluation the loss of each batch is divided by what it was at the first. A batch that has
gained less than the others weighs more from then on, by the power ``strength`` of that ratio to the
mean of all, and one that is being forgotten most of all; no weight is above ``limit`` or below its
inverse, and their mean is one. In a run of several stages, the batches of the stage alone are
compared, and the next stage begins anew. So are the rates of tasks balanced by GradNorm (arXiv
1711.02257), there by gradients of the training loss.

The weights lie in the state and change between two updates, by figures that are the same on every
host, so that a run that is resumed has them.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError

MixtureState = Mapping[str, Mapping[str, jax.Array]]  # "first" and "weight" of every batch


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How weights follow from evaluations.

    Attributes:
        metrics: name of a batch -> the figure, lower is better, that tells what it has gained.
        strength: power of the ratio; 0: the weights stay.
        limit: of a weight, and its inverse; 1 or more.
    """

    metrics: Mapping[str, str]
    strength: float
    limit: float

    @classmethod
    def of(cls, section: ConfigDict, names: Iterable[str]) -> "Mixture | None":
        """What ``config.mixture`` says; None: the weights are fixed.

        Args:
            section: of the config.
            names: of the run's batches.

        Raises:
            ConfigError: a batch is left out or not there, or a number is out of range.
        """
        if not section.metrics:
            return None
        metrics, names = section.metrics.to_dict(), sorted(names)
        if sorted(metrics) != names:
            raise ConfigError(
                "mixture.metrics",
                f"has figures for {sorted(metrics)}, and the run has the batches {names}",
                "Name one for each batch",
            )
        if not 0.0 <= section.strength < math.inf:
            raise ConfigError("mixture.strength", f"{section.strength}", "Use 0 or more")
        if not 1.0 <= section.limit < math.inf:
            raise ConfigError("mixture.limit", f"{section.limit}", "Use 1 or more")
        return cls(metrics, section.strength, section.limit)

    def init(self) -> MixtureState:
        """Before the first evaluation: every batch weighs 1."""
        names = sorted(self.metrics)
        return {
            "first": {name: jnp.full((), jnp.nan) for name in names},
            "weight": {name: jnp.ones(()) for name in names},
        }

    def observe(
        self, state: MixtureState, values: Mapping[str, float], read: Collection[str]
    ) -> MixtureState:
        """Weights after an evaluation; as they were where it did not give every figure.

        Args:
            state: before it.
            values: figures of the evaluators, the same on every host.
            read: names of the batches that updates read now.
        """
        found = {name: values.get(self.metrics[name], math.nan) for name in sorted(read)}
        if not all(math.isfinite(value) and value > 0 for value in found.values()):
            return state
        first: dict[str, float] = jax.device_get(dict(state["first"]))
        first |= {name: value for name, value in found.items() if not math.isfinite(first[name])}
        left = {name: value / float(first[name]) for name, value in found.items()}
        mean = sum(left.values()) / len(left)
        weights = {name: (ratio / mean) ** self.strength for name, ratio in left.items()}
        return {
            "first": {name: jnp.float32(value) for name, value in first.items()},
            "weight": {
                **state["weight"],
                **{name: jnp.float32(w) for name, w in self._bounded(weights).items()},
            },
        }

    def _bounded(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Weights of mean one within the limits, as near as may be."""
        low, high = 1.0 / self.limit, self.limit
        below, above = 1e-9, 1e9  # factors under which the mean is too small, and too large
        for _ in range(100):
            factor = math.sqrt(below * above)
            bounded = {name: min(max(factor * w, low), high) for name, w in weights.items()}
            if sum(bounded.values()) < len(bounded):
                below = factor
            else:
                above = factor
        return bounded


def mixture_metrics(state: Any) -> dict[str, jax.Array]:
    """The weights as metrics of an update, of a state's extras; empty where they are fixed."""
    if "mixture" not in state:
        return {}
    return {f"batch/{name}/weight": weight for name, weight in state["mixture"]["weight"].items()}
