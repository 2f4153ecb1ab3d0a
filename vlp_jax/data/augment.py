"""What happens to pixels on the device, inside the compiled step."""

import jax
import jax.numpy as jnp

# Mean and standard deviation of each colour channel in [0, 1], as in the CLIP towers.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(image: jax.Array) -> jax.Array:
    """Pixels to about zero mean and unit variance: uint8 [B, H, W, 3] -> float32 [B, H, W, 3]."""
    scale = 1.0 / (255.0 * jnp.asarray(PIXEL_STD))
    offset = jnp.asarray(PIXEL_MEAN) / jnp.asarray(PIXEL_STD)
    return image.astype(jnp.float32) * scale[None, None, None] - offset[None, None, None]
