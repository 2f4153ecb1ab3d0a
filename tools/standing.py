"""Whether a choice of units stands on other data: what is compared, and the tests.

``plan_of`` says which choices are compared: the full network, the chosen one, every unit turned
over (a kept one skipped in addition, a skipped one put back), which is what each unit does beside
the others that are chosen, and every exchange of a skipped unit for a kept one. Exchanges are
measured and not added up from single units: what units do is not additive, and no test can know by
how much that errs. They cost k (n - k) forward passes of a batch, without gradient.

All of them are losses of the same batches, so that differences are paired, batch by batch: what
batches have in common cancels. Batches share no record, so that they are independent draws, and
those of the reference and of the new data are as well. ``judge`` tests three statements:

- *cost*: skipping adds more than ``tolerance`` more to the loss on the new data than on the
  reference. Welch's test of an excess over the tolerance, one-sided.
- *exchange*: an exchange has a loss lower by more than ``tolerance`` than the choice, on the new
  data. Paired t test of an excess over the tolerance, one-sided, for each exchange.
- *shift*: the loss of the full network is another one than on the reference, two-sided by Welch's
  test, and differs by more than the share ``shift`` of it.

A statement holds if its p value is below ``level`` over the number of tests (Bonferroni). So on
data such as the choice was made on, and where no exchange is better by more than the tolerance, the
choice falls with a chance of ``level`` at most, however many units there are.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.transfer.search import Choice

_NODES = 200  # of the quadrature: exact to rounding for the degrees of freedom that occur


@dataclasses.dataclass(frozen=True)
class Compared:
    """The choices that are compared, in the order of their losses.

    Attributes:
        units: of the search.
        chosen: bool [n], True for what is skipped.
        exchanges: pairs of units: what is put back, what goes in its place; indices.
    """

    units: tuple[str, ...]
    chosen: np.ndarray
    exchanges: tuple[tuple[int, int], ...]

    @property
    def choices(self) -> np.ndarray:
        """The full network, the chosen one, n with a unit turned over, exchanges: bool [m, n]."""
        count = len(self.units)
        turned = self.chosen ^ np.eye(count, dtype=bool)
        exchanged = np.repeat(self.chosen[None], len(self.exchanges), axis=0)
        for row, (back, gone) in enumerate(self.exchanges):
            exchanged[row, back], exchanged[row, gone] = False, True
        return np.concatenate([np.zeros((1, count), bool), self.chosen[None], turned, exchanged])

    def added(self, losses: np.ndarray) -> np.ndarray:
        """What skipping the chosen units adds: float [batches, m] -> float [batches]."""
        return losses[:, 1] - losses[:, 0]

    def harms(self, losses: np.ndarray) -> np.ndarray:
        """What a unit's absence adds beside the rest of the choice: float [batches, n]."""
        more = losses[:, 2 : 2 + len(self.units)] - losses[:, 1:2]
        return np.where(self.chosen, -more, more)

    def gains(self, losses: np.ndarray) -> np.ndarray:
        """How much lower the loss of each exchange is than the choice's: float [batches, e]."""
        return losses[:, 1:2] - losses[:, 2 + len(self.units) :]


def plan_of(choice: Choice, skipped: Sequence[str]) -> Compared:
    """What is compared of a choice.

    Where FLOPs were asked for or counted, only exchanges that save as much are looked at: a lower
    loss for more FLOPs is no better choice.

    Args:
        choice: of the search.
        skipped: the units that it has chosen.
    """
    chosen = np.isin(choice.units, skipped)
    needed = choice.flops_saved
    if choice.count:
        needed = 0.0 if choice.cost == "none" else float(choice.saved[chosen].sum())
    saved = choice.saved.astype(np.float64)
    total, slack = saved[chosen].sum(), 1e-6  # for sums of float32
    exchanges = tuple(
        (int(back), int(gone))
        for back in np.flatnonzero(chosen)
        for gone in np.flatnonzero(~chosen)
        if total - saved[back] + saved[gone] >= needed - slack
    )
    return Compared(choice.units, chosen, exchanges)


@dataclasses.dataclass(frozen=True)
class Margins:
    """What does not matter, and the chance of a false alarm.

    Attributes:
        tolerance: in the unit of the loss.
        shift: as a share of the full network's loss on the reference.
        level: chance of a false alarm of all tests together, at most.
    """

    tolerance: float
    shift: float
    level: float


@dataclasses.dataclass(frozen=True)
class Statement:
    """What may speak against a choice, tested.

    Attributes:
        kind: ``cost``, ``exchange`` or ``shift``; see the module.
        words: what it says, with the figures.
        estimate: of the difference, in the unit of the loss.
        error: its standard error.
        p: chance of such an excess over the margin, or of a larger one, where there is none.
        holds: whether it is believed, against the choice.
    """

    kind: str
    words: str
    estimate: float
    error: float
    p: float
    holds: bool


