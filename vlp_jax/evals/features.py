"""Features of pictures: what evaluators that judge a frozen image tower share."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from vlp_jax.data.batch import Batch, HostBatch
from vlp_jax.data.cache import uncached
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.source import Labelled, Source
from vlp_jax.evals.base import EvalContext, fixed_plan, read
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.models.image_tower import ImageTowerConfig
from vlp_jax.models.pooling import Pool, check_pool
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.tower import image_features


class Rows(NamedTuple):
    """Of the pictures of a set that could be read, n of them.

    Attributes:
        values: float32 [n, ...], what was computed of each.
        records: int64 [n].
        positions: int32 [n], see ``data.batch.FIELDS``.
    """

    values: np.ndarray
    records: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Features:
    """Of the readable pictures of a set.

    Attributes:
        values: float32 [n, D], class tokens or means of whole images.
        labels: name -> int [n].
    """

    values: np.ndarray
    labels: Mapping[str, np.ndarray]


def tower_config(context: EvalContext) -> ImageTowerConfig:
    """Geometry of the run's image tower."""
    config, vocabulary = context.config, context.tokenizer.vocabulary
    model = build_model(config.model, vocabulary.size, vocabulary.mask_id, config.data.image_size)
    return model.config.image


def compute_rows(
    fixed: FixedSet,
    plan: EvalPlan,
    batches: Iterable[HostBatch],
    compute: Callable[[Batch], jax.Array],
) -> Rows:
    """Compute something of every picture of a set.

    Args:
        fixed: the set, or one that is read like it.
        plan: of the batches.
        batches: this process's rows of each.
        compute: from ``image`` and ``position`` of a global batch to [B, ...], on every process.
    """
    mesh = fixed.context.mesh
    rows = []
    with jax.set_mesh(mesh):
        for t, host in enumerate(batches):
            batch = global_batch({k: host[k] for k in ("image", "position", "valid")}, mesh)
            valid = np.asarray(jax.device_get(fixed.gather(batch["valid"])))
            planned, found = plan.batch(t), np.asarray(jax.device_get(compute(batch)))
            rows.append(Rows(found[valid], planned.record[valid], planned.position[valid]))
    return Rows(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one; zeros stay: [..., D]."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12))


class LabelledSets:
    """The first records of the training split, and those of one that is held out.

    Attributes:
        num_train: pictures of the training split, at most.
        names: of the labels.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str,
        num_examples: int,
        num_train: int,
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
            num_train: the first records of the training split, fewer where it has fewer.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            pool: what is read of the tower, see ``objectives.tower.image_features``.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        check_pool(f"evals.{name}.pool", pool)
        self._context = context
        self._set = FixedSet(context, name, source, split, num_examples, batch_size)
        if split == context.config.data.sources[source].get("split", "train"):
            raise ConfigError(
                f"evals.{name}.split", f"the run trains on {split!r}", "Use one that is held out"
            )
        if num_train < 1:
            raise ConfigError(
                f"evals.{name}.num_train", f"{num_train} pictures teach nothing", "Use 1 or more"
            )
        train = context.sources[source]
        self.num_train = min(num_train, train.num_records or num_train)
        self._labelled = _labelled(name, source, train), _labelled(name, source, self._set.source)
        self._train_plan = fixed_plan(context, train, self.num_train, self._set.plan.batch_size)
        self.names = tuple(self._labelled[0].labels(np.arange(1)))
        features = functools.partial(image_features, tower_config(context), pool=pool)
        self._features = jax.jit(features, out_shardings=replicated(context.mesh))
        self._embedded: tuple[Any, tuple[Features, Features]] | None = None

    @classmethod
    def of(cls, context: EvalContext, name: str, *arguments: Any) -> Self:
        """One for all evaluators of a run that ask for the same sets; see the constructor."""
        return context.once((cls, *arguments), lambda: cls(context, name, *arguments))

    def embed(self, params: Params) -> tuple[Features, Features]:
        """Features of the training pictures and of those held out.

        They are kept, so that the evaluators of one evaluation read and encode the sets once.
        """
        leaf = jax.tree.leaves(params)[0]
        if self._embedded is None or self._embedded[0]() is not leaf:
            train = read(self._context.config, self._train_plan, self._set.rows)
            both = (
                self._embed(params, self._train_plan, train, self._labelled[0]),
                self._embed(params, self._set.plan, self._set.host_batches(), self._labelled[1]),
            )
            self._embedded = weakref.ref(leaf), both  # the parameters themselves may go
        return self._embedded[1]

    def _embed(
        self, params: Params, plan: EvalPlan, batches: Iterable[HostBatch], source: Labelled
    ) -> Features:
        rows = compute_rows(
            self._set, plan, batches, lambda batch: self._features(params, batch["image"])
        )
        return Features(rows.values, source.labels(rows.records))


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
