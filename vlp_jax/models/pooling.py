"""One vector for the tokens of an image, or of a text that meets no image."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.masks import token_mask

Pool = Literal["class", "mean"]


def check_pool(key: str, pool: str) -> None:
    """Raise a ConfigError that names the key unless this is a ``Pool``."""
    if pool not in get_args(Pool):
        raise ConfigError(key, f"{pool!r}", f"Use one of {', '.join(get_args(Pool))}")


def pooled(tokens: jax.Array, pool: Pool, lengths: jax.Array | None = None) -> jax.Array:
    """[B, T, D] -> [B, D].

    Pretraining that never reads the first token alone leaves little of the input in it: what MAE's
    authors fine-tune is the mean (arXiv 2111.06377, appendix A.1, and their code), and after Free
    Language Modeling class tokens of different images are alike (docs/results/pcetl.md).

    Args:
        tokens: the class token of the image first, or <s> of the text.
        pool: ``class``, the first token, or ``mean``, that of the others, in float32.
        lengths: int32 [B], real tokens of each text; None: all are.
    """
    if pool == "class":
        return tokens[:, 0]
    wide = tokens[:, 1:].astype(jnp.float32)
    if lengths is None:
        mean = wide.mean(axis=1)
    else:
        real = token_mask(lengths, tokens.shape[1])[:, 1:, None]
        count = jnp.maximum(lengths - 1, 1)[:, None]  # rows that only fill a batch up have none
        mean = jnp.where(real, wide, 0.0).sum(axis=1) / count
    return mean.astype(tokens.dtype)
