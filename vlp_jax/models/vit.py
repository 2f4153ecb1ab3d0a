"""Vision transformer: pre-LN, class token kept, learned positions."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models.layers import ACTIVATIONS, Block, BlockConfig, Dense, Noise, norm


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Geometry of an image tower.

    Attributes:
        block: what its blocks share.
        depth: number of blocks.
        patch_size: side of a patch in pixels.
        image_size: side of the image in pixels, a multiple of ``patch_size``.
        stem: ``patch`` (one linear map of a patch) or ``conv`` (3 x 3 convolutions of stride 2 down
            to a quarter, then a linear map of what is left of the patch; learns faster at small
            scale).
        pre_norm: a layer norm before the first block, as in CLIP.
    """

    block: BlockConfig
    depth: int
    patch_size: int
    image_size: int
    stem: Literal["patch", "conv"] = "patch"
    pre_norm: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image.patch_size={self.patch_size} does not divide "
                f"data.image_size={self.image_size}"
            )
        if self.stem == "conv" and self.patch_size % 4:
            raise ValueError(
                f"model.image.stem='conv' needs a patch size that is a multiple of 4, "
                f"got model.image.patch_size={self.patch_size}"
            )
        if self.stem not in ("patch", "conv"):
            raise ValueError(f"model.image.stem={self.stem!r} is neither 'patch' nor 'conv'")

    @property
    def tokens(self) -> int:
        """Image tokens, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ViT(nn.Module):
    """Image tower: [B, H, W, 3] -> [B, I, D], the class token first."""

    config: ViTConfig

    @nn.compact
    def __call__(self, image: jax.Array, noise: Noise = None) -> jax.Array:
        """Encode normalised images.

        Args:
            image: floating [B, H, W, 3], H = W = ``image_size``.
            noise: of the dropout, or None.

        Returns:
            [B, I, D] after the final norm, I = ``config.tokens``.
        """
        c = self.config
        block = c.block
        x = self._stem(image.astype(block.dtype))
        class_token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, block.width))
        class_token = jnp.broadcast_to(class_token.astype(x.dtype), (x.shape[0], 1, block.width))
        x = jnp.concatenate([class_token, x], axis=1)
        positions = self.param(
            "position_embedding", nn.initializers.normal(0.02), (1, c.tokens, block.width)
        )
        x = x + jnp.broadcast_to(positions.astype(x.dtype), x.shape)
        if c.pre_norm:
            x = norm(block, "pre_norm")(x)
        for layer in range(c.depth):
            x = Block(block, name=f"block_{layer:02d}")(x, noise=noise)
        return norm(block, "norm")(x)

    def _stem(self, x: jax.Array) -> jax.Array:
        c = self.config
        width = c.block.width
        patch = c.patch_size
        if c.stem == "conv":
            for i, features in enumerate((width // 4, width // 2)):
                x = nn.Conv(
                    features, (3, 3), strides=2, padding=1, dtype=c.block.dtype, name=f"conv_{i}"
                )(x)
                x = ACTIVATIONS[c.block.activation](x)
            patch //= 4
        # A stride-p convolution of width p is this matrix product; the product is what every
        # backend runs fast and differentiates cheaply.
        batch, height, width_px, channels = x.shape
        grid = (height // patch, width_px // patch)
        x = x.reshape(batch, grid[0], patch, grid[1], patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(
            batch, grid[0] * grid[1], patch * patch * channels
        )
        return Dense(width, dtype=c.block.dtype, name="patch_embedding")(x)
