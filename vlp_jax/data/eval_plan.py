"""The plan of a fixed set, of which every example is seen exactly once.

plan = EvalPlan(PlannedSource(val, captions), num_records=1000, batch_size=256,
                edges=(8, 12, 16, 24), image_size=224)
plan.batch(t)      # for t in range(plan.num_batches)
"""

from collections.abc import Sequence

import numpy as np

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.planned import (
    PlannedBatch,
    PlannedSource,
    check_batch,
    host_rows,
    padded_to,
)


class EvalPlan:
    """A fixed set: the first records of a source, each with its first caption, exactly once.

    Rows are grouped by the edge their text is padded to; the last batch of each group is filled
    up with rows that are not valid. One edge gives a single bucket.

    Attributes:
        sources: the one source.
        batch_size: rows B of a global batch.
        num_batches: batches t in [0, num_batches).
        num_rows: valid rows in all of them.
    """

    replaces_damaged = False

    def __init__(
        self,
        source: PlannedSource,
        num_records: int,
        batch_size: int,
        edges: Sequence[int],
        image_size: int,
    ):
        """Plans the whole set.

        Args:
            source: where the records come from; its weight does not matter.
            num_records: how many of the first records; all, if the source has fewer.
            batch_size: rows of a global batch.
            edges: increasing text lengths to pad to.
            image_size: side of the image in pixels.

        Raises:
            ValueError: a number is out of range; the message names its config key.
        """
        check_batch([source], batch_size, edges)
        if num_records < 1:
            raise ValueError(f"num_examples={num_records}: must be at least 1")
        self.sources = (source,)
        self.batch_size = batch_size
        self.edges = tuple(edges)
        self.image_size = image_size
        available = source.source.num_records
        record = np.arange(num_records if available is None else min(num_records, available))
        caption = np.zeros_like(record)
        length = source.captions.lengths(record, caption)
        edge = padded_to(self.edges, length)
        groups = [np.flatnonzero(edge == one) for one in self.edges]
        self.num_rows = len(record)
        self._batches = [
            (group[start : start + batch_size], Bucket(int(one), image_size))
            for group, one in zip(groups, self.edges, strict=True)
            for start in range(0, len(group), batch_size)
        ]
        self.num_batches = len(self._batches)
        self._record, self._caption, self._length = record, caption, length

    def batch(self, t: int) -> PlannedBatch:
        """Batch t of the set.

        Raises:
            IndexError: the set has no such batch.
        """
        if not 0 <= t < self.num_batches:
            raise IndexError(f"there is no batch {t}: the set has {self.num_batches}")
        rows, bucket = self._batches[t]
        filled = np.resize(rows, self.batch_size)  # repeats the rows until the batch is full
        return PlannedBatch(
            source=np.zeros(self.batch_size, np.int64),
            record=self._record[filled],
            caption=self._caption[filled],
            length=self._length[filled],
            position=np.arange(t * self.batch_size, (t + 1) * self.batch_size),
            valid=np.arange(self.batch_size) < len(rows),
            bucket=bucket,
        )

    def substitutes(self, t: int, row: int) -> np.ndarray:
        """None: every row of a fixed set is seen exactly once."""
        return np.empty((0, 2), np.int64)

    def rows(self, t: int, host: int, hosts: int) -> PlannedBatch:
        """Host ``host``'s contiguous rows of batch t."""
        return self.batch(t).rows(host_rows(self.batch_size, host, hosts))

    def bucket(self, t: int) -> Bucket:
        """The bucket of batch t."""
        return self._batches[t][1]

    def buckets(self) -> tuple[Bucket, ...]:
        """Every bucket of the set, by increasing text length."""
        return tuple(dict.fromkeys(bucket for _, bucket in self._batches))
