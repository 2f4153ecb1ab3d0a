"""A fixed set of records, read once or kept: what evaluators over a source share."""

from collections.abc import Iterator, Sequence
from typing import Self

import jax
import numpy as np

from vlp_jax.data.batch import HostBatch
from vlp_jax.data.plan import PlannedBatch
from vlp_jax.data.source import Source
from vlp_jax.data.tasks import shared_images
from vlp_jax.evals.base import EvalContext, fixed_plan, read
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import batch_shards, check_batch_size, host_rows, replicated

CACHE_BYTES = 1 << 30  # a larger set is read anew each time
_IMAGES = ("image", "second_image")


class FixedSet:
    """The first records of a source in a fixed order, each with its first caption.

    Attributes:
        context: of the run.
        source: where the records come from.
        plan: of the set, in a single bucket.
        rows: the rows of each global batch that this process reads.
        gather: brings sharded arrays whole to every process.
    """

    def __init__(
        self,
        context: EvalContext,
        evaluator: str,
        source: str,
        split: str,
        num_examples: int,
        batch_size: int = 0,
        extra_fields: Sequence[str] = (),
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            evaluator: key in ``config.evals``, for messages.
            source: key in ``config.data.sources``.
            split: of that source.
            num_examples: the first records, fewer where the split has fewer.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            extra_fields: keys of ``batch.EXTRA_FIELDS`` to read.

        Raises:
            ConfigError: an argument does not fit, or a picture of the set is in the split that the
                run trains on as well; the message names the key.
        """
        config = context.config
        self.context = context
        self.source: Source = context.source(evaluator, source, split, num_examples)
        if split != config.data.sources[source].get("split", "train"):
            _check_clean(f"evals.{evaluator}.split", context.sources[source], self.source)
        batch_size = batch_size or config.data.batch_size // config.optim.accumulation
        shards = batch_shards(context.mesh)
        try:
            check_batch_size(context.mesh, batch_size)
        except ConfigError as error:
            raise ConfigError(
                f"evals.{evaluator}.batch_size", error.problem, error.remedy
            ) from error
        # A small set does not fill a batch of the run.
        batch_size = min(batch_size, -(-num_examples // shards) * shards)
        self.plan = fixed_plan(context, self.source, num_examples, batch_size)
        self.rows = host_rows(context.mesh, batch_size)
        self.gather = jax.jit(lambda arrays: arrays, out_shardings=replicated(context.mesh))
        self._extra_fields = tuple(extra_fields)
        self._kept: list[HostBatch] | None = None

    @classmethod
    def one_batch(
        cls, context: EvalContext, evaluator: str, source: str, split: str, num_examples: int
    ) -> Self:
        """A set that is a single batch; see the constructor."""
        shards = batch_shards(context.mesh)
        batch_size = -(-num_examples // shards) * shards
        return cls(context, evaluator, source, split, num_examples, batch_size)

    def host_batches(self) -> Iterator[HostBatch]:
        """This process's rows of every batch.

        Each holds, beside the fields of ``vlp_jax.data.batch``, ``image_shuffled`` (and
        ``second_image_shuffled``): the pictures of another row, see ``shuffle_images``.
        """
        if self._kept is not None:
            yield from self._kept
            return
        size = self.plan.batch(0).bucket.image_size
        pictures = 2 * (1 + ("second_image" in self._extra_fields))
        rows = self.plan.num_batches * (self.rows.stop - self.rows.start)
        if pictures * rows * 3 * size**2 > CACHE_BYTES:
            yield from self._read()
            return
        self._kept = list(self._read())
        yield from self._kept

    def whole_batches(self) -> Iterator[HostBatch]:
        """Every batch with all of its rows, on every process: for small sets that are shown."""
        everything = slice(0, self.plan.batch_size)
        return read(self.context.config, self.plan, everything, self._extra_fields)

    def planned(self) -> Iterator[PlannedBatch]:
        """What is in the rows of every global batch."""
        return (self.plan.batch(t) for t in range(self.plan.num_batches))

    def _read(self) -> Iterator[HostBatch]:
        donors: dict[str, np.ndarray] = {}
        for batch in read(self.context.config, self.plan, self.rows, self._extra_fields):
            for name in (name for name in _IMAGES if name in batch):
                shuffled = shuffle_images(batch[name], batch["valid"], donors.get(name))
                if shuffled is None:
                    raise ValueError(
                        f"data.sources.{self.source.name}: only one picture of the evaluation set "
                        "could be read, and there is no other to shuffle it with; check the files "
                        "or raise num_examples"
                    )
                batch[f"{name}_shuffled"] = shuffled
                if batch["valid"].any():
                    donors[name] = batch[name][np.flatnonzero(batch["valid"])[-1]]
            yield batch


def _check_clean(key: str, train: Source, held_out: Source) -> None:
    """Refuse a set whose pictures are trained on."""
    if train.num_records is None or held_out.num_records is None:
        return  # made, not listed: the splits of such sources share nothing
    if shared := shared_images(train, held_out):
        raise ConfigError(
            key,
            f"{len(shared)} pictures are in the training split as well, such as {shared[0]}",
            "Use splits that share no picture",
        )


def shuffle_images(
    images: np.ndarray, valid: np.ndarray, donor: np.ndarray | None
) -> np.ndarray | None:
    """Give each valid row the image of the valid row before it, the first that of the last.

    No row keeps its own image, and images of rows that are not valid are given to none.

    Args:
        images: uint8 [B, H, W, 3].
        valid: bool [B].
        donor: uint8 [H, W, 3], an image of another batch, for a row that is the only valid one.

    Returns:
        uint8 [B, H, W, 3], rows that are not valid left as they are; None where a lone row finds
        no donor.
    """
    rows = np.flatnonzero(valid)
    shuffled = images.copy()
    if len(rows) == 1:
        if donor is None:
            return None
        shuffled[rows] = donor
    else:
        shuffled[rows] = images[np.roll(rows, 1)]
    return shuffled
