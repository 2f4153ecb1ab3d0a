"""A fixed set of records, read once or kept: what evaluators over a source share."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Self

import jax
import numpy as np
from absl import logging

from vlp_jax.data.batch import HostBatch
from vlp_jax.data.planned import PlannedBatch
from vlp_jax.data.source import BadExample, Source, has_pictures
from vlp_jax.data.sources import missing_images
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
        *,
        pictures: bool = True,
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            evaluator: key in ``config.evals``, for messages.
            source: key in ``config.data.sources``.
            split: of that source.
            num_examples: the first records, fewer where the split has fewer; 0: all of them.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            extra_fields: keys of ``batch.EXTRA_FIELDS`` to read.
            pictures: whether the evaluator needs pictures; False: it does with texts alone.

        Raises:
            ConfigError: an argument does not fit, the source lacks what the evaluator needs, or a
                picture of the set is in the split that the run trains on as well; the message names
                the key.
        """
        config = context.config
        self.context = context
        self.source: Source = context.source(evaluator, source, split, num_examples)
        _check_has(self.source, evaluator, source, extra_fields, pictures)
        num_examples = num_examples or self.source.num_records or 0
        self._evaluator = evaluator
        self._told = False  # what could not be read
        if absent := missing_images({source: self.source}):
            logging.warning(
                "evals.%s: %d pictures of split %r are absent, and count in no score",
                evaluator,
                absent,
                split,
            )
        if split != config.data.sources[source].get("split", "train"):
            check_clean(f"evals.{evaluator}.split", context.sources[source], self.source)
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
        self.gather = context.once(
            "gather", lambda: jax.jit(lambda arrays: arrays, out_shardings=replicated(context.mesh))
        )
        self._extra_fields = tuple(extra_fields)
        self._kept: list[HostBatch] | None = None

    @classmethod
    def one_batch(
        cls, context: EvalContext, evaluator: str, source: str, split: str, num_examples: int
    ) -> Self:
        """A set that is a single batch, and so not all of a split; see the constructor."""
        if num_examples < 1:
            raise ConfigError(
                f"evals.{evaluator}.num_examples",
                f"{num_examples} examples, which are shown at once",
                "Use 1 or more, or remove the evaluator",
            )
        shards = batch_shards(context.mesh)
        batch_size = -(-num_examples // shards) * shards
        return cls(context, evaluator, source, split, num_examples, batch_size)

    def host_batches(self) -> Iterator[HostBatch]:
        """This process's rows of every batch.

        Each holds, beside the fields of ``vlp_jax.data.batch``, ``image_shuffled`` (and
        ``second_image_shuffled``): the pictures of another row, see ``donors``. They are the same
        on any number of processes.
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
        batches = read(self.context.config, self.plan, self.rows, self._extra_fields)
        lost = 0
        for planned, batch in zip(self.planned(), batches, strict=True):
            lost += int(planned.valid[self.rows].sum() - batch["valid"].sum())
            if "image" not in batch:
                yield batch
                continue
            keys = [frozenset(self.source.image_key(r)) for r in planned.record.tolist()]
            names = [name for name in _IMAGES if name in batch]
            shown = {name: batch[name].copy() for name in names}
            for row in np.flatnonzero(batch["valid"]).tolist():
                own = self.rows.start + row
                pictures = self._other_pictures(planned, batch, keys, own)
                for name in names:
                    shown[name][row] = pictures[name]
            yield batch | {f"{name}_shuffled": pixels for name, pixels in shown.items()}
        if lost and not self._told:
            logging.warning(
                "evals.%s: %d of %d examples could not be read, and count in no score",
                self._evaluator,
                lost,
                self.plan.num_rows,
            )
        self._told = True

    def _other_pictures(
        self, planned: PlannedBatch, batch: HostBatch, keys: Sequence[frozenset[str]], row: int
    ) -> dict[str, np.ndarray]:
        """The pictures of the first donor of a row of the global batch that can be read.

        Which one that is does not depend on what this process reads of the batch.
        """
        names = [name for name in _IMAGES if name in batch]
        for donor in donors(keys, planned.valid, row):
            if self.rows.start <= donor < self.rows.stop:
                mine = donor - self.rows.start
                if batch["valid"][mine]:
                    return {name: batch[name][mine] for name in names}
            else:
                with contextlib.suppress(BadExample):
                    record, size = int(planned.record[donor]), planned.bucket.image_size
                    return {name: self._picture(name, record, size) for name in names}
        return {name: self._picture_of_another_batch(name, keys[row]) for name in names}

    def _picture(self, name: str, record: int, size: int) -> np.ndarray:
        if name == "image":
            return self.source.image(record, size)
        return self.source.extras(record, size)[name]

    def _picture_of_another_batch(self, name: str, keys: frozenset[str]) -> np.ndarray:
        """``name`` of the first record of the set that can be read and shows none of these.

        Raises:
            ValueError: there is none.
        """
        for planned in self.planned():
            size = planned.bucket.image_size
            for record in planned.record[planned.valid].tolist():
                if keys.isdisjoint(self.source.image_key(record)):
                    with contextlib.suppress(BadExample):
                        return self._picture(name, record, size)
        raise ValueError(
            f"data.sources.{self.source.name}: only one picture of the evaluation set could be "
            "read, and there is no other to shuffle it with; check the files or raise num_examples"
        )


def _check_has(
    found: Source, evaluator: str, source: str, extra_fields: Sequence[str], pictures: bool
) -> None:
    """Refuse a source without what an evaluator reads."""
    key = f"evals.{evaluator}.source"
    if pictures and not has_pictures(found):
        raise ConfigError(
            key,
            f"data.sources.{source} has no pictures, which this evaluator shows",
            "Name a source that has some, or use an evaluator of texts, such as `text_task`",
        )
    if missing := [name for name in extra_fields if name not in found.extra_fields]:
        raise ConfigError(
            key,
            f"data.sources.{source} gives no {', '.join(missing)}, which its objective reads",
            "Name a source made for the task",
        )


def check_clean(
    key: str, train: Source, held_out: Source, known_as: str = "the training split"
) -> None:
    """Refuse a set of which another has pictures.

    Args:
        key: of the config, for the message.
        train: the other.
        held_out: the set.
        known_as: the other, for the message.

    Raises:
        ConfigError: it has; the message counts them.
    """
    if train.num_records is None or held_out.num_records is None:
        return  # made, not listed: the splits of such sources share nothing
    if not has_pictures(train):
        return  # texts: their sources keep the splits apart
    if shared := shared_images(train, held_out):
        raise ConfigError(
            key,
            f"{len(shared)} pictures are in {known_as} as well, such as {shared[0]}",
            "Use splits that share no picture",
        )


def donors(keys: Sequence[Collection[str]], valid: np.ndarray, row: int) -> Iterator[int]:
    """Whose pictures a row can be shown in place of its own, the first choice first.

    Of a list with several texts to a picture, the rows beside a row mostly hold the same picture:
    donors are the valid rows before it, the nearest first and going round, that share no picture
    with it.

    Args:
        keys: of the pictures of each row, see ``Source.image_key``.
        valid: bool [B]; rows that are not valid give their pictures to none.
        row: that is to see another picture.
    """
    own = set(keys[row])
    for back in range(1, len(keys)):
        other = (row - back) % len(keys)
        if valid[other] and own.isdisjoint(keys[other]):
            yield other
