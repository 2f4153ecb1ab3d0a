"""Scenes with one of their labels as a class, to fine-tune classification of images on."""

from collections.abc import Mapping

import numpy as np

from vlp_jax.data.scenes.source import Scenes
from vlp_jax.data.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES
from vlp_jax.infra.errors import ConfigError

CLASSES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
}


class ScenesLabels(Scenes):
    """Pictures, captions as of ``Scenes``, and ``label``: an attribute of the largest object.

    Captions may name it: an objective that reads texts is told the answer.

    Attributes:
        classes: what the label tells apart.
    """

    extra_fields: tuple[str, ...] = ("label",)

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        level: str = "full",
        num_records: int | None = None,
        label: str = "shape",
        name: str = "scenes_labels",
    ):
        """As of ``Scenes``, and which label.

        Args:
            split: see ``Scenes``.
            seed: see ``Scenes``.
            level: see ``Scenes``.
            num_records: see ``Scenes``.
            label: ``shape``, ``colour``, ``size`` or ``texture``.
            name: of the source.

        Raises:
            ConfigError: there is no such label.
            ValueError: another argument is out of range.
        """
        super().__init__(split, seed, level, num_records, name)
        if label not in CLASSES:
            raise ConfigError(
                f"data.sources.{name}.label", f"{label!r}", f"Use one of {', '.join(CLASSES)}"
            )
        self._label = label
        known = {"shape": self.level.num_shapes, "colour": self.level.num_colours}
        self.classes = CLASSES[label][: known.get(label)]
        self.identity = f"{self.identity}/{label}"

    @property
    def world(self) -> str:
        """As of the scenes without labels: the pictures are the same."""
        return self.identity.rpartition("/")[0]

    def extras(self, record: int, size: int) -> Mapping[str, np.ndarray]:
        """``label``: int32 []."""
        del size
        return {"label": np.asarray(self.targets(np.array([record]))["label"][0])}

    def targets(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """``label`` int32 [n] of many records, int64 [n]."""
        return {"label": self.labels(records)[self._label]}
