"""Buckets: the static sizes of a step, one compiled program each."""

import dataclasses

MAX_SCHEDULED_BUCKETS = 16  # more compiles than this cost more than the padding they save


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Every static size of one named batch; hashable, so that it can key a compiled step.

    Attributes:
        text_length: padded number of text tokens N, special tokens included.
        image_size: side of the square image in pixels.
    """

    text_length: int
    image_size: int


# The key of one compiled step: the bucket of every named batch, sorted by name.
StepBucket = tuple[tuple[str, Bucket], ...]


def bucket_label(bucket: StepBucket) -> str:
    """A short name of a step's sizes for logs: text length x image size of each named batch."""
    return "+".join(f"{sizes.text_length}x{sizes.image_size}" for _, sizes in bucket)
