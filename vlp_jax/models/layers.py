"""Building blocks of every transformer of the project.

Parameters are float32; ``dtype`` is the compute dtype. Layer norms and softmax run in float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Self, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from vlp_jax.models.attention import (
    Implementation,
    attention,
    attention_over_memory,
    attention_weights,
    real_keys,
)
from vlp_jax.models.dense import Dense, DenseGeneral, HeadProjection
from vlp_jax.models.dropout import dropout
from vlp_jax.models.tuning import LoraConfig, Tuning


def quick_gelu(x: jax.Array) -> jax.Array:
    """The activation of the CLIP towers: x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x times the normal distribution function (arXiv 1606.08415).

    By the error function. JAX's own takes the complement of it, several times the arithmetic, to be
    exact in the far tail as well: there this one is off by 3e-8 x (docs/perf.md).
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


# Computed again for the gradient: a few operations, while to keep what they come to would write two
# more arrays as wide as the widest of a block, and read them later (docs/perf.md).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.checkpoint(gelu),
    "gelu_tanh": jax.checkpoint(lambda x: jax.nn.gelu(x, approximate=True)),
    "quick_gelu": jax.checkpoint(quick_gelu),
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What the blocks of one stack share.

    Attributes:
        width: D, features of a token.
        heads: H; each head has D / H features.
        mlp_width: hidden features of the feed-forward part.
        norm: ``pre`` (norm on the way into a branch) or ``post`` (after the residual sum).
        norm_eps: added to the variance.
        activation: key of ``ACTIVATIONS``.
        dropout: rate on attention weights and on the output of every branch.
        drop_path: probability that a branch is left out for an example (stochastic depth, arXiv
            1603.09382); those that stay weigh more.
        attention: implementation asked of ``attention``.
        dtype: compute dtype.
        tuning: what is added to blocks and taken out of them; each knows itself by its path.
    """

    width: int
    heads: int
    mlp_width: int
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    dropout: float = 0.0
    drop_path: float = 0.0
    attention: Implementation = "auto"
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype("float32"))
    tuning: Tuning = dataclasses.field(default_factory=Tuning)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {sorted(ACTIVATIONS)}")
        if self.attention not in get_args(Implementation):
            raise ValueError(
                f"model.attention={self.attention!r} is none of {get_args(Implementation)}"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path {self.drop_path} is no probability below 1")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm {self.norm!r} is neither 'pre' nor 'post'")

    @property
    def head_width(self) -> int:
        """Features of a head, however many of them a block has left."""
        return self.width // self.heads


Noise = jax.Array | None  # uint32 [2] of ``models.dropout``; None: no dropout


def site(module: nn.Module, name: str) -> str:
    """The name of a place in the model, from the module's path."""
    return "/".join((*module.path, name))


def drop(module: nn.Module, name: str, x: jax.Array, rate: float, noise: Noise) -> jax.Array:
    """Dropout at a named place of a module; the identity without noise."""
    return x if noise is None else dropout(x, rate, noise, site(module, name))


def row_major(x: jax.Array) -> jax.Array:
    """Keep the last dimension contiguous on a GPU.

    Left alone, XLA carries the layout that a small attention product likes into the residual
    stream, and transposes around every wide product instead (docs/perf.md).
    """
    if jax.default_backend() != "gpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


class KeyValue(NamedTuple):
    """What attention reads of a run of tokens, projected once and read by many queries.

    Attributes:
        key: [..., K, H, d].
        value: [..., K, H, d].
    """

    key: jax.Array
    value: jax.Array


class Memory(NamedTuple):
    """Keys and values to be read by one query after another, such as the tokens of a growing text.

    Reading them is all the work then, so they lie head by head, each head's in one piece
    (docs/perf.md).

    Attributes:
        key: [..., H, K, d].
        value: [..., H, K, d].
    """

    key: jax.Array
    value: jax.Array

    @classmethod
    def of(cls, context: KeyValue) -> Self:
        """The memory of a context."""
        return cls(*(jnp.swapaxes(part, -3, -2) for part in context))

    def write(self, new: KeyValue, position: jax.Array) -> "Memory":
        """Put tokens in the place of those from ``position`` on.

        Args:
            new: [..., N, H, d], N tokens.
            position: int32 [], place of the first one.
        """
        return Memory(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, part, position, axis=-2)
                for old, part in zip(self, Memory.of(new), strict=True)
            )
        )


