"""Classification of images: a linear layer on the tower's class token.

Fine-tuning of a tower that any objective has pretrained: random crops and flips in training, whole
images elsewhere, optional label smoothing. No text is read, and nothing of the model but the tower
is created.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket, view_of
from vlp_jax.data.augment import Recipe, normalize
from vlp_jax.data.batch import Batch
from vlp_jax.models.flops import tower_flops
from vlp_jax.models.heads import LinearHead
from vlp_jax.models.vit import ViTConfig
from vlp_jax.objectives.base import Extras, Params, Seen, batch_noise, seen_part
from vlp_jax.objectives.classification import Classifier
from vlp_jax.objectives.tower import (
    check_share,
    encode,
    init_tower,
    random_pixels,
    size_seen,
    view_recipe,
)

_RECIPE = Recipe(jitter=0.0, grey=0.0, blur=0.0)


@dataclasses.dataclass(frozen=True)
class ImageClassification(Classifier):
    """One of several classes by the image alone.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        augment: keys of ``data.augment.Recipe`` for training; by default crops of MoCo v3's areas
            and flips.
    """

    label_smoothing: float = 0.0
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_smoothing")
        _ = self.recipe  # checks its keys

    @property
    def splittable(self) -> bool:  # type: ignore[override]
        """Not where batch norms couple the examples."""
        return isinstance(self.model.config.image, ViTConfig)

    @property
    def recipe(self) -> Recipe:
        """How the view of an image is made in training."""
        return view_recipe(_RECIPE, self.augment, f"objectives.{self.name}.augment")

    @property
    def head(self) -> LinearHead:
        """From the class token to logits."""
        return LinearHead(self.num_classes)

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of the tower and the head; no extras."""
        params, tokens = init_tower(self.model, rng, batch_spec)
        head = self.head.init(jax.random.fold_in(rng, 1), tokens[:, 0])["params"]
        return {**params, self.head_name: head}, {}

    def logits(
        self,
        params: Params,
        batch: Batch,
        noise: jax.Array | None = None,
        seen: Seen | None = None,
    ) -> jax.Array:
        """Scores of the classes for the images as they are: float32 [B, C]."""
        return self._scores(params, normalize(batch["image"]), noise, seen)[0]

    def judged(
        self, params: Params, batch: Batch, rng: jax.Array, bucket: Bucket, train: bool
    ) -> tuple[jax.Array, Params]:
        """The scores that ``loss`` judges, in training those of a random view."""
        if not train:
            return self.logits(params, batch), params
        image = self.model.config.image
        seen = seen_part(rng, batch, bucket, train)
        pixels = random_pixels(batch, rng, self.recipe, size_seen(image, seen), image)
        return self._scores(params, pixels, batch_noise(rng, batch, train), seen, train)

    def row_losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy with smoothed labels: float32 [B, C] -> [B]."""
        even = -jax.nn.log_softmax(logits).mean(axis=1)
        share = self.label_smoothing
        return (1.0 - share) * super().row_losses(logits, batch) + share * even

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example; the head is left out."""
        del text_length
        return tower_flops(self.model.config.image, view_of(bucket))

    def _scores(
        self,
        params: Params,
        pixels: jax.Array,
        noise: jax.Array | None,
        seen: Seen | None,
        train: bool = False,
    ) -> tuple[jax.Array, Params]:
        """Scores of pictures, and the parameters after the pass."""
        tokens, params = encode(self.model.config.image, params, pixels, noise, seen, train)
        scores = self.head.apply({"params": params[self.head_name]}, tokens[:, 0])
        return jnp.asarray(scores), params
