"""How images are normalised, and the exact way from one convention to another."""

import dataclasses
from typing import Any

import numpy as np

Colour = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Mean and standard deviation of each colour channel (red, green, blue), pixels in [0, 1]."""

    mean: Colour
    std: Colour


# The conventions of the public checkpoints.
PIXELS = {
    "clip": Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # ViT (augreg)
    "imagenet": Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # MAE, DeiT
}


def from_settings(settings: dict[str, Any]) -> Pixels | None:
    """What the JSON files beside a checkpoint say (transformers' or timm's); None if nothing."""
    if "image_mean" in settings and "image_std" in settings:
        return Pixels(tuple(settings["image_mean"]), tuple(settings["image_std"]))
    timm = settings.get("pretrained_cfg", {})
    if "mean" in timm and "std" in timm:
        return Pixels(tuple(timm["mean"]), tuple(timm["std"]))
    return None


def fold(
    kernel: np.ndarray, bias: np.ndarray, trained: Pixels, fed: Pixels
) -> tuple[np.ndarray, np.ndarray]:
    """A patch embedding for images that are normalised in another way, with the same outputs.

    A pixel x enters as (x - m) / s in training and as z = (x - n) / t here, so that
    (x - m) / s = z t / s + (n - m) / s: the factor goes to the kernel, the constant to the bias.

    Args:
        kernel: floating [p * p * 3, D], pixels row by row, colours innermost.
        bias: floating [D].
        trained: convention of the checkpoint.
        fed: convention of this project's batches.

    Returns:
        Kernel and bias, float32.
    """
    scale = np.divide(fed.std, trained.std)
    offset = np.subtract(fed.mean, trained.mean) / np.asarray(trained.std)
    wide = kernel.astype(np.float64).reshape(-1, 3, kernel.shape[-1])
    moved = bias + np.einsum("pcd,c->d", wide, offset)
    scaled = (wide * scale[:, None]).reshape(kernel.shape)
    return scaled.astype(np.float32), moved.astype(np.float32)
