import itertools
import math

import numpy as np
import pytest

from vlp_jax.data.tasks.glue import TASKS
from vlp_jax.evals.scores import glue_score, glue_scores
from vlp_jax.evals.scores.glue import GLUE_SCORES, f1, matthews, pearson, spearman


def counted(tp, fp, fn, tn):
    """Predictions and truths with that table of errors."""
    return (
        np.repeat([1, 1, 0, 0], [tp, fp, fn, tn]),
        np.repeat([1, 0, 1, 0], [tp, fp, fn, tn]),
    )


def test_matthews_by_hand():
    # (6 * 3 - 1 * 2) / sqrt(7 * 8 * 4 * 5)
    assert matthews(*counted(6, 1, 2, 3)) == pytest.approx(16 / math.sqrt(1120))
    assert matthews(*counted(4, 0, 0, 4)) == pytest.approx(1.0)
    assert matthews(*counted(0, 4, 4, 0)) == pytest.approx(-1.0)


def test_matthews_is_the_formula_of_the_table_of_errors():
    for tp, fp, fn, tn in itertools.product((0, 1, 2, 5), repeat=4):
        if tp + fp + fn + tn:
            product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
            expected = (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0
            assert matthews(*counted(tp, fp, fn, tn)) == pytest.approx(expected)


def test_f1_by_hand():
    # Precision 6/7, recall 6/8: 2 * 6 / (7 + 8).
    assert f1(*counted(6, 1, 2, 3)) == pytest.approx(12 / 15)
    assert f1(*counted(0, 1, 2, 3)) == 0.0
    assert f1(*counted(0, 0, 2, 3)) == 0.0  # none predicted
    assert f1(*counted(0, 0, 0, 3)) == 0.0  # and none true


def test_correlations_by_hand():
    predictions, truths = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 4.0, 3.0])
    # Means 4 and 2.5: products 4.5 + 1 - 1.5 + 3, squares 50 and 5.
    assert pearson(predictions, truths) == pytest.approx(7 / math.sqrt(250))
    # 1 - 6 * (1 + 1) / (4 * 15)
    assert spearman(predictions, truths) == pytest.approx(0.8)
    # Ranks 1, 2.5, 2.5, 4 of both: means 2.5; and 1, 2, 3, 4.
    tied = np.array([0.0, 5.0, 5.0, 9.0])
    assert spearman(tied, tied * 2) == pytest.approx(1.0)
    assert spearman(tied, np.arange(4.0)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_is_pearson_of_ranks_counted_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.integers(0, 6, (2, 30)).astype(np.float32)
        ranks = [
            [np.sum(row < value) + (np.sum(row == value) + 1) / 2 for value in row]
            for row in values
        ]
        assert spearman(*values) == pytest.approx(np.corrcoef(ranks)[0, 1])
        assert pearson(*values) == pytest.approx(np.corrcoef(values)[0, 1])


def test_what_is_undefined_is_zero_and_what_is_broken_is_nan():
    truths = np.array([0.0, 2.5, 5.0])
    for constant in (0.0, 2.5, 0.1):  # of 0.1 the mean is not 0.1
        same = np.full(3, constant, np.float32)
        assert pearson(same, truths) == spearman(same, truths) == 0.0
        assert pearson(truths, same) == spearman(truths, same) == 0.0
    for fault in (np.nan, np.inf):
        scores = glue_scores("stsb", np.array([1.0, fault, 2.0]), truths)
        assert all(math.isnan(score) for score in scores.values())
    tiny = 1e-200 * np.array([1.0, 2.0, 4.0])
    assert pearson(tiny, tiny) == pytest.approx(1.0)
    for guess in (0, 1):
        assert glue_scores("cola", np.full(4, guess), np.array([0, 1, 1, 0])) == {"matthews": 0.0}


def test_every_task_has_its_metrics():
    assert tuple(GLUE_SCORES) == TASKS
    predictions, truths = counted(6, 1, 2, 3)
    for task, names in GLUE_SCORES.items():
        scores = glue_scores(task, predictions, truths)
        assert tuple(scores) == names
        assert glue_score(task, predictions, truths) == pytest.approx(np.mean([*scores.values()]))
    assert glue_scores("qqp", predictions, truths) == pytest.approx({"accuracy": 0.75, "f1": 0.8})
    assert glue_score("mrpc", predictions, truths) == pytest.approx(0.775)
    assert glue_scores("mnli", [0, 1, 2, 2], [0, 1, 1, 2]) == {"accuracy": 0.75}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"'sst-2' is no task of GLUE\. Perhaps you mean 'sst2'"):
        glue_scores("sst-2", [0], [0])
    for predictions, truths in (([], []), ([0, 1], [0]), ([[0]], [[0]])):
        with pytest.raises(ValueError, match=r"rte: predictions of shape .* one prediction for"):
            glue_scores("rte", predictions, truths)


@pytest.mark.filterwarnings("ignore:A single label was found")
def test_as_in_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for size in (2, 5, 50, 500):
        for _ in range(10):
            predictions, truths = rng.integers(0, 2, (2, size))
            assert matthews(predictions, truths) == pytest.approx(
                metrics.matthews_corrcoef(truths, predictions)
            )
            assert f1(predictions, truths) == pytest.approx(
                metrics.f1_score(truths, predictions, zero_division=0.0)
            )
            scores = rng.normal(size=size).round(1), np.append(rng.integers(0, 6, size - 1), 6)
            if size > 2:
                assert pearson(*scores) == pytest.approx(stats.pearsonr(*scores)[0])
                assert spearman(*scores) == pytest.approx(stats.spearmanr(*scores)[0])
    for guess in (0, 1):
        constant = np.full(4, guess), np.array([0, 1, 1, 0])
        assert matthews(*constant) == metrics.matthews_corrcoef(constant[1], constant[0])
