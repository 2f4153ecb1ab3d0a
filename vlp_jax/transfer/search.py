"""Which units a task does without: what is drawn, what is learned of it, and what is chosen.

While a search runs, every update skips units that are drawn, and now and then several choices are
compared on one batch. From what these lose, preferences are learned, by which units are drawn from
then on; the higher a unit's, the rather it is skipped. All of it is arrays in and arrays out:
``train.searching`` has the batches and the losses.

``reward="paper"`` is the bandit of PCETL (arXiv 2309.01479; its fact sheet, section 2): a unit is
skipped with weight p = sigmoid(r), and

    r_i += rate * (R_h - mean R) * p_i * (1 - p_i)        for the units i of every choice h,

R = exp(-loss). Rewards of this size differ little, so that r hardly moves; what a unit costs has
no part in it.

``reward="held_out"`` learns what a unit's absence adds to the loss, in the unit of the loss: the
harm b of the ridge regression

    loss_h - mean loss = sum over i of b_i (s_hi - mean s_i)

over all choices compared so far, where s is 1 for what was skipped, and means are over the choices
that were compared on one batch, so that what they have in common, which is most of the noise,
cancels. Older comparisons count less, for the model trains on. A unit is drawn with weight
exp((mean b - b_i) / error of b_i): what differs by less than is known of it is drawn alike.

Losses of the first updates understate what an absence costs in the end, and where a task has not
begun to be learned they say nothing of it. What is expected beforehand (``search.prior``) is added
to b, and how it varies to its error: a unit that leaves the tokens much as they enter it is
expected to be missed less.

What is chosen does least harm, as a sum over its units: the ``count`` units that do least, or least
for each FLOP saved, or the set that does least of all those that save a share of the FLOPs. Harm is
counted from that of the least harmful unit: choices of about one size are compared, so that what an
absence does as such is not known, and taken to do good it would let a budget be overspent.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.infra.errors import ConfigError

Reward = Literal["held_out", "paper"]
Cost = Literal["none", "per_flop"]
_GRID = 100_000  # parts of the FLOPs, in which a set under a budget is told apart
_TRIES = 40  # times that choices are drawn until they differ, the last ones all but alike
_TIE = 1e-9  # of the greatest harm: tells units apart that do the same
_RIDGE = 1.0  # as of one comparison that has seen no harm

State = Mapping[str, Any]  # what has been learned; float32 arrays


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many units are skipped, or how much they save.

    Attributes:
        units: that there are.
        costs: share of the model's forward FLOPs that skipping each saves.
        count: k, of the units that are skipped; 0: as many as save ``flops_saved``.
        flops_saved: share of the model's forward FLOPs.
        cost: ``per_flop``: of the units, those count that do least harm for each FLOP they save.
    """

    units: tuple[str, ...]
    costs: tuple[float, ...]
    count: int = 0
    flops_saved: float = 0.0
    cost: Cost = "none"

    def __post_init__(self) -> None:
        if not self.units:
            raise ConfigError(
                "model.tuning.gated",
                "it names no unit, so that there is nothing to choose from",
                "Use ('fusion',), ('all',), or name stacks or units",
            )
        if (self.count > 0) == (self.flops_saved > 0):
            raise ConfigError(
                "search.skipped",
                f"{self.count} units and search.flops_saved={self.flops_saved}",
                "Give one of the two: how many are skipped, or what share of the FLOPs they save",
            )
        if not 0 <= self.count < len(self.units):
            raise ConfigError(
                "search.skipped",
                f"{self.count} of {len(self.units)} units ({', '.join(self.units)})",
                f"Skip 1 to {len(self.units) - 1} of them, or gate more by model.tuning.gated",
            )
        if not 0 <= self.flops_saved < sum(self.costs) + (self.count > 0):
            raise ConfigError(
                "search.flops_saved",
                f"{self.flops_saved}: all {len(self.units)} units together save "
                f"{sum(self.costs):.4f} of the forward FLOPs",
                "Ask for less, or gate more by model.tuning.gated",
            )
        if self.cost not in get_args(Cost):
            raise ConfigError("search.cost", f"{self.cost!r}", f"Use one of {get_args(Cost)}")

    @property
    def saved(self) -> np.ndarray:
        """``costs``, float32 [n]."""
        return np.asarray(self.costs, np.float32)

    def draw(self, key: jax.Array, log_weights: jax.Array) -> jax.Array:
        """Units one after the other, none twice, each by its weight among those that are left.

        Adding Gumbel noise to the logarithms and sorting draws in this way (fact sheet, section 7).

        Args:
            key: PRNG key.
            log_weights: float32 [n].

        Returns:
            bool [n], True for what is skipped.
        """
        order = jnp.argsort(-(log_weights + jax.random.gumbel(key, log_weights.shape)))
        rank = jnp.argsort(order)
        if self.count:
            return rank < self.count
        saved = jnp.asarray(self.saved)[order]
        before = jnp.cumsum(saved) - saved  # by the units drawn before
        return (before < self.flops_saved)[rank]

    def draws(self, key: jax.Array, log_weights: jax.Array, count: int) -> np.ndarray:
        """Choices no two of which are the same: bool [count, n].

        Where weights are so apart that hardly anything but one choice is drawn, they are brought
        nearer to one another, step by step.

        Raises:
            ConfigError: there are not so many.
        """
        found: dict[bytes, np.ndarray] = {}
        for number in range(_TRIES):
            keys = jax.random.split(jax.random.fold_in(key, number), 4 * count)
            for drawn in np.asarray(_drawn(self, keys, log_weights * 0.5**number)):
                found.setdefault(drawn.tobytes(), drawn)
                if len(found) == count:
                    return np.stack(list(found.values()))
        raise ConfigError(
            "search.candidates",
            f"{count}, but there are only {len(found)} different choices",
            "Compare fewer, or gate more units by model.tuning.gated",
        )

    def best(self, harm: np.ndarray) -> np.ndarray:
        """The choice of least harm: float [n] -> bool [n]."""
        chosen = np.zeros(len(self.units), bool)
        if self.count:
            chosen[self.order(harm)[: self.count]] = True
            return chosen
        return ~_most_kept(_from_least(harm), self.saved, self.flops_saved)

    def order(self, harm: np.ndarray) -> np.ndarray:
        """Units in the order in which they are skipped as more of them are: int64 [n]."""
        harm = _from_least(harm)
        if self.cost == "none" and self.count:
            return np.argsort(harm, kind="stable")
        return np.lexsort((-self.saved, harm / self.saved))  # of the same, what saves most

    def orders(self, harm: np.ndarray) -> Iterator[np.ndarray]:
        """The choices of 0, 1, ... n units in that order: bool [n] each."""
        order = self.order(harm)
        for count in range(len(order) + 1):
            chosen = np.zeros(len(order), bool)
            chosen[order[:count]] = True
            yield chosen

    def names(self, skipped: np.ndarray) -> tuple[str, ...]:
        """The units of a choice."""
        return tuple(unit for unit, gone in zip(self.units, skipped, strict=True) if gone)


