"""What is drawn, learned and chosen in a search for units, against values known beforehand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.infra.errors import ConfigError
from vlp_jax.transfer.search import Bandit, Choice, Regression, learner


def choice(count: int = 2, costs: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1), **other) -> Choice:
    return Choice(tuple(f"unit_{i}" for i in range(len(costs))), costs, count, **other)


def sets(*chosen: tuple[int, ...], of: int) -> np.ndarray:
    return np.array([[unit in some for unit in range(of)] for some in chosen])


def test_the_bandit_from_indifference():
    """Rewards exp(-loss) of 1, 1/2, 1/4, less their mean 7/12, times p (1 - p) = 1/4."""
    bandit = Bandit()
    state = bandit.init(4)
    learned = bandit.learn(state, sets((0,), (1,), (2,), of=4), np.log([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(
        learned["preference"], [5 / 48, -1 / 48, -4 / 48, 0.0], rtol=1e-6, atol=1e-9
    )


def test_the_bandit_of_sets_that_overlap():
    """P of log 3 is 3/4, so p (1 - p) = 3/16; every choice moves its units from the same p."""
    bandit = Bandit(rate=0.5)
    state = {"preference": np.array([math.log(3.0), 0.0, -math.log(3.0)], np.float32)}
    chosen = sets((0, 1), (0, 2), (1, 2), of=3)
    learned = bandit.learn(state, chosen, -np.log([0.9, 0.6, 0.3]))
    # Less their mean, rewards are 0.3, 0, -0.3: what unit 1 gains in one it loses in the other.
    expected = state["preference"] + 0.5 * np.array([0.3 * 3 / 16, 0.0, -0.3 * 3 / 16])
    np.testing.assert_allclose(learned["preference"], expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bandit.log_weights(state), np.log([3 / 4, 1 / 2, 1 / 4]), rtol=1e-6)


def test_units_are_drawn_as_one_after_the_other_without_replacement():
    """Frequencies of all ordered-out sets against sequential sampling by weight."""
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    exact = {}
    for first, second in itertools.permutations(range(4), 2):
        chance = weights[first] / 8 * weights[second] / (8 - weights[first])
        exact[frozenset((first, second))] = exact.get(frozenset((first, second)), 0.0) + chance
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = jax.jit(jax.vmap(lambda key: choice().draw(key, jnp.log(weights))))(keys)
    drawn = np.asarray(drawn)
    assert (drawn.sum(axis=1) == 2).all()
    for some, chance in exact.items():
        found = np.mean([set(np.flatnonzero(row)) == set(some) for row in drawn[:5000]])
        assert found == pytest.approx(chance, abs=4 * math.sqrt(chance / 5000)), some
    marginal = np.array([sum(c for some, c in exact.items() if i in some) for i in range(4)])
    np.testing.assert_allclose(drawn.mean(axis=0), marginal, atol=4 * 0.5 / math.sqrt(draws))


def test_under_a_budget_units_are_drawn_until_it_is_saved():
    of = choice(0, (0.3, 0.1, 0.05, 0.05), flops_saved=0.14)
    for seed in range(50):
        drawn = np.asarray(of.draw(jax.random.key(seed), jnp.zeros(4)))
        saved = of.saved[drawn]
        assert saved.sum() >= 0.14 - 1e-6
        # Without the one drawn last it would not be saved; some unit is that one.
        assert any(saved.sum() - one < 0.14 for one in saved)


def test_choices_that_are_compared_differ():
    drawn = choice().draws(jax.random.key(0), jnp.array([9.0, 0.0, 0.0, 0.0]), 5)
    assert len({row.tobytes() for row in drawn}) == 5
    with pytest.raises(ConfigError, match=r"search\.candidates: 7, but there are only 6 diff"):
        choice().draws(jax.random.key(0), jnp.zeros(4), 7)


def compared(harm: np.ndarray, rounds: int, noise: float, seed: int, of: Choice, together: float):
    """Comparisons of a loss that is a sum of harms, and of noise that choices have in common."""
    draw = np.random.default_rng(seed)
    regression = Regression(forget=1.0)
    state = regression.init(len(harm))
    for number in range(rounds):
        drawn = of.draws(jax.random.key(1000 * seed + number), jnp.zeros(len(harm)), 6)
        losses = drawn @ harm + noise * draw.normal(size=6) + together * draw.normal()
        state = regression.learn(state, drawn, losses)
    return regression, state


def test_the_regression_finds_planted_harms_whatever_the_batches_have_in_common():
    harm = np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35])
    of = choice(3, (0.1,) * 8)
    regression, state = compared(harm, 40, 0.02, 0, of, together=0.0)
    found, error = regression.harm(state), regression.error(state)
    # Of choices of one size, differences alone can be told.
    differences = (found - found.mean()) - (harm - harm.mean())
    assert np.abs(differences).max() < 4 * error.max()
    assert error.max() < 0.01
    np.testing.assert_array_equal(of.best(found), [True] * 3 + [False] * 5)
    _, other = compared(harm, 40, 0.02, 0, of, together=5.0)
    np.testing.assert_allclose(regression.harm(other), found, atol=1e-4)
    weights = np.asarray(regression.log_weights(state))
    assert (np.diff(weights) < 0).all()  # the less harm, the rather


def test_errors_of_the_regression_are_what_its_estimates_differ_by():
    harm = np.linspace(0.0, 0.3, 6)
    of = choice(2, (0.1,) * 6)
    scores = []
    for seed in range(40):
        regression, state = compared(harm, 12, 0.1, seed, of, together=1.0)
        found = regression.harm(state)
        apart = (found[5] - found[0]) - (harm[5] - harm[0])
        scores.append(apart / np.hypot(*regression.error(state)[[0, 5]]))
    assert 0.6 < np.std(scores) < 1.4


def test_older_comparisons_count_less():
    of, early, late = choice(1), np.array([0.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])
    regression = Regression(forget=0.5)
    state = regression.init(4)
    single = np.eye(4, dtype=bool)
    for losses in [early] * 10 + [late] * 4:
        state = regression.learn(state, single, losses)
    assert of.names(of.best(regression.harm(state))) == ("unit_3",)


def test_under_a_budget_the_choice_does_least_harm():
    """Against all sets."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        costs = tuple(draw.choice([0.011, 0.0576, 0.03], size=8).tolist())
        harm = draw.normal(0.1, 0.1, 8)
        budget = float(draw.uniform(0.02, 0.9 * sum(costs)))
        of = choice(0, costs, flops_saved=budget)
        best = of.best(harm)
        assert of.saved[best].sum() >= budget - 2e-4
        every = np.array(list(itertools.product([False, True], repeat=8)))
        allowed = every[every @ np.asarray(costs) >= budget + 1e-9]
        more = harm - harm.min()
        assert more[best].sum() <= (allowed @ more).min() + 1e-8


