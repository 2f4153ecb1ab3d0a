"""Stages of a run: which of its batches an update reads, until a held-out curve flattens.

    config.stages.batches = ("images", "images+text", "pairs+text")
    config.stages.metrics = ("heldout_images/loss", "heldout_text/loss")

Stage k ends when its figure has not fallen by ``min_change`` of its lowest value in ``patience``
evaluations; the last stage ends with the run. Objectives of batches that a stage does not read are
not computed, and what they keep in the extras stays. Parameters that no batch of a stage reads have
a gradient of zero: weight decay and old moments still move them. The stage lies in the state and
changes between two updates, by figures that are the same on every host, so that a run that is
resumed goes on in it. Stages of known lengths are runs that start from one another by
``init_from``.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError

StageState = Mapping[str, jax.Array]  # "number", "lowest" and "waited"


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a run.

    Attributes:
        batches: names of the batches that each stage reads.
        metrics: the figure, lower is better, by which each but the last ends.
        patience: evaluations without a fall after which a stage ends; 1 or more.
        min_change: what counts as a fall, as a share of the lowest value.
    """

    batches: tuple[tuple[str, ...], ...]
    metrics: tuple[str, ...]
    patience: int
    min_change: float

    @classmethod
    def of(cls, section: ConfigDict, names: Collection[str]) -> "Stages | None":
        """What ``config.stages`` says; None: every update reads every batch.

        Args:
            section: of the config.
            names: of the run's batches.

        Raises:
            ConfigError: a batch is not there or never read, or a number is out of range.
        """
        if not section.batches:
            if section.metrics:
                raise ConfigError(
                    "stages.metrics", "end stages that are not given", "Give stages.batches"
                )
            return None
        batches = tuple(tuple(sorted(stage.split("+"))) for stage in section.batches)
        read = {name for stage in batches for name in stage}
        if strange := sorted(read - set(names)):
            raise ConfigError(
                "stages.batches", f"{strange[0]!r} is no batch of this run", f"Use {sorted(names)}"
            )
        if left := sorted(set(names) - read):
            raise ConfigError(
                "stages.batches",
                f"no stage reads the batch {left[0]!r}",
                "Name it in one, or remove its sources and objectives",
            )
        if len(section.metrics) != len(batches) - 1:
            raise ConfigError(
                "stages.metrics",
                f"{len(section.metrics)} figures end {len(batches)} stages",
                "Give one for each stage but the last, which ends with the run",
            )
        if section.patience < 1:
            raise ConfigError("stages.patience", f"{section.patience}", "Use 1 or more")
        if not 0.0 <= section.min_change < 1.0:
            raise ConfigError(
                "stages.min_change", f"{section.min_change}", "Use a share of at least 0, below 1"
            )
        return cls(batches, tuple(section.metrics), section.patience, section.min_change)

    def init(self) -> StageState:
        """At the beginning of the first stage."""
        zero = jnp.zeros((), jnp.int32)
        return {"number": zero, "lowest": jnp.full((), jnp.inf), "waited": zero}

    def observe(self, state: StageState, values: Mapping[str, float]) -> StageState:
        """The state after an evaluation.

        Args:
            state: before it.
            values: figures of the evaluators, the same on every host.
        """
        number, waited = int(state["number"]), int(state["waited"])
        lowest = float(state["lowest"])
        if number == len(self.batches) - 1 or self.metrics[number] not in values:
            return state
        value = values[self.metrics[number]]
        if math.isinf(lowest) or value < lowest - self.min_change * abs(lowest):
            lowest, waited = value, 0
        else:
            waited += 1
        if waited >= self.patience:
            number, lowest, waited = number + 1, math.inf, 0
        return {
            "number": jnp.int32(number),
            "lowest": jnp.float32(lowest),
            "waited": jnp.int32(waited),
        }


def stage_of(extras: Any) -> int:
    """The stage that a state's extras are in; 0 of a run without stages."""
    return int(extras["stage"]["number"]) if "stage" in extras else 0
