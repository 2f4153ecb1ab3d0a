"""Visual entailment: does a picture entail a sentence, contradict it, or neither?

    VisualEntailment("/data/snli_ve", split="val")      # snli_ve_dev.jsonl as published
    VisualEntailment("../shared/data", split="train")   # ve.json

SNLI-VE (Xie et al. 2019) is ``snli_ve_train.jsonl``, ``snli_ve_dev.jsonl`` (``val`` here) and
``snli_ve_test.jsonl``; its images are those of Flickr30K, looked for in ``flickr30k-images/``
or ``flickr30k_images/`` with or without ``images/`` before it, in ``images/`` and in the root. The
first release spells the picture's field ``Flikr30kID`` and may end it in ``.jpg``; both are read.
``ve.json`` is a list of ``{"image": path, "sentence": text, "label": name, "split": name}``.
"""

from collections.abc import Mapping
from typing import Any

from vlp_jax.data.files import FLICKR_FOLDERS, field, image_candidates, inside
from vlp_jax.data.tasks.annotated import Example, LabelledSentences

_OLD_ID = "Flikr30kID"
_NO_GOLD_LABEL = "-"  # SNLI's mark where no label has a majority among the annotators


class VisualEntailment(LabelledSentences):
    """Pictures and hypotheses about them: a ``Source`` of one split.

    Hypotheses without a gold label (``-``) are left out and counted in ``bad_captions``.
    """

    classes: tuple[str, ...] = ("contradiction", "neutral", "entailment")
    files = ("ve.json", "snli_ve_{split}.jsonl")
    published: Mapping[str, str] = {"train": "train", "val": "dev", "test": "test"}

    @staticmethod
    def own_entry(item: Any, where: str) -> Example:
        """An entry of ``ve.json``."""
        return Example(
            ((inside(field(item, "image", str, where), where),),),
            field(item, "split", str, where),
            field(item, "sentence", object, where),
            _label(field(item, "label", str, where), where),
        )

    @staticmethod
    def published_entry(item: Any, split: str, where: str) -> Example:
        """A line of SNLI-VE; the picture is the premise, ``sentence1`` is its caption."""
        key = _OLD_ID if isinstance(item, dict) and _OLD_ID in item else "Flickr30K_ID"
        image = inside(field(item, key, str, where).removesuffix(".jpg") + ".jpg", where)
        return Example(
            (image_candidates(image, *FLICKR_FOLDERS),),
            split,
            field(item, "sentence2", object, where),
            _label(field(item, "gold_label", str, where), where),
        )


def _label(name: str, where: str) -> int | None:
    if name == _NO_GOLD_LABEL:
        return None
    if name not in VisualEntailment.classes:
        raise ValueError(
            f"{where}: label {name!r} must be one of {', '.join(VisualEntailment.classes)}"
        )
    return VisualEntailment.classes.index(name)
