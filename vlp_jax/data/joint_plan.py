"""The plan of updates over several named batches: which of them an update reads, in what sizes.

    joint = JointPlan({"pairs": plan, "text": other})
    joint.batches(t)       # name -> PlannedBatch
    joint.bucket(t)        # (("pairs", Bucket(...)), ("text", Bucket(...)))
    joint.buckets()        # all that can occur

Every combination of the batches' sizes would be a program of its own. So batches meet in the order
of their text lengths, long with long, and what can occur is a chain in which no size ever falls
while another rises: as many programs as the batches have sizes together, at most. A combination
beside the chain is padded to the next one on it.

Or the batches take turns (``alternate``), one an update, which is what simultaneous updates are
compared with: the same batches in the same order, so that over as many examples both have seen the
same ones.
"""

import dataclasses
import zlib
from collections.abc import Collection, Mapping

import numpy as np

from vlp_jax.compress.buckets import MAX_SCHEDULED_BUCKETS, Bucket, StepBucket
from vlp_jax.data.plan import Plan
from vlp_jax.data.planned import PlannedBatch, PlannedSource

_CYCLE = 3600  # updates after which batches that take turns do so again


class JointPlan:
    """The batches of update t, by name, for every t >= 0: a pure function of the seed and of t.

    Attributes:
        plans: of each batch, sorted by name.
    """

    def __init__(
        self,
        plans: Mapping[str, Plan],
        most: int = MAX_SCHEDULED_BUCKETS,
        alternate: Mapping[str, float] | None = None,
    ):
        """Plans the first window of each batch where there are several, to see which sizes meet.

        Args:
            plans: of each batch, of windows of equal length.
            most: combinations of sizes that may occur; 1 or more.
            alternate: how many of the updates each batch gets, relative to the others; None: every
                update reads all of them.
        """
        self.plans = {name: plans[name] for name in sorted(plans)}
        if not self.plans or most < 1:
            raise ValueError(f"{len(self.plans)} batches in {most} sizes: both must be 1 or more")
        if len({plan.window_batches for plan in self.plans.values()}) > 1:
            raise ValueError("the plans of one run need windows of one length")
        self._most, self._alternate = most, alternate
        self._turns = None if alternate is None or len(self.plans) == 1 else self._cycle(alternate)
        # int64 [C, batches], rising in every column
        self._chain = self._sizes_that_meet(most) if self._turns is None else np.empty((0, 0))

    def part(self, names: Collection[str]) -> "JointPlan":
        """The plan of updates that read these batches alone."""
        return JointPlan({n: self.plans[n] for n in names}, self._most, self._alternate)

    def batches(self, t: int) -> dict[str, PlannedBatch]:
        """What is in every batch that update t reads, at the sizes of ``bucket(t)``.

        Raises:
            IndexError: t is negative.
        """
        return {name: self.batch(name, t) for name, _ in self.bucket(t)}

    def batch(self, name: str, t: int) -> PlannedBatch:
        """What is in one of the batches that update t reads."""
        planned = self.plans[name].batch(self.updates_before(name, t))
        return dataclasses.replace(planned, bucket=dict(self.bucket(t))[name])

    def updates_before(self, name: str, t: int) -> int:
        """How many of the updates before t read the batch of this name."""
        if self._turns is None:
            return t
        cycles, place = divmod(t, len(self._turns))
        mine = self._turns == list(self.plans).index(name)
        return int(cycles * mine.sum() + mine[:place].sum())

    def bucket(self, t: int) -> StepBucket:
        """The sizes of the batches of update t; guarded if one of them holds a guarded example."""
        if self._turns is not None:
            if t < 0:
                raise IndexError(f"there is no update {t}: steps count from 0")
            name = list(self.plans)[self._turns[t % len(self._turns)]]
            return ((name, self.plans[name].bucket(self.updates_before(name, t))),)
        own = {name: plan.bucket(t) for name, plan in self.plans.items()}
        lengths = np.asarray([bucket.text_length for bucket in own.values()])
        sizes = self._chain[np.argmax((self._chain >= lengths).all(axis=1))]
        guarded = any(bucket.guarded for bucket in own.values())
        return tuple(
            (name, dataclasses.replace(bucket, text_length=int(size), guarded=guarded))
            for (name, bucket), size in zip(own.items(), sizes, strict=True)
        )

    def buckets(self) -> tuple[StepBucket, ...]:
        """Every combination of sizes that can occur, by increasing text lengths."""
        plans = self.plans.items()
        if self._turns is not None:
            return tuple(((name, bucket),) for name, plan in plans for bucket in plan.buckets())
        return tuple(
            tuple(
                (name, Bucket(int(size), plan.image_size))
                for (name, plan), size in zip(plans, sizes, strict=True)
            )
            for sizes in self._chain
        )

    @property
    def take_turns(self) -> bool:
        """Whether an update reads one batch, not all."""
        return self._turns is not None

    @property
    def members(self) -> dict[str, "Member"]:
        """What a loader needs of each batch."""
        return {name: Member(self, name) for name in self.plans}

    @property
    def sources(self) -> tuple[PlannedSource, ...]:
        """Of all batches."""
        return tuple(planned for plan in self.plans.values() for planned in plan.sources)

    @property
    def edges(self) -> tuple[int, ...]:
        """Text lengths that some batch is padded to, increasing."""
        return tuple(sorted({edge for plan in self.plans.values() for edge in plan.edges}))

    @property
    def batch_size(self) -> int:
        """Examples of an update, all batches together; where they take turns, the rounded mean."""
        sizes = np.asarray([plan.batch_size for plan in self.plans.values()])
        return int(sizes.sum() if self._turns is None else np.rint(sizes[self._turns].mean()))

    @property
    def examples_per_epoch(self) -> int | None:
        """Records of all sources together; None if one is unbounded."""
        sizes = [plan.examples_per_epoch for plan in self.plans.values()]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def guarded_share(self) -> float:
        """Share of the updates with a guarded example, as is to be expected."""
        shares = np.asarray([plan.guarded_share for plan in self.plans.values()])
        if self._turns is not None:
            return float(shares[self._turns].mean())
        # Guarded batches come last in the order in which batches meet: the most hold the others.
        return float(shares.max())

    @property
    def mean_text_lengths(self) -> dict[str, float]:
        """Mean tokens of a text of each batch, special ones included."""
        return {name: plan.mean_text_length for name, plan in self.plans.items()}

    @property
    def window_batches(self) -> int:
        """Updates whose batches are sorted together."""
        return next(iter(self.plans.values())).window_batches

    def fingerprint(self, t: int) -> int:
        """A 32-bit number that tells the batches of update t from others; of one batch, its own."""
        prints = [batch.fingerprint() for batch in self.batches(t).values()]
        return prints[0] if len(prints) == 1 else zlib.crc32(np.asarray(prints).tobytes())

    def padding_waste(self, num_updates: int) -> float:
        """Share of text tokens that are padding in the first ``num_updates`` updates."""
        used = padded = 0
        for t in range(num_updates):
            for batch in self.batches(t).values():
                used += int(batch.length.sum())
                padded += len(batch) * batch.bucket.text_length
        return 1.0 - used / padded

    def _cycle(self, shares: Mapping[str, float]) -> np.ndarray:
        """The turns of the batches, over and over: their numbers, int64 [T].

        Each comes as evenly as its share allows: always the one that is furthest behind. At random,
        as is usual, would need a table of all updates to say how many of a batch came before.
        """
        wanted = np.asarray([shares[name] for name in self.plans], np.float64)
        wanted = wanted / wanted.sum()
        if wanted.min() <= 0 or not np.isfinite(wanted).all():
            raise ValueError(f"shares {dict(shares)} of the updates: all must be above 0")
        turns: list[int] = []
        had = np.zeros(len(wanted))
        for t in range(_CYCLE):
            turns.append(int(np.argmax(wanted * (t + 1) - had)))
            had[turns[-1]] += 1
        if not had.all():
            raise ValueError(f"shares {dict(shares)} of the updates: one is below 1 in {_CYCLE}")
        return np.asarray(turns)

    def _sizes_that_meet(self, most: int) -> np.ndarray:
        plans = list(self.plans.values())
        own = [[bucket.text_length for bucket in plan.buckets()] for plan in plans]
        if len(plans) == 1:
            return np.asarray(own[0])[:, None]
        # What has not met in the first window is padded to what has, at the longest to the last.
        met = [[plan.bucket(t).text_length for plan in plans] for t in range(self.window_batches)]
        pairs, counts = np.unique([*met, [max(sizes) for sizes in own]], axis=0, return_counts=True)
        chain = np.maximum.accumulate(pairs, axis=0)
        chain, place = np.unique(chain, axis=0, return_inverse=True)
        weight = np.bincount(place.reshape(-1), counts)
        rows = np.asarray([plan.batch_size for plan in plans])
        while len(chain) > most:
            # Without a link, what met in it is padded to the next: leave the one that costs least.
            cost = weight[:-1] * ((chain[1:] - chain[:-1]) * rows).sum(axis=1)
            link = int(np.argmin(cost))
            weight[link + 1] += weight[link]
            chain, weight = np.delete(chain, link, axis=0), np.delete(weight, link)
        return chain


@dataclasses.dataclass(frozen=True)
class Member:
    """One batch of a joint plan, as a loader reads it; see ``planned.BatchPlan``.

    Attributes:
        joint: the plan.
        name: of the batch.
    """

    joint: JointPlan
    name: str

    @property
    def _plan(self) -> Plan:
        return self.joint.plans[self.name]

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        return self._plan.batch_size

    @property
    def replaces_damaged(self) -> bool:
        """A damaged record's place is taken by another."""
        return self._plan.replaces_damaged

    @property
    def sources(self) -> tuple[PlannedSource, ...]:
        """The mixture."""
        return self._plan.sources

    def batch(self, t: int) -> PlannedBatch:
        """Global batch t of this name; where batches take turns, that of its turn t."""
        if self.joint.take_turns:
            return self._plan.batch(t)
        return self.joint.batch(self.name, t)

    def substitutes(self, t: int, row: int) -> np.ndarray:
        """As ``Plan.substitutes``."""
        return self._plan.substitutes(t, row)
