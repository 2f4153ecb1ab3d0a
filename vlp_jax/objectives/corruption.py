"""How much FLM hides: a fixed rate, a range, a schedule, or a choice made while training.

    config.objectives.flm.corruption_rate = 0.3
    {"kind": "range", "low": 0.1, "high": 0.5}            # a rate for each text
    {"kind": "schedule", "points": ((0.0, 0.5), (1.0, 0.1))}  # (share of the budget, rate), linear
    {"kind": "bandit", "arms": (0.0, 0.15, 0.3, 0.5), "metric": "reconstruction/0.3/loss"}

Whatever a kind remembers lies in the objective's extras, so that a resumed run goes on as it was.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.infra.errors import ConfigError, section_arguments

Memory = Mapping[str, jax.Array]


class Corruption(Protocol):
    """A rule for the corruption rate."""

    def init(self) -> dict[str, jax.Array]:
        """What it remembers, before the first update."""
        ...

    def rates(
        self, memory: Memory, keys: jax.Array, progress: jax.Array | float = 0.0
    ) -> jax.Array:
        """The rate of each text.

        Args:
            memory: of ``init`` or ``observe``.
            keys: PRNG keys [B].
            progress: share of the budget that is spent, float32 [].

        Returns:
            float32 [B].
        """
        ...

    def observe(self, memory: Memory, values: Mapping[str, float]) -> dict[str, Any]:
        """Memory after an evaluation, on the host."""
        ...

    @property
    def mean_rate(self) -> float:
        """Of the whole run, as far as it is known."""
        ...

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Figures of evaluators that it cannot do without."""
        ...


class _Stateless:
    """Remembers nothing, and learns nothing from evaluations."""

    def init(self) -> dict[str, jax.Array]:
        """Nothing."""
        return {}

    def observe(self, memory: Memory, values: Mapping[str, float]) -> dict[str, Any]:
        """Nothing changes."""
        del values
        return dict(memory)

    @property
    def learns_from(self) -> tuple[str, ...]:
        """No figure."""
        return ()


@dataclasses.dataclass(frozen=True)
class Fixed(_Stateless):
    """One rate; what lies below 1 / L (so also 0.0) hides the query's own token alone."""

    key: str
    rate: float = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.key, self.rate)

    def rates(
        self, memory: Memory, keys: jax.Array, progress: jax.Array | float = 0.0
    ) -> jax.Array:
        """The rate, for each text."""
        del memory, progress
        return jnp.full(keys.shape, self.rate, jnp.float32)

    @property
    def mean_rate(self) -> float:
        """The rate."""
        return self.rate


@dataclasses.dataclass(frozen=True)
class Range(_Stateless):
    """A rate for each text, uniform between ``low`` and ``high``."""

    key: str
    low: float = 0.0
    high: float = 0.5

    def __post_init__(self) -> None:
        _check_rate(f"{self.key}.low", self.low)
        _check_rate(f"{self.key}.high", self.high)
        if self.low > self.high:
            raise ConfigError(
                f"{self.key}.low", f"{self.low} exceeds high={self.high}", "Swap the two"
            )

    def rates(
        self, memory: Memory, keys: jax.Array, progress: jax.Array | float = 0.0
    ) -> jax.Array:
        """A fresh draw for each key."""
        del memory, progress
        draws = jax.vmap(jax.random.uniform)(keys)
        return self.low + (self.high - self.low) * draws

    @property
    def mean_rate(self) -> float:
        """The middle."""
        return (self.low + self.high) / 2


@dataclasses.dataclass(frozen=True)
class Scheduled(_Stateless):
    """A rate that changes over the run, linear between the points and constant outside them.

    Attributes:
        key: config key, for messages.
        points: (share of the budget in [0, 1], rate), in order of the share.
    """

    key: str
    points: Sequence[Sequence[float]] = ((0.0, 0.0), (1.0, 0.5))

    def __post_init__(self) -> None:
        try:
            shares = [float(share) for share, _ in self.points]
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self.key}.points",
                f"{self.points!r} are no pairs of numbers",
                "Give (share, rate) pairs, such as ((0.0, 0.5), (1.0, 0.1))",
            ) from None
        if not shares or sorted(shares) != shares or not 0 <= shares[0] <= shares[-1] <= 1:
            raise ConfigError(
                f"{self.key}.points",
                f"{shares} are no shares of a run in order",
                "Give (share, rate) pairs with shares from 0 to 1",
            )
        for _, rate in self.points:
            _check_rate(f"{self.key}.points", rate)

    def rates(
        self, memory: Memory, keys: jax.Array, progress: jax.Array | float = 0.0
    ) -> jax.Array:
        """The rate of this moment, for each text."""
        del memory
        shares, rates = np.asarray(self.points, np.float32).T
        rate = jnp.interp(jnp.asarray(progress, jnp.float32), shares, rates)
        return jnp.broadcast_to(rate, keys.shape)

    @property
    def mean_rate(self) -> float:
        """Over the whole run."""
        shares, rates = np.asarray(self.points, np.float64).T
        grid = np.linspace(0.0, 1.0, 1001)
        return float(np.interp(grid, shares, rates).mean())


