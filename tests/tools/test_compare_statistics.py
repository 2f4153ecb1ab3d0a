"""Where a curve reaches a score, and how sure that is."""

import math

import numpy as np
import pytest

from tools.compare.statistics import Budget, crossing, deviation, time_to_score

FRACTIONS = (0.25, 0.4, 1 / 1.5, 1.0)


def curve(speed: float = 1.0, spread: tuple[float, ...] = (0.0,)) -> list[Budget]:
    """Scores linear in the logarithm of the cost; ``speed`` times as good as speed 1."""
    return [
        Budget(f, 60 * f, tuple(0.5 + 0.1 * math.log(speed * f) + e for e in spread))
        for f in FRACTIONS
    ]


def test_interpolation_is_exact_where_scores_are_linear_in_the_logarithm():
    costs = [10.0, 40.0, 100.0]
    scores = [math.log(cost) for cost in costs]
    for cost in (15.0, 40.0, 77.0, 100.0):
        assert crossing(costs, scores, math.log(cost)).cost == pytest.approx(cost)


def test_the_first_crossing_counts_and_nothing_is_extrapolated():
    found = crossing([1.0, 2.0, 4.0, 8.0], [0.0, 1.0, 0.5, 1.5], 1.0)
    assert (found.cost, found.at_most) == (pytest.approx(2.0), False)
    below = crossing([1.0, 2.0], [0.3, 0.4], 0.2)
    assert (below.cost, below.at_most) == (1.0, True)
    assert crossing([1.0, 2.0], [0.3, 0.4], 0.41).cost == math.inf


@pytest.mark.parametrize("speed", [1.2, 2.0, 3.0])
def test_a_config_of_n_times_the_speed_needs_an_nth_of_the_time(speed):
    found = time_to_score(curve(speed), curve())
    assert found.share == pytest.approx(1 / speed)
    assert not found.at_most
    assert (found.low, found.high, found.reached) == (None, None, None), "one seed has no spread"


def test_a_slower_config_does_not_reach_it_and_a_fast_one_needs_at_most_the_smallest_budget():
    assert time_to_score(curve(0.9), curve()).share is None
    fast = time_to_score(curve(9.0), curve())
    assert (fast.share, fast.at_most) == (0.25, True)


def test_the_baseline_needs_its_whole_time_unless_it_has_saturated():
    whole = curve(spread=(-0.01, 0.0, 0.01))
    itself = time_to_score(whole, whole)
    assert itself.share == pytest.approx(1.0)
    assert itself.reached == 1.0
    flat = [*whole[:2], Budget(FRACTIONS[2], 40.0, whole[-1].scores), whole[-1]]
    assert time_to_score(flat, flat).share == pytest.approx(1 / 1.5)


def test_the_interval_holds_the_share_and_widens_with_the_spread():
    narrow, wide = (
        time_to_score(curve(2.0, (-s, 0.0, s)), curve(1.0, (-s, 0.0, s))) for s in (0.005, 0.02)
    )
    for found in (narrow, wide):
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.share < found.high
        assert found.share == pytest.approx(0.5)
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_the_bootstrap_tells_how_often_a_close_race_is_won():
    spread = (-0.02, 0.0, 0.02)
    tie = time_to_score(curve(1.0, spread), curve(1.0, spread))
    assert 0.3 < tie.reached < 0.95
    assert tie.high is None, "the upper end of a tie is that it is not reached"
    lost = time_to_score(curve(0.5, spread), curve(1.0, spread))
    assert lost.share is None
    assert lost.reached < 0.05


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits, trials = 0, 60
    for _ in range(trials):
        noisy = [
            [Budget(b.fraction, b.cost, tuple(b.mean + 0.01 * rng.normal(size=12))) for b in line]
            for line in (curve(2.0), curve())
        ]
        found = time_to_score(*noisy, draws=300)
        hits += found.low <= 0.5 <= (found.high or math.inf)
    assert 0.78 <= hits / trials <= 1.0


def test_draws_are_repeatable():
    spread = (-0.01, 0.0, 0.02)
    once, again = (time_to_score(curve(2.0, spread), curve(1.0, spread)) for _ in range(2))
    assert once == again


def test_deviation_needs_two_values():
    assert deviation([1.0]) is None
    assert deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2))
