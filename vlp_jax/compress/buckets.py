"""Buckets: the static sizes of a step, one compiled program each."""

import dataclasses

MAX_SCHEDULED_BUCKETS = 16  # more compiles than this cost more than the padding they save


@dataclasses.dataclass(frozen=True, order=True)
class View:
    """How much of an image is encoded.

    Attributes:
        image_size: side in pixels of the square that is cut into patches.
        patch_size: side of a patch in pixels; divides ``image_size``.
        kept: patches that are encoded, 1 to all of the grid; the class token comes on top.
    """

    image_size: int
    patch_size: int
    kept: int

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"patches of {self.patch_size} px do not divide an image of {self.image_size} px"
            )
        if not 1 <= self.kept <= self.patches:
            raise ValueError(
                f"{self.kept} patches cannot be kept of the {self.patches} that an image of "
                f"{self.image_size} px has at {self.patch_size} px each"
            )

    @classmethod
    def whole(cls, image_size: int, patch_size: int) -> "View":
        """Every patch of an image."""
        return cls(image_size, patch_size, max(1, (image_size // max(patch_size, 1)) ** 2))

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of the whole grid."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """What is encoded: the kept patches and the class token."""
        return self.kept + 1

    @property
    def label(self) -> str:
        """A short name, such as ``p16@224`` or ``p16@224k49``."""
        kept = "" if self.kept == self.patches else f"k{self.kept}"
        return f"p{self.patch_size}@{self.image_size}{kept}"


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Every static size of one named batch; hashable, so that it can key a compiled step.

    Attributes:
        text_length: padded number of text tokens N, special tokens included.
        image_size: side of the square image in pixels, as it comes from the host.
        views: what is encoded of the image, in the order of an objective's views (query, key); the
            last one counts for those beyond. None: all of it, at the model's own sizes.
    """

    text_length: int
    image_size: int
    views: tuple[View, ...] = ()


def view_of(bucket: Bucket | None, index: int = 0) -> View | None:
    """What an objective's view of this index encodes; None: everything."""
    if bucket is None or not bucket.views:
        return None
    return bucket.views[min(index, len(bucket.views) - 1)]


# The key of one compiled step: the bucket of every named batch, sorted by name.
StepBucket = tuple[tuple[str, Bucket], ...]


def bucket_label(bucket: StepBucket) -> str:
    """A short name of a step's sizes for logs: text length x image size of each named batch."""
    return "+".join(
        "/".join((f"{sizes.text_length}x{sizes.image_size}", *(v.label for v in sizes.views)))
        for _, sizes in bucket
    )
