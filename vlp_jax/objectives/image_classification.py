"""Classification of images: a linear layer on the tower's class token.

Fine-tuning of a tower that any objective has pretrained: random crops and flips in training, whole
images elsewhere, optional label smoothing. No text is read, and nothing of the model but the tower
is created.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket, view_of
from vlp_jax.data.augment import Recipe, normalize, random_view, standardize
from vlp_jax.data.batch import Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.flops import vit_flops
from vlp_jax.models.heads import LinearHead
from vlp_jax.models.vision_language import VisionLanguageModel
from vlp_jax.models.vit import ViT
from vlp_jax.objectives.base import (
    Extras,
    LossOutput,
    Mean,
    Params,
    Seen,
    batch_noise,
    example_keys,
    seen_part,
    zeros,
)
from vlp_jax.objectives.classification import Classification
from vlp_jax.objectives.invariance import TOWER, view_recipe

_RECIPE = Recipe(jitter=0.0, grey=0.0, blur=0.0)


@dataclasses.dataclass(frozen=True)
class ImageClassification(Classification):
    """One of several classes by the image alone: ``label`` int32 [B].

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        augment: keys of ``data.augment.Recipe`` for training; by default crops of MoCo v3's areas
            and flips.
    """

    label_smoothing: float = 0.0
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    image_encoder: ClassVar[VisionLanguageModel | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"objectives.{self.name}.label_smoothing",
                f"{self.label_smoothing}",
                "Use a number in [0, 1)",
            )
        _ = self.recipe  # checks its keys

    @property
    def recipe(self) -> Recipe:
        """How the view of an image is made in training."""
        return view_recipe(_RECIPE, self.augment, f"objectives.{self.name}.augment")

    @property
    def classifier(self) -> LinearHead:
        """From the class token to logits."""
        return LinearHead(self.num_classes)

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of the tower and the head; no extras."""
        size = self.model.config.image.image_size
        image = jnp.zeros((len(zeros(batch_spec)["image"]), size, size, 3))
        tokens, variables = nn.init_with_output(lambda model: model.image_tower(image), self.model)(
            rng
        )
        head = self.classifier.init(jax.random.fold_in(rng, 1), tokens[:, 0])["params"]
        return {TOWER: variables["params"][TOWER], self.head_name: head}, {}

    def logits(
        self,
        params: Params,
        batch: Batch,
        noise: jax.Array | None = None,
        seen: Seen | None = None,
    ) -> jax.Array:
        """Scores of the classes for whole images: float32 [B, C]."""
        return self._scores(params, normalize(batch["image"]), noise, seen)

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Loss and accuracy; of a random view in training."""
        seen = seen_part(rng, batch, bucket, train)
        if train:
            own = self.model.config.image.image_size
            size = own if seen is None else seen.view.image_size
            keys = example_keys(rng, batch["position"])
            pixels = standardize(random_view(batch["image"], keys, self.recipe, size, own))
        else:
            pixels = normalize(batch["image"])
        logits = self._scores(params, pixels, batch_noise(rng, batch, train), seen)
        rows = batch["valid"].astype(jnp.float32)
        losses = self.row_losses(logits, batch)
        if self.label_smoothing:
            even = -jax.nn.log_softmax(logits).mean(axis=1)
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * even
        score = (self.row_scores(logits, batch) * rows).sum()
        metrics = {"accuracy": Mean(score, rows.sum())}
        return LossOutput(Mean((losses * rows).sum(), rows.sum()), extras, metrics)

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example; the head is left out."""
        del text_length
        return vit_flops(self.model.config.image, view_of(bucket))

    def _scores(
        self, params: Params, pixels: jax.Array, noise: jax.Array | None, seen: Seen | None
    ) -> jax.Array:
        tower = ViT(self.model.config.image)
        tokens = tower.apply({"params": params[TOWER]}, pixels, noise, *(seen or (None, None)))
        feature = jnp.asarray(tokens)[:, 0]
        return jnp.asarray(self.classifier.apply({"params": params[self.head_name]}, feature))
