"""Downstream tasks on a text, or two sentences, alone: the classes and the scores of GLUE.

The vector of ``objectives.readout``, read without an image, passes the head of the tasks that have
one. Only a model with one stack reads a text so; nothing of what it has for images is computed, and
the gradient of that is zero.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder, check_text_alone
from vlp_jax.models.heads import ClassificationHead
from vlp_jax.objectives.base import Extras, LossOutput, Mean, Params, Seen, batch_noise
from vlp_jax.objectives.classification import ReadingClassifier
from vlp_jax.objectives.reading import Reading


@dataclasses.dataclass(frozen=True)
class TextAlone(Reading):
    """A task whose examples are texts, whether their batch has images or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text_alone(self.model, f"objectives.{self.name}")

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example; by formula over real tokens."""
        del bucket  # of images
        return self.reader.flops(self.model.config, text_length, with_image=False)

    def _features(
        self,
        model: Encoder,
        batch: Batch,
        noise: jax.Array | None,
        seen: Seen | None,
    ) -> jax.Array:
        del seen  # of images
        text = self.reader.encode(model, batch["text_ids"], batch["text_length"], noise)
        return self.reader.read(model, text, None, noise)


@dataclasses.dataclass(frozen=True)
class TextClassification(TextAlone, ReadingClassifier):
    """One of several classes by the text alone."""


@dataclasses.dataclass(frozen=True)
class TextRegression(TextAlone):
    """A number by the text alone: ``target`` float32 [B], under the squared error.

    Attributes:
        scale: what the head's output is multiplied by. The loss is that of the output: with the
            largest target as the scale, both are about one.
    """

    scale: float = 1.0

    extra_fields: ClassVar[tuple[str, ...]] = ("target",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.scale < float("inf"):
            raise ConfigError(
                f"objectives.{self.name}.scale",
                f"{self.scale} is no scale",
                "Use a number above 0, such as the largest target",
            )

    @property
    def head(self) -> ClassificationHead:
        """From the vector to the one output."""
        return ClassificationHead(self.model.config.text, 1)

    def scores(self, params: Params, batch: Batch, noise: jax.Array | None = None) -> jax.Array:
        """What the target is taken to be: float32 [B]."""
        return self.scale * self.outputs(params, batch, noise)[:, 0]

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Squared error, in scales; the metric ``absolute_error`` is in units of the target."""
        del bucket
        scores = self.scores(params, batch, batch_noise(rng, batch, train))
        error = scores - batch["target"]
        rows = batch["valid"].astype(jnp.float32)
        count = rows.sum()
        loss = (jnp.square(error / self.scale) * rows).sum()
        metrics = {"absolute_error": Mean((jnp.abs(error) * rows).sum(), count)}
        return LossOutput(Mean(loss, count), extras, metrics)
