"""The batch contract: a flat dict of arrays whose names and shapes are declared here, once."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from vlp_jax.compress.buckets import Bucket

Batch = Mapping[str, jax.Array]
HostBatch = dict[str, np.ndarray]

PAIRS = "pairs"  # name of the batch of sources and objectives that name none


@dataclasses.dataclass(frozen=True)
class Field:
    """Dtype, symbolic shape and meaning of one array; B rows, N text tokens, H = W pixels."""

    dtype: type[np.generic]
    shape: tuple[str, ...]
    meaning: str


# What a batch of pairs has. Batches of texts alone have no `image`.
FIELDS: Mapping[str, Field] = {
    "image": Field(np.uint8, ("B", "H", "W", "3"), "RGB pixels, not normalised"),
    "text_ids": Field(np.int32, ("B", "N"), "token ids: <s> words </s>, then padding"),
    "text_length": Field(np.int32, ("B",), "tokens including <s> and </s>; the rest is padding"),
    "position": Field(
        np.int32, ("B",), "global position in the run, t * B + row; folded into keys"
    ),
    "valid": Field(np.bool_, ("B",), "False for a row that only fills up the last batch of a set"),
    "replaced": Field(np.int32, ("B",), "damaged records passed over before this row was read"),
}

# What batches of packed texts have on top.
PACKED_FIELDS: Mapping[str, Field] = {
    "text_document": Field(
        np.int32, ("B", "N"), "which document of its row a token is of, from 1; 0 at padding"
    ),
}

MAX_ANSWERS = 10  # distinct answers of one question; VQA v2 asked ten people

# What only some sources have; a run's batches hold those that all of its sources share.
EXTRA_FIELDS: Mapping[str, Field] = {
    "second_image": Field(np.uint8, ("B", "H", "W", "3"), "RGB pixels of the pair's other picture"),
    "label": Field(np.int32, ("B",), "index of the example's class"),
    "target": Field(np.float32, ("B",), "the example's score, where it has one and no class"),
    "answer": Field(np.int32, ("B", "10"), "indices of the accepted answers, then -1"),
    "answer_score": Field(np.float32, ("B", "10"), "score of each accepted answer in [0, 1]"),
}


def standard_fields(pictures: bool, packed: bool) -> tuple[str, ...]:
    """The arrays of a batch of sources of a kind, but for those that only some sources have.

    Args:
        pictures: whether its records are pictures; False: texts alone.
        packed: whether several texts share a row.
    """
    names = [name for name in FIELDS if pictures or name != "image"]
    return (*names, *(PACKED_FIELDS if packed else ()))


def batch_spec(
    bucket: Bucket, batch_size: int, names: tuple[str, ...] = tuple(FIELDS)
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch with ``batch_size`` rows in ``bucket``.

    Args:
        bucket: static sizes.
        batch_size: rows.
        names: keys of ``FIELDS``, ``PACKED_FIELDS`` and ``EXTRA_FIELDS``.
    """
    declared = {**FIELDS, **PACKED_FIELDS, **EXTRA_FIELDS}
    sizes = {
        "B": batch_size,
        "N": bucket.text_length,
        "H": bucket.image_size,
        "W": bucket.image_size,
        "3": 3,
        "10": MAX_ANSWERS,
    }
    return {
        name: jax.ShapeDtypeStruct(
            tuple(sizes[axis] for axis in declared[name].shape), declared[name].dtype
        )
        for name in names
    }