class Attention(nn.Module):
    """Multi-head attention of queries over a context, or of tokens over each other.

    Attributes:
        config: of the stack.
        heads: how many there are, each of ``config.head_width``.
        lora: low-rank updates of its projections; None: none.
    """

    config: BlockConfig
    heads: int
    lora: LoraConfig | None = None

    def setup(self) -> None:
        """Name the four projections."""
        c = self.config
        self.query = self._projection("query")
        self.key = self._projection("key")
        self.value = self._projection("value")
        self.out = DenseGeneral(c.width, axis=(-2, -1), dtype=c.dtype)

    def _projection(self, name: str) -> HeadProjection:
        c, lora = self.config, self.lora
        heads = (self.heads, c.head_width)
        if lora is None or name not in lora.targets:
            return HeadProjection(heads, c.dtype)
        return HeadProjection(heads, c.dtype, lora.rank, lora.scale)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None,
        mask: jax.Array | None,
        noise: Noise,
        tokens: int | jax.Array | None = None,
    ) -> jax.Array:
        """Attend.

        Where the collection ``intermediates`` is mutable, the attention weights are sown there as
        ``weights`` [..., H, Q, K], for evaluators that show them.

        Args:
            x: queries [..., Q, D].
            context: [..., K, D] with the leading dimensions of ``x``; None: self-attention.
            mask: bool [..., Q, K] or None.
            noise: of the dropout on attention weights, or None.
            tokens: real ones of what is attended to, see ``attention``; None: all.

        Returns:
            [..., Q, D].
        """
        query = self.query(x)
        read = self.project(x if context is None else context)
        return self._attend(query, read, mask, noise, tokens)

    def project(self, context: jax.Array) -> KeyValue:
        """Keys and values of a context: [..., K, D] -> [..., K, H, d] each."""
        return KeyValue(self.key(context), self.value(context))

    def read(
        self,
        x: jax.Array,
        context: KeyValue,
        mask: jax.Array | None,
        noise: Noise,
        tokens: int | jax.Array | None = None,
    ) -> jax.Array:
        """Attend to a context that was projected before.

        Args:
            x: queries [..., Q, D].
            context: of ``project``, with the leading dimensions of ``x``.
            mask: bool [..., Q, K] or None.
            noise: of the dropout on attention weights, or None.
            tokens: real ones of the context, see ``attention``; None: all.

        Returns:
            [..., Q, D].
        """
        return self._attend(self.query(x), context, mask, noise, tokens)

    def recall(
        self,
        x: jax.Array,
        memory: Memory,
        mask: jax.Array | None = None,
        beside: Memory | None = None,
    ) -> jax.Array:
        """Attend to a memory, without dropout.

        Args:
            x: queries [..., Q, D]; [B, S, Q, D] with ``beside``.
            memory: with the leading dimensions of ``x``.
            mask: bool [..., Q, K] or None.
            beside: another, [B, H, I, d], which all queries of an example see.

        Returns:
            [..., Q, D].
        """
        return self.out(attention_over_memory(self.query(x), *memory, mask, beside))

    def _attend(
        self,
        query: jax.Array,
        context: KeyValue,
        mask: jax.Array | None,
        noise: Noise,
        tokens: int | jax.Array | None = None,
    ) -> jax.Array:
        c = self.config
        if self.is_mutable_collection("intermediates"):
            keys, seen = context.key, mask
            if isinstance(tokens, jax.Array):
                seen = real_keys(tokens, keys.shape[-3])
            else:
                keys = keys[..., :tokens, :, :]
            self.sow("intermediates", "weights", attention_weights(query, keys, seen))
        out = attention(
            query,
            context.key,
            context.value,
            mask,
            dropout_rate=0.0 if noise is None else c.dropout,
            dropout_noise=noise,
            site=site(self, "weights"),
            implementation=c.attention,
            tokens=tokens,
        )
        return self.out(out)


class Mlp(nn.Module):
    """Two dense layers with an activation between them: [..., D] -> [..., D].

    Attributes:
        config: of the stack.
        channels: between the two.
    """

    config: BlockConfig
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to every token."""
        c = self.config
        x = Dense(self.channels, dtype=c.dtype, name="in")(x)
        x = ACTIVATIONS[c.activation](x)
        return Dense(c.width, dtype=c.dtype, name="out")(x)


def norm(config: BlockConfig, name: str | None = None) -> nn.LayerNorm:
    """The layer norm of a stack; statistics in float32."""
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=config.dtype, name=name)
