"""When a choice stands: what is compared, and how often tests are wrong."""

import numpy as np
import pytest

from tools.standing import Compared, Margins, judge, plan_of, student_tail, table_rows
from vlp_jax.transfer.search import Choice

UNITS = ("a", "b", "c", "d", "e")
MARGINS = Margins(tolerance=0.02, shift=0.05, level=0.01)
BATCHES = 32


def compared(**settings) -> Compared:
    choice = Choice(UNITS, (0.1, 0.1, 0.2, 0.2, 0.1), **({"count": 2} | settings))
    return plan_of(choice, ("b", "d"))


def draw(
    plan: Compared, seed: int, harms: tuple[float, ...], full: float = 2.0, batches: int = BATCHES
) -> np.ndarray:
    """Losses of batches whose units add these harms, with noise in common and of each."""
    rng = np.random.default_rng(seed)
    common = full + 0.2 * rng.standard_normal((batches, 1))
    effects = np.asarray(harms) + 0.02 * rng.standard_normal((batches, len(harms)))
    return common + effects @ plan.choices.T.astype(float)


HARMS = (0.05, 0.01, 0.05, 0.0, 0.06)


def test_what_is_compared():
    plan = compared()
    assert plan.exchanges == ((1, 0), (1, 2), (1, 4), (3, 0), (3, 2), (3, 4))
    names = [tuple(u for u, gone in zip(UNITS, row, strict=True) if gone) for row in plan.choices]
    assert names[:7] == [(), ("b", "d"), tuple("abd"), ("d",), tuple("bcd"), ("b",), tuple("bde")]
    assert names[7:] == [tuple(x) for x in ("ad", "cd", "de", "ab", "bc", "be")]
    losses = draw(plan, 0, HARMS)
    exact = draw(plan, 0, HARMS) * 0 + np.asarray(HARMS) @ plan.choices.T
    np.testing.assert_allclose(plan.harms(exact), np.tile(HARMS, (BATCHES, 1)), atol=1e-12)
    np.testing.assert_allclose(plan.added(exact), 0.01, atol=1e-12)
    np.testing.assert_allclose(plan.gains(exact)[0], [-0.04, -0.04, -0.05, -0.05, -0.05, -0.06])
    [first, *_] = table_rows(plan, losses, losses)
    assert (first["unit"], first["kept"]) == ("a", True)
    assert first["new"]["harm"] == pytest.approx(0.05, abs=4 * first["new"]["error"])


def test_an_exchange_saves_as_much_as_was_asked_for():
    """A lower loss for more FLOPs is no better choice."""
    assert compared(count=0, flops_saved=0.3).exchanges == ((1, 0), (1, 2), (1, 4), (3, 2))
    assert compared(cost="per_flop").exchanges == ((1, 0), (1, 2), (1, 4), (3, 2))
    assert len(compared(count=0, flops_saved=0.2).exchanges) == 6


def test_false_alarms_are_as_rare_as_said():
    """Of data that differ by chance alone, at noise of the size of what is looked for."""
    plan, alarms, trials = compared(), 0, 1000
    level = 0.05  # so that there are some to count
    for seed in range(trials):
        reference, new = (draw(plan, 2 * seed + side, HARMS) for side in (0, 1))
        tests = judge(plan, reference, new, Margins(0.0, 0.0, level))
        alarms += any(test.holds for test in tests)
    assert alarms <= trials * level + 3 * (trials * level * (1 - level)) ** 0.5


@pytest.mark.parametrize(
    ("harms", "full", "kind"),
    [
        (HARMS, 2.0, ""),
        ((0.05, 0.03, 0.05, 0.0, 0.06), 2.0, ""),  # as much more as is tolerated
        ((0.2, 0.09, 0.2, 0.05, 0.2), 2.0, "cost"),
        ((0.05, 0.01, 0.05, 0.0, -0.06), 2.0, "exchange"),
        (HARMS, 3.0, "shift"),
        (HARMS, 1.5, "shift"),
        (HARMS, 2.04, ""),  # less than counts for a shift
    ],
)
def test_what_makes_a_choice_fall(harms, full, kind):
    plan = compared()
    for seed in range(10):
        reference = draw(plan, 2 * seed, HARMS)
        tests = judge(plan, reference, draw(plan, 2 * seed + 1, harms, full), MARGINS)
        assert {test.kind for test in tests if test.holds} == ({kind} if kind else set()), seed
        if kind == "exchange":
            assert "with e skipped in place of b" in tests[2].words


def test_losses_that_are_not_finite_are_refused():
    plan = compared()
    losses = draw(plan, 0, HARMS)
    with pytest.raises(ValueError, match="a loss on the new data is not finite"):
        judge(plan, losses, losses * np.nan, MARGINS)


def test_units_that_do_nothing_at_all():
    """Losses that do not vary have no error, and nothing to be told from chance."""
    plan = compared()
    losses = np.full((BATCHES, len(plan.choices)), 2.0)
    assert not any(test.holds for test in judge(plan, losses, losses, MARGINS))
    assert any(test.holds for test in judge(plan, losses, losses + 1.0, MARGINS))


@pytest.mark.parametrize(("t", "freedom"), [(0.5, 1), (2.0, 7), (-1.3, 12.7), (4.0, 31), (8, 62)])
def test_the_tail_of_students_t(t, freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)
    assert student_tail(float("inf"), freedom) == 0.0