@pytest.mark.parametrize("level", [-3.0, 0.0, 0.5])
def test_what_an_absence_does_as_such_does_not_overspend_a_budget(level):
    """Losses of choices of one size tell differences alone, so that half the harms are negative."""
    of = choice(0, (0.1, 0.1, 0.1, 0.05, 0.05), flops_saved=0.18)
    harm = level + np.array([0.02, 0.0, 0.3, 0.2, 0.1])
    assert of.names(of.best(harm)) == ("unit_0", "unit_1")
    nothing_known = of.best(np.full(5, level))
    assert 0.18 <= of.saved[nothing_known].sum() < 0.2 + 1e-6


def test_what_is_expected_decides_where_losses_tell_nothing():
    of, expected = choice(1), np.array([0.3, 0.2, 0.0, 0.1])
    regression = Regression()
    state = regression.expecting(regression.init(4), expected)
    single = np.eye(4, dtype=bool)
    silent = regression.learn(state, single, np.full(4, 0.69))
    np.testing.assert_allclose(regression.harm(silent), expected, atol=1e-7)
    assert of.names(of.best(regression.harm(silent))) == ("unit_2",)
    # Units are still drawn: what is expected is as uncertain as it varies.
    assert 1.0 < np.ptp(regression.log_weights(silent)) < 3.0
    for _ in range(30):
        state = regression.learn(state, single, np.array([1.0, 1.0, 1.9, 1.0]))
    assert of.names(of.best(regression.harm(state))) == ("unit_3",)
    # It is added to what losses tell, whenever it is given.
    bare = regression.init(4)
    for _ in range(30):
        bare = regression.learn(bare, single, np.array([1.0, 1.0, 1.9, 1.0]))
    np.testing.assert_allclose(
        regression.harm(state), regression.harm(bare) + expected, rtol=0, atol=1e-6
    )


def test_per_flop_what_saves_most_for_its_harm_goes_first():
    of = choice(2, (0.01, 0.05, 0.05, 0.01), cost="per_flop")
    harm = np.array([0.02, 0.03, 0.2, -0.001])
    assert of.names(of.best(harm)) == ("unit_1", "unit_3")
    assert choice(2).names(choice(2).best(harm)) == ("unit_0", "unit_3")
    assert [list(np.flatnonzero(some)) for some in of.orders(harm)][:3] == [[], [3], [1, 3]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choice(4), r"search\.skipped: 4 of 4 units .* Skip 1 to 3"),
        (lambda: choice(9), r"search\.skipped: 9 of 4 units"),
        (lambda: choice(0), r"search\.skipped: 0 units and search\.flops_saved=0\.0"),
        (lambda: choice(1, flops_saved=0.1), r"Give one of the two"),
        (lambda: choice(0, flops_saved=0.4), r"search\.flops_saved: 0\.4: all 4 .* save 0\.4000"),
        (lambda: choice(1, ()), r"model\.tuning\.gated: it names no unit"),
        (lambda: choice(1, cost="time"), r"search\.cost: 'time'"),
        (lambda: learner("free", choice(), 1.0, 0.9), r"search\.reward: 'free'"),
        (
            lambda: learner("paper", choice(1, cost="per_flop"), 1.0, 0.9),
            r"search\.reward: 'paper' takes no account",
        ),
    ],
)
def test_bad_input_names_the_key(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
