"""Image-text contrast (ITC) and matching (ITM).

ITC: every image of the global batch against every text of it, symmetric cross-entropy over scaled
cosines (CLIP, arXiv 2103.00020, section 2.3). Negatives of all devices count and carry gradients:
the similarities are one product of the global batch, which the compiler shards.

ITM: does this text belong to this image? Each pair is joined by two wrong ones, drawn in
proportion to the contrastive softmax (ALBEF, arXiv 2107.07651, section 3.2): hard negatives. A row
whose text is the same is none: it would be as similar as the pair itself, and drawn most of all.
What both read of an image and of a text that have not met is ``image_feature`` and
``text_feature`` of the model: of two stacks the image tower and the lower half of the text stack,
so that only matching runs the upper half; of three towers those of the image and of the text, so
that only matching runs the fusion tower; of a shared stack one pass over each alone. Of what these
make the first token is read, or the mean of the others (``ITC.pool``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket, view_of
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import PAIRS, Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import (
    image_feature_flops,
    image_flops,
    image_input_flops,
    lower_flops,
    text_feature_flops,
)
from vlp_jax.models.heads import MAX_SCALE, ClassificationHead, ContrastiveHead, apply_head
from vlp_jax.models.layers import Noise
from vlp_jax.models.pooling import Pool, check_pool
from vlp_jax.objectives.base import (
    IMAGE_TOKENS,
    Defaults,
    Extras,
    ImagePass,
    LossOutput,
    Mean,
    Params,
    Pass,
    Seen,
    batch_noise,
    encode_image,
    example_keys,
    seen_part,
    zeros,
)
from vlp_jax.objectives.readout import EncodedText, Kind, Readout
from vlp_jax.objectives.similarity import info_nce, spread, valid_mean

CONTRASTIVE_HEAD = "contrastive_head"  # ITC trains it, ITM draws its negatives by it
MATCHING_HEAD = "matching_head"


@dataclasses.dataclass(frozen=True)
class DualEncoder:
    """Image and text embeddings of the model, for ITC, ITM and retrieval; a ``Pass``.

    Tokens of the text all see one another and no image.

    Attributes:
        model: as of ``ITC``, like the others.
        embedding_dim: E.
        temperature: the first one.
        pool: of the tokens of either.
    """

    model: Encoder
    embedding_dim: int
    temperature: float
    pool: Pool
    key: ClassVar[str] = "embeddings"

    @property
    def head(self) -> ContrastiveHead:
        """From features to unit vectors."""
        return ContrastiveHead(self.model.config.text, self.embedding_dim, self.temperature)

    def __call__(
        self, params: Params, batch: Batch, noise: Noise = None, seen: Seen | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Both sides of a batch: those that the update made for several objectives, or new ones.

        Args:
            params: of the run.
            batch: with its image, or tokens of it (``IMAGE_TOKENS``).
            noise: of the dropout, or None.
            seen: what is encoded of the images; None: everything.

        Returns:
            Unit vectors of images and of texts, float32 [B, E] each; the scale of their cosines.
        """
        if self.key in batch:
            shared: Any = batch[self.key]  # three arrays, where other keys have one
            image, text, scale = shared
            return image, text, scale
        image = encode_image(self.model, params, batch, noise, seen)
        text = self.text_feature(params, batch["text_ids"], batch["text_length"], noise)
        return self.embed(params, image, text, noise)

    def image_tokens(self, params: Params, image: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, I, D] of ``Encoder.encode_image``, without dropout."""
        return encode_image(self.model, params, {"image": image}, None)

    def text_feature(
        self, params: Params, ids: jax.Array, lengths: jax.Array, noise: Any = None
    ) -> jax.Array:
        """int32 [B, N], int32 [B] -> [B, D]."""

        def forward(model: Encoder) -> jax.Array:
            return model.text_feature(ids, lengths, noise, self.pool)

        return nn.apply(forward, self.model)({"params": params})

    def image_feature(self, params: Params, tokens: jax.Array, noise: Any = None) -> jax.Array:
        """Image tokens [B, I, D] -> [B, D]."""

        def forward(model: Encoder) -> jax.Array:
            return model.image_feature(tokens, noise, self.pool)

        return nn.apply(forward, self.model)({"params": params})

    def embed(
        self, params: Params, image: jax.Array, text: jax.Array, noise: Any = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unit vectors of image tokens [B, I, D] and text features [B', D], and their scale."""
        embedded: tuple[jax.Array, jax.Array, jax.Array] = self._head(
            params, None, self.image_feature(params, image, noise), text
        )
        return embedded

    def embed_image(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Image tokens [B, I, D] -> unit vectors float32 [B, E]."""
        embedded: jax.Array = self._head(params, "image", self.image_feature(params, tokens))
        return embedded

    def embed_text(self, params: Params, feature: jax.Array) -> jax.Array:
        """Text features [B, D] -> unit vectors float32 [B, E]."""
        embedded: jax.Array = self._head(params, "text", feature)
        return embedded

    def _head(self, params: Params, method: str | None, *arguments: jax.Array) -> Any:
        return self.head.apply({"params": params[CONTRASTIVE_HEAD]}, *arguments, method=method)

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        """Parameters of the towers and of the head."""

        def forward(model: Encoder) -> None:
            model.image_feature(model.encode_image(normalize(batch["image"])))
            model.text_feature(batch["text_ids"], batch["text_length"])

        feature = jnp.zeros((1, self.model.config.text.width))
        # Names in the head are those of the model: another key, or they would start alike.
        head = self.head.init(jax.random.fold_in(rng, 1), feature, feature)["params"]
        return nn.init(forward, self.model)(rng)["params"] | {CONTRASTIVE_HEAD: head}

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of both features for one example, from an image that is encoded."""
        c = self.model.config
        return image_feature_flops(c, view_of(bucket)) + text_feature_flops(c, text_length)


@dataclasses.dataclass(frozen=True)
class ITC(Defaults):
    """Image-text contrast over the global batch.

    Attributes:
        model: the shared encoder.
        name: key in ``config.objectives``.
        batch_name: named batch it reads.
        embedding_dim: E, width of the shared space.
        temperature: the first one, 0.01 or more; it is learned.
        pool: of the tokens of an image and of a text, see ``models.pooling``; a config may leave it
            to the origin by ``auto``, see ``train.adopted``.
    """

    model: Encoder
    name: str = "itc"
    batch_name: str = PAIRS
    embedding_dim: int = 256
    temperature: float = 0.07
    pool: Pool = "class"

    splittable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1.0 / MAX_SCALE <= self.temperature < float("inf"):
            raise ConfigError(
                f"objectives.{self.name}.temperature",
                f"{self.temperature} is no temperature to begin with",
                f"Use {1.0 / MAX_SCALE:g} or more; 0.07 is usual",
            )
        check_pool(f"objectives.{self.name}.pool", self.pool)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Tokens of the images, and embeddings of both sides."""
        return ImagePass(self.model), self.dual_encoder

    @property
    def dual_encoder(self) -> DualEncoder:
        """Embeddings of both sides."""
        return DualEncoder(self.model, self.embedding_dim, self.temperature, self.pool)

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of both towers and the head; no extras."""
        return self.dual_encoder.init(rng, zeros(batch_spec)), {}

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Mean over pairs of both directions' cross-entropies."""
        noise, seen = batch_noise(rng, batch, train), seen_part(rng, batch, bucket, train)
        image, text, scale = self.dual_encoder(params, batch, noise, seen)
        valid = batch["valid"]
        to_text, text_right = info_nce(scale * (image @ text.T), valid)
        to_image, image_right = info_nce(scale * (text @ image.T), valid)
        metrics = {
            "image_to_text_accuracy": valid_mean(text_right, valid),
            "text_to_image_accuracy": valid_mean(image_right, valid),
            "scale": Mean(scale, jnp.ones(())),
            "image_embedding_std": spread(image, valid),
            "text_embedding_std": spread(text, valid),
        }
        return LossOutput(valid_mean((to_text + to_image) / 2, valid), extras, metrics)

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example; similarities not counted."""
        c = self.model.config
        heads = 2.0 * 2 * c.text.width * self.embedding_dim
        image = image_flops(c, view_of(bucket))
        return image + self.dual_encoder.flops(text_length, bucket) + heads


@dataclasses.dataclass(frozen=True)
class ITM(Defaults):
    """Image-text matching with hard negatives of the global batch.

    Attributes:
        itc: of the run; by its similarities the negatives are drawn.
        name: key in ``config.objectives``.
        batch_name: named batch it reads.
        readout: how text and image are read together, see ``objectives.readout``.
    """

    itc: ITC
    name: str = "itm"
    batch_name: str = PAIRS
    readout: Kind = "query"

    splittable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _ = self.reader  # checks the key

    @property
    def model(self) -> Encoder:
        """The shared encoder."""
        return self.itc.model

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those of ``itc``."""
        return self.itc.passes

    @property
    def dual_encoder(self) -> DualEncoder:
        """That of ``itc``."""
        return self.itc.dual_encoder

    @property
    def reader(self) -> Readout:
        """The way a pair is read."""
        return Readout(self.readout, f"objectives.{self.name}.readout")

    @property
    def head(self) -> ClassificationHead:
        """Logits of no match and match."""
        return ClassificationHead(self.model.config.text, 2)

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of the whole encoder and of both heads; no extras."""
        batch = zeros(batch_spec)

        def forward(model: Encoder) -> None:
            image = model.encode_image(normalize(batch["image"]))
            text = self.reader.encode(model, batch["text_ids"], batch["text_length"], None)
            self.reader.read(model, text, image, None)

        params = nn.init(forward, self.model)(rng)["params"]
        feature = jnp.zeros((1, self.model.config.text.width))
        head = self.head.init(rng, feature)["params"]
        return params | self.itc.dual_encoder.init(rng, batch) | {MATCHING_HEAD: head}, {}

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Cross-entropy of each pair and its two hard negatives, as far as the batch has any."""
        draw_key, noise_key = jax.random.split(rng)
        noise = batch_noise(noise_key, batch, train)
        seen = seen_part(rng, batch, bucket, train)
        image = encode_image(self.model, params, batch, noise, seen)
        known = {**batch, IMAGE_TOKENS: image}
        other_text, other_image, found = self._negatives(params, known, draw_key)
        own = jnp.arange(len(other_text))

        def forward(model: Encoder) -> jax.Array:
            text = self.reader.encode(model, batch["text_ids"], batch["text_length"], noise)
            # Candidates sit on an inner axis: the batch axis is sharded and never concatenated.
            texts = text.rows(jnp.stack([own, other_text, own], axis=1).reshape(-1))
            images = image[jnp.stack([own, own, other_image], axis=1).reshape(-1)]
            return self.reader.read(model, texts, images, noise)

        features = nn.apply(forward, self.model)({"params": params})
        logits = apply_head(self.head, params[MATCHING_HEAD], features, noise)
        label = jnp.tile(jnp.array([1, 0, 0]), len(own))
        valid = batch["valid"]
        rows = jnp.stack([valid, valid & found, valid & found], axis=1)
        rows = rows.reshape(-1).astype(jnp.float32)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
        correct = 1.0 * (logits.argmax(axis=1) == label)
        metrics = {"accuracy": Mean((correct * rows).sum(), rows.sum())}
        return LossOutput(Mean((nll * rows).sum(), rows.sum()), extras, metrics)

    def match(self, params: Params, text: EncodedText, image: jax.Array) -> jax.Array:
        """Log-odds that texts belong to images: B texts, [B, I, D] -> float32 [B]."""

        def forward(model: Encoder) -> jax.Array:
            return self.reader.read(model, text, image, None)

        features = nn.apply(forward, self.model)({"params": params})
        logits = apply_head(self.head, params[MATCHING_HEAD], features)
        return logits[:, 1] - logits[:, 0]

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example: both modalities once, three readings."""
        c, view = self.model.config, view_of(bucket)
        entering, image = image_input_flops(c, view), image_flops(c, view)
        lower = lower_flops(c, text_length, self.reader.streams)
        once = lower + (image - entering)  # of a reading, shared by all three
        features = self.dual_encoder.flops(text_length, bucket)
        return entering + 3 * self.reader.flops(c, text_length, view) - 2 * once + features

    def _negatives(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A wrong text for each image, a wrong image for each text, and whether there are any.

        Returns:
            int32 [B] twice, and bool [B].
        """
        embedded = self.dual_encoder(params, batch)
        images, texts, scale = jax.lax.stop_gradient(embedded)
        size = len(texts)
        code = _codes(batch["text_ids"])
        allowed = batch["valid"][None, :] & (code[:, None] != code[None, :])
        keys = example_keys(rng, batch["position"])
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (2, size)))(keys)

        def drawn(similarity: jax.Array, noise: jax.Array) -> jax.Array:
            return jnp.where(allowed, scale * similarity + noise, -jnp.inf).argmax(axis=1)

        other_text = drawn(images @ texts.T, gumbel[:, 0])
        return other_text, drawn(texts @ images.T, gumbel[:, 1]), allowed.any(axis=1)


def _codes(ids: jax.Array) -> jax.Array:
    """A number for each row, the same for the same ids: int32 [B, N] -> uint32 [B].

    Two rows that differ have the same with a chance of 2^-32, and are then not told apart.
    """
    factors = jax.random.bits(jax.random.key(0), (ids.shape[1],), jnp.uint32)
    return (ids.astype(jnp.uint32) * (factors | 1)[None]).sum(axis=1, dtype=jnp.uint32)