@functools.partial(jax.jit, static_argnums=0)
def _drawn(choice: Choice, keys: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Draws, bool [keys, n]."""
    drawn: jax.Array = jax.vmap(choice.draw, in_axes=(0, None))(keys, log_weights)
    return drawn


def _from_least(harm: np.ndarray) -> np.ndarray:
    """By how much each unit does more harm than the one that does least: float64 [n]."""
    harm = np.asarray(harm, np.float64)
    return harm - harm.min()


def _most_kept(harm: np.ndarray, saved: np.ndarray, budget: float) -> np.ndarray:
    """Which units are kept, so that least harm is done where ``budget`` is saved: bool [n].

    A knapsack: what is kept may cost what is not to be saved, and is worth the harm of its absence.

    Args:
        harm: float64 [n], 0 or more.
        saved: share of the FLOPs, float32 [n].
        budget: share of the FLOPs.
    """
    costs = np.round(saved * _GRID).astype(np.int64)
    room = int(costs.sum()) - math.ceil(budget * _GRID - len(saved))  # rounding aside
    worth = np.zeros(room + 1)
    kept = np.zeros((len(harm), room + 1), bool)
    values = harm + _TIE * max(harm.max(), 1.0) * saved  # of the same harm, no more goes than must
    for unit, (cost, value) in enumerate(zip(costs, values, strict=True)):
        if cost > room:
            continue
        taken = np.full(room + 1, -np.inf)
        taken[cost:] = worth[: room + 1 - cost] + value
        kept[unit] = taken > worth
        worth = np.maximum(worth, taken)
    chosen, left = np.zeros(len(harm), bool), room
    for unit in reversed(range(len(harm))):
        if kept[unit, left]:
            chosen[unit] = True
            left -= costs[unit]
    return chosen


class Learner(Protocol):
    """What is learned of units whose choices are compared."""

    def init(self, units: int) -> dict[str, np.ndarray]:
        """Nothing is known yet."""
        ...

    def log_weights(self, state: State) -> jax.Array:
        """By which units are drawn to be skipped: float32 [n]."""
        ...

    def learn(self, state: State, skipped: np.ndarray, losses: np.ndarray) -> dict[str, np.ndarray]:
        """What is known after choices were compared on one batch.

        Args:
            state: before.
            skipped: bool [m, n].
            losses: float [m].
        """
        ...

    def harm(self, state: State) -> np.ndarray:
        """What a unit's absence does, by which choices are made: float64 [n]."""
        ...


@dataclasses.dataclass(frozen=True)
class Bandit:
    """That of the paper, see the module.

    Attributes:
        rate: of the preferences.
    """

    rate: float = 1.0

    def init(self, units: int) -> dict[str, np.ndarray]:
        """All preferences are 0."""
        return {"preference": np.zeros(units, np.float32)}

    def log_weights(self, state: State) -> jax.Array:
        """Logarithms of sigmoid(r)."""
        return jax.nn.log_sigmoid(jnp.asarray(state["preference"]))

    def learn(self, state: State, skipped: np.ndarray, losses: np.ndarray) -> dict[str, np.ndarray]:
        """One step of every choice, all from the same probabilities."""
        preference = np.asarray(state["preference"], np.float64)
        rewards = np.exp(-np.asarray(losses, np.float64))
        p = 1.0 / (1.0 + np.exp(-preference))
        gained = (rewards - rewards.mean()) @ np.asarray(skipped, np.float64)
        moved = preference + self.rate * gained * p * (1.0 - p)
        return {"preference": moved.astype(np.float32)}

    def harm(self, state: State) -> np.ndarray:
        """Minus the preference."""
        return -np.asarray(state["preference"], np.float64)


@dataclasses.dataclass(frozen=True)
class Regression:
    """Of the loss on what is skipped, see the module.

    Attributes:
        costs: of the units, float32 [n]: their harm is drawn by for each FLOP. None: as it is.
        forget: what older comparisons count, of each that follows.
    """

    costs: tuple[float, ...] | None = None
    forget: float = 0.98

    def init(self, units: int) -> dict[str, np.ndarray]:
        """No comparison yet."""
        return {
            "products": np.zeros((units, units), np.float32),
            "sums": np.zeros(units, np.float32),
            "squares": np.zeros((), np.float32),
            "compared": np.zeros((), np.float32),
            "preference": np.zeros(units, np.float32),
            "expected": np.zeros(units, np.float32),
        }

    def expecting(self, state: State, harm: np.ndarray) -> dict[str, np.ndarray]:
        """A state in which units are expected to do this harm beside what losses tell.

        Args:
            state: before.
            harm: in the unit of the loss, float [n].
        """
        return {**state, "expected": np.asarray(harm, np.float32)}

    def log_weights(self, state: State) -> jax.Array:
        """Preferences, which are logarithms of weights."""
        return jnp.asarray(state["preference"])

    def learn(self, state: State, skipped: np.ndarray, losses: np.ndarray) -> dict[str, np.ndarray]:
        """Add the comparison to the sums of the regression; refit."""
        x = np.asarray(skipped, np.float64)
        y = np.asarray(losses, np.float64)
        x, y = x - x.mean(axis=0), y - y.mean()
        keep = self.forget
        sums = {
            "products": keep * state["products"] + x.T @ x,
            "sums": keep * state["sums"] + x.T @ y,
            "squares": keep * state["squares"] + y @ y,
            "compared": keep * state["compared"] + len(y) - 1.0,
        }
        harm, error = self._fit(sums)
        # What is expected is off by about what units differ by in it: it is not to stop the search.
        error = np.hypot(error, np.std(state["expected"]))
        harm = harm + state["expected"]
        if self.costs is not None:
            harm, error = harm / self.costs, error / self.costs
        preference = (harm.mean() - harm) / np.maximum(error, np.finfo(np.float32).tiny)
        found = {**state, **sums, "preference": preference if error.any() else np.zeros(len(harm))}
        return {name: np.asarray(value, np.float32) for name, value in found.items()}

    def harm(self, state: State) -> np.ndarray:
        """In the unit of the loss: what losses tell, and what was expected."""
        return self._fit(state)[0] + np.asarray(state["expected"], np.float64)

    def error(self, state: State) -> np.ndarray:
        """Standard errors of ``harm`` less its mean over all units: float64 [n].

        Of choices of one size, what all units have in common cannot be told.
        """
        return self._fit(state)[1]

    def _fit(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        products = np.asarray(state["products"], np.float64)
        sums = np.asarray(state["sums"], np.float64)
        inverse = np.linalg.inv(products + _RIDGE * np.eye(len(products)))
        harm = inverse @ sums
        # As many comparisons as are left beside the parameters they have fitted.
        free = float(state["compared"]) - np.trace(inverse @ products)
        left = float(state["squares"]) - harm @ sums
        variance = max(left, 0.0) / max(free, 1.0)
        apart = inverse - inverse.mean(axis=0)
        return harm, np.sqrt(variance * np.diag(apart - apart.mean(axis=1, keepdims=True)))


def learner(reward: Reward, choice: Choice, rate: float, forget: float) -> Learner:
    """What learns from this reward.

    Raises:
        ConfigError: there is no such reward, or it does not know what a unit costs.
    """
    if reward == "held_out":
        per_flop = choice.cost == "per_flop" or choice.flops_saved > 0
        return Regression(choice.costs if per_flop else None, forget)
    if reward != "paper":
        raise ConfigError("search.reward", f"{reward!r}", f"Use one of {get_args(Reward)}")
    if not choice.count or choice.cost != "none":
        raise ConfigError(
            "search.reward",
            "'paper' takes no account of what a unit costs",
            "Give search.skipped and search.cost='none', or use 'held_out'",
        )
    return Bandit(rate)
