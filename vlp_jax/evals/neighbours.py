"""What the image tower's class token tells: nearest neighbours by label, and its own health.

    config.evals.neighbours = {"source": "scenes", "num_train": 10_000, "num_examples": 2_000}

Every held-out picture is named by its nearest pictures of the training set, by the cosine of their
class tokens: by the nearest alone, and by the votes of k, each weighted by exp(cosine / 0.07) (Wu
et al. 2018; DINO's protocol, k = 20). Nothing is trained. The tower reads whole images.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.features import LabelledSets, unit
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.pooling import Pool
from vlp_jax.objectives.base import Params

TEMPERATURE = 0.07  # of the votes
_PAIRS = 2_000  # features whose pairs measure uniformity
_RANKED = 25_600  # features of which the rank is measured, as its authors do
_KINDS = ("knn", "nearest")
_ROWS = 256  # pictures compared with all of the training set at a time


class Neighbours:
    """Accuracy of nearest neighbours for every label of a source, and figures of the features.

    Metrics: ``<label>/knn_accuracy`` and ``<label>/nearest_accuracy``; ``rankme`` (the effective
    number of dimensions of the training features: Garrido et al. 2023), ``uniformity`` (logarithm
    of the mean of exp(-2 d^2) over pairs of unit vectors, lower is more even: Wang and Isola
    2020), ``alignment`` (mean d^2 of pairs that agree in every label, lower is nearer; absent where
    no two pictures do) and ``spread`` (mean standard deviation of a dimension of the unit vectors,
    1 / sqrt(D) at best).
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str = "val",
        num_examples: int = 2_000,
        num_train: int = 10_000,
        k: int = 20,
        batch_size: int = 0,
        pool: Pool = "class",
    ):
        """Plans both sets; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``.
            source: key in ``config.data.sources``; one that labels its records.
            split: of that source, another than it is trained on.
            num_examples: the first records of it, fewer where it has fewer; 0: all.
            num_train: the first records of the training split, whose labels are known.
            k: neighbours that vote, 1 to ``num_train``.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            pool: what is read of the tower: ``class`` token, or ``mean`` of the patches.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        self._sets = LabelledSets.of(
            context, name, source, split, num_examples, num_train, batch_size, pool
        )
        if not 1 <= k <= self._sets.num_train:
            raise ConfigError(
                f"evals.{name}.k",
                f"{k} neighbours of {self._sets.num_train} pictures",
                f"Use 1 to {self._sets.num_train}, or raise evals.{name}.num_train",
            )
        self._k = k
        self.figures: tuple[str, ...] = (
            *(f"{label}/{kind}_accuracy" for label in self._sets.names for kind in _KINDS),
            *("rankme", "uniformity", "alignment", "spread"),
        )

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Embed both sets and compare them; see the class for the metrics."""
        del step
        train, asked = self._sets.embed(params)
        known = train.values
        if len(known) < self._k:
            raise ValueError(
                f"evals: {len(known)} of {self._sets.num_train} training pictures could be read, "
                f"fewer than the {self._k} neighbours that vote"
            )
        unit_known, unit_asked = unit(known), unit(asked.values)
        cosine, nearest = _nearest(unit_asked, unit_known, self._k)
        for label, values in train.labels.items():
            truth, votes = asked.labels[label], weighted_votes(values[nearest], cosine)
            yield f"{label}/knn_accuracy", float(np.mean(votes == truth))
            yield f"{label}/nearest_accuracy", float(np.mean(values[nearest[:, 0]] == truth))
        yield "rankme", rankme(known[:_RANKED])
        yield "uniformity", uniformity(unit_known[:_PAIRS])
        near = alignment(unit_known[:_PAIRS], train.labels)
        if near is not None:
            yield "alignment", near
        yield "spread", float(unit_known.std(axis=0).mean())


def weighted_votes(labels: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """The label with the largest sum of exp(cosine / 0.07): int [n, k], float [n, k] -> int [n].

    Of equal sums, the smaller label.
    """
    weights = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / TEMPERATURE)
    classes = labels.max() + 1
    sums = np.zeros((len(labels), classes))
    np.add.at(sums, (np.arange(len(labels))[:, None], labels), weights)
    return sums.argmax(axis=1)


def rankme(features: np.ndarray) -> float:
    """The exponential of the entropy of the singular values' shares: float [n, D]."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-12) + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def uniformity(units: np.ndarray) -> float:
    """Logarithm of the mean of exp(-2 d^2) over all pairs of unit vectors: float [n, D]."""
    square = np.maximum(0.0, 2.0 - 2.0 * (units @ units.T))
    pairs = square[np.triu_indices(len(units), 1)]
    return float(np.log(np.exp(-2.0 * pairs).mean()))


def alignment(units: np.ndarray, labels: Mapping[str, np.ndarray]) -> float | None:
    """Mean squared distance of unit vectors whose labels all agree: float [n, D], name -> [m].

    None where no two of the first n pictures agree.
    """
    rows = np.stack([values[: len(units)] for values in labels.values()], axis=1)
    _, group = np.unique(rows, axis=0, return_inverse=True)
    same = np.triu(group.reshape(-1, 1) == group.reshape(1, -1), 1)
    if not same.any():
        return None
    return float((2.0 - 2.0 * (units @ units.T))[same].mean())


def _nearest(asked: np.ndarray, known: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and indices of the k nearest, the nearest first: [n, k] each."""
    found = []
    for start in range(0, len(asked), _ROWS):
        cosine = asked[start : start + _ROWS] @ known.T
        part = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(cosine, part, axis=1), axis=1, kind="stable")
        nearest = np.take_along_axis(part, order, axis=1)
        found.append((np.take_along_axis(cosine, nearest, axis=1), nearest))
    cosines, indices = zip(*found, strict=True)
    return np.concatenate(cosines), np.concatenate(indices)
