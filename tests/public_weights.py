"""Goldens of public checkpoints, the config that takes them, and their other public namings."""

import importlib.util
import pathlib
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.data.augment import PIXEL_MEAN, PIXEL_STD
from vlp_jax.models.pretrained import Pixels
from vlp_jax.models.sizes import build_model
from vlp_jax.models.vision_language import VisionLanguageModel, two_stacks
from vlp_jax.train.config import default_config

FOLDER = pathlib.Path(__file__).resolve().parent / "goldens" / "weights"
FED = Pixels(PIXEL_MEAN, PIXEL_STD)
VOCAB = 60
SPECIALS = {
    "roberta": {"bos": 0, "pad": 1, "eos": 2},
    "bert": {"bos": 1, "pad": 0, "eos": 2},
}
_IMAGE = {
    "clip": {"activation": "quick_gelu", "pre_norm": True},
    "vit": {"norm_eps": 1e-6},
    "mae": {"norm_eps": 1e-6},
}
_NORM_EPS = {"roberta": 1e-5, "bert": 1e-12}

Arrays = dict[str, np.ndarray]


def config_for(image: str = "clip", text: str = "roberta", **overrides: Any) -> ConfigDict:
    """The config of a run that starts from the golden checkpoints.

    Args:
        image: family of the image tower.
        text: family of the text stack.
        overrides: values by dotted key.
    """
    config = default_config("tiny")
    block = {"width": 16, "heads": 2, "mlp_width": 24}
    config.model.dtype = "float32"
    config.model.image.update(**block, depth=2, patch_size=4, stem="patch", **_IMAGE[image])
    config.model.text.update(
        **block, norm="post", norm_eps=_NORM_EPS[text], max_positions=16, dropout=0.0
    )
    config.data.image_size = 16
    config.data.batch_size = 8
    config.tokenizer.vocab_size = VOCAB
    with config.unlocked():
        config.objectives.flm = {"weight": 1.0, "corruption_rate": 0.0}
    config.update_from_flattened_dict(overrides)
    return config


def model_for(config: ConfigDict) -> VisionLanguageModel:
    """The model of a config, for the vocabulary of the goldens."""
    model = build_model(config.model, VOCAB, 3, config.data.image_size)
    return two_stacks(model, "a text encoder")


def blank(model: VisionLanguageModel) -> Any:
    """Parameters of all stages but the reconstructor, all zero."""
    size = model.config.image.image_size

    def forward(model: VisionLanguageModel) -> None:
        image = model.encode_image(jnp.zeros((1, size, size, 3)))
        mask = jnp.ones((1, 1, 4, 4), bool)
        states = model.encode_text(jnp.zeros((1, 4), jnp.int32), mask, image, ("forward",))
        model.predict_vocabulary(states.last)

    shapes = jax.eval_shape(nn.init(forward, model), jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in keys): leaf.shape for keys, leaf in leaves}


def golden(family: str) -> Arrays:
    """Inputs and hidden states of a family."""
    with np.load(FOLDER / f"{family}.npz") as file:
        return dict(file)


def load_maker() -> ModuleType:
    """The script that made the goldens; it needs torch and transformers."""
    spec = importlib.util.spec_from_file_location("make_weight_goldens", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_timm(arrays: Arrays) -> Arrays:
    """ViT or MAE of transformers in the naming of timm, which is that of MAE's authors too."""
    result = {}
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.",
        "attention.output.dense": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm": "norm",
    }
    query = "attention.attention.query"
    for name, array in arrays.items():
        if not name.startswith("vit."):
            result[name.replace("decoder.decoder_", "decoder_")] = array
        elif query in name:
            fused = [arrays[name.replace(query, f"attention.attention.{r}")] for r in _ROLES]
            name = name.replace("vit.encoder.layer.", "blocks.").replace(query, "attn.qkv")
            result[name] = np.concatenate(fused)
        elif "attention.attention" not in name:
            name = name.removeprefix("vit.")
            for theirs, timm in names.items():
                name = name.replace(theirs, timm)
            result[name] = array
    return result


def to_npz(arrays: Arrays) -> Arrays:
    """ViT of transformers in the naming and the layouts of its authors' npz files."""
    heads, width = 2, 16
    result = {
        "cls": arrays["vit.embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": arrays["vit.embeddings.position_embeddings"],
        "embedding/kernel": arrays["vit.embeddings.patch_embeddings.projection.weight"].transpose(
            2, 3, 1, 0
        ),
        "embedding/bias": arrays["vit.embeddings.patch_embeddings.projection.bias"],
        "Transformer/encoder_norm/scale": arrays["vit.layernorm.weight"],
        "Transformer/encoder_norm/bias": arrays["vit.layernorm.bias"],
        "head/kernel": arrays["classifier.weight"].T,
        "head/bias": arrays["classifier.bias"],
    }
    for layer in range(2):
        theirs, ours = f"vit.encoder.layer.{layer}.", f"Transformer/encoderblock_{layer}/"
        attention = f"{ours}MultiHeadDotProductAttention_1/"
        for role in _ROLES:
            kernel = arrays[f"{theirs}attention.attention.{role}.weight"]
            bias = arrays[f"{theirs}attention.attention.{role}.bias"]
            result[f"{attention}{role}/kernel"] = kernel.T.reshape(width, heads, -1)
            result[f"{attention}{role}/bias"] = bias.reshape(heads, -1)
        out = arrays[f"{theirs}attention.output.dense.weight"]
        result[f"{attention}out/kernel"] = out.T.reshape(heads, -1, width)
        result[f"{attention}out/bias"] = arrays[f"{theirs}attention.output.dense.bias"]
        for index, name in ((0, "layernorm_before"), (2, "layernorm_after")):
            result[f"{ours}LayerNorm_{index}/scale"] = arrays[f"{theirs}{name}.weight"]
            result[f"{ours}LayerNorm_{index}/bias"] = arrays[f"{theirs}{name}.bias"]
        for index, name in ((0, "intermediate.dense"), (1, "output.dense")):
            dense = f"{ours}MlpBlock_3/Dense_{index}"
            result[f"{dense}/kernel"] = arrays[f"{theirs}{name}.weight"].T
            result[f"{dense}/bias"] = arrays[f"{theirs}{name}.bias"]
    return result


def to_open_clip(arrays: Arrays) -> Arrays:
    """CLIP's image tower of transformers in the naming of OpenAI's and open_clip's files."""
    names = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "vision_model.encoder.layers.": "visual.transformer.resblocks.",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    result = {}
    for name, array in arrays.items():
        if not name.startswith("vision_model."):
            continue
        fused = [arrays[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "q_proj" in name:
            name, array = name.replace("self_attn.q_proj.", "attn.in_proj_"), np.concatenate(fused)
        if "k_proj" not in name and "v_proj" not in name:
            result[name] = array
    return result


_ROLES = ("query", "key", "value")
