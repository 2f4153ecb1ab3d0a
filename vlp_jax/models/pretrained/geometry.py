"""Does a model have the geometry of the weights it is to take? Keys of the config are named."""

from collections.abc import Mapping
from typing import Any

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.pretrained.files import Weights

_USUAL_HEAD = 64  # features of a head, where neither shapes nor settings tell
# Names of activations in the settings of transformers -> ours.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def expect(weights: Weights, key: str, ours: Any, theirs: Any) -> None:
    """Refuse a model whose value of a config key is another than that of the weights.

    Raises:
        ConfigError: they differ; it says what to set.
    """
    if ours != theirs:
        raise ConfigError(
            key,
            f"is {ours!r}, and the weights of {weights.file} have {theirs!r}",
            f"Set {theirs!r}",
        )


def expect_depth(weights: Weights, key: str, ours: int, theirs: int) -> None:
    """Refuse a model deeper than the weights; of more blocks the first are taken.

    Raises:
        ConfigError: the weights have fewer blocks.
    """
    if ours > theirs:
        raise ConfigError(
            key,
            f"is {ours}, and {weights.file} has {theirs} blocks",
            f"Set {theirs} or less, or fetch the file again if blocks are missing",
        )


def check_block(
    weights: Weights,
    section: str,
    block: BlockConfig,
    settings: Mapping[str, Any],
    usual_activation: str,
    usual_eps: float,
    heads_known: bool = False,
) -> tuple[str, ...]:
    """Compare what shapes do not show: heads, activation and the norms' epsilon.

    Args:
        weights: of the checkpoint.
        section: of the config, such as ``model.text``.
        block: ours.
        settings: of the checkpoint, as transformers writes them; empty where there are none.
        usual_activation: of this kind of checkpoint.
        usual_eps: likewise, of its norms.
        heads_known: whether shapes tell how many heads there are.

    Returns:
        Notes on what settings do not say and may differ.

    Raises:
        ConfigError: the settings say other heads or another activation.
    """
    notes = []
    if "num_attention_heads" in settings:
        expect(weights, f"{section}.heads", block.heads, settings["num_attention_heads"])
    elif not heads_known and block.width != block.heads * _USUAL_HEAD:
        notes.append(
            f"config.{section}.heads is {block.heads}, so that a head has "
            f"{block.width // block.heads} features; the weights do not say how many they were "
            f"trained with, most public ones with {_USUAL_HEAD}: give their folder with config.json"
        )
    if "hidden_act" in settings:
        stated = _ACTIVATIONS.get(settings["hidden_act"], settings["hidden_act"])
        expect(weights, f"{section}.activation", block.activation, stated)
    elif block.activation != usual_activation:
        notes.append(
            f"config.{section}.activation is {block.activation!r}; weights of this kind are "
            f"usually trained with {usual_activation!r}"
        )
    eps = settings.get("layer_norm_eps", usual_eps)
    if block.norm_eps != eps:
        notes.append(f"config.{section}.norm_eps is {block.norm_eps:g}; in training it was {eps:g}")
    return tuple(notes)
