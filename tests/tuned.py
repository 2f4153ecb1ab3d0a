"""Tiny models of every kind with something tuned: shared by the tests of what tuning adds."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import (
    IMAGE_SIZE,
    MASK_ID,
    TOKENS,
    VOCAB,
    VOCABULARY,
    lowered_flops,
    make_batch,
    shared_config,
    tiny_config,
    towers_config,
)

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import prompt_flops
from vlp_jax.models.masks import bidirectional_mask, two_stream_mask
from vlp_jax.models.sizes import build_model, model_config
from vlp_jax.models.tuning import PARTS, units_of
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.base import Objective

LENGTHS = [12, 9, 5, 2]
BATCH = make_batch(LENGTHS)
IDS, N = jnp.asarray(BATCH["text_ids"]), jnp.array(LENGTHS)

MODELS: dict[str, Callable[[], ConfigDict]] = {
    "two_stacks": lambda: (
        tiny_config(**{"model.text.lower_depth": 2, "model.text.upper_depth": 2}).model
    ),
    "shared": lambda: shared_config().model,
    "three_towers": lambda: towers_config(**{"text.depth": 2, "fusion.depth": 2}),
    "co_attention": lambda: towers_config(co_attention=True, **{"fusion.depth": 2}),
}
# Of the same kinds, large enough for blocks to weigh most.
SMALL = {
    "two_stacks": "small",
    "shared": "shared_small",
    "three_towers": "towers_small",
    "co_attention": "co_attention_small",
}


def small_geometry(name: str, **tuning: Any) -> ConfigDict:
    """``config.model`` of one of ``SMALL`` for images of 144 px, with few blocks."""
    config = tuned_size(SMALL[name], **tuning)
    config.dtype = "float32"
    config.image.update(depth=4, patch_size=16, stem="patch")
    config.reconstructor.depth = 2
    return config


def small_vqa(config: ConfigDict, readout: str = "bidirectional") -> Objective:
    """VQA on a model of ``small_geometry``."""
    section = ConfigDict({"vqa": {"num_classes": 8, "readout": readout}})
    [one] = build_objectives(section, build_model(config, 1000, 3, 144), VOCABULARY)
    return one


def check_formulas_of_prompts(configs: Sequence[ConfigDict], streams: tuple[str, ...]) -> None:
    """What prompts add to a model: by formula, and by the lowered module.

    Keys and values of deep ones are made once for the four examples of a batch.

    Args:
        configs: of ``small_geometry``, without and with prompts.
        streams: of the texts.
    """
    readout = "bidirectional" if streams == ("bidirectional",) else "forward"
    counted, expected = [], []
    for config in configs:
        one = small_vqa(config, readout)
        counted.append(lowered_flops(one, Bucket(48, 144)))
        expected.append(one.flops(48) + prompt_flops(one.model.config) / 4)
    assert counted[1] == pytest.approx(expected[1], rel=0.04)
    assert counted[1] - counted[0] == pytest.approx(expected[1] - expected[0], rel=0.05)


def with_tuning(config: ConfigDict, tuning: Mapping[str, Any]) -> ConfigDict:
    """A geometry with these keys of ``model.tuning``, those of its sections beneath them."""
    config = ConfigDict(config.to_dict())
    config.tuning = tuning_config()
    for key, value in tuning.items():
        config.tuning.update({key: ConfigDict(value) if isinstance(value, Mapping) else value})
    return config


def tuned_size(size: str, **tuning: Any) -> ConfigDict:
    """``config.model`` of a named size."""
    return with_tuning(model_config(size), tuning)


def geometry(name: str, **tuning: Any) -> ConfigDict:
    """``config.model`` of one of ``MODELS``."""
    return with_tuning(MODELS[name](), tuning)


def build(config: ConfigDict) -> Encoder:
    """The tiny model of a geometry."""
    return build_model(config, VOCAB, MASK_ID, IMAGE_SIZE)


def forward(streams: tuple[str, ...], model: Encoder) -> Any:
    """What texts and their images come to, in one or in two streams, and each alone."""
    pixels = normalize(jnp.asarray(BATCH["image"]))
    image = model.encode_image(pixels)
    joint = streams == ("bidirectional",)
    mask = bidirectional_mask(N, TOKENS)[:, None] if joint else two_stream_mask(N, TOKENS)
    both = model.encode_text(IDS, mask, image, streams)
    return both.last, model.image_feature(image), model.text_feature(IDS, N)


def compiled(model: Encoder, streams: tuple[str, ...] = ("bidirectional",)) -> Any:
    """``forward`` of ``{"params": ...}``."""
    return jax.jit(nn.apply(functools.partial(forward, streams), model))


def drawn(config: ConfigDict) -> Any:
    """Parameters of a model, none of them zero or one, but for switches: units are kept."""
    init = nn.init(functools.partial(forward, ("bidirectional",)), build(config))
    shapes = by_path(jax.eval_shape(init, jax.random.key(0))["params"])
    draw = np.random.default_rng(0)
    values = {p: 0.3 * draw.normal(size=x.shape).astype(np.float32) for p, x in shapes.items()}
    return nested({p: np.float32(1) if p.endswith("_kept") else x for p, x in values.items()})


def all_units(name: str) -> tuple[str, ...]:
    """Of one of ``MODELS``: its blocks, their attentions and their feed-forward parts."""
    stacks = build(MODELS[name]()).config.stacks
    return units_of([block for stack in stacks.values() for block in stack], PARTS)


def patterns(name: str) -> list[tuple[str, ...]]:
    """Nothing, everything, and random ones of all three kinds of unit."""
    units = all_units(name)
    whole = [unit for unit in units if unit.rpartition("/")[2] not in PARTS]
    found: list[tuple[str, ...]] = [(), tuple(whole)]
    for seed in range(3):
        draw = np.random.default_rng(seed)
        chosen: list[str] = []
        for block in whole:
            kind = draw.choice(["", "block", "attention", "mlp", "both"])
            names = {"block": [block], "both": [f"{block}/attention", f"{block}/mlp"], "": []}
            chosen += names.get(kind, [f"{block}/{kind}"])
        found.append(tuple(chosen))
    return found


@functools.cache
def base(name: str) -> Any:
    """Of the model without tuning."""
    return drawn(MODELS[name]())
