"""Curves of score against cost, and the cost at which a score is reached.

All scores here are signed so that more is better.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
INTERVAL = (0.05, 0.95)


@dataclasses.dataclass(frozen=True)
class Budget:
    """The runs of one config at one budget, one for each seed.

    Attributes:
        fraction: nominal share of the whole budget.
        cost: mean over the seeds: seconds by the calibrated clock, samples or FLOPs.
        scores: of the seeds.
    """

    fraction: float
    cost: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean score."""
        return statistics.fmean(self.scores)


Curve = Sequence[Budget]  # of increasing cost


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where a curve first reaches a score.

    Attributes:
        cost: infinite where it does not.
        at_most: the smallest budget is enough already; less may be, and was not measured.
    """

    cost: float
    at_most: bool = False


@dataclasses.dataclass(frozen=True)
class TimeToScore:
    """The share of the baseline's whole cost at which a config reaches the baseline's score.

    Attributes:
        target: the baseline's mean score at its whole budget, signed.
        share: of the baseline's mean cost there; None: not reached at any budget.
        at_most: the share is that of the smallest budget, and less may be enough.
        smallest: share of the smallest budget; an end of the interval there is an upper bound too.
        low: lower end of the bootstrap interval; None where it is not reached, or without spread
            because no budget has two seeds.
        high: upper end, likewise.
        reached: share of the bootstrap draws in which it is reached; None without spread.
        largest: share of the largest budget that is there.
        is_whole: it is the last one asked for; else what is not reached may be yet.
    """

    target: float
    share: float | None
    at_most: bool
    smallest: float
    low: float | None
    high: float | None
    reached: float | None
    largest: float
    is_whole: bool


def crossing(costs: Sequence[float], scores: Sequence[float], target: float) -> Crossing:
    """The least cost at which a piecewise curve reaches a score.

    Between two measured budgets the score is taken as linear in the logarithm of the cost; beyond
    them nothing is assumed.

    Args:
        costs: increasing, positive.
        scores: at these costs.
        target: to be reached.
    """
    if scores[0] >= target:
        return Crossing(costs[0], at_most=True)
    for index in range(1, len(costs)):
        if scores[index] >= target:
            low, high = math.log(costs[index - 1]), math.log(costs[index])
            share = (target - scores[index - 1]) / (scores[index] - scores[index - 1])
            return Crossing(math.exp(low + share * (high - low)))
    return Crossing(math.inf)


def time_to_score(
    curve: Curve, baseline: Curve, *, until: float = 1.0, draws: int = DRAWS
) -> TimeToScore:
    """The share of the baseline's whole cost at which ``curve`` reaches its score there.

    The spread is that of a bootstrap over seeds: at every budget of either config, as many seeds
    are drawn with replacement as there are. With few seeds it is narrower than the truth.

    Args:
        curve: of the config, not empty.
        baseline: its last entry is the whole budget. The same object as ``curve`` where the config
            is the baseline: its own score is then drawn once, and the share is 1 unless a smaller
            budget is as good, that is, unless the baseline has saturated.
        until: the largest share of the budget that the config is to have.
        draws: of the bootstrap.
    """
    costs = [budget.cost for budget in curve]
    whole = baseline[-1]
    found = crossing(costs, [budget.mean for budget in curve], whole.mean)
    share = found.cost / whole.cost
    if max(len(budget.scores) for budget in (*curve, whole)) < 2:
        low = high = reached = None
    else:
        rng = np.random.default_rng(0)
        scores = np.stack([_resampled_means(rng, budget.scores, draws) for budget in curve], 1)
        target = scores[:, -1] if curve is baseline else _resampled_means(rng, whole.scores, draws)
        drawn = np.array(
            [crossing(costs, row, goal).cost for row, goal in zip(scores, target, strict=True)]
        )
        # "nearest", for no value lies between a share and "not reached".
        ends = np.quantile(drawn / whole.cost, INTERVAL, method="nearest")
        low, high = (_finite(float(end)) for end in ends)
        reached = float(np.isfinite(drawn).mean())
    return TimeToScore(
        target=whole.mean,
        share=_finite(share),
        at_most=found.at_most,
        smallest=costs[0] / whole.cost,
        low=low,
        high=high,
        reached=reached,
        largest=costs[-1] / whole.cost,
        is_whole=curve[-1].fraction >= until,
    )


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _resampled_means(rng: np.random.Generator, scores: Sequence[float], draws: int) -> np.ndarray:
    """Means of bootstrap samples, float64 [draws]."""
    return rng.choice(np.asarray(scores), (draws, len(scores))).mean(1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
