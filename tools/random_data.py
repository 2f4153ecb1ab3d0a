"""A run without its data: for where only the time that it takes is asked for."""

from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.data.batch import PAIRS
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.objectives.base import Objective
from vlp_jax.train.adopted import adopt
from vlp_jax.train.program import Program
from vlp_jax.train.schedule import Budget

MASK_ID = 4  # any id will do: the tokens are random


def program_without_data(config: ConfigDict, text_length: float) -> Program:
    """What a config compiles to, with made-up words; the config is changed in place.

    What is ``auto`` is settled as in a run that starts from nothing.

    Args:
        config: of a run.
        text_length: mean tokens of its texts.

    Raises:
        ConfigError, ValueError: a key does not fit; the message names it.
    """
    adopt(config, None, None)
    names = {section.get("batch", PAIRS) for section in config.objectives.values()}
    return Program(
        config,
        Vocabulary.of_words(config.tokenizer.vocab_size, MASK_ID),
        make_mesh(**config.mesh),
        Budget(
            config.data.batch_size,
            None,
            total_steps=config.total_steps or 10_000,
            text_lengths=dict.fromkeys(names, text_length),
        ),
    )


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
