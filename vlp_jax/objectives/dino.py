"""DINO: a student that finds the prototypes of its own moving average (arXiv 2104.14294).

Two large crops of every image and several small ones pass the student, the large ones the teacher
as well. Each crop of the student is to name the prototypes that the teacher names for another crop.
The teacher's cosines are sharpened and lose their running mean, or are balanced so that prototypes
get equal shares of the batch, without which all images would get one answer, or none. Recipe: fact
sheet of accelerated invariance pretraining, section 7; the balance is SwAV's (arXiv 2006.09882,
section 3.1), as DINOv2 has it (arXiv 2304.07193, section 4).

A bucket's first view is what the student encodes of its large crops, the second what the teacher
does; small crops are encoded whole, by the tower's own patches.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from vlp_jax.compress.buckets import Bucket, View
from vlp_jax.data.augment import Recipe
from vlp_jax.data.batch import Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.heads import PrototypeHead
from vlp_jax.objectives.base import PROGRESS, Extras, LossOutput, Mean, Params, Seen, example_keys
from vlp_jax.objectives.invariance import (
    Compared,
    Drawn,
    Embedded,
    Embeddings,
    Heads,
    Look,
    Momentum,
    check_temperature,
)
from vlp_jax.objectives.similarity import valid_mean
from vlp_jax.objectives.tower import check_share, statistics, view_recipe

_LARGE = 2  # crops that the teacher sees
_CENTRINGS = ("mean", "sinkhorn")
_TURNS = 3  # of Sinkhorn and Knopp, as in SwAV and DINOv2


@dataclasses.dataclass(frozen=True)
class DINO(Momentum):
    """Self-distillation without labels.

    The extras hold ``target`` (see ``Momentum``), which evaluators and later runs use in place of
    the student, and ``centre``, the running mean of the teacher's cosines, float32 [K].

    Attributes:
        prototypes: K.
        temperature: of the student's softmax.
        teacher_temperature: of the teacher's, at the end of its warm-up.
        first_teacher_temperature: at its begin.
        teacher_warmup: share of the budget over which it rises.
        centring: ``mean``, the running mean, or ``sinkhorn``, three turns of Sinkhorn and Knopp
            over all valid answers of the batch, on all devices.
        centre_momentum: of the running mean.
        frozen_prototypes: share of the budget, at its begin, in which prototypes are not trained.
        head_norm: a batch norm before each GELU of the head, an option of DINO's own code. The
            features of an untrained tower have most in common; the norm takes that away, so that
            answers to different images differ from the first update on.
        small_crops: how many.
        small_size: their side in pixels, a multiple of the tower's patch size; 0: three sevenths of
            the images' size, rounded to one.
        augment_small: keys of ``data.augment.Recipe`` for small crops.
    """

    hidden_dim: int = 2048
    embedding_dim: int = 256
    momentum: float = 0.996
    prototypes: int = 65_536
    temperature: float = 0.1
    teacher_temperature: float = 0.04
    first_teacher_temperature: float = 0.04
    teacher_warmup: float = 0.1
    centring: str = "mean"
    centre_momentum: float = 0.9
    frozen_prototypes: float = 0.01
    head_norm: bool = False
    small_crops: int = 8
    small_size: int = 0
    augment_small: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    served: ClassVar[str] = "target"
    widths = ("hidden_dim", "embedding_dim", "prototypes")
    first_recipe = Recipe(scale=(0.4, 1.0))
    second_recipe = Recipe(scale=(0.4, 1.0), blur=0.1, solarize=0.2)
    small_recipe: ClassVar[Recipe] = Recipe(scale=(0.05, 0.4), blur=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("temperature", "teacher_temperature", "first_teacher_temperature"):
            check_temperature(self, key)
        for key in ("teacher_warmup", "centre_momentum", "frozen_prototypes"):
            check_share(self, key)
        if self.centring not in _CENTRINGS:
            raise ConfigError(
                f"objectives.{self.name}.centring",
                f"{self.centring!r} is unknown",
                f"Use one of {', '.join(_CENTRINGS)}",
            )
        if self.small_crops < 0:
            raise ConfigError(
                f"objectives.{self.name}.small_crops", f"{self.small_crops}", "Use 0 or more"
            )
        _ = self.small_view  # checks its size

    @property
    def small_view(self) -> View:
        """What is encoded of a small crop."""
        image = self.model.config.image
        patch = image.patch_size
        size = self.small_size or max(1, round(3 / 7 * image.image_size / patch)) * patch
        try:
            return View.whole(size, patch)
        except ValueError as error:
            raise ConfigError(
                f"objectives.{self.name}.small_size", str(error), f"Use a multiple of {patch}"
            ) from error

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """How the first large crop, the second, and the small ones are made."""
        key = f"objectives.{self.name}.augment_small"
        section = {**self.augment, **self.augment_small}
        return (*super().recipes, view_recipe(self.small_recipe, section, key))

    @property
    def heads(self) -> Heads:
        """Three layers and the prototypes; no predictor."""
        dtype = self.model.config.image.dtype
        sizes = (self.hidden_dim, self.embedding_dim, self.prototypes)
        return Heads(PrototypeHead(3, *sizes, dtype, self.head_norm), None)

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters as of the base, and a centre of zeros."""
        params, extras = super().init(rng, batch_spec)
        return params, {**extras, "centre": jnp.zeros(self.prototypes)}

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Mean over the valid images of the cross-entropies of all pairs of different crops."""
        drawn, valid = Drawn(batch, rng, bucket, train), batch["valid"]
        progress = batch.get(PROGRESS, jnp.zeros(()))
        extras, target = self.renewed(params, extras, drawn)
        head = self._key("projector")
        frozen = jnp.where(progress < self.frozen_prototypes, 0.0, 1.0)
        prototypes = params[head]["prototypes"]
        still = jax.lax.stop_gradient(prototypes)
        own = {**params[head], "prototypes": still + frozen * (prototypes - still)}
        embedded, params = self.embeddings({**params, head: own}, target, drawn)
        *student, one, other = embedded
        teacher = (one, other)
        temperature = self._teacher_temperature(progress)
        if self.centring == "sinkhorn":
            both = jnp.concatenate(teacher) / temperature
            sharpened = jnp.split(balanced(both, jnp.tile(valid, len(teacher))), len(teacher))
        else:
            centre = extras["centre"][None]
            sharpened = [jax.nn.softmax((t - centre) / temperature) for t in teacher]
        losses, metrics = self.compare((*student, *sharpened), valid)
        if train and self.centring == "mean":
            weights = valid.astype(jnp.float32)[:, None]
            mean = sum((weights * t).sum(axis=0) for t in teacher)
            mean /= len(teacher) * jnp.maximum(weights.sum(), 1.0)
            centre = optax.incremental_update(mean, extras["centre"], 1.0 - self.centre_momentum)
            extras = {**extras, "centre": centre}
        return LossOutput(valid_mean(losses, valid), extras, metrics, statistics(params))

    def embeddings(self, params: Params, target: Params, drawn: Drawn) -> Embeddings:
        """Cosines with the prototypes, float32 [B, K]: the student's crops, then the teacher's."""
        looks = [self._look(drawn, picture, 0) for picture in range(_LARGE)]
        keys = example_keys(drawn.rng, drawn.batch["position"])  # not read: nothing is dropped
        small = Seen(self.small_view, keys)
        looks += [Look(_LARGE + crop, small) for crop in range(self.small_crops)]
        student, params = self._project(params, drawn, looks)
        return (*student, *self._keys(target, drawn)), params

    def compare(self, embedded: Embedded, valid: jax.Array) -> Compared:
        """Mean cross-entropy of the student's crops with the teacher's answers to other crops.

        Args:
            embedded: cosines of the student's crops, then the answers of the teacher to the large
                ones, whose rows sum to 1.
            valid: bool [B].
        """
        *student, one, other = embedded
        logs = [jax.nn.log_softmax(cosines / self.temperature) for cosines in student]
        pairs = [
            -(answer * log).sum(axis=1)
            for index, answer in enumerate((one, other))
            for crop, log in enumerate(logs)
            if crop != index
        ]
        losses = sum(pairs[1:], pairs[0]) / len(pairs)
        right = 1.0 * (logs[1].argmax(axis=1) == one.argmax(axis=1))
        usage = jnp.where(valid[:, None], one, 0.0).sum(axis=0)
        usage /= jnp.maximum(usage.sum(), 1e-30)
        return losses, {
            "accuracy": valid_mean(right, valid),
            "teacher_entropy": valid_mean(_entropy(one), valid),
            # Over the whole batch: near 0 where all images get one answer.
            "batch_entropy": Mean(_entropy(usage), jnp.ones(())),
        }

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """As of the base, and the small crops."""
        small = self.small_crops * self._pass_flops(self.small_view, trained=True)
        return super().flops(text_length, bucket) + small

    def _teacher_temperature(self, progress: jax.Array) -> jax.Array:
        first, last = self.first_teacher_temperature, self.teacher_temperature
        share = jnp.minimum(1.0, progress / max(self.teacher_warmup, 1e-9))
        return first + (last - first) * share


def balanced(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Answers of which all prototypes get about equal shares over the valid rows.

    Three turns of Sinkhorn and Knopp: every column is divided by its sum over the valid rows, then
    every row by its own.

    Args:
        logits: cosines over a temperature, float32 [N, K].
        valid: bool [N].

    Returns:
        float32 [N, K]; rows sum to 1.
    """
    outside = jnp.where(valid, 0.0, -jnp.inf)[:, None]
    # Without a valid row there is nothing to balance, and no sum to divide by.
    some = valid.any()
    for _ in range(_TURNS):
        column = jax.nn.logsumexp(logits + outside, axis=0, keepdims=True)
        logits = jax.nn.log_softmax(logits - jnp.where(some, column, 0.0))
    return jnp.exp(logits)


def _entropy(chances: jax.Array) -> jax.Array:
    """In nats: [..., K] -> [...]."""
    return jax.scipy.special.entr(chances).sum(axis=-1)