def judge(
    compared: Compared, reference: np.ndarray, new: np.ndarray, margins: Margins
) -> list[Statement]:
    """Test whatever would make the choice fall; it stands if nothing of it holds.

    Args:
        compared: the choices.
        reference: their losses on data like those that they were made on, float64 [batches, m].
        new: on the new data, float64 [batches, m]; as many batches or another number.
        margins: of the tests.

    Returns:
        Cost, shift, and exchanges from the most to the least gained.

    Raises:
        ValueError: a loss is not finite.
    """
    for name, losses in (("the reference", reference), ("the new data", new)):
        if not np.isfinite(losses).all():
            raise ValueError(f"a loss on {name} is not finite, so that nothing can be compared")
    tolerance, tests = margins.tolerance, 2 + len(compared.exchanges)
    threshold = margins.level / tests

    def tested(kind: str, words: str, p: float, estimate: float, error: float) -> Statement:
        return Statement(kind, words, estimate, error, p, p < threshold)

    before, now = compared.added(reference), compared.added(new)
    apart, error = _difference(now, before)
    cost = tested(
        "cost",
        f"skipping adds {_told(now)} to the loss on the new data and {_told(before)} on the "
        f"reference: {apart:+.4f} ± {error:.4f} more (tolerance {tolerance:.4f})",
        _welch(now, before, tolerance),
        apart,
        error,
    )
    full, whole = reference[:, 0], new[:, 0]
    apart, error = _difference(whole, full)
    p = 2.0 * _welch(*((whole, full) if apart > 0 else (full, whole)), 0.0)
    far = abs(apart) > margins.shift * abs(float(full.mean()))
    shift = tested(
        "shift",
        f"the full network has a loss of {_told(whole)} on the new data and {_told(full)} on the "
        f"reference: {apart / abs(full.mean()):+.1%} ± {error / abs(full.mean()):.1%} "
        f"(up to {margins.shift:.1%} counts for none)",
        min(1.0, p) if far else 1.0,
        apart,
        error,
    )
    gains = compared.gains(new)
    exchanges = [
        tested(
            "exchange",
            f"with {compared.units[gone]} skipped in place of {compared.units[back]}, the loss on "
            f"the new data is lower by {_told(gains[:, index])} (tolerance {tolerance:.4f})",
            _paired(gains[:, index], tolerance),
            float(gains[:, index].mean()),
            standard_error(gains[:, index]),
        )
        for index, (back, gone) in enumerate(compared.exchanges)
    ]
    return [cost, shift, *sorted(exchanges, key=lambda one: -one.estimate)]


def table_rows(
    compared: Compared, reference: np.ndarray, new: np.ndarray
) -> list[Mapping[str, Any]]:
    """Every unit: ``unit``, ``kept``, and ``reference`` and ``new``, harm with standard error."""
    harms = [compared.harms(losses) for losses in (reference, new)]
    return [
        {
            "unit": unit,
            "kept": not compared.chosen[index],
            **{
                name: {
                    "harm": float(harm[:, index].mean()),
                    "error": standard_error(harm[:, index]),
                }
                for name, harm in zip(("reference", "new"), harms, strict=True)
            },
        }
        for index, unit in enumerate(compared.units)
    ]


def standard_error(values: np.ndarray) -> float:
    """Of the mean of float [n], n at least 2."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def student_tail(t: float, freedom: float) -> float:
    """The chance that a t-distributed number exceeds t.

    With t = sqrt(freedom) tan(x) the density is a power of a cosine, which a Gauss rule integrates.

    Args:
        t: any number; infinities are taken as such.
        freedom: degrees of freedom, above 0.
    """
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    if t < 0:
        return 1.0 - student_tail(-t, freedom)
    nodes, weights = _gauss_rule()
    low, high = math.atan(t / math.sqrt(freedom)), math.pi / 2
    x = 0.5 * (high - low) * nodes + 0.5 * (high + low)
    area = 0.5 * (high - low) * float(weights @ np.cos(x) ** (freedom - 1.0))
    log_scale = math.lgamma((freedom + 1.0) / 2.0) - math.lgamma(freedom / 2.0)
    return area * math.exp(log_scale) / math.sqrt(math.pi)


@functools.cache
def _gauss_rule() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(_NODES)


def _paired(differences: np.ndarray, margin: float) -> float:
    """The p value of a mean above a margin: float [batches]."""
    excess, error = float(differences.mean()) - margin, standard_error(differences)
    return _p(excess, error, len(differences) - 1.0)


def _welch(first: np.ndarray, second: np.ndarray, margin: float) -> float:
    """The p value of a mean that is higher than another by more than a margin."""
    apart, error = _difference(first, second)
    parts = [standard_error(values) ** 2 for values in (first, second)]
    shares = zip(parts, (first, second), strict=True)
    spread = sum(part**2 / (len(values) - 1) for part, values in shares)
    return _p(apart - margin, error, error**4 / spread if spread else 1.0)


def _p(excess: float, error: float, freedom: float) -> float:
    if error == 0.0:  # as where units do nothing at all
        return 0.0 if excess > 0 else 1.0
    return student_tail(excess / error, freedom)


def _difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Of means of independent draws, and its standard error."""
    error = math.hypot(standard_error(first), standard_error(second))
    return float(first.mean() - second.mean()), error


def _told(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {standard_error(values):.4f}"
