"""Few-shot episodes against a plain loop."""

import numpy as np
import pytest

from tests.evals.conftest import announced
from vlp_jax.evals import build_evaluators
from vlp_jax.evals.few_shot import episode_accuracy
from vlp_jax.infra.errors import ConfigError

DRAW = np.random.default_rng(0)
SECTION = {"source": "scenes", "num_examples": 20, "num_train": 60}


def test_accuracy_is_that_of_the_nearest_centre():
    supports = DRAW.normal(size=(7, 4, 3, 5)) + DRAW.normal(size=(7, 4, 1, 5))
    queries = DRAW.normal(size=(7, 4, 2, 5)) + supports.mean(axis=2, keepdims=True)
    found = episode_accuracy(supports, queries)
    for episode in range(7):
        mean = supports[episode].reshape(-1, 5).mean(axis=0)
        centres = []
        for way in range(4):
            rows = [s - mean for s in supports[episode, way]]
            centres.append(np.mean([r / np.linalg.norm(r) for r in rows], axis=0))
        right = 0
        for way in range(4):
            for query in queries[episode, way]:
                moved = (query - mean) / np.linalg.norm(query - mean)
                right += np.argmin([np.linalg.norm(moved - c) for c in centres]) == way
        assert found[episode] == pytest.approx(right / 8)
    assert 0.3 < found.mean() < 1


def test_figures_of_a_run_and_labels_of_too_few_classes(with_evals, params):
    section = {**SECTION, "shots": 2, "queries": 1, "episodes": 300}
    [evaluator] = build_evaluators(with_evals({"few_shot": section})).values()
    found = announced(evaluator, evaluator.run(params))
    again = dict(evaluator.run(params))
    assert found == again
    assert found["shape/accuracy"] > 0.15
    assert found["shape/accuracy_std"] > 0
    [evaluator] = build_evaluators(with_evals({"few_shot": {**section, "shots": 60}})).values()
    assert dict(evaluator.run(params)) == {}


@pytest.mark.parametrize("key", ["ways", "shots", "queries", "episodes"])
def test_errors_name_the_key(with_evals, key):
    with pytest.raises(ConfigError, match=rf"evals\.few_shot\.{key}: 0"):
        build_evaluators(with_evals({"few_shot": {**SECTION, key: 0}}))
