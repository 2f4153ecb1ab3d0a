"""A model with something to say, and the plain way to its logits: encode the whole text."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from tiny import IMAGE_SIZE

from vlp_jax.models.decoding import decode_token, empty_cache, project_image
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.masks import forward_mask


def whole_text(
    model: Encoder, ids: jax.Array, pixels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the head makes of every row of the forward stream: features, kernel, bias.

    Args:
        model: bound.
        ids: int32 [B, N], no padding.
        pixels: normalised [B, S, S, 3].
    """
    mask = forward_mask(jnp.full(len(ids), ids.shape[1]), ids.shape[1])[:, None]
    states = model.encode_text(ids, mask, model.encode_image(pixels), ("forward",))
    return model.predict_vocabulary(states.last[:, 0])


def caption_params(model: Encoder, image_size: int = IMAGE_SIZE) -> Any:
    """Parameters of the stages that captions need.

    Larger than they start, so that tokens and images tell in the logits.
    """

    gain = {"embedding": 50.0, "type_embedding": 20.0, "stream_embedding": 20.0}
    gain["decoder_kernel"] = 5.0

    def enlarged(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        sharp = 2.0 if len(path) > 1 and path[-2].key in ("query", "key") else 1.0
        return leaf * gain.get(path[-1].key, 1.0) * sharp

    def make(key: jax.Array) -> Any:
        ids, pixels = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, image_size, image_size, 3))
        params = model.init(key, ids, pixels, method=whole_text)["params"]
        return jax.tree_util.tree_map_with_path(enlarged, {"params": params})["params"]

    return jax.jit(make)(jax.random.key(0))


def whole_logits(model: Encoder, params: Any, ids: jax.Array, pixels: jax.Array) -> jax.Array:
    """Logits [B, N, V] of the token after each of ids [B, N]."""
    features, kernel, bias = nn.apply(whole_text, model)({"params": params}, ids, pixels)
    return features @ kernel + bias[None, None]


def counted_decoding(model: Encoder, rows: int, beams: int, room: int, pixels: int) -> float:
    """FLOPs of an image and a token of each of its texts, by the lowered module."""
    c = model.config
    shapes = jax.eval_shape(lambda: caption_params(model, pixels))
    image = jax.ShapeDtypeStruct((rows, c.image.tokens, c.text.width), jnp.float32)

    def token(params: Any, image: jax.Array, ids: jax.Array) -> jax.Array:
        cache = empty_cache(c, rows, beams, room)
        memory = project_image(model, params, image)
        return decode_token(model, params, ids, jnp.int32(3), cache, memory)[0]

    ids = jax.ShapeDtypeStruct((rows, beams), jnp.int32)
    return jax.jit(token).lower(shapes, image, ids).cost_analysis()["flops"] / rows
