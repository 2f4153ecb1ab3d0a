"""Makes the goldens of this folder: small random models and what they compute.

    pip install torch transformers
    python tests/goldens/weights/make.py

For every family: ``FAMILY.safetensors`` as transformers saves it, and ``FAMILY.npz`` with inputs
and hidden states. All parameters are drawn at random, those that transformers starts at 0 or 1 as
well, so that none can be mistaken for another. ``python -m pytest tests/models/test_pretrained.py``
runs the same models live where torch and transformers are installed.
"""

import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
import transformers as hf

FOLDER = pathlib.Path(__file__).resolve().parent

BLOCK: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IMAGE = {"image_size": 16, "patch_size": 4, **BLOCK}
TEXT = {"vocab_size": 60, **BLOCK}
# Per channel, as the public checkpoints were trained.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Arrays = dict[str, np.ndarray]


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter, scales of norms around 1; returns the model, for evaluation."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2 + float(scale))
    return model.eval()


def pixels(image_size: int, seed: int) -> np.ndarray:
    """Random images, uint8 [2, H, W, 3]."""
    shape = (2, image_size, image_size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def normalised(image: np.ndarray, statistics: Any) -> torch.Tensor:
    """As the reference reads images: float32 [2, 3, H, W]."""
    mean, std = (np.asarray(values) for values in statistics)
    scaled = (image / 255.0 - mean) / std
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))


def clip(seed: int = 0) -> tuple[torch.nn.Module, Arrays]:
    """CLIP's image tower without its last block, all tokens through the last norm."""
    text = {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = hf.CLIPConfig(
        vision_config={"num_hidden_layers": 3, **IMAGE},
        text_config={"num_hidden_layers": 1, **text, **BLOCK},
        projection_dim=8,
    )
    model = randomise(hf.CLIPModel(config), seed)
    images = {"image": pixels(16, seed), "smaller": pixels(12, seed), "larger": pixels(24, seed)}
    with torch.no_grad():
        out = {}
        for name, batch in images.items():
            states = model.vision_model(
                normalised(batch, CLIP), output_hidden_states=True, interpolate_pos_encoding=True
            ).hidden_states[-2]
            out[f"{name}_states"] = model.vision_model.post_layernorm(states).numpy()
    return model, {**images, **out}


def vit(seed: int = 1) -> tuple[torch.nn.Module, Arrays]:
    """ViT, pixels in [-1, 1]."""
    config = hf.ViTConfig(num_hidden_layers=2, layer_norm_eps=1e-6, **IMAGE)
    model = randomise(hf.ViTForImageClassification(config), seed)
    image = pixels(16, seed)
    with torch.no_grad():
        states = model.vit(normalised(image, HALF)).last_hidden_state
    return model, {"image": image, "image_states": states.numpy()}


def mae(seed: int = 2) -> tuple[torch.nn.Module, Arrays]:
    """MAE's encoder with nothing masked."""
    config = hf.ViTMAEConfig(
        num_hidden_layers=2,
        layer_norm_eps=1e-6,
        mask_ratio=0.0,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
        **IMAGE,
    )
    model = randomise(hf.ViTMAEForPreTraining(config), seed)
    image = pixels(16, seed)
    order = torch.arange(16.0).expand(2, -1)  # "noise" that keeps the patches in their places
    with torch.no_grad():
        states = model.vit(normalised(image, IMAGENET), noise=order).last_hidden_state
    return model, {"image": image, "image_states": states.numpy()}


def _text(
    model: torch.nn.Module, encoder: torch.nn.Module, pad: int, seed: int, blocks: int
) -> tuple[torch.nn.Module, Arrays]:
    draw = np.random.default_rng(seed)
    length = np.array([9, 6], np.int32)
    ids = draw.integers(4, 60, (2, 9), np.int32)
    mask = np.arange(9) < length[:, None]
    ids[~mask] = pad
    tensors = {
        "input_ids": torch.from_numpy(ids).long(),
        "attention_mask": torch.from_numpy(mask).long(),
    }
    with torch.no_grad():
        states = encoder(**tensors, output_hidden_states=True).hidden_states[blocks]
        logits = model(**tensors)[0]
        last = encoder(**tensors).last_hidden_state
    return model, {
        "ids": ids,
        "length": length,
        "states": states.numpy(),
        "last": last.numpy(),
        "logits": logits.numpy(),
    }


def roberta(seed: int = 3) -> tuple[torch.nn.Module, Arrays]:
    """RoBERTa of three blocks: states after two of them, and the MLM head on the last."""
    config = hf.RobertaConfig(
        num_hidden_layers=3,
        max_position_embeddings=18,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        **TEXT,
    )
    model = randomise(hf.RobertaForMaskedLM(config), seed)
    return _text(model, model.roberta, pad=1, seed=seed, blocks=2)


def bert(seed: int = 4) -> tuple[torch.nn.Module, Arrays]:
    """BERT of two blocks, and its MLM head."""
    config = hf.BertConfig(num_hidden_layers=2, max_position_embeddings=16, **TEXT)
    model = randomise(hf.BertForPreTraining(config), seed)
    return _text(model, model.bert, pad=0, seed=seed, blocks=2)


FAMILIES = {"clip": clip, "vit": vit, "mae": mae, "roberta": roberta, "bert": bert}


def main() -> None:
    """Write all goldens."""
    for family, make in FAMILIES.items():
        model, arrays = make()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            shutil.copyfile(f"{folder}/model.safetensors", FOLDER / f"{family}.safetensors")
        np.savez_compressed(FOLDER / f"{family}.npz", **arrays)


if __name__ == "__main__":
    main()
