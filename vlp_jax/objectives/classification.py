"""Downstream classification of a text with one image or two: VQA, entailment, NLVR2.

Source: fact sheet of Free Language Modeling, section 5. The vector of ``objectives.readout`` passes
a pooler and an MLP. Nothing is computed that it does not read: no vocabulary head, and of the
reconstructor's queries only one.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket, view_of
from vlp_jax.data.batch import PAIRS, Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import image_input_flops, lower_flops
from vlp_jax.models.heads import ClassificationHead, apply_head
from vlp_jax.objectives.base import (
    Extras,
    ImagePass,
    LossOutput,
    Mean,
    Params,
    Pass,
    Seen,
    batch_noise,
    check_pictures,
    encode_seen,
    image_tokens,
    seen_part,
    zeros,
)
from vlp_jax.objectives.reading import Headed, Reading
from vlp_jax.objectives.tower import statistics


@dataclasses.dataclass(frozen=True)
class Classifier(Headed):
    """One of several classes: ``label`` int32 [B]; what tasks on texts and on images share.

    Attributes:
        num_classes: C, as many as the source has at least.
        batch_name: named batch it reads.
    """

    num_classes: int
    batch_name: str = PAIRS

    extra_fields: ClassVar[tuple[str, ...]] = ("label",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 2:
            raise ConfigError(
                f"objectives.{self.name}.num_classes",
                f"{self.num_classes} classes leave nothing to tell apart",
                "Use as many as the source has",
            )

    def logits(
        self,
        params: Params,
        batch: Batch,
        noise: jax.Array | None = None,
        seen: Seen | None = None,
    ) -> jax.Array:
        """Scores of the classes: float32 [B, C]; each task has its own."""
        raise NotImplementedError

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Loss and accuracy."""
        logits, params = self.judged(params, batch, rng, bucket, train)
        rows = batch["valid"].astype(jnp.float32)
        count = rows.sum()
        loss = (self.row_losses(logits, batch) * rows).sum()
        score = (self.row_scores(logits, batch) * rows).sum()
        metrics = {"accuracy": Mean(score, count)}
        return LossOutput(Mean(loss, count), extras, metrics, statistics(params))

    def judged(
        self, params: Params, batch: Batch, rng: jax.Array, bucket: Bucket, train: bool
    ) -> tuple[jax.Array, Params]:
        """The scores that ``loss`` judges, float32 [B, C], and the parameters after the pass."""
        seen = seen_part(rng, batch, bucket, train)
        return self.logits(params, batch, batch_noise(rng, batch, train), seen), params

    def row_losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy: float32 [B, C] -> [B]."""
        label = batch["label"][:, None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), label, axis=1)[:, 0]

    def row_scores(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """1 where the best class is right: float32 [B, C] -> [B]."""
        return 1.0 * (logits.argmax(axis=1) == batch["label"])


@dataclasses.dataclass(frozen=True)
class ReadingClassifier(Reading, Classifier):
    """One of several classes by what is read."""

    @property
    def head(self) -> ClassificationHead:
        """From the vector to logits."""
        return ClassificationHead(self.model.config.text, self.num_classes)

    def logits(
        self,
        params: Params,
        batch: Batch,
        noise: jax.Array | None = None,
        seen: Seen | None = None,
    ) -> jax.Array:
        """Scores of the classes: float32 [B, C]."""
        return self.outputs(params, batch, noise, seen)


@dataclasses.dataclass(frozen=True)
class Classification(ReadingClassifier):
    """One of several classes by a text and an image; also the base of the other tasks."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Tokens of the images."""
        return (ImagePass(self.model),)

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of what it reads and of the head; no extras."""
        check_pictures(self.name, batch_spec)
        return super().init(rng, batch_spec)

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example; by formula over real tokens."""
        c, view = self.model.config, view_of(bucket)
        return image_input_flops(c, view) + self.reader.flops(c, text_length, view)

    def _features(
        self,
        model: Encoder,
        batch: Batch,
        noise: jax.Array | None,
        seen: Seen | None,
    ) -> jax.Array:
        image = image_tokens(model, batch, noise, seen)
        text = self.reader.encode(model, batch["text_ids"], batch["text_length"], noise)
        return self.reader.read(model, text, image, noise)


