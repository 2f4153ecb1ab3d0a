"""The metrics of GLUE, as its authors define them (Wang et al. 2018).

    scores = glue_scores("mrpc", predictions, truths)    # {"accuracy": 0.86, "f1": 0.90}
    glue_score("mrpc", predictions, truths)              # 0.88, their mean

The score of the benchmark is the mean over the nine tasks, of MNLI that of its two sets: what
``tools.evaluate_shared`` tells as the average of texts.

Where a metric is undefined it is 0: what cannot be told from chance earns nothing. That is what
scikit-learn returns for Matthews' correlation of constant predictions and for F1 without positives.
For Pearson's and Spearman's correlations with a constant scipy returns NaN, which no checkpoint
could be chosen by; they are 0 here as well. Predictions that are not finite are no chance but a
fault: correlations with them are NaN.
"""

from collections.abc import Callable, Mapping

import numpy as np

from vlp_jax.infra.errors import instead_of

_Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predictions: np.ndarray, truths: np.ndarray) -> float:
    """Share of the predictions that are right.

    Args:
        predictions: int [n], n >= 1.
        truths: int [n].
    """
    return float(np.mean(predictions == truths))


def f1(predictions: np.ndarray, truths: np.ndarray) -> float:
    """F1 of class 1; 0 where it is neither predicted nor true.

    Args:
        predictions: int [n], n >= 1.
        truths: int [n].
    """
    both = np.sum((predictions == 1) & (truths == 1))
    either = np.sum(predictions == 1) + np.sum(truths == 1)
    return float(2 * both / either) if either else 0.0


def matthews(predictions: np.ndarray, truths: np.ndarray) -> float:
    """Matthews' correlation of two classes in [-1, 1]; 0 where one of the two is constant.

    It is Pearson's correlation of the indices 0 and 1.

    Args:
        predictions: int [n], 0 or 1, n >= 1.
        truths: int [n], 0 or 1.
    """
    return pearson(predictions, truths)


def pearson(predictions: np.ndarray, truths: np.ndarray) -> float:
    """Pearson's correlation in [-1, 1]; 0 where one of the two is constant, NaN if not finite.

    Args:
        predictions: float [n], n >= 1.
        truths: float [n].
    """
    x, y = np.asarray(predictions, np.float64), np.asarray(truths, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    # Compared, not computed: the mean of equal numbers may differ from them by rounding.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    # Of numbers as small as 1e-200 the squares would be 0.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def spearman(predictions: np.ndarray, truths: np.ndarray) -> float:
    """Spearman's correlation, equal numbers sharing their mean rank; else as ``pearson``.

    Args:
        predictions: float [n], n >= 1.
        truths: float [n].
    """
    if not (np.isfinite(predictions).all() and np.isfinite(truths).all()):
        return float("nan")
    return pearson(_mean_ranks(predictions), _mean_ranks(truths))


# The one place that says what each task is scored by.
_METRICS: Mapping[str, Mapping[str, _Metric]] = {
    "cola": {"matthews": matthews},
    "sst2": {"accuracy": accuracy},
    "mrpc": {"accuracy": accuracy, "f1": f1},
    "stsb": {"pearson": pearson, "spearman": spearman},
    "qqp": {"accuracy": accuracy, "f1": f1},
    "mnli": {"accuracy": accuracy},
    "qnli": {"accuracy": accuracy},
    "rte": {"accuracy": accuracy},
    "wnli": {"accuracy": accuracy},
}
GLUE_SCORES: Mapping[str, tuple[str, ...]] = {task: tuple(own) for task, own in _METRICS.items()}


def glue_scores(task: str, predictions: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """The metrics of a task; those that its name has in ``GLUE_SCORES``, in that order.

    Args:
        task: a task of ``data.tasks.glue.TASKS``.
        predictions: classes int [n], or for ``stsb`` scores float [n].
        truths: likewise.

    Raises:
        ValueError: there is no such task, or the arrays do not fit.
    """
    if task not in _METRICS:
        raise ValueError(f"{task!r} is no task of GLUE. {instead_of(task, _METRICS)}.")
    predictions, truths = np.asarray(predictions), np.asarray(truths)
    if predictions.ndim != 1 or predictions.shape != truths.shape or not truths.size:
        raise ValueError(
            f"{task}: predictions of shape {predictions.shape} and truths of shape {truths.shape}: "
            "there must be one prediction for each example, and an example"
        )
    return {name: metric(predictions, truths) for name, metric in _METRICS[task].items()}


def glue_score(task: str, predictions: np.ndarray, truths: np.ndarray) -> float:
    """The one number of a task: the mean of its ``glue_scores``."""
    return float(np.mean(list(glue_scores(task, predictions, truths).values())))


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values have the mean of theirs: float64 [n]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
