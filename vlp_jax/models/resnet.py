"""Residual convolutional network (arXiv 1512.03385), its strides in the 3 x 3 convolutions.

It serves the objectives of images alone beside the transformer, and speaks its language: the mean
of the last grid stands where the class token does, the cells of the grid behind it. What a step
encodes may be a smaller image; a convolution cannot leave patches out.

Batch norms read the whole global batch in training, and running statistics elsewhere. Those are
not trained: they lie in the parameters under ``objectives.tower.STATISTICS`` and every update
replaces them.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import View
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.layers import Noise

_MOMENTUM, _EPSILON = 0.9, 1e-5  # of the norms
_EXPANSION = 4  # of a bottleneck's features
_INITIALIZER = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Geometry of a convolutional image tower.

    Attributes:
        image_size: side of the image in pixels, a multiple of ``patch_size``.
        stages: residual blocks of each stage, such as (3, 4, 6, 3); every stage but the first
            halves the grid and doubles the features.
        channels: features inside the blocks of the first stage.
        bottleneck: blocks of three convolutions that end in four times their features, as from 50
            layers on; else of two.
        stem: ``conv7`` (7 x 7 of stride 2, then a maximum over 3 x 3 of stride 2) or ``conv3`` (3 x
            3 of stride 1 alone, for small pictures: arXiv 2002.05709, appendix B.9).
        dtype: compute dtype; norms compute in float32.
    """

    image_size: int
    stages: tuple[int, ...] = (3, 4, 6, 3)
    channels: int = 64
    bottleneck: bool = True
    stem: Literal["conv7", "conv3"] = "conv7"
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype("float32"))

    dropout: ClassVar[float] = 0.0
    drop_path: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"model.image.stages={self.stages} needs 1 or more blocks a stage")
        if self.channels < 1:
            raise ValueError(f"model.image.channels={self.channels} must be 1 or more")
        if self.stem not in ("conv7", "conv3"):
            raise ValueError(f"model.image.stem={self.stem!r} is neither 'conv7' nor 'conv3'")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"data.image_size={self.image_size} is no multiple of {self.patch_size}, the "
                "stride of the last grid of the ResNet in model.image"
            )

    @property
    def width(self) -> int:
        """D, features of a token."""
        return self.features(len(self.stages) - 1)[1]

    def features(self, stage: int) -> tuple[int, int]:
        """Features inside the blocks of a stage, and of what they end in."""
        inner = self.channels * 2**stage
        return inner, inner * (_EXPANSION if self.bottleneck else 1)

    @property
    def patch_size(self) -> int:
        """Pixels between cells of the last grid."""
        return (4 if self.stem == "conv7" else 1) * 2 ** (len(self.stages) - 1)

    @property
    def view(self) -> View:
        """The whole image."""
        return View.whole(self.image_size, self.patch_size)

    @property
    def tokens(self) -> int:
        """Cells of the last grid, and their mean."""
        return self.view.tokens

    def check_view(self, view: View, key: str) -> None:
        """Refuse a view that this tower cannot encode.

        Args:
            view: what is to be encoded.
            key: of the config, for the message.

        Raises:
            ConfigError: patches are dropped, or are of another size than the stride.
        """
        if view.kept < view.patches:
            raise ConfigError(
                key,
                f"{view.label} drops patches, but the ResNet in model.image convolves all of them",
                "Leave k... out and use smaller images",
            )
        if view.patch_size != self.patch_size:
            raise ConfigError(
                key,
                f"{view.label}: patches of {view.patch_size} px, but the last grid of the ResNet "
                f"in model.image has a stride of {self.patch_size}",
                f"Write p{self.patch_size}@SIZE",
            )


