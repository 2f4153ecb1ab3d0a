"""Vision transformer: pre-LN, class token kept; any patch size and any part of the patches.

What a step encodes of an image is a ``View``: another patch size than the model's own resizes its
kernel and reads its positions at scaled coordinates, and patches that are dropped are never
projected (``vlp_jax.compress``). The convolutions of the stem ``conv`` read the whole image all the
same: there, what is dropped still costs them, and its pixels reach its neighbours.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import default_kernel_init

from vlp_jax.compress.buckets import View
from vlp_jax.compress.patch_scaling import kernel_resize, position_resize, sincos_positions
from vlp_jax.compress.token_dropout import kept_patches, split_patches, take_patches
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.attention import padded_length
from vlp_jax.models.block import Block
from vlp_jax.models.dense import dense_product
from vlp_jax.models.layers import ACTIVATIONS, BlockConfig, Noise, norm
from vlp_jax.models.tuning import stack_of

CONV_STRIDE = 4  # of the convolutions of the stem ``conv``


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
        positions: ``learned`` (a table of the model's own grid, which includes the class token) or
            ``sincos`` (fixed, none for the class token).
        modality: a learned vector is added to every token, which tells an image from a text where
            one stack reads both.
    """

    block: BlockConfig
    depth: int
    patch_size: int
    image_size: int
    stem: Literal["patch", "conv"] = "patch"
    pre_norm: bool = False
    positions: Literal["learned", "sincos"] = "learned"
    modality: bool = False

    def block_of(self, layer: int) -> BlockConfig:
        """What a block is: the probability to be left out rises linearly to the last one's."""
        rate = self.block.drop_path * layer / max(1, self.depth - 1)
        return dataclasses.replace(self.block, drop_path=rate)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image.patch_size={self.patch_size} does not divide "
                f"data.image_size={self.image_size}"
            )
        if self.stem == "conv" and self.patch_size % CONV_STRIDE:
            raise ValueError(
                f"model.image.stem='conv' needs a patch size that is a multiple of 4, "
                f"got model.image.patch_size={self.patch_size}"
            )
        if self.stem not in ("patch", "conv"):
            raise ValueError(f"model.image.stem={self.stem!r} is neither 'patch' nor 'conv'")
        if self.positions not in ("learned", "sincos"):
            raise ValueError(
                f"model.image.positions={self.positions!r} is neither 'learned' nor 'sincos'"
            )
        if self.positions == "sincos" and self.block.width % 4:
            raise ValueError(
                f"model.image.positions='sincos' needs a width of a multiple of 4, "
                f"got model.image.width={self.block.width}"
            )

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of its blocks in a model, whose image tower it is."""
        return stack_of("image_tower/block", self.depth)

    @property
    def width(self) -> int:
        """D, features of a token."""
        return self.block.width

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype."""
        return self.block.dtype

    @property
    def dropout(self) -> float:
        """Rate of its dropout."""
        return self.block.dropout

    @property
    def drop_path(self) -> float:
        """Probability that the last block's branches are left out."""
        return self.block.drop_path

    @property
    def tokens(self) -> int:
        """Image tokens, the class token included."""
        return self.view.tokens

    @property
    def view(self) -> View:
        """The whole image at the model's own sizes."""
        return View.whole(self.image_size, self.patch_size)

    def check_view(self, view: View, key: str) -> None:
        """Refuse a view that this tower cannot encode.

        Args:
            view: what is to be encoded.
            key: of the config, for the message.

        Raises:
            ConfigError: the stem's convolutions do not divide the patches.
        """
        if self.stem == "conv" and view.patch_size % CONV_STRIDE:
            raise ConfigError(
                key,
                f"patches of {view.patch_size} px, but the convolutions of model.image.stem='conv' "
                f"have a stride of {CONV_STRIDE}",
                f"Use multiples of {CONV_STRIDE}, or model.image.stem=patch",
            )


