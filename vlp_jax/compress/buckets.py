"""Buckets: the static sizes of a step, one compiled program each, and how configs write them."""

import dataclasses
import re
from typing import Any

from vlp_jax.infra.errors import ConfigError

WHOLE = "whole"  # a bucket of everything, at the model's own sizes
_VIEW = re.compile(r"p(\d+)@(\d+)(?:k(\d+))?")
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
        guarded: in a plan: the batch is encoded whole whatever the schedule says. Steps are keyed
            without it.
    """

    text_length: int
    image_size: int
    views: tuple[View, ...] = ()
    guarded: bool = False


def view_of(bucket: Bucket | None, index: int = 0) -> View | None:
    """What an objective's view of this index encodes; None: everything."""
    if bucket is None or not bucket.views:
        return None
    return bucket.views[min(index, len(bucket.views) - 1)]


# The key of one compiled step: the bucket of every named batch, sorted by name.
StepBucket = tuple[tuple[str, Bucket], ...]


def bucket_label(bucket: StepBucket, named: bool = False) -> str:
    """A short name of a step's sizes for logs: text length x image size of each named batch.

    Args:
        bucket: of the step.
        named: begin each with the name of the batch.
    """
    return "+".join(
        (f"{name}:" if named else "")
        + "/".join((f"{sizes.text_length}x{sizes.image_size}", *(v.label for v in sizes.views)))
        for name, sizes in bucket
    )


Views = tuple[View, ...]  # of one bucket; none: everything, at the model's own sizes


def parse_bucket(text: str, key: str, whole: View) -> Views:
    """The views of a bucket from its text, such as ``p16@224k49/p16@224`` or ``whole``.

    Args:
        text: as in ``compression.buckets``.
        key: of the config, for messages.
        whole: all of an image at the model's own sizes; of that alone, a bucket is ``whole``.

    Raises:
        ConfigError: it is none.
    """
    if text == WHOLE:
        return ()
    views = parse_views(text, key)
    while len(views) > 1 and views[-1] == views[-2]:  # the last counts for those beyond
        views = views[:-1]
    return () if views == (whole,) else views


def bucket_text(views: Views) -> str:
    """What ``parse_bucket`` reads."""
    return "/".join(view.label for view in views) or WHOLE


def parse_views(text: Any, key: str) -> Views:
    """The views of a bucket other than ``whole``; see ``parse_bucket``."""
    views = []
    for part in str(text).split("/"):
        match = _VIEW.fullmatch(part)
        if match is None:
            alone = f" ({WHOLE} stands alone)" if part == WHOLE else ""
            raise ConfigError(
                key,
                f"{text!r} is no bucket{alone}",
                "Write patch and image size in pixels and how many patches are kept, such as "
                f"p16@224k49, or {WHOLE}",
            )
        patch, image, kept = (int(number or 0) for number in match.groups())
        try:
            view = View.whole(image, patch)
            views.append(dataclasses.replace(view, kept=kept) if match.group(3) else view)
        except ValueError as error:
            raise ConfigError(key, f"{text!r}: {error}", "Choose sizes that fit") from error
    return tuple(views)
