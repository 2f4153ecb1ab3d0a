"""Durations in any unit, and rates as functions of the step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from vlp_jax.infra.errors import ConfigError

UNITS = ("steps", "examples", "epochs", "percent")
Schedule = Callable[[jax.Array], jax.Array]
TEXT_LENGTH = 16.0  # tokens of a text, where nothing is known of it


@dataclasses.dataclass(frozen=True)
class Budget:
    """What turns a duration into steps.

    Attributes:
        batch_size: examples in an update, of all its batches together.
        examples_per_epoch: records of the training sources, None where one is unbounded.
        total_steps: length of the run, None while it is being worked out.
        text_lengths: mean tokens of the texts of each named batch, for what an update costs by
            formula; ``TEXT_LENGTH`` where it is not named.
    """

    batch_size: int
    examples_per_epoch: int | None
    total_steps: int | None = None
    text_lengths: Mapping[str, float] = dataclasses.field(default_factory=dict)


def duration(name: str, **value: float) -> dict[str, Any]:
    """Keys ``name_steps``, ``name_examples``, ``name_epochs``, ``name_percent`` for a config.

    Args:
        name: what lasts.
        value: at most one of ``steps``, ``examples``, ``epochs``, ``percent``, the default.
    """
    return {
        f"{name}_{unit}": value.get(
            unit, config_dict.placeholder(int if unit == "steps" else float)
        )
        for unit in UNITS
    }


def to_steps(config: ConfigDict, section: str, name: str, budget: Budget) -> int | None:
    """Read a duration in whichever unit it is given.

    Of steps, examples and epochs only one may be above 0; a flag takes the config's own back by
    setting it to 0. Any of them, 0 included, comes before a percentage, so that a flag overrides
    a default in percent.

    Args:
        config: a section with keys made by ``duration``.
        section: its path, for messages; empty for the root.
        name: what lasts.
        budget: of the run.

    Returns:
        Whole steps, or None where no unit is given.

    Raises:
        ConfigError: two units, epochs of an unbounded source, a percentage of an unknown total, or
            a negative number.
    """
    key = f"{section}.{name}" if section else name
    values = {unit: config[f"{name}_{unit}"] for unit in UNITS}
    given = [unit for unit in UNITS if values[unit] is not None]
    positive = [unit for unit in given if values[unit] and unit != "percent"]
    if len(positive) > 1:
        first, second = positive[:2]
        raise ConfigError(
            f"{key}_{second}",
            f"{key}_{first}={values[first]} is given as well",
            f"Give one; --config.{key}_{first}=0 takes the other back",
        )
    for unit in positive or given:
        value = values[unit]
        if value < 0:
            raise ConfigError(f"{key}_{unit}", f"{value} is negative", "Give 0 or more")
        if unit == "steps":
            return int(value)
        if unit == "examples":
            return round(value / budget.batch_size)
        if unit == "epochs":
            if budget.examples_per_epoch is None:
                raise ConfigError(
                    f"{key}_epochs",
                    "a training source is unbounded and has no epochs",
                    f"Give {key}_steps or {key}_examples, or data.sources.NAME.num_records",
                )
            return round(value * budget.examples_per_epoch / budget.batch_size)
        if budget.total_steps is None:
            raise ConfigError(
                f"{key}_percent", "the length of the run is not known", f"Give {key}_steps"
            )
        return round(value / 100 * budget.total_steps)
    return None


def learning_rate(config: ConfigDict, budget: Budget) -> Schedule:
    """Linear warm-up, then a decay to ``final_factor`` of the peak.

    Args:
        config: ``config.schedule``: ``peak``, ``warmup_*``, ``decay`` (``linear``, ``cosine``,
            ``rsqrt``, ``constant``), ``cooldown_*`` (a linear end of an rsqrt or constant
            schedule), ``final_factor``.
        budget: of the run.

    Returns:
        A function from the steps made, [] (or the budget spent, counted in steps), to the rate,
        float32 [].

    Raises:
        ConfigError: unknown decay, or a warm-up longer than the run.
    """
    total = budget.total_steps or 1
    warmup = to_steps(config, "schedule", "warmup", budget) or 0
    cooldown = to_steps(config, "schedule", "cooldown", budget) or 0
    if warmup + cooldown > total:
        raise ConfigError(
            "schedule.warmup",
            f"{warmup} steps of warm-up and {cooldown} of cool-down exceed the run of {total}",
            "Shorten them, or give them in percent",
        )
    decays: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "linear": lambda progress, step: 1.0 - progress,
        "cosine": lambda progress, step: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        "rsqrt": lambda progress, step: jnp.sqrt(
            max(warmup, 1) / jnp.maximum(step, max(warmup, 1))
        ),
        "constant": lambda progress, step: jnp.ones_like(progress),
    }
    if config.decay not in decays:
        raise ConfigError(
            "schedule.decay", f"{config.decay!r} is unknown", f"Use one of {sorted(decays)}"
        )
    decay, final = decays[config.decay], config.final_factor

    def rate(step: jax.Array) -> jax.Array:
        step = step.astype(jnp.float32)
        progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        factor = final + (1.0 - final) * decay(progress, step)
        # The first update has a rate above zero, the one at the end of the warm-up the peak.
        factor *= jnp.minimum(1.0, (step + 1.0) / max(warmup, 1))
        if cooldown:
            factor *= jnp.clip((total - step) / cooldown, 0.0, 1.0)
        return config.peak * factor

    return rate