def known_only(logits: jax.Array, classes: int) -> jax.Array:
    """Scores [B, C] of which those beyond the first ``classes`` are -inf: nobody has named them."""
    return jnp.where((jnp.arange(logits.shape[1]) < classes)[None], logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class VQA(Classification):
    """Answers as classes with soft targets: binary cross-entropy of each answer, summed.

    An answer's target is its score (``answer_score``); answers outside the list have no target and
    count as wrong.
    """

    extra_fields: ClassVar[tuple[str, ...]] = ("answer", "answer_score")

    @property
    def head(self) -> ClassificationHead:
        """From the vector to logits; about one answer is right."""
        return ClassificationHead(self.model.config.text, self.num_classes, 1 / self.num_classes)

    def row_losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Summed over the answers: float32 [B, C] -> [B]."""
        targets = self.targets(batch)
        return (jax.nn.softplus(logits) - targets * logits).sum(axis=1)

    def row_scores(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The soft target of the best answer: float32 [B, C] -> [B]."""
        best = logits.argmax(axis=1)[:, None]
        return jnp.take_along_axis(self.targets(batch), best, axis=1)[:, 0]

    def targets(self, batch: Batch) -> jax.Array:
        """The score of every answer: float32 [B, C]."""
        answer = batch["answer"]
        answer = jnp.where(answer < 0, self.num_classes, answer)  # past the end: dropped
        rows = jnp.arange(len(answer))[:, None]
        zero = jnp.zeros((len(answer), self.num_classes))
        return zero.at[rows, answer].max(batch["answer_score"], mode="drop")


@dataclasses.dataclass(frozen=True)
class NLVR2(Classification):
    """A statement about two images, true or false.

    The text is read with each image in turn, marked as the first or the second; the head sees both
    vectors. The lower half of the text stack, which no image enters, runs once.
    """

    num_classes: int = 2

    extra_fields: ClassVar[tuple[str, ...]] = ("second_image", "label")

    @property
    def passes(self) -> tuple[Pass, ...]:
        """None: both images pass the tower together."""
        return ()

    @property
    def _mark_name(self) -> str:
        return f"{self.name}_image_type"

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters as of the base, and the two marks [2, D]."""
        check_pictures(self.name, batch_spec)
        width = self.model.config.text.width
        marks = 0.02 * jax.random.normal(jax.random.fold_in(rng, 1), (2, width))
        batch = zeros(batch_spec)

        def forward(model: Encoder) -> jax.Array:
            return self._pair_features(model, batch, marks, None, None)

        features, variables = nn.init_with_output(forward, self.model)(rng)
        head = self.head.init(rng, features)["params"]
        return variables["params"] | {self.head_name: head, self._mark_name: marks}, {}

    def logits(
        self,
        params: Params,
        batch: Batch,
        noise: jax.Array | None = None,
        seen: Seen | None = None,
    ) -> jax.Array:
        """Scores of false and true: float32 [B, 2]."""

        def forward(model: Encoder) -> jax.Array:
            return self._pair_features(model, batch, params[self._mark_name], noise, seen)

        features = nn.apply(forward, self.model)({"params": params})
        return apply_head(self.head, params[self.head_name], features, noise)

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example: two images, once what of the text no image enters."""
        lower = lower_flops(self.model.config, text_length, self.reader.streams)
        return 2 * super().flops(text_length, bucket) - lower

    def _pair_features(
        self,
        model: Encoder,
        batch: Batch,
        marks: jax.Array,
        noise: jax.Array | None,
        seen: Seen | None,
    ) -> jax.Array:
        """[B, 2 D]."""
        # The pair sits on an inner axis: the batch axis is sharded and never concatenated.
        images = jnp.stack([batch["image"], batch["second_image"]], axis=1)
        images = images.reshape(-1, *images.shape[2:])
        if seen is not None:  # each picture of a pair drops patches of its own
            seen = seen._replace(keys=jax.vmap(jax.random.split)(seen.keys).reshape(-1))
        tokens = encode_seen(model, images, noise, seen)
        rows = len(batch["text_ids"])
        marked = jnp.tile(marks, (rows, 1))[:, None].astype(tokens.dtype)
        tokens = tokens + jnp.broadcast_to(marked, tokens.shape)
        text = self.reader.encode(model, batch["text_ids"], batch["text_length"], noise)
        pairs = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), text)
        return self.reader.read(model, pairs, tokens, noise).reshape(rows, -1)
