"""From the section ``config.model.tuning`` to what a model's blocks find of it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import EncoderConfig
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.shared import SharedConfig
from vlp_jax.models.three_towers import ThreeTowersConfig
from vlp_jax.models.tuning import (
    BRANCHES,
    CHANNELS,
    AdapterConfig,
    LoraConfig,
    PromptConfig,
    PruneConfig,
    Tuning,
    check_apart,
    check_units,
    split_unit,
    units_of,
)
from vlp_jax.models.vision_language import VisionLanguageConfig
from vlp_jax.models.vit import ViTConfig

FUSION, ALL = "fusion", "all"  # words for blocks, beside patterns

_Model = TypeVar("_Model", SharedConfig, ThreeTowersConfig, VisionLanguageConfig)


def tuning_config() -> ConfigDict:
    """The section in which nothing is tuned; see ``models.tuning``.

    Its keys: ``adapter`` (``kind``, empty: none; ``width``, 0: an eighth of the model's; ``scale``;
    ``norm``; ``branches``), ``lora`` (``rank``, 0: none; ``alpha``, 0: the rank; ``targets``),
    ``prompt`` (``kind``, empty: none, ``shallow`` or ``deep``; ``length``), ``blocks`` that have
    them (``fusion``, ``all``, or a regular expression of their paths), ``skip`` (units that do not
    exist), ``gated`` (units that are switched while a search looks for those to skip; ``fusion``,
    ``fusion/attention``, ``all/mlp``, ``image_tower``, ``text_upper/mlp`` and the like, of any
    stack, stand for those of all their blocks),
    ``replacement`` (width of the adapter in the place of each branch that is skipped; -1: that of
    the adapters of branches that are not), and ``prune``: the share of ``heads`` and of channels
    (``mlp``) that its ``blocks`` do without (empty: those above), of which
    ``tools.prune_weights`` chooses the least important.
    """
    return ConfigDict(
        {
            "adapter": {"kind": "", "width": 0, "scale": 1.0, "norm": False, "branches": BRANCHES},
            "lora": {"rank": 0, "alpha": 0.0, "targets": ("query", "value")},
            "prompt": {"kind": "", "length": 200},
            "blocks": FUSION,
            "skip": (),
            "gated": (),
            "replacement": -1,
            "prune": {"heads": 0.0, "mlp": 0.0, "blocks": ""},
        }
    )


def blocks_among(config: EncoderConfig, chosen: str, key: str) -> tuple[str, ...]:
    """Paths of the blocks that a word or a pattern chooses.

    Args:
        config: geometry.
        chosen: ``fusion``, ``all``, or a regular expression that the whole path matches.
        key: of the config, for messages.

    Raises:
        ConfigError: it matches no block, or is no regular expression.
    """
    stacks = config.stacks
    names = config.fusion_stacks if chosen == FUSION else tuple(stacks)
    blocks = tuple(block for name in names for block in stacks[name])
    if chosen in (FUSION, ALL):
        return blocks
    try:
        found = tuple(block for block in blocks if re.fullmatch(chosen, block))
    except re.error as error:
        raise ConfigError(key, f"{chosen!r} ({error})", "Mend the pattern") from error
    if not found:
        raise ConfigError(
            key,
            f"{chosen!r} matches no block of the model",
            f"Use {FUSION!r}, {ALL!r}, or match some of {', '.join(blocks)}",
        )
    return found


def units_among(config: EncoderConfig, named: Sequence[str], key: str) -> tuple[str, ...]:
    """The units of a model that are named one by one, or by a word or stack that they are in.

    Args:
        config: geometry.
        named: units, or ``fusion``, ``all`` or a stack with or without a part: ``fusion/mlp``.
        key: of the config, for messages.

    Raises:
        ConfigError: the model has no such unit.
    """
    found: list[str] = []
    for name in named:
        word, part = split_unit(name)
        if word in config.stacks:
            found += units_of(config.stacks[word], (part,))
        elif word in (FUSION, ALL):
            found += units_of(blocks_among(config, word, key), (part,))
        else:
            found.append(name)
    return check_units(tuple(dict.fromkeys(found)), config.stacks, key)


def tuned(config: _Model, section: ConfigDict) -> _Model:
    """A geometry whose blocks find in theirs what the section says.

    Args:
        config: of the model as it was pretrained.
        section: ``config.model.tuning``.

    Raises:
        ConfigError, ValueError: a value cannot be used; the message names the key.
    """
    tuning = _tuning(config, section)
    image = config.image
    if isinstance(image, ViTConfig):
        block = dataclasses.replace(image.block, tuning=tuning)
        config = dataclasses.replace(config, image=dataclasses.replace(image, block=block))
    if isinstance(config, SharedConfig):  # whose blocks are those of the image tower
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tuning=tuning))


def _tuning(config: EncoderConfig, section: ConfigDict) -> Tuning:
    section = ConfigDict({**tuning_config(), **section})  # earlier checkpoints do not say all of it
    adapter, lora = None, None
    if section.adapter.kind:
        adapter = AdapterConfig(
            section.adapter.kind,
            section.adapter.width or max(1, config.text.width // 8),
            section.adapter.scale,
            section.adapter.norm,
            tuple(section.adapter.branches),
        )
    if section.lora.rank:
        alpha = section.lora.alpha or float(section.lora.rank)
        lora = LoraConfig(section.lora.rank, alpha, tuple(section.lora.targets))
    prompt = None
    if section.prompt.kind:
        prompt = PromptConfig(section.prompt.kind, section.prompt.length)
    placed = blocks_among(config, section.blocks, "model.tuning.blocks")
    if prompt and prompt.kind == "shallow":
        passed = {block for stack in config.fusion_stacks for block in config.stacks[stack]}
        if not passed <= {*placed}:
            raise ConfigError(
                "model.tuning.blocks",
                f"{section.blocks!r} leaves out some that shallow prompts pass, which are all that "
                "read both modalities",
                f"Use {FUSION!r} or {ALL!r}, or model.tuning.prompt.kind='deep'",
            )
    skipped = check_units(section.skip, config.stacks, "model.tuning.skip")
    check_apart(skipped, "model.tuning.skip")
    gated = units_among(config, section.gated, "model.tuning.gated")
    both = sorted({*skipped} & {*gated})
    if both:
        raise ConfigError("model.tuning.gated", f"{', '.join(both)} are skipped", "Gate others")
    replacement = section.replacement
    if replacement < 0:
        replacement = adapter.width if adapter else 0
    return Tuning(
        adapter=adapter,
        lora=lora,
        prompt=prompt,
        placed=placed,
        skipped=skipped,
        gated=gated,
        replacement=replacement,
        prune=_prune(config, section),
    )


def _prune(config: EncoderConfig, section: ConfigDict) -> PruneConfig | None:
    prune = section.prune
    key = "model.tuning.prune.blocks" if prune.blocks else "model.tuning.blocks"
    blocks = blocks_among(config, pruned_blocks(section), key)
    cut = PruneConfig(prune.heads, prune.mlp, blocks)
    if not cut.heads and not cut.mlp:
        return None
    tuning = Tuning(prune=cut)
    for path in blocks:
        block = block_config(config, path)
        left = {
            "heads": (block.heads, tuning.heads_at(path, block.heads)),
            "mlp": (block.mlp_width, tuning.channels_at(path, block.mlp_width)),
        }
        for name, (there, kept) in left.items():
            if prune[name] and kept == there:
                raise ConfigError(
                    f"model.tuning.prune.{name}",
                    f"{prune[name]} of the {there} of {path} is less than the least that is cut "
                    "at once",
                    f"Use more (heads go one by one, channels of mlp by {CHANNELS}), or 0",
                )
    return cut


def pruned_blocks(section: Mapping[str, Any]) -> str:
    """The word or pattern of the blocks that ``config.model.tuning`` prunes."""
    return str(section.get("prune", {}).get("blocks") or section["blocks"])


def block_config(config: EncoderConfig, block: str) -> BlockConfig:
    """What the stack of a block shares.

    Args:
        config: geometry.
        block: a path among its stacks.
    """
    if isinstance(config.image, ViTConfig) and block in config.image.blocks:
        return config.image.block
    return config.text
