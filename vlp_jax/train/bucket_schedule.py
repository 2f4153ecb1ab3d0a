"""Which views of the images each update encodes: a schedule over the budget spent.

    config.compression.buckets = ("p32@64", "p16@64k12", "p16@64", "p8@64")   # cheapest first
    config.compression.schedule = "staged"

A bucket is what an update encodes of its images, written as ``View.label`` has it: patches of so
many pixels, of an image of so many pixels, of which ``k`` patches are kept (all where it is not
said); ``whole`` is everything at the model's own sizes. After a ``/`` stands the second view of an
objective that has two (query/key).

The length of a run is its budget: so many updates of whole images. An update of a cheaper bucket
spends less of it, and a run has as many more of them as the budget buys; so runs of one length cost
the same under every schedule. What each bucket costs, as a share of an update of whole images, is
given with the schedule or follows from FLOPs. So the bucket of step t is a function of t: resumed
runs and other hosts find the same one.

Kinds, fact sheet of accelerated invariance pretraining, section 3:

    constant   one bucket
    staged     one after the other, each for its share of the budget
    reversed   the same, from the last to the first
    linear     the cost rises linearly with the budget spent; the bucket nearest to it is used
    random     drawn for each update, so that each gets its share of the budget
    online     decided during the run, by the gradient errors of its own batches, in one of
               ``decisions`` equal parts of the budget after the other; costs never fall. What
               was decided is kept in the state (``train.online``)

Examples that compression hurts may be guarded: their batches are encoded whole (``data.guarded``),
which counts in what every update costs in the mean. With ``tail_percent`` the last part of the
budget goes to whole images, after any of the kinds. A ``file`` (``tools.bench buckets --out``)
holds buckets, costs and stages. What a run was begun with is kept in its workdir, so that neither a
new formula nor a new file moves its stages when it goes on.

Durations of ``config.schedule`` count updates of whole images, as the length of the run does; those
of evaluations, checkpoints and logs count updates.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import (
    MAX_SCHEDULED_BUCKETS,
    WHOLE,
    View,
    Views,
    bucket_text,
    parse_bucket,
    parse_views,
)
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text

KINDS = ("constant", "staged", "reversed", "linear", "random", "online")
_BLOCK = 4096  # random draws at a time
_FILE = "compression.file"

Stages = Sequence[tuple[float, int]]  # (share of the budget at its end, bucket), in order


@dataclasses.dataclass(frozen=True)
class BucketSchedule:
    """The bucket of every update of a run.

    Attributes:
        buckets: what is encoded in each.
        costs: of an update in each, as a share of one of whole images.
        index: int [T], the bucket of each update.
        spent: float64 [T + 1], updates of whole images that would have cost as much as all before.
        decided_at: the updates before which an online schedule is decided.
    """

    buckets: tuple[Views, ...]
    costs: tuple[float, ...]
    index: np.ndarray
    spent: np.ndarray
    decided_at: tuple[int, ...] = ()

    @property
    def total_steps(self) -> int:
        """T, updates of the run."""
        return len(self.index)

    @property
    def compresses(self) -> bool:
        """Whether anything but whole images is, or may be, encoded."""
        return bool(self.decided_at) or any(
            self.buckets[number] for number in np.unique(self.index)
        )

    def views(self, step: int) -> Views:
        """What update ``step`` encodes; after the last one, what that encodes."""
        return self.buckets[self._number(step)]

    def cost(self, step: int) -> float:
        """What update ``step`` costs, as a share of one of whole images."""
        return self.costs[self._number(step)]

    def progress(self, step: int) -> float:
        """Share of the budget spent before update ``step``, in [0, 1]."""
        return min(1.0, float(self.spent[min(step, self.total_steps)] / self.spent[-1]))

    def _number(self, step: int) -> int:
        return int(self.index[min(step, self.total_steps - 1)])


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A schedule whose costs are known, for a budget of any size.

    Attributes:
        buckets: what is encoded in each.
        costs: of an update in each, as a share of one of whole images.
        stages: in order; None: drawn at random.
        shares: of the budget, of each bucket, where it is drawn.
        tail: share of the budget, at its end, for whole images.
        decisions: parts of the budget that an online schedule is decided for; 0: there are none.
        guarded: share of the updates that encode whole images all the same (``data.guarded``), by
            which those of any bucket cost more in the mean.
    """

    buckets: tuple[Views, ...]
    costs: tuple[float, ...]
    stages: Stages | None
    shares: tuple[float, ...] = ()
    tail: float = 0.0
    decisions: int = 0
    guarded: float = 0.0

    @classmethod
    def read(cls, file: pathlib.Path, made_for: Mapping[str, Any] | None = None) -> "Resolved":
        """What ``write`` has written.

        Args:
            file: of ``compression.file``, or kept in a workdir.
            made_for: of this run; None: it is not compared.

        Raises:
            ConfigError: it is none, or was made for another run; OSError: it cannot be read.
        """
        try:
            held = json.loads(file.read_text())
            buckets = tuple(() if t == WHOLE else parse_views(t, _FILE) for t in held["buckets"])
            stages = held["stages"]
            found = cls(
                buckets,
                tuple(float(cost) for cost in held["costs"]),
                stages and [(float(end), int(number)) for end, number in stages],
                tuple(float(share) for share in held["shares"]),
                float(held["tail"]),
                int(held.get("decisions", 0)),
                float(held.get("guarded", 0.0)),
            )
            theirs = dict(held["made_for"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(_FILE, f"{file} is no schedule ({error})", "Make it anew") from error
        if not found._sound():
            raise ConfigError(
                _FILE, f"{file}: its buckets, costs and stages do not fit", "Make it anew"
            )
        differing = sorted(_differing(theirs, made_for)) if made_for is not None else []
        if differing:
            raise ConfigError(
                _FILE,
                f"{file} was made for another model or other data; {', '.join(differing)} differ",
                "Make one for this config (tools.bench buckets --out)",
            )
        return found

    def write(
        self, file: pathlib.Path, made_for: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Write what ``read`` reads.

        Args:
            file: to be written.
            made_for: what its costs hold for, see ``Program.made_for``.
            facts: how it was made: command, machine.
        """
        held = {
            "buckets": [bucket_text(views) for views in self.buckets],
            "costs": self.costs,
            "stages": self.stages,
            "shares": self.shares,
            "tail": self.tail,
            "decisions": self.decisions,
            "guarded": self.guarded,
            "made_for": made_for,
            "facts": facts,
        }
        write_text(file, json.dumps(held, indent=2) + "\n")

    def over(self, full_steps: int, seed: int, decided: Sequence[int] = ()) -> BucketSchedule:
        """The schedule of a run.

        Args:
            full_steps: the budget, in updates of whole images.
            seed: of the run, for what is drawn.
            decided: buckets of the first parts of an online schedule; the last one counts for the
                parts that follow, and before the first decision it is the cheapest.
        """
        buckets = self.buckets
        costs = tuple(cost + self.guarded * (1.0 - cost) for cost in self.costs)
        if self.tail and () not in buckets:
            buckets, costs = (*buckets, ()), (*costs, 1.0)
        budget = full_steps * (1 - self.tail)
        decided_at: tuple[int, ...] = ()
        if self.decisions:
            count = self.decisions
            numbers = [*decided, *[decided[-1] if decided else 0] * (count - len(decided))]
            parts = [((i + 1) / count, number) for i, number in enumerate(numbers)]
            index, spent = _in_stages(budget, costs, parts)
            # A part ends up to half of its last update before or after its share.
            slack = [0.0, *(costs[number] / 2 for number in numbers[:-1])]
            begins = [budget * i / count - slack[i] - 1e-9 for i in range(count)]
            decided_at = tuple(int(step) for step in np.searchsorted(spent, begins))
        elif self.stages is None:
            index, spent = _random(budget, costs[: len(self.shares)], self.shares, seed)
        else:
            index, spent = _in_stages(budget, costs, self.stages)
        rest = round(full_steps - spent[-1]) if self.tail else 0
        if rest:
            index = np.concatenate([index, np.full(rest, buckets.index(()), np.int8)])
            spent = np.concatenate([spent, spent[-1] + np.arange(1.0, rest + 1)])
        return BucketSchedule(buckets, costs, index, spent, decided_at)

    def _sound(self) -> bool:
        count = len(self.buckets)
        ends = [end for end, _ in self.stages or ()]
        staged = (
            ends == sorted(ends)
            and math.isclose(ends[-1], 1.0, rel_tol=1e-9)
            and all(0 <= number < count for _, number in self.stages or ())
            if ends
            else len(self.shares) == count or self.decisions > 0
        )
        positive = all(0 < cost < math.inf for cost in self.costs)
        return 0 < count == len(self.costs) <= MAX_SCHEDULED_BUCKETS and positive and staged


def resolve(
    config: ConfigDict,
    whole: View,
    num_views: int,
    cost_of: Callable[[Views], float],
    made_for: Mapping[str, Any],
) -> Resolved:
    """The schedule that a config asks for.

    Args:
        config: ``config.compression``.
        whole: all of an image, at the model's own sizes.
        num_views: views that the objectives tell apart.
        cost_of: what an update of a bucket costs by FLOPs, as a share of one of whole images.
        made_for: of the run, against which a file is held.

    Raises:
        ConfigError: a key or the file does not fit; the message names it.
    """
    if not 0.0 <= config.tail_percent < 100.0:
        raise ConfigError(
            "compression.tail_percent", f"{config.tail_percent}", "Use a share from 0 to below 100"
        )
    tail = config.tail_percent / 100
    others = [name for name in ("schedule", "buckets", "costs", "shares") if config[name]]
    if config.file:
        if others:
            raise ConfigError(
                f"compression.{others[0]}",
                f"stands beside {_FILE}, which holds its own",
                "Remove one of them",
            )
        found = Resolved.read(pathlib.Path(config.file), made_for)
        return dataclasses.replace(found, tail=tail or found.tail)
    kind = config.schedule
    if not kind:
        alone = [name for name in ("tail_percent", "guard_file") if config[name]]
        unread = [*others, *alone]
        if unread:
            raise ConfigError(
                "compression.schedule",
                f"is empty, but compression.{unread[0]} is given",
                f"Use one of {', '.join(KINDS)}",
            )
        return Resolved(((),), (1.0,), [(1.0, 0)])
    if kind not in KINDS:
        raise ConfigError(
            "compression.schedule", f"{kind!r} is no kind", f"Use one of {', '.join(KINDS)}"
        )
    buckets = _buckets(config, whole, num_views)
    costs = _costs(config, buckets, cost_of)
    shares = _shares(config, len(buckets))
    if kind == "online":
        _check_online(config, costs)
        return Resolved(buckets, costs, None, (), tail, config.decisions)
    stages = None if kind == "random" else stages_of(config, costs)
    return Resolved(buckets, costs, stages, shares, tail)


def stages_of(config: ConfigDict, costs: Sequence[float]) -> Stages:
    """The stages of a kind that has any.

    Args:
        config: ``config.compression``.
        costs: of an update in each bucket, as a share of one of whole images.

    Raises:
        ConfigError: the kind has none, or does not fit; the message names the key.
    """
    kind, count = config.schedule, len(costs)
    if kind in ("constant", "linear") and config.shares:
        raise ConfigError(
            "compression.shares", f"are not read by {kind!r}", "Remove them, or use staged"
        )
    if kind == "constant":
        if count != 1:
            raise ConfigError(
                "compression.buckets", f"{count} of them for 'constant'", "Give one, or use staged"
            )
        return [(1.0, 0)]
    if kind == "linear":
        _check_rising(costs, "linear")
        middles = [(a + b) / 2 for a, b in itertools.pairwise(costs)]
        rise = costs[-1] - costs[0]
        ends = [(middle - costs[0]) / rise for middle in middles]
        return [*zip(ends, range(count - 1), strict=True), (1.0, count - 1)]
    if kind in ("random", "online"):
        raise ConfigError(
            "compression.schedule", f"{kind!r} has no stages to be written", "Use another kind"
        )
    order = range(count) if kind == "staged" else range(count - 1, -1, -1)
    shares = _shares(config, count)
    ends = [*itertools.accumulate(shares[number] for number in order)][:-1]
    return [*zip([*ends, 1.0], order, strict=True)]  # 1, whatever a sum of shares comes to


def _check_rising(costs: Sequence[float], kind: str) -> None:
    if any(after <= before for before, after in itertools.pairwise(costs)) or len(costs) < 2:
        raise ConfigError(
            "compression.buckets",
            f"their costs {tuple(round(cost, 3) for cost in costs)} do not rise, as {kind!r} needs",
            "Order them from the cheapest to the dearest",
        )


def _check_online(config: ConfigDict, costs: Sequence[float]) -> None:
    _check_rising(costs, "online")
    if config.shares:
        raise ConfigError("compression.shares", "are not read by 'online'", "Remove them")
    if config.decisions < 1:
        raise ConfigError("compression.decisions", f"{config.decisions}", "Use 1 or more")
    if not 0.0 < config.overhead_percent < 100.0:
        raise ConfigError(
            "compression.overhead_percent",
            f"{config.overhead_percent}",
            "Use a share above 0 and below 100",
        )


def count_buckets(config: ConfigDict) -> int:
    """How many buckets a section of ``compression`` names, before they are checked."""
    count = len(config.buckets) or 1
    if config.file:
        count = len(Resolved.read(pathlib.Path(config.file)).buckets)
    whole = config.tail_percent > 0 or bool(config.guard_file)
    return count + (whole and WHOLE not in config.buckets)


def _buckets(config: ConfigDict, whole: View, num_views: int) -> tuple[Views, ...]:
    key = "compression.buckets"
    buckets = tuple(parse_bucket(text, key, whole) for text in config.buckets)
    if not buckets:
        raise ConfigError(key, "is empty", "Give some, such as ('p16@64', 'whole')")
    if len(buckets) > MAX_SCHEDULED_BUCKETS:
        raise ConfigError(
            key,
            f"{len(buckets)} buckets; a run compiles at most {MAX_SCHEDULED_BUCKETS}",
            "Give fewer",
        )
    if len(set(buckets)) < len(buckets):
        raise ConfigError(key, "names one twice", f"Give each once; {whole.label} is {WHOLE!r}")
    for views in buckets:
        if len(views) > num_views:
            raise ConfigError(
                key,
                f"{bucket_text(views)!r} has {len(views)} views, of which the objectives of this "
                f"run tell {num_views} apart",
                f"Give {num_views}",
            )
    return buckets


def _costs(
    config: ConfigDict, buckets: Sequence[Views], cost_of: Callable[[Views], float]
) -> tuple[float, ...]:
    key = "compression.costs"
    costs = tuple(config.costs) or tuple(cost_of(views) for views in buckets)
    if len(costs) != len(buckets):
        raise ConfigError(
            key,
            f"{len(costs)} costs of {len(buckets)} buckets",
            "Give one for each, or none: by FLOPs",
        )
    if not all(_is_number(cost) and 0 < cost < math.inf for cost in costs):
        raise ConfigError(key, f"{costs} are no costs", "Use numbers above 0")
    for views, cost in zip(buckets, costs, strict=True):
        if not views and not math.isclose(cost, 1.0, rel_tol=1e-6):
            raise ConfigError(
                key, f"{cost} for {WHOLE!r}, in whose updates costs are counted", "Give 1.0"
            )
    return costs


def _shares(config: ConfigDict, count: int) -> tuple[float, ...]:
    """Of the budget, one for each bucket; they add up to 1."""
    key = "compression.shares"
    shares = tuple(config.shares) or (1.0,) * count
    sound = all(_is_number(share) and 0 <= share < math.inf for share in shares)
    if len(shares) != count or not sound:
        raise ConfigError(
            key,
            f"{shares} are no shares of {count} buckets",
            "Give a number of 0 or more for each, or none: equal ones",
        )
    total = sum(shares)
    if not total:
        raise ConfigError(key, "all are 0", "Give one above 0")
    return tuple(share / total for share in shares)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_stages(
    budget: float, costs: Sequence[float], stages: Stages
) -> tuple[np.ndarray, np.ndarray]:
    """Bucket of each update, and what was spent before each: stages end at their shares, rounded.

    There is one update at least, in the last stage.
    """
    index: list[np.ndarray] = []
    spent: list[np.ndarray] = [np.zeros(1)]
    now, last = 0.0, stages[-1][1]
    for end, number in stages:
        steps = max(0, round((end * budget - now) / costs[number]))
        index.append(np.full(steps, number, np.int8))
        spent.append(now + costs[number] * np.arange(1, steps + 1))
        now += steps * costs[number]
    if not now:
        index.append(np.full(1, last, np.int8))
        spent.append(np.full(1, costs[last]))
    return np.concatenate(index), np.concatenate(spent)


def _random(
    budget: float, costs: Sequence[float], shares: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As ``_in_stages``: a bucket's chance is its share of the budget over its cost."""
    chance = np.asarray(shares) / np.asarray(costs)
    chance /= chance.sum()
    draw = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0xB0C4E7,)))
    index = np.zeros(0, np.int8)
    while np.asarray(costs)[index].sum() < budget:
        more = draw.choice(len(costs), _BLOCK, p=chance).astype(np.int8)
        index = np.concatenate([index, more])
    spent = np.concatenate([[0.0], np.cumsum(np.asarray(costs)[index])])
    steps = max(1, int(np.searchsorted(spent, budget - min(costs) / 2)))
    return index[:steps], spent[: steps + 1]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys whose values differ."""
    found = set()
    for key in {*one, *other}:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            found.add(f"{prefix}{key}")
    return found
