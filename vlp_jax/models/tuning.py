"""What is added to the blocks of a pretrained model, and what is taken out of them, for a task.

Adapters, low-rank updates and prompts are the few parameters that parameter-efficient tuning
trains; skippable units are what PCETL (arXiv 2309.01479; its fact sheet, section 2) looks for
among the blocks. A unit is a whole block (``fusion_tower/text_block_03``), its attention, both
kinds of it (``.../attention``), or its feed-forward part (``.../mlp``). While they are looked for,
units are *gated*: a parameter of the block says whether it is kept or an adapter stands in its
place, so that one compiled program serves every choice. What has been chosen is *skipped*: its
parameters do not exist. Blocks may also be *pruned*: heads of their attentions and channels of
their feed-forward parts do not exist then (``transfer.structured`` chooses which).

Every model declares its blocks by ``stacks``; a block finds in ``Tuning`` what concerns it by its
path in the model.

Prompts (arXiv 2203.12119) are learned tokens. *Deep* ones are of a block: its cross-attention, or
where it has none its self-attention, reads them beside its other keys, and nothing is made of them.
*Shallow* ones are of a model: they are appended to the image tokens as these enter the blocks that
read both modalities, are there what image tokens are to every block, mask and stream, and are left
out of what comes of it. In a fusion tower of two streams the text has others, put before it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.dense import Dense

Branch = Literal["self_attention", "cross_attention", "mlp"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)
Part = Literal["block", "attention", "mlp"]  # of a block, that can be skipped
PARTS: tuple[Part, ...] = get_args(Part)
LORA_TARGETS = ("query", "key", "value")
CHANNELS = 8  # are cut in such groups, for matrix units like shapes that are multiples of it
# Paths of parameters that no pretrained model has: those that are trained, and switches.
ADDITIONS = r"(^|/)(\w+_adapter|(\w+_)?(replacement|prompt)|lora_(down|up))(/|$)"
_ADDED = re.compile(rf"{ADDITIONS}|_kept$")
# Names in a block of what goes with a part of it.
_OF_PART = {
    "block": r"(?!replacement/)",
    "attention": r"((self_attention|cross_attention|context)(_norm|_adapter)?|prompt)/",
    "mlp": r"mlp(_norm|_adapter)?/",
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Bottlenecks beside the branches of a block.

    Attributes:
        kind: ``serial`` reads what a branch has made (arXiv 1902.00751), ``parallel`` what enters
            it (arXiv 2110.04366); both are added before the residual sum.
        width: hidden features.
        scale: factor of what is added.
        norm: whether it has a layer norm on the way in.
        branches: those that have one.
    """

    kind: Literal["serial", "parallel"]
    width: int
    scale: float = 1.0
    norm: bool = False
    branches: tuple[Branch, ...] = BRANCHES

    def __post_init__(self) -> None:
        if self.kind not in ("serial", "parallel"):
            raise ValueError(
                f"model.tuning.adapter.kind={self.kind!r} is neither 'serial' nor 'parallel'"
            )
        if self.width < 1:
            raise ValueError(f"model.tuning.adapter.width={self.width} must be 1 or more")
        if not self.branches or not set(self.branches) <= set(BRANCHES):
            raise ValueError(
                f"model.tuning.adapter.branches={self.branches} are not among {BRANCHES}"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of the projections of every attention (arXiv 2106.09685).

    Attributes:
        rank: of an update.
        alpha: the update counts ``alpha / rank``.
        targets: projections that have one, of ``LORA_TARGETS``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"model.tuning.lora.rank={self.rank} must be 1 or more")
        if not self.targets or not set(self.targets) <= set(LORA_TARGETS):
            raise ValueError(f"model.tuning.lora.targets={self.targets} are not in {LORA_TARGETS}")

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Learned tokens that are read beside those of a text or an image (arXiv 2203.12119).

    Attributes:
        kind: ``deep`` (every block has its own) or ``shallow`` (the first block's pass all others).
        length: how many.
    """

    kind: Literal["shallow", "deep"]
    length: int = 200

    def __post_init__(self) -> None:
        if self.kind not in ("shallow", "deep"):
            raise ValueError(
                f"model.tuning.prompt.kind={self.kind!r} is neither 'shallow' nor 'deep', nor '' "
                "for none"
            )
        if self.length < 1:
            raise ValueError(
                f"model.tuning.prompt.length={self.length} must be 1 or more; for no prompts set "
                "model.tuning.prompt.kind=''"
            )


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What is cut out of every one of some blocks; heads keep their width.

    Attributes:
        heads: share of the heads of either attention; as many as it holds whole ones of.
        mlp: share of the channels of the feed-forward part; as many as it holds whole eights of,
            or whole ones where their number is no multiple of ``CHANNELS``.
        blocks: paths of these blocks.
    """

    heads: float
    mlp: float
    blocks: tuple[str, ...]

    def __post_init__(self) -> None:
        for key in ("heads", "mlp"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(
                    f"model.tuning.prune.{key}={getattr(self, key)} is no share from 0 to below 1"
                )


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Of all blocks of a model.

    Attributes:
        adapter: beside the branches of the blocks that are ``placed``.
        lora: in their attentions.
        prompt: what their attentions read; shallow ones pass all blocks that read both modalities.
        placed: paths of blocks.
        skipped: units that do not exist.
        gated: units that a parameter switches.
        replacement: width of the adapter in the place of a branch; 0: none.
        prune: what is cut out of blocks.
        prefix: of these paths in the model, where they are those of a module of it.
    """

    adapter: AdapterConfig | None = None
    lora: LoraConfig | None = None
    prompt: PromptConfig | None = None
    placed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    replacement: int = 0
    prune: PruneConfig | None = None
    prefix: str = ""

    @property
    def serial(self) -> bool:
        """Whether adapters read what their branch has made."""
        return self.adapter is not None and self.adapter.kind == "serial"

    def adapter_at(self, block: str, branch: str) -> AdapterConfig | None:
        """The adapter of a branch of a block."""
        has = self.adapter is not None and block in self.placed and branch in self.adapter.branches
        return self.adapter if has else None

    def lora_at(self, block: str) -> LoraConfig | None:
        """The low-rank updates in a block."""
        return self.lora if block in self.placed else None

    @property
    def shallow_prompts(self) -> int:
        """Tokens that are appended to the image's where texts read it; 0: none."""
        return self.prompt.length if self.prompt and self.prompt.kind == "shallow" else 0

    def prompts_at(self, block: str) -> int:
        """Tokens of its own that the attention of a block reads; 0: none, as if it is skipped."""
        if self.prompt is None or self.prompt.kind != "deep" or block not in self.placed:
            return 0
        gone = {block, unit_name(block, "attention")} & {*self.skipped}
        return 0 if gone else self.prompt.length

    def heads_at(self, block: str, heads: int) -> int:
        """Heads that either attention of a block has, of so many of a whole one."""
        prune = self.prune
        return heads if prune is None or block not in prune.blocks else _left(heads, prune.heads)

    def channels_at(self, block: str, channels: int) -> int:
        """Hidden channels that a block's feed-forward part has, of so many of a whole one."""
        prune = self.prune
        if prune is None or block not in prune.blocks:
            return channels
        return _left(channels, prune.mlp, 1 if channels % CHANNELS else CHANNELS)

    def within(self, module: str) -> "Tuning":
        """The same of the blocks inside a module, by their paths in it."""

        start = f"{module}/"

        def inside(paths: Sequence[str]) -> tuple[str, ...]:
            return tuple(path.removeprefix(start) for path in paths if path.startswith(start))

        prune = self.prune and dataclasses.replace(self.prune, blocks=inside(self.prune.blocks))
        return dataclasses.replace(
            self,
            placed=inside(self.placed),
            skipped=inside(self.skipped),
            gated=inside(self.gated),
            prune=prune,
            prefix=start,
        )

    def replacement_at(self, part: Part, attentions: int) -> int:
        """Width of the adapter in the place of a part of a block, of all its branches; 0: none.

        Args:
            part: of the block.
            attentions: 0 to 2, of the block.
        """
        branches = {"block": attentions + 1, "attention": attentions, "mlp": 1}[part]
        return self.replacement * branches


def _left(count: int, share: float, group: int = 1) -> int:
    """What is left of a count of which a share is cut away in whole groups."""
    # Shares such as 0.7 are a little less than what is meant.
    return count - group * math.floor(share * count / group + 1e-9)


def stack_of(name: str, depth: int) -> tuple[str, ...]:
    """Paths of the blocks of a stack whose layers have two digits."""
    return tuple(f"{name}_{layer:02d}" for layer in range(depth))


def unit_name(block: str, part: Part) -> str:
    """The name of a part of a block."""
    return block if part == "block" else f"{block}/{part}"


def units_of(blocks: Sequence[str], parts: Sequence[Part] = ("block",)) -> tuple[str, ...]:
    """The skippable units of blocks, block by block."""
    return tuple(unit_name(block, part) for block in blocks for part in parts)


def is_added(path: str) -> bool:
    """Whether a parameter is one of tuning, which no pretrained model has."""
    return _ADDED.search(path) is not None


def split_unit(unit: str) -> tuple[str, Part]:
    """The block of a unit, and which part of it; see ``unit_name``."""
    for part in PARTS:
        if part != "block" and unit.endswith(f"/{part}"):
            return unit.removesuffix(f"/{part}"), part
    return unit, "block"


def kept_name(part: Part) -> str:
    """The switch of a part, in its block."""
    return f"{part}_kept"


def replacement_name(part: Part) -> str:
    """The adapter in the place of a part, in its block."""
    return "replacement" if part == "block" else f"{part}_replacement"


def is_skipped(path: str, skipped: Sequence[str]) -> bool:
    """Whether a parameter belongs to a unit that is skipped, and not to what replaces that."""
    for unit in skipped:
        block, part = split_unit(unit)
        inside = path.removeprefix(f"{block}/")
        if inside != path and re.match(_OF_PART[part], inside):
            return True
    return False


def check_units(
    units: Sequence[str], stacks: Mapping[str, Sequence[str]], key: str
) -> tuple[str, ...]:
    """Refuse units that a model does not have.

    Args:
        units: names.
        stacks: blocks of the model, see ``Encoder``.
        key: of the config, for the message.

    Returns:
        The units.

    Raises:
        ConfigError: the message names the unit and what there is.
    """
    blocks = [block for stack in stacks.values() for block in stack]
    known = set(units_of(blocks, PARTS))
    for unit in units:
        if unit not in known:
            raise ConfigError(
                key,
                f"{unit!r} is no unit of this model",
                f"Its blocks are {', '.join(blocks)}: each whole, or its BLOCK/attention, or "
                "BLOCK/mlp",
            )
    return tuple(units)


def check_apart(units: Sequence[str], key: str) -> None:
    """Refuse units that are named twice, or beside their whole block.

    Raises:
        ConfigError: the message names the unit.
    """
    for unit in units:
        block, part = split_unit(unit)
        if units.count(unit) > 1 or (part != "block" and block in units):
            raise ConfigError(
                key, f"{unit!r} is named twice, or beside its whole block", "Leave one out"
            )


class Adapter(nn.Module):
    """Down, ReLU, up: [..., D] -> [..., D]; a fresh one gives zeros, so that nothing is changed.

    Attributes:
        width: hidden features.
        features: D.
        dtype: compute dtype.
        norm_eps: of the layer norm on the way in; None: there is none.
        scale: factor of the output.
    """

    width: int
    features: int
    dtype: jnp.dtype
    norm_eps: float | None = None
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to every token."""
        if self.norm_eps is not None:
            x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        small, zeros = nn.initializers.normal(0.02), nn.initializers.zeros_init()
        x = Dense(self.width, dtype=self.dtype, kernel_init=small, name="down")(x)
        x = Dense(self.features, dtype=self.dtype, kernel_init=zeros, name="up")(nn.relu(x))
        return x if self.scale == 1.0 else self.scale * x


class Prompt(nn.Module):
    """Learned tokens of a block, or of a model: [length, D].

    They start uniform within sqrt(3 / D), with a variance of 1 / D. For patches of as many pixels
    as features that is the bound of VPT, sqrt(6 / (3 p^2 + D)), which the baselines of PCETL take
    over for METER and ViLT (code of APT, arXiv 2306.15706): there p = 16 and D = 768.

    Attributes:
        length: how many.
        features: D.
        dtype: compute dtype.
    """

    length: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        """The tokens, in the compute dtype."""
        bound = math.sqrt(3.0 / self.features)

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        return self.param("tokens", uniform, (self.length, self.features)).astype(self.dtype)
