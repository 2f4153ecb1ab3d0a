"""The decoder of masked images: from the tokens of some patches to the pixels of all (MAE).

As in arXiv 2111.06377: narrow blocks over the encoder's tokens and a learned token at every place
that was not encoded. It is dropped after pretraining.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import View
from vlp_jax.compress.patch_scaling import sincos_positions
from vlp_jax.compress.token_dropout import are_kept, take_patches
from vlp_jax.models.block import Block
from vlp_jax.models.dense import Dense
from vlp_jax.models.flops import block_flops
from vlp_jax.models.layers import BlockConfig, norm


@dataclasses.dataclass(frozen=True)
class ImageDecoderConfig:
    """Geometry.

    Attributes:
        block: what its blocks share.
        depth: number of blocks.
        base_grid: patches along a side of the encoder's own images, to which positions are scaled.
        outputs: numbers for each patch.
    """

    block: BlockConfig
    depth: int
    base_grid: int
    outputs: int

    def __post_init__(self) -> None:
        if self.block.width % 4:
            raise ValueError(f"a width of {self.block.width} is no multiple of 4")

    def flops(self, features: int, view: View) -> float:
        """Forward FLOPs of one image, of whose view so many features a token were encoded."""
        tokens, width = view.patches + 1, self.block.width
        ends = 2.0 * view.tokens * features * width + 2.0 * view.patches * width * self.outputs
        return ends + self.depth * block_flops(self.block, tokens, tokens)


class ImageDecoder(nn.Module):
    """Tokens of the encoder to numbers for every patch."""

    config: ImageDecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, kept: jax.Array, view: View) -> jax.Array:
        """Decode.

        Args:
            tokens: [B, 1 + K, D], the class token first, then the kept patches in their order.
            kept: int32 [B, K], increasing places of these.
            view: what was encoded.

        Returns:
            float32 [B, P, outputs], P = ``view.patches``.
        """
        c = self.config
        block = c.block
        x = Dense(block.width, dtype=block.dtype, name="embedding")(tokens)
        masked = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, block.width))
        seen = are_kept(kept, view.patches)
        # Kept patches lie in their order: how many lie up to a place is the number of its own.
        number = jnp.maximum(jnp.cumsum(seen, axis=1) - 1, 0)
        patches = jnp.where(seen[..., None], take_patches(x[:, 1:], number), masked.astype(x.dtype))
        positions = jnp.asarray(sincos_positions(c.base_grid, view.grid, block.width))
        patches += positions[None].astype(x.dtype)
        x = jnp.concatenate([x[:, :1], patches], axis=1)
        for layer in range(c.depth):
            x = Block(block, name=f"block_{layer:02d}")(x)
        x = norm(block, "norm")(x[:, 1:])
        return Dense(c.outputs, dtype=block.dtype, name="pixels")(x).astype(jnp.float32)
