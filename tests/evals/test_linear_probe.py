"""Linear probes against SciPy's optimum of the same loss, and against scikit-learn."""

import jax
import numpy as np
import pytest
import scipy.optimize
from scipy.special import log_softmax

from tests.evals.conftest import announced
from vlp_jax.evals import build_evaluators
from vlp_jax.evals.linear_probe import EXPONENTS, choose, fit, predict
from vlp_jax.infra.errors import ConfigError

DRAW = np.random.default_rng(0)
CLASSES, COUNT, WIDTH = 3, 120, 6
CENTRES = DRAW.normal(size=(CLASSES, WIDTH))
TARGETS = DRAW.integers(0, CLASSES, COUNT)
FEATURES = (CENTRES[TARGETS] + DRAW.normal(size=(COUNT, WIDTH))).astype(np.float32)
SECTION = {"source": "scenes", "num_examples": 10, "num_train": 30, "max_iterations": 20}


def reference(strength: float, penalty: str) -> tuple[float, np.ndarray]:
    """Least objective and its weights, in float64."""
    x = FEATURES.astype(np.float64)

    def objective(flat: np.ndarray) -> float:
        kernel, bias = flat[: WIDTH * CLASSES].reshape(WIDTH, CLASSES), flat[WIDTH * CLASSES :]
        chances = log_softmax(x @ kernel + bias, axis=1)
        losses = -chances[np.arange(COUNT), TARGETS]
        square = np.square(kernel).sum()
        if penalty == "squared":
            return float((losses.sum() + square / (2 * strength)) / COUNT)
        return float(losses.mean() + np.sqrt(square) / strength)

    start = 0.01 * DRAW.normal(size=(WIDTH + 1) * CLASSES)
    found = scipy.optimize.minimize(objective, start, options={"gtol": 1e-7, "maxiter": 2000})
    kernel = found.x[: WIDTH * CLASSES].reshape(WIDTH, CLASSES)
    return objective(found.x), kernel


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("penalty", ["squared", "norm"])
def test_weights_are_those_of_the_least_objective(penalty, strength):
    _, kernel = reference(strength, penalty)
    fitted = fit(FEATURES, TARGETS, strength, penalty)
    # Only differences between classes are told by the losses; the penalty centres them.
    np.testing.assert_allclose(fitted.kernel, kernel, atol=2e-3 * max(1.0, np.abs(kernel).max()))


def test_scale_of_the_features_does_not_stop_the_fit():
    """The same optimum in other units, with the penalty to match."""
    plain = fit(FEATURES, TARGETS, 1.0)
    scaled = fit(1000.0 * FEATURES, TARGETS, 1e-6)
    np.testing.assert_allclose(1000.0 * scaled.kernel, plain.kernel, atol=2e-3)


def test_weights_are_those_of_scikit_learn():
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="scikit-learn is absent: pip install -e '.[parity]'"
    )
    for strength in (0.01, 1.0, 100.0):
        theirs = linear_model.LogisticRegression(C=strength, max_iter=5000, tol=1e-8)
        theirs.fit(FEATURES, TARGETS)
        ours = fit(FEATURES, TARGETS, strength)
        largest = max(1.0, np.abs(theirs.coef_).max())
        np.testing.assert_allclose(ours.kernel, theirs.coef_.T, atol=3e-3 * largest)
        np.testing.assert_array_equal(predict(ours, FEATURES), theirs.predict(FEATURES))


def test_the_penalty_is_chosen_on_the_last_fifth():
    """Where the last fifth is noise, nothing beats the strongest penalty by more than chance."""
    noise = TARGETS.copy()
    first = COUNT - COUNT // 5
    exponent = choose(FEATURES, noise, "squared", 100)
    assert EXPONENTS[0] <= exponent <= EXPONENTS[-1]
    scores = {}
    for tried in (-6.0, exponent):
        fitted = fit(FEATURES[:first], noise[:first], 10.0**tried)
        scores[tried] = np.mean(predict(fitted, FEATURES[first:]) == noise[first:])
    assert scores[exponent] >= scores[-6.0]
    assert scores[exponent] > 0.5
    constant = np.zeros_like(FEATURES)  # no penalty is better than another: the strongest
    assert choose(constant, noise, "squared", 10) == EXPONENTS[0]


def test_figures_of_a_run(with_evals, params):
    context = with_evals({"linear_probe": {**SECTION, "labels": ("shape", "count")}})
    [evaluator] = build_evaluators(context).values()
    found = announced(evaluator, evaluator.run(params))
    assert {name.split("/")[0] for name in found} == {"shape", "count"}
    for label in ("shape", "count"):
        assert 0 <= found[f"{label}/accuracy"] <= 1
        assert 0 < found[f"{label}/train_accuracy"] <= 1
        assert -6 <= found[f"{label}/log10_c"] <= 6
    assert jax.device_get(params) is not None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"penalty": "l1"}, r"evals\.linear_probe\.penalty: 'l1' is no penalty"),
        ({"num_train": 4}, r"evals\.linear_probe\.num_train: of 4 pictures"),
        ({"num_train": 0}, r"evals\.linear_probe\.num_train: 0 pictures"),
        ({"labels": ("hue",)}, r"evals\.linear_probe\.labels: 'scenes' has no label 'hue'"),
        ({"max_iterations": 0}, r"evals\.linear_probe\.max_iterations: 0 fit nothing"),
    ],
)
def test_errors_name_the_key(with_evals, section, message):
    with pytest.raises(ConfigError, match=message):
        build_evaluators(with_evals({"linear_probe": {**SECTION, **section}}))
