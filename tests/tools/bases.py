"""Parameter files in the place of bases, for tests that tune nothing."""

import pathlib

import numpy as np

from vlp_jax.models.pretrained import Metadata, save_parameters


def parameters(folder: pathlib.Path, value: int) -> pathlib.Path:
    """A file of three equal numbers."""
    file = folder / f"{value}.safetensors"
    save_parameters(file, {"scale": np.full(3, value, np.float32)}, Metadata({}, ""))
    return file
