"""What the image tower's class token tells: nearest neighbours by label, and its own health.

    config.evals.neighbours = {"source": "scenes", "num_train": 10_000, "num_examples": 2_000}

Every held-out picture is named by its nearest pictures of the training set, by the cosine of their
class tokens: by the nearest alone, and by the votes of k, each weighted by exp(cosine / 0.07) (Wu
et al. 2018; DINO's protocol, k = 20). Nothing is trained. The tower reads whole images.
"""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import HostBatch
from vlp_jax.data.cache import uncached
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.source import Labelled, Source
from vlp_jax.evals.base import EvalContext, fixed_plan, read
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.models.sizes import build_model
from vlp_jax.models.vit import ViT
from vlp_jax.objectives.base import Params

TEMPERATURE = 0.07  # of the votes
_PAIRS = 2_000  # features whose pairs measure uniformity
_RANKED = 25_600  # features of which the rank is measured, as its authors do
_ROWS = 256  # pictures compared with all of the training set at a time


class Neighbours:
    """Accuracy of nearest neighbours for every label of a source, and figures of the features.

    Metrics: ``<label>/knn_accuracy`` and ``<label>/nearest_accuracy``; ``rankme`` (the effective
    number of dimensions of the training features: Garrido et al. 2023), ``uniformity`` (logarithm
    of the mean of exp(-2 d^2) over pairs of unit vectors, lower is more even: Wang and Isola 2020)
    and ``spread`` (mean standard deviation of a dimension of the unit vectors, 1 / sqrt(D) at
    best).
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

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        self._context = context
        self._set = FixedSet(context, name, source, split, num_examples, batch_size)
        if split == context.config.data.sources[source].get("split", "train"):
            raise ConfigError(
                f"evals.{name}.split", f"the run trains on {split!r}", "Use one that is held out"
            )
        train = context.sources[source]
        known = min(num_train, train.num_records or num_train)
        if not 1 <= k <= known:
            raise ConfigError(
                f"evals.{name}.k",
                f"{k} neighbours of {known} pictures",
                f"Use 1 to {max(known, 1)}, or raise evals.{name}.num_train",
            )
        self._labelled = _labelled(name, source, train), _labelled(name, source, self._set.source)
        self._train_plan = fixed_plan(context, train, known, self._set.plan.batch_size)
        self._k = k
        names = self._labelled[0].labels(np.arange(1))
        self.figures: tuple[str, ...] = (
            *(f"{label}/{kind}_accuracy" for label in names for kind in ("knn", "nearest")),
            *("rankme", "uniformity", "spread"),
        )
        config, vocabulary = context.config, context.tokenizer.vocabulary
        model = build_model(
            config.model, vocabulary.size, vocabulary.mask_id, config.data.image_size
        )
        tower = ViT(model.config.image)
        whole = replicated(context.mesh)

        def features(params: Params, image: jax.Array) -> jax.Array:
            tokens = tower.apply({"params": params["image_tower"]}, normalize(image))
            return jnp.asarray(tokens)[:, 0].astype(jnp.float32)

        self._features = jax.jit(features, out_shardings=whole)

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Embed both sets and compare them; see the class for the metrics."""
        del step
        train = read(self._context.config, self._train_plan, self._set.rows)
        known, rows = self._embed(params, self._train_plan, train)
        asked, asked_rows = self._embed(params, self._set.plan, self._set.host_batches())
        if len(known) < self._k:
            raise ValueError(
                f"evals: {len(known)} of {self._train_plan.num_rows} training pictures could be "
                f"read, fewer than the {self._k} neighbours that vote"
            )
        unit_known, unit_asked = _unit(known), _unit(asked)
        cosine, nearest = _nearest(unit_asked, unit_known, self._k)
        truth = self._labelled[1].labels(asked_rows)
        for label, values in self._labelled[0].labels(rows).items():
            votes = weighted_votes(values[nearest], cosine)
            yield f"{label}/knn_accuracy", float(np.mean(votes == truth[label]))
            yield f"{label}/nearest_accuracy", float(np.mean(values[nearest[:, 0]] == truth[label]))
        yield "rankme", rankme(known[:_RANKED])
        yield "uniformity", uniformity(unit_known[:_PAIRS])
        yield "spread", float(unit_known.std(axis=0).mean())

    def _embed(
        self, params: Params, plan: EvalPlan, batches: Iterable[HostBatch]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Class tokens float32 [n, D] of the readable pictures of a set, and their records [n]."""
        mesh = self._context.mesh
        features, records = [], []
        with jax.set_mesh(mesh):
            for t, host in enumerate(batches):
                arrays = global_batch({k: host[k] for k in ("image", "valid")}, mesh)
                valid = np.asarray(jax.device_get(self._set.gather(arrays["valid"])))
                found = jax.device_get(self._features(params, arrays["image"]))
                features.append(found[valid])
                records.append(plan.batch(t).record[valid])
        return np.concatenate(features), np.concatenate(records)


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


def _unit(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def _labelled(evaluator: str, name: str, source: Source) -> Labelled:
    """The source, if it labels its records."""
    read_from = uncached(source)
    if not isinstance(read_from, Labelled):
        raise ConfigError(
            f"evals.{evaluator}.source",
            f"{name!r} does not label its records",
            "Use one that does, such as scenes",
        )
    return read_from
