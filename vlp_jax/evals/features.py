"""Class tokens of labelled pictures: what evaluators that judge a frozen image tower share."""

import dataclasses
from collections.abc import Iterable, Mapping

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


@dataclasses.dataclass(frozen=True)
class Features:
    """Of the readable pictures of a set.

    Attributes:
        values: float32 [n, D], class tokens of whole images.
        labels: name -> int [n].
    """

    values: np.ndarray
    labels: Mapping[str, np.ndarray]


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

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
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
        config, vocabulary = context.config, context.tokenizer.vocabulary
        model = build_model(
            config.model, vocabulary.size, vocabulary.mask_id, config.data.image_size
        )
        tower = ViT(model.config.image)

        def features(params: Params, image: jax.Array) -> jax.Array:
            tokens = tower.apply({"params": params["image_tower"]}, normalize(image))
            return jnp.asarray(tokens)[:, 0].astype(jnp.float32)

        self._features = jax.jit(features, out_shardings=replicated(context.mesh))

    def embed(self, params: Params) -> tuple[Features, Features]:
        """Features of the training pictures and of those held out."""
        train = read(self._context.config, self._train_plan, self._set.rows)
        return (
            self._embed(params, self._train_plan, train, self._labelled[0]),
            self._embed(params, self._set.plan, self._set.host_batches(), self._labelled[1]),
        )

    def _embed(
        self, params: Params, plan: EvalPlan, batches: Iterable[HostBatch], source: Labelled
    ) -> Features:
        mesh = self._context.mesh
        features, records = [], []
        with jax.set_mesh(mesh):
            for t, host in enumerate(batches):
                arrays = global_batch({k: host[k] for k in ("image", "valid")}, mesh)
                valid = np.asarray(jax.device_get(self._set.gather(arrays["valid"])))
                found = jax.device_get(self._features(params, arrays["image"]))
                features.append(found[valid])
                records.append(plan.batch(t).record[valid])
        return Features(np.concatenate(features), source.labels(np.concatenate(records)))


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
