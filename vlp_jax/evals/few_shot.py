"""Few-shot classification by a frozen tower, for every label of a source.

    config.evals.few_shot = {"source": "scenes", "split": "test"}

An episode draws 5 classes, 5 support pictures of each from the training split and 6 queries of each
from the held-out one. Features lose the supports' mean and are scaled to length 1; a query is given
the class whose supports' average (not scaled again) is nearest (fact sheet of language-guided
sampling, section 4). Labels of fewer classes give episodes of as many as they have, two at least.
"""

from collections.abc import Iterator

import numpy as np

from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.features import Features, LabelledSets, unit
from vlp_jax.infra.errors import ConfigError
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.tower import Pool

_AT_ONCE = 250  # episodes


class FewShot:
    """Mean accuracy of few-shot episodes for every label of a source.

    Metrics: ``<label>/accuracy`` and ``<label>/accuracy_std`` (over episodes); absent for a label
    of which no two classes have pictures enough.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str = "val",
        num_examples: int = 2_000,
        num_train: int = 10_000,
        ways: int = 5,
        shots: int = 5,
        queries: int = 6,
        episodes: int = 5_000,
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
            num_train: the first records of the training split, from which supports are drawn.
            ways: classes in an episode.
            shots: supports of a class.
            queries: of a class.
            episodes: how many; which they are does not depend on the run.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            pool: what is read of the tower: ``class`` token, or ``mean`` of the patches.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        least = {"ways": 2, "shots": 1, "queries": 1, "episodes": 1}
        given = {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes}
        for key, value in given.items():
            if value < least[key]:
                raise ConfigError(f"evals.{name}.{key}", f"{value}", f"Use {least[key]} or more")
        self._sets = LabelledSets.of(
            context, name, source, split, num_examples, num_train, batch_size, pool
        )
        self._ways, self._shots, self._queries, self._episodes = ways, shots, queries, episodes
        kinds = ("accuracy", "accuracy_std")
        self.figures = tuple(f"{label}/{kind}" for label in self._sets.names for kind in kinds)

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Embed both sets and play the episodes; see the class for the metrics."""
        del step
        train, asked = self._sets.embed(params)
        for label in self._sets.names:
            scores = self._scores(train, asked, label)
            if scores is not None:
                yield f"{label}/accuracy", float(scores.mean())
                yield f"{label}/accuracy_std", float(scores.std())

    def _scores(self, train: Features, asked: Features, label: str) -> np.ndarray | None:
        """Accuracy of every episode: float [episodes]."""
        supports = _by_class(train.labels[label], self._shots)
        queries = _by_class(asked.labels[label], self._queries)
        classes = sorted({*supports} & {*queries})
        ways = min(self._ways, len(classes))
        if ways < 2:
            return None
        draw = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(0xFE3,)))
        found = []
        for start in range(0, self._episodes, _AT_ONCE):
            episodes = min(_AT_ONCE, self._episodes - start)
            known = np.empty((episodes, ways, self._shots), np.int64)
            wanted = np.empty((episodes, ways, self._queries), np.int64)
            for episode in range(episodes):
                for way, number in enumerate(draw.choice(len(classes), ways, replace=False)):
                    of = classes[number]
                    known[episode, way] = draw.choice(supports[of], self._shots, replace=False)
                    wanted[episode, way] = draw.choice(queries[of], self._queries, replace=False)
            found.append(episode_accuracy(train.values[known], asked.values[wanted]))
        return np.concatenate(found)


def episode_accuracy(supports: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Share of queries whose own class is the nearest.

    Args:
        supports: float [E, W, S, D], W classes of S supports in each of E episodes.
        queries: float [E, W, Q, D].

    Returns:
        float [E].
    """
    mean = supports.mean(axis=(1, 2), keepdims=True)
    supports, queries = unit(supports - mean), unit(queries - mean)
    centres = supports.mean(axis=2)  # [E, W, D]
    distance = np.square(centres).sum(axis=-1)[:, None, None] - 2.0 * np.einsum(
        "ewqd,evd->ewqv", queries, centres
    )
    own = np.arange(supports.shape[1])[None, :, None]
    return (distance.argmin(axis=-1) == own).mean(axis=(1, 2))


def _by_class(labels: np.ndarray, least: int) -> dict[int, np.ndarray]:
    """Rows of every class that has so many."""
    rows = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
    return {c: r for c, r in rows.items() if len(r) >= least}
