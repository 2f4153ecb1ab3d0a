"""Named sizes, and the way from a config to a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.resnet import ResNetConfig
from vlp_jax.models.shared import SharedConfig, SharedModel
from vlp_jax.models.three_towers import ThreeTowers, ThreeTowersConfig
from vlp_jax.models.tuning_config import tuned, tuning_config
from vlp_jax.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from vlp_jax.models.vit import ViTConfig

# ``model.type``; the first where there is none
TWO_STACKS, SHARED, THREE_TOWERS = "two_stacks", "shared", "three_towers"

_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # For CPUs: the demo and the tests.
    "tiny": {
        "image": {
            "width": 128,
            "heads": 4,
            "mlp_width": 512,
            "depth": 2,
            "patch_size": 4,
            "stem": "conv",
        },
        "text": {
            "width": 128,
            "heads": 4,
            "mlp_width": 512,
            "lower_depth": 2,
            "upper_depth": 2,
            "max_positions": 64,
        },
        "reconstructor": {"depth": 2},
    },
    # For one GPU and experiments of a minute.
    "mini": {
        "image": {
            "width": 256,
            "heads": 4,
            "mlp_width": 1024,
            "depth": 4,
            "patch_size": 8,
            "stem": "conv",
        },
        "text": {
            "width": 256,
            "heads": 4,
            "mlp_width": 1024,
            "lower_depth": 2,
            "upper_depth": 2,
            "max_positions": 64,
            "dropout": 0.1,
        },
        "reconstructor": {"depth": 4},
    },
    # For one GPU and experiments of minutes.
    "small": {
        "image": {
            "width": 384,
            "heads": 6,
            "mlp_width": 1536,
            "depth": 8,
            "patch_size": 8,
            "stem": "conv",
        },
        "text": {
            "width": 384,
            "heads": 6,
            "mlp_width": 1536,
            "lower_depth": 4,
            "upper_depth": 4,
            "max_positions": 64,
            "dropout": 0.1,
        },
        "reconstructor": {"depth": 8},
    },
    # The geometry of the released recipe: CLIP ViT-B/32 without its last block, RoBERTa-base cut
    # in half (FLM fact sheet, sections 1 and 3).
    "base": {
        "image": {
            "width": 768,
            "heads": 12,
            "mlp_width": 3072,
            "depth": 11,
            "patch_size": 32,
            "activation": "quick_gelu",
            "pre_norm": True,
        },
        "text": {
            "width": 768,
            "heads": 12,
            "mlp_width": 3072,
            "lower_depth": 6,
            "upper_depth": 6,
            "max_positions": 512,
            "norm": "post",
            "dropout": 0.1,
        },
        "reconstructor": {"depth": 12},
    },
}
# Convolutional towers, for objectives of images alone; text as in the size named.
_RESNETS: dict[str, tuple[dict[str, Any], str]] = {
    # For pictures of up to about 64 px.
    "resnet18": (
        {"stages": (2, 2, 2, 2), "channels": 64, "bottleneck": False, "stem": "conv3"},
        "mini",
    ),
    "resnet50": (
        {"stages": (3, 4, 6, 3), "channels": 64, "bottleneck": True, "stem": "conv7"},
        "base",
    ),
}


# One stack for both modalities (fact sheet of MoMo, section 1): heads, width, depth, patch size,
# and the depth of the reconstructor, which only FLM and its readout have.
_SHARED: dict[str, tuple[int, int, int, int, int]] = {
    "shared_tiny": (4, 128, 4, 4, 2),
    "shared_mini": (4, 256, 6, 8, 3),
    "shared_small": (6, 384, 12, 8, 6),
    "shared_base": (12, 768, 12, 16, 6),
    "shared_large": (16, 1024, 24, 16, 12),
    # That of ViLT-B/32 (arXiv 2102.03334), which reads pairs alone.
    "vilt_base": (12, 768, 12, 32, 6),
}
# Three towers: those of images and of texts are each as the shared stack named, and the fusion
# tower is so deep (FLAVA has 6 blocks beside twice 12).
_TOWERS: dict[str, tuple[str, int]] = {
    "towers_tiny": ("shared_tiny", 2),
    "towers_mini": ("shared_mini", 3),
    "towers_small": ("shared_small", 6),
    "towers_base": ("shared_base", 6),
}
# The same with a fusion tower of co-attention, so deep in each stream. METER (fact sheet of PCETL,
# section 2) has as many layers beside a ViT-B/16 of 11 blocks and 12 blocks of texts.
_CO_ATTENTION: dict[str, tuple[str, int]] = {
    "co_attention_tiny": ("shared_tiny", 2),
    "co_attention_mini": ("shared_mini", 3),
    "co_attention_small": ("shared_small", 6),
    "co_attention_base": ("shared_base", 6),
}


def model_config(size: str) -> ConfigDict:
    """The explicit geometry of a named size, to be changed key by key.

    Args:
        size: ``tiny``, ``mini``, ``small`` or ``base``; ``resnet18`` or ``resnet50``, whose image
            tower is a ResNet and serves the objectives of images alone; ``shared_tiny``,
            ``shared_mini``, ``shared_small``, ``shared_base``, ``shared_large`` or ``vilt_base``,
            whose one stack reads images and texts (``type="shared"``): there `image` is the stack,
            and `text` what texts have beside it; ``towers_tiny``, ``towers_mini``,
            ``towers_small`` or ``towers_base``, as wide, with a tower for each and one for both
            (``type="three_towers"``); or ``co_attention_tiny``, ``co_attention_mini``,
            ``co_attention_small`` or ``co_attention_base``, where that one has two streams
            (``fusion.type="co_attention"``).

    Raises:
        ValueError: the size is none of these.
    """
    if size in _RESNETS:
        image, text = _RESNETS[size]
        config = model_config(text)
        config.image = ConfigDict({"type": "resnet", **image})
        return config
    if size in _SHARED:
        return _shared_config(*_SHARED[size])
    if size in _TOWERS:
        shared, fusion = _TOWERS[size]
        return _towers_config(model_config(shared), fusion)
    if size in _CO_ATTENTION:
        shared, fusion = _CO_ATTENTION[size]
        config = _towers_config(model_config(shared), fusion)
        config.fusion.type = "co_attention"
        return config
    if size not in _SIZES:
        known = sorted([*_SIZES, *_RESNETS, *_SHARED, *_TOWERS, *_CO_ATTENTION])
        raise ValueError(f"model size {size!r} is none of {known}")
    chosen = _SIZES[size]
    block = {"norm_eps": 1e-5, "activation": "gelu", "dropout": 0.0}
    return ConfigDict(
        {
            "dtype": "bfloat16",
            "attention": "auto",
            "image": {
                **block,
                "stem": "patch",
                "pre_norm": False,
                "positions": "learned",
                "drop_path": 0.0,
                **chosen["image"],
            },
            "text": {**block, "norm": "pre", **chosen["text"]},
            "reconstructor": dict(chosen["reconstructor"]),
        }
    )


def _shared_config(
    heads: int, width: int, depth: int, patch_size: int, reconstructor: int
) -> ConfigDict:
    return ConfigDict(
        {
            "type": SHARED,
            "dtype": "bfloat16",
            "attention": "auto",
            "image": {
                "norm_eps": 1e-6,  # as of ViT and MAE, whose weights fit
                "activation": "gelu",
                "dropout": 0.0,
                "stem": "patch",
                "pre_norm": False,
                "positions": "sincos",
                "drop_path": 0.0,
                "width": width,
                "heads": heads,
                "mlp_width": 4 * width,
                "depth": depth,
                "patch_size": patch_size,
            },
            "text": {"max_positions": 512, "tied": True},
            "reconstructor": {"depth": reconstructor},
        }
    )


def _towers_config(shared: ConfigDict, fusion: int) -> ConfigDict:
    """Of a shared stack the image tower, blocks of the same kind for texts, and a fusion tower."""
    block = ("norm_eps", "activation", "dropout", "width", "heads", "mlp_width", "depth")
    of_text = {key: shared.image[key] for key in block}
    return ConfigDict(
        {
            **shared,
            "type": THREE_TOWERS,
            "text": {**of_text, **shared.text},
            "fusion": {"depth": fusion},
        }
    )


def kind_of(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Which stacks ``config.model`` describes, which image tower, and which fusion tower.

    Configs of earlier checkpoints do not say: two stacks, and a vision transformer.

    Returns:
        The last one is empty where there is no fusion tower.

    Raises:
        ConfigError: a type is unknown.
    """
    stacks = config.get("type", TWO_STACKS)
    known = (TWO_STACKS, SHARED, THREE_TOWERS)
    if stacks not in known:
        raise ConfigError("model.type", f"{stacks!r}", f"Use one of {', '.join(map(repr, known))}")
    tower = config.get("image", {}).get("type", "vit")
    towers = ("vit", "resnet") if stacks == TWO_STACKS else ("vit",)
    if tower not in towers:
        raise ConfigError("model.image.type", f"{tower!r}", f"Use {' or '.join(map(repr, towers))}")
    fusion = config.get("fusion", {}).get("type", "merged") if stacks == THREE_TOWERS else ""
    return stacks, tower, fusion


