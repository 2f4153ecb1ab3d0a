"""Sources of downstream tasks, read from the files as their authors publish them.

Captioning and retrieval need images with captions and nothing else: ``data.folder`` reads those.
"""

from vlp_jax.data.tasks.answers import normalise_answer
from vlp_jax.data.tasks.entailment import VisualEntailment
from vlp_jax.data.tasks.glue import GLUE
from vlp_jax.data.tasks.image_labels import ImageLabels
from vlp_jax.data.tasks.nlvr2 import NLVR2
from vlp_jax.data.tasks.splits import shared_images
from vlp_jax.data.tasks.unpaired_images import UnpairedImages
from vlp_jax.data.tasks.vqa import VQA

__all__ = [
    "GLUE",
    "NLVR2",
    "VQA",
    "ImageLabels",
    "UnpairedImages",
    "VisualEntailment",
    "normalise_answer",
    "shared_images",
]
