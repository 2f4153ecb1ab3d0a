"""Dense layers whose products, gradients and biases XLA runs fast (docs/perf.md).

Their kernels may be stored in eight bits with a float32 ``scale`` beside them, for inference
(``transfer.quantize``); the layers multiply the two where they read them.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import default_kernel_init

SCALE = "scale"  # beside a kernel in eight bits

DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


def dense_product(
    x: jax.Array, kernel: jax.Array, dimension_numbers: DimensionNumbers, precision: Any = None
) -> jax.Array:
    """The product of a dense layer, for the ``dot_general`` of flax's layers.

    Its rule for the gradient of the kernel yields that gradient in the kernel's own layout. JAX's
    rule yields the transpose, which XLA undoes inside the optimiser's update at a quarter of its
    speed: 8 of 128 ms of an update of the base model (docs/perf.md).

    Args:
        x: [..., in...].
        kernel: [in..., out...].
        dimension_numbers: the last dimensions of ``x`` against the first of ``kernel``, no batch.
        precision: of the products.

    Returns:
        [..., out...].
    """
    (contracted, against), batched = dimension_numbers
    count = len(contracted)
    expected = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
    if (tuple(contracted), tuple(against)) != expected or any(batched):
        raise ValueError(f"not the product of a dense layer: {dimension_numbers}")
    return _dense_product(x, kernel, count, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_product(x: jax.Array, kernel: jax.Array, count: int, precision: Any) -> jax.Array:
    last, first = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
    return jax.lax.dot_general(x, kernel, ((last, first), ((), ())), precision=precision)


def _dense_product_forward(
    x: jax.Array, kernel: jax.Array, count: int, precision: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense_product(x, kernel, count, precision), (x, kernel)


def _dense_product_backward(
    count: int, precision: Any, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    rows = tuple(range(x.ndim - count))
    out_of_cotangent = tuple(range(len(rows), cotangent.ndim))
    out_of_kernel = tuple(range(count, kernel.ndim))
    dot = functools.partial(jax.lax.dot_general, precision=precision)
    return (
        dot(cotangent, kernel, ((out_of_cotangent, out_of_kernel), ((), ()))),
        dot(x, cotangent, ((rows, rows), ((), ()))),
    )


_dense_product.defvjp(_dense_product_forward, _dense_product_backward)


def read_kernel(module: nn.Module, kernel: jax.Array) -> jax.Array:
    """The kernel of a dense layer; of one in eight bits what it stands for, float32."""
    scale: jax.Array | None = module.get_variable("params", SCALE)
    return kernel if scale is None else scaled_kernel(kernel, scale)


def scaled_kernel(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """What a kernel in eight bits stands for: int8 [...], float32 that broadcasts -> float32."""
    return kernel.astype(jnp.float32) * scale


class Dense(nn.Dense):
    """As in flax, by ``dense_product``; its kernel may be in eight bits."""

    dot_general: Any = dense_product

    @nn.nowrap
    def param(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """As in flax."""
        value = super().param(name, *arguments, **keywords)
        return read_kernel(self, value) if name == "kernel" else value


class DenseGeneral(nn.DenseGeneral):
    """As in flax, by ``dense_product``; its kernel may be in eight bits."""

    dot_general: Any = dense_product

    @nn.nowrap
    def param(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """As in flax."""
        value = super().param(name, *arguments, **keywords)
        return read_kernel(self, value) if name == "kernel" else value


class HeadProjection(nn.Module):
    """A dense layer to heads: [..., D] -> [..., H, d]; parameters as ``nn.DenseGeneral`` has them.

    The bias is added before the heads are told apart, where XLA leaves it to the matrix product;
    after that it would be a pass of its own over memory (docs/perf.md).

    Attributes:
        heads: H and d.
        dtype: compute dtype.
        lora_rank: of a low-rank update of the kernel; 0: there is none.
        lora_scale: factor of it.
    """

    heads: tuple[int, int]
    dtype: jnp.dtype
    lora_rank: int = 0
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Project every token."""
        width, flat = x.shape[-1], math.prod(self.heads)

        def kernel_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return default_kernel_init(key, (width, flat)).reshape(shape)

        kernel = read_kernel(self, self.param("kernel", kernel_init, (width, *self.heads)))
        bias = self.param("bias", nn.initializers.zeros_init(), self.heads)
        dimensions = (((x.ndim - 1,), (0,)), ((), ()))
        kernel = kernel.reshape(width, flat).astype(self.dtype)
        entering = x.astype(self.dtype)
        x = dense_product(entering, kernel, dimensions)
        if self.lora_rank:
            # Not added to the kernel, whose whole gradient would have to be computed then.
            down = self.param("lora_down", default_kernel_init, (width, self.lora_rank))
            up = self.param("lora_up", nn.initializers.zeros_init(), (self.lora_rank, flat))
            low = dense_product(entering, down.astype(self.dtype), dimensions)
            x = x + self.lora_scale * dense_product(low, up.astype(self.dtype), dimensions)
        x = x + bias.reshape((1,) * (x.ndim - 1) + (flat,)).astype(self.dtype)
        return x.reshape(*x.shape[:-1], *self.heads)
