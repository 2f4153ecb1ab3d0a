"""Random stand-ins for what batches hold, where only the time that they take is asked for."""

from collections.abc import Sequence

import jax
import numpy as np

from vlp_jax.objectives.base import Objective


def classes_of(objectives: Sequence[Objective]) -> int:
    """Classes that labels may be of: of every objective that reads some."""
    return min((getattr(o, "num_classes", 1) for o in objectives if o.extra_fields), default=1)


def random_extra(
    draw: np.random.Generator, name: str, spec: jax.ShapeDtypeStruct, classes: int
) -> np.ndarray:
    """A random array of ``batch.EXTRA_FIELDS``, pictures aside.

    Args:
        draw: from which.
        name: of the field.
        spec: its shape and dtype.
        classes: of ``classes_of``.

    Raises:
        ValueError: it cannot be drawn.
    """
    if name in ("label", "answer"):
        drawn = draw.integers(0, classes, spec.shape)
    elif name in ("answer_score", "target"):
        drawn = draw.random(spec.shape)
    else:
        raise ValueError(f"the objectives read {name}, which cannot be drawn")
    return drawn.astype(spec.dtype)