@dataclasses.dataclass(frozen=True)
class Bandit:
    """One of several rates, chosen after each evaluation by how fast the held-out loss falls.

    Between two evaluations one rate is used; its reward is the fall of the loss in that time,
    divided by the mean absolute fall of late, for all falls shrink as training goes on. Arms are
    compared by discounted upper confidence bounds (Garivier and Moulines, 2011); rates that were
    not tried yet come first, in their order.

    Remembers ``arm`` int32 [], ``counts`` and ``rewards`` float32 [A] (discounted), ``last``
    float32 [] (the loss before; NaN at first) and ``scale`` float32 [].

    Attributes:
        key: config key, for messages.
        arms: the rates.
        metric: what an evaluator of the run reports, lower is better.
        discount: of counts and rewards, for each evaluation.
        exploration: factor of the confidence bound.
    """

    key: str
    arms: Sequence[float] = (0.0, 0.15, 0.3, 0.5)
    metric: str = "reconstruction/0.3/loss"
    discount: float = 0.95
    exploration: float = 0.5

    def __post_init__(self) -> None:
        if len(set(self.arms)) < 2:
            raise ConfigError(
                f"{self.key}.arms", f"{tuple(self.arms)} leave no choice", "Give two rates or more"
            )
        for rate in self.arms:
            _check_rate(f"{self.key}.arms", rate)
        if not 0.0 <= self.exploration < math.inf:
            raise ConfigError(
                f"{self.key}.exploration", f"{self.exploration} is no factor", "Use 0 or more"
            )
        if not 0.0 < self.discount <= 1.0:
            raise ConfigError(
                f"{self.key}.discount", f"{self.discount} is no discount", "Use one in (0, 1]"
            )

    def init(self) -> dict[str, jax.Array]:
        """Nothing tried yet; the first rate is in use."""
        count = len(self.arms)
        return {
            "arm": jnp.zeros((), jnp.int32),
            "counts": jnp.zeros(count),
            "rewards": jnp.zeros(count),
            "last": jnp.full((), jnp.nan),
            "scale": jnp.zeros(()),
        }

    def rates(
        self, memory: Memory, keys: jax.Array, progress: jax.Array | float = 0.0
    ) -> jax.Array:
        """The rate in use, for each text."""
        del progress
        rate = jnp.asarray(tuple(self.arms), jnp.float32)[memory["arm"]]
        return jnp.broadcast_to(rate, keys.shape)

    def observe(self, memory: Memory, values: Mapping[str, float]) -> dict[str, Any]:
        """Reward the rate in use and choose the next; unchanged where the metric is absent."""
        if self.metric not in values:
            return dict(memory)
        loss = float(values[self.metric])
        fall = float(memory["last"]) - loss
        new = {**memory, "last": np.float32(loss)}
        if not math.isfinite(fall):  # the first evaluation
            return new
        scale = float(memory["scale"])
        scale = 0.8 * scale + 0.2 * abs(fall) if scale else abs(fall)
        reward = min(max(fall / max(scale, 1e-12), -2.0), 2.0)
        used = np.arange(len(self.arms)) == int(memory["arm"])
        counts = self.discount * np.asarray(memory["counts"]) + used
        rewards = self.discount * np.asarray(memory["rewards"]) + used * reward
        return new | {
            "scale": np.float32(scale),
            "counts": counts.astype(np.float32),
            "rewards": rewards.astype(np.float32),
            "arm": np.int32(self._best(counts, rewards)),
        }

    def _best(self, counts: np.ndarray, rewards: np.ndarray) -> int:
        untried = np.flatnonzero(counts == 0)
        if len(untried):
            return int(untried[0])
        bound = self.exploration * np.sqrt(np.log(max(counts.sum(), np.e)) / counts)
        return int(np.argmax(rewards / counts + bound))

    @property
    def mean_rate(self) -> float:
        """Of the arms."""
        return float(np.mean(self.arms))

    @property
    def learns_from(self) -> tuple[str, ...]:
        """The held-out loss."""
        return (self.metric,)


_KINDS: Mapping[str, Callable[..., Corruption]] = {
    "range": Range,
    "schedule": Scheduled,
    "bandit": Bandit,
}


def build_corruption(rate: float | Mapping[str, Any], key: str) -> Corruption:
    """The rule that a config asks for.

    Args:
        rate: a fixed one, or a section with ``kind`` and its arguments.
        key: config key, for messages.

    Raises:
        ConfigError: an unknown kind or key, or a rate out of range.
    """
    if not isinstance(rate, Mapping):
        return Fixed(key, rate)
    kind = rate.get("kind", "")
    if kind not in _KINDS:
        raise ConfigError(f"{key}.kind", f"{kind!r} is no kind", f"Use one of {sorted(_KINDS)}")
    rule = _KINDS[kind]
    fields = set(inspect.signature(rule).parameters)
    return rule(key=key, **section_arguments(rate, key, fields - {"key"}, ("kind",)))


def _check_rate(key: str, rate: float) -> None:
    if isinstance(rate, bool | str) or not 0.0 <= rate <= 1.0:
        raise ConfigError(
            key, f"{rate!r} is no corruption rate", "Use one in [0, 1]; 0 hides one token"
        )
