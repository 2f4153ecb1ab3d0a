"""The image tower by itself: what objectives and evaluators of images alone share.

The tower lies in the parameters under ``TOWER``, where the vision-language model has it, so that a
run of either kind can start from one of the other. Running statistics of a ResNet's batch norms lie
beside it under ``STATISTICS``: they are served, averaged and saved as parameters are, but replaced
by every update (``LossOutput.statistics``) where those are trained.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.data.augment import Recipe, normalize, random_view, standardize
from vlp_jax.data.batch import Batch
from vlp_jax.infra.errors import ConfigError, unknown_key
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.image_tower import ImageTowerConfig, tower_alone
from vlp_jax.models.layers import Noise
from vlp_jax.models.pooling import Pool, pooled
from vlp_jax.objectives.base import Params, Seen, example_keys, zeros

TOWER = "image_tower"
STATISTICS = "image_tower_statistics"


class Encoded(NamedTuple):
    """What a pass of the tower makes.

    Attributes:
        tokens: [B, I, D], the class token (of a ResNet: the mean) first.
        params: those that the pass was given, with renewed statistics.
    """

    tokens: jax.Array
    params: Params


def init_tower(
    model: Encoder, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Params, jax.Array]:
    """Parameters of the tower alone, and the tokens [B, I, D] that it makes of black pictures."""
    size = model.config.image.image_size
    image = jnp.zeros((len(zeros(batch_spec)["image"]), size, size, 3))
    tokens, variables = nn.init_with_output(lambda model: model.image_tower(image), model)(rng)
    params = {TOWER: variables["params"][TOWER]}
    if "batch_stats" in variables:
        params[STATISTICS] = variables["batch_stats"][TOWER]
    return params, jnp.asarray(tokens)


def tower_params(params: Params) -> Params:
    """What of a model's parameters the tower has: its own, and its statistics where it has any."""
    return {key: params[key] for key in (TOWER, STATISTICS) if key in params}


def statistics(params: Params) -> Params:
    """``LossOutput.statistics`` of parameters that a training pass has renewed."""
    return {key: params[key] for key in (STATISTICS,) if key in params}


def encode(
    config: ImageTowerConfig,
    params: Params,
    pixels: jax.Array,
    noise: Noise = None,
    seen: Seen | None = None,
    train: bool = False,
) -> Encoded:
    """One pass of the tower over pictures.

    Args:
        config: geometry of the tower.
        params: with the tower's under ``TOWER`` and ``STATISTICS``.
        pixels: normalised, floating [B, S, S, 3], at the size of what is seen.
        noise: of dropout and dropped paths, or None.
        seen: what is encoded; None: everything.
        train: batch norms read the batch, and their statistics are renewed.
    """
    variables = {"params": params[TOWER]}
    renewing = train and STATISTICS in params
    if STATISTICS in params:
        variables["batch_stats"] = params[STATISTICS]
    tokens, renewed = tower_alone(config, TOWER).apply(
        variables,
        pixels,
        noise,
        *(seen or (None, None)),
        train=train,
        mutable=["batch_stats"] if renewing else [],
    )
    if renewing:
        params = {**params, STATISTICS: jax.lax.stop_gradient(renewed["batch_stats"])}
    return Encoded(jnp.asarray(tokens), params)


def tower_tokens(
    config: ImageTowerConfig,
    params: Params,
    pixels: jax.Array,
    noise: Noise = None,
    seen: Seen | None = None,
) -> jax.Array:
    """Tokens [B, I, D] of pictures by ``encode``, outside training."""
    return encode(config, params, pixels, noise, seen).tokens


def image_features(
    config: ImageTowerConfig, params: Params, image: jax.Array, pool: Pool = "class"
) -> jax.Array:
    """What is read of a frozen tower: uint8 [B, S, S, 3] -> float32 [B, D].

    Args:
        config: of the tower.
        params: of the run.
        image: whole images.
        pool: see ``models.pooling``.
    """
    tokens = tower_tokens(config, params, normalize(image)).astype(jnp.float32)
    return pooled(tokens, pool)


def random_pixels(
    batch: Batch, rng: jax.Array, recipe: Recipe, size: int, config: ImageTowerConfig
) -> jax.Array:
    """A random view of every image, normalised: float32 [B, size, size, 3].

    Args:
        batch: with ``image`` and ``position``.
        rng: of the view; keys fold in the position.
        recipe: how it is made.
        size: of the view in pixels.
        config: of the tower, to whose own size a blur is measured.
    """
    keys = example_keys(rng, batch["position"])
    return standardize(random_view(batch["image"], keys, recipe, size, config.image_size))


def side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
    """Arrays [B, ...] of several pictures of every image as one: [B * V, ...], image by image.

    Picture after picture, their rows would have to change devices.
    """
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def size_seen(config: ImageTowerConfig, seen: Seen | None) -> int:
    """Side in pixels of what is encoded."""
    return config.image_size if seen is None else seen.view.image_size


def view_recipe(default: Recipe, section: Mapping[str, Any], key: str) -> Recipe:
    """A recipe with the keys of a section.

    Raises:
        ConfigError: a key is none of a recipe's, or its value makes no sense.
    """
    known = list(inspect.signature(Recipe).parameters)
    for name in section:
        if name not in known:
            raise unknown_key(f"{key}.{name}", known)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
    recipe = dataclasses.replace(default, **values)
    recipe.check(key)
    return recipe


def check_no_dropout(model: Encoder, name: str) -> None:
    """Raise a ConfigError where the tower has dropout, which objective ``name`` does not apply."""
    rate = model.config.image.dropout
    if rate:
        raise ConfigError(
            "model.image.dropout",
            f"{rate}: objectives.{name} has no dropout, for its views differ enough",
            "Set it to 0",
        )


def check_share(objective: Any, key: str) -> None:
    """Raise a ConfigError that names the key where its value is not in [0, 1)."""
    value = getattr(objective, key)
    if not 0.0 <= value < 1.0:
        raise ConfigError(
            f"objectives.{objective.name}.{key}", f"{value}", "Use a number in [0, 1)"
        )