def known_keys(config: Mapping[str, Any]) -> ConfigDict:
    """A geometry of the same kind as ``config.model``: its keys are those that one may have."""
    stacks, tower, fusion = kind_of(config)
    two = {"vit": "tiny", "resnet": "resnet18"}[tower]
    known = model_config({SHARED: "shared_tiny", THREE_TOWERS: "towers_tiny"}.get(stacks, two))
    known.type, known.image.type = stacks, tower
    known.tuning = tuning_config()
    if fusion:
        known.fusion.type = fusion
    return known


def build_model(config: ConfigDict, vocab_size: int, mask_id: int, image_size: int) -> Encoder:
    """Build the module a config describes.

    Args:
        config: ``config.model``, see ``model_config``.
        vocab_size: entries of the tokenizer.
        mask_id: its mask token.
        image_size: side of the images in pixels.

    Raises:
        ValueError: the geometry does not fit; the message names the keys.
    """

    def block(section: ConfigDict) -> BlockConfig:
        shared = {f.name for f in dataclasses.fields(BlockConfig)}
        values = {key: value for key, value in section.items() if key in shared}
        return BlockConfig(**values, attention=config.attention, dtype=jnp.dtype(config.dtype))

    def vit(section: ConfigDict, modality: bool) -> ViTConfig:
        return ViTConfig(
            block=block(section),
            depth=section.depth,
            patch_size=section.patch_size,
            image_size=image_size,
            stem=section.stem,
            pre_norm=section.pre_norm,
            positions=section.get("positions", "learned"),  # earlier checkpoints do not say
            modality=modality,
        )

    def resnet(section: ConfigDict) -> ResNetConfig:
        values = {key: value for key, value in section.items() if key != "type"}
        values["stages"] = tuple(section.stages)
        return ResNetConfig(image_size, dtype=jnp.dtype(config.dtype), **values)

    common = {
        "reconstructor_depth": config.reconstructor.depth,
        "vocab_size": vocab_size,
        "max_positions": config.text.max_positions,
        "mask_id": mask_id,
    }
    stacks, tower, _ = kind_of(config)
    tuning = config.get("tuning", tuning_config())
    if stacks == SHARED:
        shared = SharedConfig(
            image=vit(config.image, modality=True), tied=config.text.tied, **common
        )
        return SharedModel(tuned(shared, tuning))
    if stacks == THREE_TOWERS:
        three = ThreeTowersConfig(
            image=vit(config.image, modality=False),
            text=block(config.text),
            text_depth=config.text.depth,
            fusion_depth=config.fusion.depth,
            tied=config.text.tied,
            fusion=config.fusion.get("type", "merged"),
            **common,
        )
        return ThreeTowers(tuned(three, tuning))
    two = VisionLanguageConfig(
        image=resnet(config.image) if tower == "resnet" else vit(config.image, modality=False),
        text=block(config.text),
        lower_depth=config.text.lower_depth,
        upper_depth=config.text.upper_depth,
        **common,
    )
    return VisionLanguageModel(tuned(two, tuning))


def parameter_table(params: Any, depth: int = 1) -> list[tuple[str, int]]:
    """Parameters of each module: [(path, count)], then their sum as ``total``.

    Args:
        params: nested dict of arrays or shapes.
        depth: how many levels of the tree get a row of their own.
    """
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(str(key.key) for key in path[:depth])
        counts[name] = counts.get(name, 0) + leaf.size
    return [*counts.items(), ("total", sum(counts.values()))]
