"""Weights in and out: public checkpoints into our naming, and our own parameter files.

- ``read_weights``, ``convert_image``, ``convert_text``: CLIP, ViT, MAE, RoBERTa, BERT -> ours.
- ``save_parameters``, ``load_parameters``, ``load_metadata``, ``is_parameter_file``,
  ``check_vocabulary``: our files.
- ``merge``: loaded parameters into freshly initialised ones, with a report.
"""

from vlp_jax.models.pretrained.converted import Converted
from vlp_jax.models.pretrained.files import (
    WEIGHTS_FILE,
    Metadata,
    Weights,
    WeightsError,
    check_vocabulary,
    is_parameter_file,
    load_metadata,
    load_parameters,
    read_weights,
    save_parameters,
)
from vlp_jax.models.pretrained.image_towers import convert_image
from vlp_jax.models.pretrained.merge import STATUSES, NoPartFits, Report, Row, merge
from vlp_jax.models.pretrained.pixels import PIXELS, Pixels
from vlp_jax.models.pretrained.text_encoders import convert_text

__all__ = [
    "PIXELS",
    "STATUSES",
    "WEIGHTS_FILE",
    "Converted",
    "Metadata",
    "NoPartFits",
    "Pixels",
    "Report",
    "Row",
    "Weights",
    "WeightsError",
    "check_vocabulary",
    "convert_image",
    "convert_text",
    "is_parameter_file",
    "load_metadata",
    "load_parameters",
    "merge",
    "read_weights",
    "save_parameters",
]
