"""The image tower a config describes: a vision transformer or a residual network."""

import dataclasses

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.resnet import ResNet, ResNetConfig
from vlp_jax.models.vit import ViT, ViTConfig

# Both have ``image_size``, ``patch_size``, ``width``, ``dtype``, ``dropout``, ``drop_path``,
# ``view``, ``tokens`` and ``check_view``; what is of a transformer alone asks for a ``ViTConfig``.
ImageTowerConfig = ViTConfig | ResNetConfig


def image_tower(config: ImageTowerConfig) -> ViT | ResNet:
    """The module, which takes an image, noise, a view, keys and whether it trains."""
    return ResNet(config) if isinstance(config, ResNetConfig) else ViT(config)


def tower_alone(config: ImageTowerConfig, name: str) -> ViT | ResNet:
    """The module by itself, whose blocks find by shorter paths what tuning says of them.

    Args:
        config: of a model.
        name: of the tower there.
    """
    if isinstance(config, ViTConfig):
        block = dataclasses.replace(config.block, tuning=config.block.tuning.within(name))
        config = dataclasses.replace(config, block=block)
    return image_tower(config)


def as_vit(config: ImageTowerConfig, reader: str) -> ViTConfig:
    """The geometry of a vision transformer, for what works on no other tower.

    Args:
        config: of the tower.
        reader: what needs it, for the message.

    Raises:
        ConfigError: the tower is a ResNet.
    """
    if isinstance(config, ResNetConfig):
        raise ConfigError(
            "model.image.type",
            f"a ResNet, but {reader} needs a vision transformer",
            "Use a size of model that has one",
        )
    return config
