"""What objectives put on top of the shared encoder; an objective creates the one it reads."""

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.models.dense import Dense
from vlp_jax.models.layers import ACTIVATIONS, BlockConfig, Noise, drop, norm

MAX_SCALE = 100.0  # of the contrastive logits, as in CLIP


class ContrastiveHead(nn.Module):
    """Two projections to one sphere, and the scale of their cosines.

    Attributes:
        config: compute dtype.
        embedding_dim: E, width of the shared space.
        temperature: the first one; the scale is its inverse and is learned as a logarithm.
    """

    config: BlockConfig
    embedding_dim: int
    temperature: float = 0.07

    def setup(self) -> None:
        """Create the projections and the scale."""
        dense = functools.partial(
            Dense, self.embedding_dim, use_bias=False, dtype=self.config.dtype
        )
        self.image_projection, self.text_projection = dense(), dense()
        self.log_scale = self.param(
            "log_scale", nn.initializers.constant(math.log(1.0 / self.temperature)), ()
        )

    def __call__(self, image: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embed features of both modalities.

        Args:
            image: [B, D].
            text: [B', D].

        Returns:
            Unit vectors float32 [B, E] and [B', E], and the scale of their products, float32 [].
        """
        scale = jnp.exp(_at_most(math.log(MAX_SCALE), self.log_scale))
        return self.image(image), self.text(text), scale

    def image(self, feature: jax.Array) -> jax.Array:
        """[B, D] -> unit vectors float32 [B, E]."""
        return unit(self.image_projection(feature).astype(jnp.float32))

    def text(self, feature: jax.Array) -> jax.Array:
        """[B, D] -> unit vectors float32 [B, E]."""
        return unit(self.text_projection(feature).astype(jnp.float32))


class ClassificationHead(nn.Module):
    """A pooler and a small MLP, as METER's fine-tuning has them: [B, F] -> float32 [B, C].

    Fact sheet of FLM, section 5: the feature passes a dense layer with tanh, then
    dense -> norm -> GELU -> dense.

    Attributes:
        config: width D, dropout and compute dtype.
        num_classes: C.
        prior: probability of each class by a sigmoid at first, which the biases give (Lin et al.
            2017, section 3.3). Where each of many classes is nearly always wrong, the first
            hundreds of updates would otherwise teach no more than that. 0.5: no bias.
    """

    config: BlockConfig
    num_classes: int
    prior: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, noise: Noise = None) -> jax.Array:
        """Logits of features [B, F]."""
        c = self.config
        x = jnp.tanh(Dense(c.width, dtype=c.dtype, name="pooler")(x))
        x = drop(self, "pooled", x, c.dropout, noise)
        x = Dense(2 * c.width, dtype=c.dtype, name="hidden")(x)
        x = ACTIVATIONS["gelu"](norm(c, "norm")(x))
        small = nn.initializers.normal(0.02)  # so that a fresh head prefers no class
        classifier = Dense(
            self.num_classes,
            dtype=jnp.float32,
            kernel_init=small,
            bias_init=nn.initializers.constant(math.log(self.prior / (1 - self.prior))),
            name="classifier",
        )
        return classifier(x.astype(jnp.float32))


class LinearHead(nn.Module):
    """A linear layer in float32, zero at first: [B, F] -> float32 [B, C].

    Attributes:
        num_classes: C.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of features."""
        zero = nn.initializers.zeros_init()
        dense = Dense(self.num_classes, dtype=jnp.float32, kernel_init=zero, name="classifier")
        return dense(x.astype(jnp.float32))


def apply_head(
    head: ClassificationHead, params: Any, x: jax.Array, noise: Noise = None
) -> jax.Array:
    """Logits of features [B, F] under the head's own parameters: float32 [B, C]."""
    logits: jax.Array = head.apply({"params": params}, x, noise)  # type: ignore[assignment]
    return logits


class BatchNorm(nn.Module):
    """Normalises features by the mean and variance of the whole batch, in float32: [B, F].

    The batch is the global one, on any number of devices. There are no running statistics: heads
    of invariance objectives are dropped after training.

    Attributes:
        affine: a scale and a bias after it.
        epsilon: added to the variance.
    """

    affine: bool = True
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise; in the dtype of ``x``."""
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=0, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=0, keepdims=True) + self.epsilon)
        if self.affine:
            features = x.shape[-1:]
            y = y * self.param("scale", nn.initializers.ones_init(), features)[None]
            y = y + self.param("bias", nn.initializers.zeros_init(), features)[None]
        return y.astype(x.dtype)


class ProjectionHead(nn.Module):
    """Dense layers with batch norm and ReLU between them: [B, F] -> float32 [B, E].

    As the projectors and predictors of MoCo v3, SimCLR (SLIP's) and SimSiam: the last layer has a
    bias, unless a norm follows it, and no other has one.

    Attributes:
        layers: dense layers.
        hidden_dim: width of all but the last.
        embedding_dim: E.
        last_norm: a batch norm without scale and bias after the last.
        dtype: compute dtype.
    """

    layers: int
    hidden_dim: int
    embedding_dim: int
    last_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Project features."""
        for layer in range(self.layers - 1):
            x = Dense(self.hidden_dim, use_bias=False, dtype=self.dtype, name=f"dense_{layer}")(x)
            x = nn.relu(BatchNorm(name=f"norm_{layer}")(x))
        last = f"dense_{self.layers - 1}"
        x = Dense(self.embedding_dim, use_bias=not self.last_norm, dtype=self.dtype, name=last)(x)
        x = x.astype(jnp.float32)
        return BatchNorm(affine=False)(x) if self.last_norm else x

    def flops(self, features: int) -> float:
        """Forward FLOPs of one example with so many features."""
        widths = [features, *[self.hidden_dim] * (self.layers - 1), self.embedding_dim]
        return sum(2.0 * a * b for a, b in itertools.pairwise(widths))


class PrototypeHead(nn.Module):
    """How near features are to prototypes: [B, F] -> float32 [B, K], cosines.

    As DINO's head: dense layers with GELU between them to a bottleneck, whose unit vectors are
    multiplied with unit prototypes.

    Attributes:
        layers: dense layers.
        hidden_dim: width of all but the last.
        embedding_dim: of the bottleneck.
        prototypes: K.
        dtype: compute dtype of the dense layers.
        norm: a batch norm before each GELU.
    """

    layers: int
    hidden_dim: int
    embedding_dim: int
    prototypes: int
    dtype: jnp.dtype
    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compare features with all prototypes."""
        small = nn.initializers.truncated_normal(0.02)
        widths = [*[self.hidden_dim] * (self.layers - 1), self.embedding_dim]
        for layer, width in enumerate(widths):
            name = f"dense_{layer}"
            hidden = layer < self.layers - 1
            biased = not (hidden and self.norm)
            dense = Dense(width, use_bias=biased, dtype=self.dtype, kernel_init=small, name=name)
            x = dense(x)
            if hidden:
                x = BatchNorm(name=f"norm_{layer}")(x) if self.norm else x
                x = ACTIVATIONS["gelu"](x)
        kernel = self.param("prototypes", small, (self.embedding_dim, self.prototypes))
        near = jnp.dot(
            unit(x.astype(jnp.float32)).astype(self.dtype),
            unit(kernel.T).T.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return near

    def flops(self, features: int) -> float:
        """Forward FLOPs of one example with so many features."""
        hidden = [self.hidden_dim] * (self.layers - 1)
        widths = [features, *hidden, self.embedding_dim, self.prototypes]
        return sum(2.0 * a * b for a, b in itertools.pairwise(widths))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_most(limit: float, x: jax.Array) -> jax.Array:
    """The smaller of both; beyond the limit the gradient leads back, and no further out.

    That of a plain minimum would be zero there, and what is once beyond would stay for good.
    """
    return jnp.minimum(x, limit)


def _at_most_forward(limit: float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(x, limit), x


def _at_most_backward(limit: float, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # An update goes against the gradient: a negative one leads upwards.
    return (jnp.where((x >= limit) & (gradient < 0), 0.0, gradient),)


_at_most.defvjp(_at_most_forward, _at_most_backward)


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length one; one shorter than 1e-6 becomes zero, with a zero gradient: [..., E]."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    long = ~(square <= 1e-12)  # NaN stays NaN
    return jnp.where(long, x * jax.lax.rsqrt(jnp.where(long, square, 1.0)), 0.0)
