"""What a plan is made of and what it gives: sources, batches, and the rows of a host."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.source import Source


class EncodedTexts(Protocol):
    """What a plan and a loader ask of the encoded texts of a source."""

    max_length: int
    num_truncated: int

    @property
    def longest(self) -> int:
        """No row has more tokens."""
        ...

    def lengths(self, records: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Tokens of rows: int64 [n], int [n] -> int32 [n]."""
        ...

    def padded(
        self, records: np.ndarray, indices: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n, width] and lengths int32 [n]."""
        ...

    def histogram(self) -> np.ndarray:
        """How many rows have each length: int64 [max_length + 1]."""
        ...

    def unknown_share(self) -> float:
        """Share of the tokens of words that are <unk>."""
        ...


@runtime_checkable
class Packed(Protocol):
    """Encoded texts of which several share a row."""

    def documents(self, records: np.ndarray, indices: np.ndarray, width: int) -> np.ndarray:
        """Which document each token of ``padded`` is of: int32 [n, width], 0 at padding."""
        ...


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """A source and what a plan knows of it.

    Attributes:
        source: its records.
        captions: their captions, encoded.
        weight: its share of the examples, relative to the others'.
        guarded: records that are encoded whole (``data.guarded``), int64 and increasing.
    """

    source: Source
    captions: EncodedTexts
    weight: float = 1.0
    guarded: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """What is in the rows of one batch; B rows, or those of one host.

    Attributes:
        source: index into the plan's sources, int64 [B].
        record: record of that source, int64 [B].
        caption: caption of that record, int64 [B].
        length: text length in tokens, special tokens included, int32 [B].
        position: t * B + row of the global batch, int64 [B].
        valid: False for a row that only fills up the last batch of a set, bool [B].
        bucket: the static sizes of the batch.
    """

    source: np.ndarray
    record: np.ndarray
    caption: np.ndarray
    length: np.ndarray
    position: np.ndarray
    valid: np.ndarray
    bucket: Bucket

    def __len__(self) -> int:
        return len(self.record)

    def fingerprint(self) -> int:
        """A 32-bit number that tells this batch from others: what is in its rows, in order."""
        return zlib.crc32(np.stack([self.source, self.record, self.caption]).tobytes())

    def rows(self, rows: slice) -> "PlannedBatch":
        """The batch that holds only these rows."""
        arrays = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if field.name != "bucket"
        }
        return PlannedBatch(**arrays, bucket=self.bucket)


class BatchPlan(Protocol):
    """What the loader needs of a plan."""

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        ...

    @property
    def replaces_damaged(self) -> bool:
        """False: a damaged row is not valid instead."""
        ...

    @property
    def sources(self) -> Sequence[PlannedSource]:
        """The mixture."""
        ...

    def batch(self, t: int) -> PlannedBatch:
        """Global batch t."""
        ...

    def substitutes(self, t: int, row: int) -> np.ndarray:
        """(record, caption) to try in turn if ``row`` is damaged: int64 [n, 2], maybe none."""
        ...


def host_rows(batch_size: int, host: int, hosts: int) -> slice:
    """The contiguous rows of a global batch that a host reads.

    Raises:
        ValueError: the hosts do not divide the batch, or there is no such host.
    """
    if not 0 <= host < hosts:
        raise ValueError(f"there is no host {host} among {hosts}")
    if batch_size % hosts:
        raise ValueError(
            f"data.batch_size={batch_size}: {hosts} hosts do not divide it; "
            f"take a multiple of {hosts}"
        )
    share = batch_size // hosts
    return slice(host * share, (host + 1) * share)


def check_batch(sources: Sequence[PlannedSource], batch_size: int, edges: Sequence[int]) -> None:
    """Refuse what no batch can be made of.

    Raises:
        ValueError: the message names the config key.
    """
    if batch_size < 1:
        raise ValueError(f"data.batch_size={batch_size}: must be at least 1")
    if not sources:
        raise ValueError("data.sources: name at least one source")
    for planned in sources:
        if planned.source.num_records == 0:
            raise ValueError(f"data.sources.{planned.source.name}: the source is empty")
        if not (np.isfinite(planned.weight) and planned.weight > 0):
            raise ValueError(
                f"data.sources.{planned.source.name}.weight={planned.weight}: must be above 0; "
                "remove the source to leave it out"
            )
    if not edges or any(low >= high for low, high in zip([0, *edges], edges, strict=False)):
        raise ValueError(f"data.text_edges={tuple(edges)}: must be positive and increasing")
    longest = max(planned.captions.longest for planned in sources)
    if longest > edges[-1]:
        raise ValueError(
            f"data.text_edges={tuple(edges)}: captions have up to {longest} tokens; raise the last "
            "edge or lower data.max_text_length"
        )


def padded_to(edges: Sequence[int], lengths: np.ndarray) -> np.ndarray:
    """The first edge that holds each length."""
    return np.asarray(edges)[np.searchsorted(edges, lengths)]
