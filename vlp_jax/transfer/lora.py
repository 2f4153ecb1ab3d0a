"""Low-rank updates put into the weights, so that inference costs what it did before."""

from typing import Any

import jax.numpy as jnp

from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.tuning import LoraConfig


def merge_lora(params: Any, lora: LoraConfig) -> dict[str, Any]:
    """The parameters of the model without low-rank updates that computes the same.

    Args:
        params: float32 tree with ``lora_down`` [D, r] and ``lora_up`` [r, H * d] beside a kernel
            [D, H, d].
        lora: what the model was built with.

    Raises:
        ValueError: there are no low-rank updates.
    """
    leaves = by_path(params)
    places = [path.removesuffix("lora_down") for path in leaves if path.endswith("/lora_down")]
    if not places:
        raise ValueError("there are no low-rank updates to merge: nothing is named lora_down")
    for place in places:
        kernel = leaves[f"{place}kernel"]
        low = jnp.dot(
            leaves.pop(f"{place}lora_down"), leaves.pop(f"{place}lora_up"), precision="highest"
        )
        leaves[f"{place}kernel"] = kernel + lora.scale * low.reshape(kernel.shape)
    return nested(leaves)