class ViT(nn.Module):
    """Image tower: [B, S, S, 3] -> [B, I, D], the class token first.

    Its two stages can be called by themselves: ``embed`` makes tokens of an image, and ``encode``
    runs the blocks over tokens, wherever these come from.
    """

    config: ViTConfig

    def setup(self) -> None:
        """Name the blocks and the final norm; ``embed`` creates what it reads."""
        c = self.config
        for layer in range(c.depth):
            setattr(self, f"block_{layer:02d}", Block(c.block_of(layer)))
        self.norm = norm(c.block)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in their order."""
        return tuple(getattr(self, f"block_{layer:02d}") for layer in range(self.config.depth))

    def __call__(
        self,
        image: jax.Array,
        noise: Noise = None,
        view: View | None = None,
        keys: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Encode normalised images.

        Args:
            image: floating [B, S, S, 3], S = ``view.image_size``.
            noise: of the dropout, or None.
            view: what to encode; None: all, at the model's own sizes.
            keys: PRNG keys [B] that decide which patches stay; needed where some are dropped.
            train: not used: layer norms know no batch.

        Returns:
            [B, I, D] after the final norm, I = ``view.tokens``.

        Raises:
            ValueError: the images are of another size, or there are no keys to drop by.
        """
        del train
        return self.encode(self.embed(image, view, keys), noise)

    @nn.compact
    def embed(
        self, image: jax.Array, view: View | None = None, keys: jax.Array | None = None
    ) -> jax.Array:
        """Tokens of normalised images before the first block; arguments as of ``__call__``.

        Returns:
            [B, I, D], the class token first.

        Raises:
            ValueError: as ``__call__``.
        """
        c = self.config
        block, view = c.block, view or c.view
        if image.shape[1:3] != (view.image_size, view.image_size):
            raise ValueError(f"images of {image.shape[1:3]} px for a view of {view.image_size} px")
        patches = self._patches(image.astype(block.dtype), view)
        small = nn.initializers.normal(0.02)
        class_token = self.param("class_token", small, (1, 1, block.width))
        positions, class_position = self._positions(view)
        if view.kept < view.patches:
            if keys is None:
                raise ValueError(f"{view.label} drops patches and needs keys")
            kept = kept_patches(keys, view.patches, view.kept)
            patches = take_patches(patches, kept)
            positions = jnp.take(positions, kept, axis=0, mode="clip")
        else:
            positions = jnp.broadcast_to(positions[None], (len(patches), *positions.shape))
        x = PatchEmbedding(block, self._side(c.patch_size), name="patch_embedding")(
            patches, self._side(view.patch_size)
        )
        first = class_token.astype(x.dtype) + class_position.astype(x.dtype)
        first = jnp.broadcast_to(first, (len(x), 1, block.width))
        x = jnp.concatenate([first, x + positions.astype(x.dtype)], axis=1)
        if c.modality:
            x = x + self.param("modality_embedding", small, (1, 1, block.width)).astype(x.dtype)
        return norm(block, "pre_norm")(x) if c.pre_norm else x

    def encode(self, tokens: jax.Array, noise: Noise = None) -> jax.Array:
        """Run the blocks over tokens that all see one another: [B, I, D] -> [B, I, D].

        Args:
            tokens: of ``embed``.
            noise: of the dropout, or None.

        Returns:
            After the final norm.
        """
        block, count = self.config.block, tokens.shape[1]
        x = tokens
        if noise is None or not block.dropout:
            length = padded_length(count, block.dtype, block.attention)
            x = jnp.pad(x, ((0, 0), (0, length - count), (0, 0)))
        for layer in self.blocks:
            x = layer(x, noise=noise, tokens=count)
        return self.norm(x[:, :count])

    def _side(self, patch_size: int) -> int:
        """Side of a patch where it is projected."""
        return patch_size // CONV_STRIDE if self.config.stem == "conv" else patch_size

    def _patches(self, x: jax.Array, view: View) -> jax.Array:
        """What is projected: [B, S, S, 3] -> [B, P, F], rows of patches from the upper left."""
        c = self.config
        width = c.block.width
        if c.stem == "conv":
            for i, features in enumerate((width // 4, width // 2)):
                x = nn.Conv(
                    features, (3, 3), strides=2, padding=1, dtype=c.block.dtype, name=f"conv_{i}"
                )(x)
                x = ACTIVATIONS[c.block.activation](x)
        # A stride-p convolution of width p is a matrix product; the product is what every backend
        # runs fast and differentiates cheaply.
        return split_patches(x, self._side(view.patch_size))

    def _positions(self, view: View) -> tuple[jax.Array, jax.Array]:
        """Of the patches, float32 [P, D], and of the class token, [1, 1, D]."""
        c = self.config
        width, base = c.block.width, c.view.grid
        if c.positions == "sincos":
            table = jnp.asarray(sincos_positions(base, view.grid, width))
            return table, jnp.zeros((1, 1, width))
        table = self.param("position_embedding", nn.initializers.normal(0.02), (1, c.tokens, width))
        class_position, table = table[:, :1], table[0, 1:]
        if view.grid != base:
            table = _by_rows(position_resize(base, view.grid), table)
        return table, class_position


class PatchEmbedding(nn.Module):
    """A linear map of a patch, for patches of any size: [B, P, s * s * C] -> [B, P, D].

    Attributes:
        config: width D and compute dtype.
        base: b, side of the patches that the parameters are of.
    """

    config: BlockConfig
    base: int

    @nn.compact
    def __call__(self, patches: jax.Array, side: int) -> jax.Array:
        """Project patches of ``side`` pixels (or features) a side."""
        c = self.config
        channels = patches.shape[-1] // side**2
        shape = (self.base**2 * channels, c.width)
        kernel = self.param("kernel", default_kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (c.width,))
        if side != self.base:
            rows = kernel.reshape(self.base**2, channels * c.width)
            kernel = _by_rows(kernel_resize(self.base, side), rows).reshape(-1, c.width)
        dimensions = (((patches.ndim - 1,), (0,)), ((), ()))
        x = dense_product(patches.astype(c.dtype), kernel.astype(c.dtype), dimensions)
        return x + bias.astype(c.dtype)[None, None]


def _by_rows(weights: np.ndarray, rows: jax.Array) -> jax.Array:
    """Mix the rows of a parameter: [n, m] constant, [m, D] -> float32 [n, D]."""
    return jnp.dot(jnp.asarray(weights, jnp.float32), rows, precision=jax.lax.Precision.HIGHEST)
