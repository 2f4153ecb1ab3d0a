"""Masked image modelling: a few patches are encoded, the pixels of the others are predicted (MAE).

As in arXiv 2111.06377: a random crop and flip, a quarter of the patches kept by the same token
dropout as everywhere else, so that the rest costs the tower nothing; a small decoder; the loss is
the mean squared error of the pixels of patches that were not encoded, each patch scaled to zero
mean and unit variance.

A bucket's view says by what patches the image is encoded and how many are kept at most. Whatever
the patch size, a patch's target has as many pixels as the model's own: the crop is made at that
size for it.

With its text (``with_text``), an image is encoded together with all of it, by a shared stack or a
fusion tower, and the decoder reads what that makes of the patches: what they do not show, the text
may tell.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import Bucket, View, view_of
from vlp_jax.compress.token_dropout import are_kept, kept_patches, split_patches
from vlp_jax.data.augment import Recipe
from vlp_jax.data.batch import PAIRS, Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import image_input_flops, text_flops, vit_flops
from vlp_jax.models.image_decoder import ImageDecoder, ImageDecoderConfig
from vlp_jax.models.image_tower import as_vit
from vlp_jax.models.masks import bidirectional_mask
from vlp_jax.models.pairs import PairEncoder
from vlp_jax.models.vit import ViTConfig
from vlp_jax.objectives.base import Defaults, Extras, LossOutput, Params, Seen, example_keys, zeros
from vlp_jax.objectives.similarity import valid_mean
from vlp_jax.objectives.tower import (
    check_no_dropout,
    init_tower,
    random_pixels,
    tower_tokens,
    view_recipe,
)

_RECIPE = Recipe(scale=(0.2, 1.0), jitter=0.0, grey=0.0, blur=0.0)
_KEPT = 0x3A5  # folded into a step's key for the choice of patches


@dataclasses.dataclass(frozen=True)
class MIM(Defaults):
    """Masked autoencoding of pixels.

    Attributes:
        model: of which the image tower alone is used, unless ``with_text``.
        name: key in ``config.objectives``.
        batch_name: named batch it reads.
        kept_share: of the patches, how many are encoded at most, rounded.
        decoder_width, decoder_depth, decoder_heads: geometry of the decoder.
        augment: keys of ``data.augment.Recipe``.
        with_text: images are encoded together with their texts; of models with a stack for both.
        decoder_of: name of another one of the run, whose decoder it trains too, of the same
            geometry; empty: it has its own.
    """

    model: Encoder
    name: str
    batch_name: str = PAIRS
    kept_share: float = 0.25
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    with_text: bool = False
    decoder_of: str = ""

    def __post_init__(self) -> None:
        key = f"objectives.{self.name}"
        if not 0.0 < self.kept_share < 1.0:
            raise ConfigError(
                f"{key}.kept_share", f"{self.kept_share}", "Use a share above 0 and below 1"
            )
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{key}.{name}", f"{getattr(self, name)}", "Use 1 or more")
        check_no_dropout(self.model, self.name)
        _ = self.image  # refuses a convolutional tower
        if self.image.stem != "patch":
            raise ConfigError(
                "model.image.stem",
                f"{self.image.stem!r}: its convolutions carry pixels of the patches "
                f"that {key} hides to those that are encoded",
                "Use patch",
            )
        if self.image.view.patches < 2:
            raise ConfigError("data.image_size", "one patch leaves none to predict", "Raise it")
        try:
            _ = self.decoder
        except ValueError as error:
            raise ConfigError(f"{key}.decoder_width", str(error), "Choose one that fits") from error
        _ = self.recipe  # checks its keys
        if self.with_text and not isinstance(self.model, PairEncoder):
            raise ConfigError(
                f"{key}.with_text",
                "True, but no stack of this model makes image tokens that have read a text",
                "Use a model of type 'shared' or 'three_towers', or set it to False",
            )

    @property
    def image(self) -> ViTConfig:
        """Geometry of the tower."""
        return as_vit(self.model.config.image, f"objectives.{self.name}")

    @property
    def recipe(self) -> Recipe:
        """How the view of an image is made."""
        return view_recipe(_RECIPE, self.augment, f"objectives.{self.name}.augment")

    @property
    def decoder(self) -> ImageDecoder:
        """Its decoder."""
        image = self.image
        block = dataclasses.replace(
            image.block,
            width=self.decoder_width,
            heads=self.decoder_heads,
            mlp_width=4 * self.decoder_width,
            norm="pre",
            drop_path=0.0,
        )
        outputs = 3 * image.patch_size**2
        return ImageDecoder(ImageDecoderConfig(block, self.decoder_depth, image.view.grid, outputs))

    def encoded(self, bucket: Bucket | None) -> View:
        """What is encoded of an image: at least one patch, and not all."""
        view = view_of(bucket) or self.image.view
        most = min(max(1, round(self.kept_share * view.patches)), view.patches - 1)
        return dataclasses.replace(view, kept=min(view.kept, most))

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of the tower, of what texts have beside it, and of the decoder; no extras."""
        view = self.image.view
        params, tokens = init_tower(self.model, rng, batch_spec)
        if self.with_text:
            batch = zeros(batch_spec)
            pixels = jnp.zeros((len(tokens), view.image_size, view.image_size, 3))
            forward = functools.partial(_read_together, batch=batch, pixels=pixels, seen=None)
            params = nn.init(forward, self.model)(rng)["params"]
        kept = jnp.broadcast_to(jnp.arange(view.kept)[None], (len(tokens), view.kept))
        own = self.decoder.init(jax.random.fold_in(rng, 1), tokens, kept, view)
        return {**params, self._key: own["params"]}, {}

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Mean over the valid images of the error of their hidden patches."""
        image = self.image
        view = self.encoded(bucket if train else None)
        chosen = example_keys(jax.random.fold_in(rng, _KEPT), batch["position"])
        kept = kept_patches(chosen, view.patches, view.kept)
        pixels = random_pixels(batch, rng, self.recipe, view.image_size, image)
        target, size = pixels, view.grid * image.patch_size
        if size != view.image_size:
            target = random_pixels(batch, rng, self.recipe, size, image)
        seen = Seen(view, chosen)
        if self.with_text:
            forward = functools.partial(_read_together, batch=batch, pixels=pixels, seen=seen)
            tokens = nn.apply(forward, self.model)({"params": params})
        else:
            tokens = tower_tokens(image, params, pixels, None, seen)
        found = self.decoder.apply({"params": params[self._key]}, tokens, kept, view)
        error = jnp.square(jnp.asarray(found) - scaled_patches(target, image.patch_size))
        hidden = ~are_kept(kept, view.patches)
        losses = jnp.where(hidden, error.mean(axis=-1), 0.0).sum(axis=1) / hidden.sum(axis=1)
        return LossOutput(valid_mean(losses, batch["valid"]), extras, {})

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example."""
        image, view, config = self.image, self.encoded(bucket), self.model.config
        decoder = self.decoder.config.flops(image.block.width, view)
        if not self.with_text:
            return vit_flops(image, view) + decoder
        text = text_flops(config, text_length, streams=1, view=view, joint=True)
        return image_input_flops(config, view) + text + decoder

    @property
    def _key(self) -> str:
        """Key of the decoder's parameters."""
        return f"{self.decoder_of or self.name}_decoder"


def _read_together(
    model: PairEncoder, batch: Batch, pixels: jax.Array, seen: Seen | None
) -> jax.Array:
    """Tokens [B, I, D] of images by blocks that read them with their texts."""
    mask = bidirectional_mask(batch["text_length"], batch["text_ids"].shape[1])[:, None]
    image = model.encode_image(pixels, None, *(seen or (None, None)))
    text = model.encode_text_lower(batch["text_ids"], mask)[-1]
    return model.encode_pair(text, mask, image).image[:, 0]


def scaled_patches(pixels: jax.Array, side: int) -> jax.Array:
    """Patches, each with zero mean and unit variance: [B, S, S, 3] -> [B, P, side * side * 3]."""
    x = split_patches(pixels, side)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
