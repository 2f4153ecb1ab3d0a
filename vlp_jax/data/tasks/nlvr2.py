"""NLVR2 (Suhr et al. 2019): is a sentence true of two pictures?

    NLVR2("/data/nlvr2", split="val")                   # dev.json as published
    NLVR2("../shared/data", split="train")              # nlvr.json

The published ``train.json``, ``dev.json`` (``val`` here) and ``test1.json`` (``test``) hold one
JSON object a line; they are looked for in the root and in ``data/``, images in ``<split>/``, for
``train`` in its numbered folders, with or without ``images/`` before it, in ``images/`` and in
the root. ``nlvr.json`` is a list of
``{"images": [path, path], "sentence": text, "label": true, "split": name}``.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp_jax.data.files import field, image_candidates, inside
from vlp_jax.data.tasks.annotated import Example, LabelledSentences

_LABELS = {"False": 0, "True": 1}


class NLVR2(LabelledSentences):
    """Pairs of pictures and sentences about them: a ``Source`` of one split.

    ``image`` is the left picture, ``second_image`` the right one; ``label`` is 1 where the
    sentence is true.
    """

    extra_fields: tuple[str, ...] = ("second_image", "label")
    classes: tuple[str, ...] = ("false", "true")
    files = ("nlvr.json", "{split}.json", "data/{split}.json")
    published: Mapping[str, str] = {"train": "train", "val": "dev", "test": "test1"}

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``second_image`` uint8 [size, size, 3] and ``label`` int32 [].

        Raises:
            BadExample: the file of the second picture is damaged, too large or gone.
        """
        return {"second_image": self._picture(record, 1, size), **super().extras(record, size)}

    @staticmethod
    def own_entry(item: Any, where: str) -> Example:
        """An entry of ``nlvr.json``."""
        images = field(item, "images", list, where)
        if len(images) != 2 or not all(isinstance(image, str) for image in images):
            raise ValueError(f"{where}: 'images' must be two paths")
        return Example(
            tuple((inside(image, where),) for image in images),
            field(item, "split", str, where),
            field(item, "sentence", object, where),
            int(field(item, "label", bool, where)),
        )

    @staticmethod
    def published_entry(item: Any, split: str, where: str) -> Example:
        """``dev-850-0-1`` is sentence 1 about ``dev-850-0-img0.png`` and ``...-img1.png``."""
        identifier = inside(field(item, "identifier", str, where), where)
        pair = identifier.rpartition("-")[0]
        folder = NLVR2.published[split]
        if not pair.startswith(f"{folder}-"):
            raise ValueError(f"{where}: identifier {identifier!r} is not of split {folder!r}")
        label = field(item, "label", str, where)
        if label not in _LABELS:
            raise ValueError(f"{where}: label {label!r} must be 'True' or 'False'")
        if "directory" in item:
            folder = os.path.join(folder, inside(str(item["directory"]), where))
        images = tuple(image_candidates(f"{pair}-img{side}.png", folder) for side in (0, 1))
        return Example(images, split, field(item, "sentence", object, where), _LABELS[label])