class ResNet(nn.Module):
    """Image tower: [B, S, S, 3] -> [B, I, D], the mean of the last grid first."""

    config: ResNetConfig

    @nn.compact
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
            noise: not used: nothing is random here.
            view: what to encode; None: all.
            keys: not used: no patch is dropped.
            train: norms read the batch and renew the collection ``batch_stats``, which must be
                mutable; else they read it.

        Returns:
            [B, I, D], I = ``view.tokens``; the mean is computed in float32.

        Raises:
            ValueError: the images are of another size.
        """
        del noise, keys
        c = self.config
        view = view or c.view
        if image.shape[1:3] != (view.image_size, view.image_size):
            raise ValueError(f"images of {image.shape[1:3]} px for a view of {view.image_size} px")
        batch_norm = functools.partial(
            nn.BatchNorm, not train, momentum=_MOMENTUM, epsilon=_EPSILON, dtype=c.dtype
        )
        if c.stem == "conv7":
            stem: nn.Module = _Stem(c.channels, c.dtype, name="conv")
        else:
            stem = _convolution(c.channels, 3, 1, c.dtype, "conv")
        x = nn.relu(batch_norm(name="norm")(stem(image.astype(c.dtype))))
        if c.stem == "conv7":
            x = max_pool(max_pool(x, axis=1), axis=2)
        sides = (1, 3, 1) if c.bottleneck else (3, 3)
        for stage, depth in enumerate(c.stages):
            inner, outputs = c.features(stage)
            for layer in range(depth):
                x = _Block(
                    outputs,
                    sides,
                    inner,
                    2 if stage and not layer else 1,
                    batch_norm,
                    c.dtype,
                    name=f"stage_{stage}_block_{layer:02d}",
                )(x)
        grid = x.reshape(len(x), -1, c.width)
        mean = grid.astype(jnp.float32).mean(axis=1, keepdims=True).astype(c.dtype)
        return jnp.concatenate([mean, grid], axis=1)


class _Stem(nn.Module):
    """A convolution of 7 x 7 with stride 2, as one of 4 x 4 over squares of 2 x 2 pixels.

    The same sums: a row of zeros before the kernel makes it 8 x 8, which squares of 2 x 2 divide.
    With three features a pixel, cuDNN's kernels run at a twentieth of their speed (docs/perf.md).

    Attributes:
        features: of the output.
        dtype: compute dtype.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, S, S, C] -> [B, S / 2, S / 2, features]."""
        batch, side, _, channels = image.shape
        kernel = self.param("kernel", _INITIALIZER, (7, 7, channels, self.features))
        kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
        kernel = kernel.reshape(4, 2, 4, 2, channels, self.features).transpose(0, 2, 1, 3, 4, 5)
        squares = image.reshape(batch, side // 2, 2, side // 2, 2, channels)
        squares = squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side // 2, side // 2, -1)
        missing = -squares.shape[-1] % 8  # of what tensor cores read at once
        kernel = kernel.reshape(4, 4, -1, self.features).astype(self.dtype)
        return jax.lax.conv_general_dilated(
            jnp.pad(squares, ((0, 0), (0, 0), (0, 0), (0, missing))),
            jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0))),
            window_strides=(1, 1),
            padding=((2, 1), (2, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def max_pool(x: jax.Array, axis: int) -> jax.Array:
    """The maximum of three neighbours along one axis, at every second place from the first on.

    By slices: the gradient of a window's maximum is a scatter, which GPUs run slowly.

    Args:
        x: floating, of any shape.
        axis: along which.

    Returns:
        In the dtype of ``x``, with half of the size along the axis, rounded up. Equal numbers share
        the gradient, which that of a window's maximum gives to the first.
    """
    last = x.shape[axis]
    widths = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=-jnp.inf)
    parts = [jax.lax.slice_in_dim(x, i, i + last, 2, axis) for i in range(3)]
    return jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])


class _Block(nn.Module):
    """Convolutions beside a shortcut; the last norm's scale starts at 0.

    Attributes:
        outputs: features of its output.
        sides: of the convolutions' kernels: 1, 3, 1 of a bottleneck, else 3, 3.
        inner: features between them.
        stride: of the first 3 x 3 convolution.
        batch_norm: how its norms are made.
        dtype: compute dtype.
    """

    outputs: int
    sides: tuple[int, ...]
    inner: int
    stride: int
    batch_norm: functools.partial[nn.BatchNorm]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, outputs]."""
        y, last, strided = x, len(self.sides) - 1, self.sides.index(3)
        for i, side in enumerate(self.sides):
            features, stride = self.inner, self.stride if i == strided else 1
            scale = nn.initializers.ones_init()
            if i == last:
                features, scale = self.outputs, nn.initializers.zeros_init()
            y = _convolution(features, side, stride, self.dtype, f"conv_{i}")(y)
            y = self.batch_norm(name=f"norm_{i}", scale_init=scale)(y)
            y = y if i == last else nn.relu(y)
        if x.shape[-1] != self.outputs or self.stride > 1:
            x = _convolution(self.outputs, 1, self.stride, self.dtype, "shortcut_conv")(x)
            x = self.batch_norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


def _convolution(features: int, side: int, stride: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    """Without bias, for a norm follows; padded as if the grid began at the image's corner."""
    return nn.Conv(
        features,
        (side, side),
        strides=stride,
        padding=side // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=_INITIALIZER,
        name=name,
    )
