"""Successive halving over config keys.

All candidates are trained at a small budget, the best third (for ``--halving=3``) at three times
that budget, and so on up to the whole budget. Every rung trains anew with a schedule of its own
that comes to its end, so that a rung compares finished runs.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tools.compare.cells import MIN_STEPS, Cells, steps_for
from tools.compare.comparison import POLL_SECONDS, check_settings
from tools.compare.configs import CommandError, NamedConfig, digest, parse_values
from tools.compare.rows import Row, Settings, line, make_row
from vlp_jax.infra.errors import ConfigError

Candidate = Mapping[str, Any]  # dotted key -> value

_SCALES: Mapping[str, Callable[[float, float, float], float | int]] = {
    "log": lambda low, high, share: low * (high / low) ** share,
    "lin": lambda low, high, share: low + (high - low) * share,
    "int": lambda low, high, share: math.floor(low + (high + 1 - low) * share),
}


@dataclasses.dataclass(frozen=True)
class Axis:
    """A key to search, and how a value is drawn.

    Attributes:
        key: dotted.
        values: to choose from; empty for a range.
        scale: "log", "lin" or "int", of a range.
        low, high: ends of the range; both of them included for "int".
    """

    key: str
    values: tuple[Any, ...] = ()
    scale: str = ""
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """Read KEY:A,B,C or KEY:log:LOW:HIGH (or lin, int).

        Raises:
            ConfigError: it is neither.
        """
        key, _, rest = text.partition(":")
        scale, *ends = rest.split(":")
        remedy = "Write KEY:A,B,C or KEY:log:LOW:HIGH; the scales are log, lin, int"
        if not ends:
            values = parse_values(rest)
            if not values:
                raise ConfigError(key, "nothing to search", remedy)
            return cls(key, values)
        try:
            low, high = (float(end) for end in ends)
        except ValueError:
            raise ConfigError(key, f"{rest!r} is no range", remedy) from None
        if scale not in _SCALES or not low < high or (scale == "log" and low <= 0):
            raise ConfigError(key, f"{rest!r} is no range", remedy)
        return cls(key, (), scale, low, high)

    def listed(self, trials: int) -> "Axis":
        """With its values, if it is a range of no more than ``trials`` whole numbers."""
        if self.scale != "int" or self.high - self.low >= trials:
            return self
        return Axis(self.key, tuple(range(math.ceil(self.low), math.floor(self.high) + 1)))

    def draw(self, share: float) -> Any:
        """The value at ``share`` in [0, 1) of the way."""
        if self.values:
            return self.values[int(share * len(self.values))]
        return _SCALES[self.scale](self.low, self.high, share)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate at a rung.

    Attributes:
        candidate: its keys.
        score: signed mean of the seeds that count; None where none does.
        rows: its cells; none where the candidate is rejected.
        rejected: why it takes no part; empty where it does.
    """

    candidate: Candidate
    score: float | None
    rows: tuple[Row, ...]
    rejected: str = ""


@dataclasses.dataclass(frozen=True)
class Rung:
    """All trials of one budget, best first; those without a score last.

    Attributes:
        fraction: of the whole budget.
        trials: of the candidates that came this far.
    """

    fraction: float
    trials: tuple[Trial, ...]


def candidates(axes: Sequence[Axis], trials: int) -> list[Candidate]:
    """The full grid where all axes list values, else up to ``trials`` draws with a fixed seed.

    Draws are stratified: each axis is cut into as many equal parts as there are trials, each of
    which is used once (a Latin hypercube), so that few trials still span every axis. Of equal
    draws one is kept, and a whole number with no more values than trials lists them.

    Args:
        axes: at least one.
        trials: how many, if an axis is a range.
    """
    keys = [axis.key for axis in axes]
    axes = [axis.listed(trials) for axis in axes]
    if all(axis.values for axis in axes):
        grid = itertools.product(*(axis.values for axis in axes))
        return [dict(zip(keys, values, strict=True)) for values in grid]
    rng = np.random.default_rng(0)
    parts = np.stack([rng.permutation(trials) for _ in axes], 1)
    shares = (parts + rng.random(parts.shape)) / trials
    drawn = [
        {axis.key: axis.draw(float(share)) for axis, share in zip(axes, row, strict=True)}
        for row in shares
    ]
    return [candidate for index, candidate in enumerate(drawn) if candidate not in drawn[:index]]


def rung_sizes(count: int, halving: int) -> list[int]:
    """Candidates at every rung: ``count``, then a ``halving``-th of the rung before, down to one.

    Raises:
        CommandError: ``halving`` below 2.
    """
    if halving < 2:
        raise CommandError(f"--halving={halving} keeps everyone; use 2 or more")
    sizes = [count]
    while sizes[-1] >= halving:
        sizes.append(sizes[-1] // halving)
    return sizes


def halve(
    named: Sequence[Candidate],
    halving: int,
    trial: Callable[[Candidate, float], Trial | None],
) -> list[Rung]:
    """Successive halving.

    Args:
        named: the candidates.
        halving: factor by which each rung has fewer candidates and a larger budget. One of which
            a seed was stopped stands behind all that are whole.
        trial: trains a candidate with a fraction of the budget; None: there is no time.

    Returns:
        The complete rungs, smallest budget first; with the last the search has finished.
    """
    sizes = rung_sizes(len(named), halving)
    left, rungs = list(named), []
    for index, size in enumerate(sizes):
        fraction = float(halving) ** (index + 1 - len(sizes))
        tried = [trial(candidate, fraction) for candidate in left[:size]]
        done = [item for item in tried if item is not None]
        if len(done) < len(tried):
            break
        done.sort(key=_standing, reverse=True)
        rungs.append(Rung(fraction, tuple(done)))
        left = [item.candidate for item in done if item.score is not None]
        if not left:
            break
    return rungs


def _standing(trial: Trial) -> tuple[bool, int, float]:
    """What trials are ordered by, the best last."""
    counted = sum(row.status == "counted" for row in trial.rows)
    whole = trial.score is not None and counted == len(trial.rows)
    return whole, counted, -math.inf if trial.score is None else trial.score


def search(
    settings: Settings,
    axes: Sequence[Axis],
    halving: int,
    trials: int,
    cells: Cells,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Search the same keys for every config, as far as there is time.

    A cell that another process is training is left to it, and a rung waited for until it is
    complete.

    Args:
        settings: configs, whole budget, seeds of every trial, fine-tuning, and the metric
            (``tune_metric``) that ranks; its fractions and rates are not used.
        axes: keys to search.
        halving: factor between rungs.
        trials: candidates, where an axis is a range.
        cells: finished ones, and the way to others.
        say: takes a line about every cell that is trained.

    Returns:
        label -> ``rungs`` (fraction, and trials best first), ``complete``, ``best`` (of the last
        rung; None before), ready for JSON.

    Raises:
        CommandError, ConfigError: what was asked for cannot be had; the message says why.
    """
    check_settings(settings)
    calibrate_candidates(settings, axes, halving, trials, cells)
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    while True:
        found = {
            named.label: _search_one(settings, named, axes, halving, trials, cells, say_once)
            for named in settings.configs
        }
        cells.tell_foreign_claims()
        if not cells.busy or not cells.can_start():
            return found
        cells.busy.clear()
        time.sleep(POLL_SECONDS)


def calibrate_candidates(
    settings: Settings, axes: Sequence[Axis], halving: int, trials: int, cells: Cells
) -> None:
    """Measure the cost of an update of every candidate whose keys change it.

    Raises:
        CommandError: the smallest budget buys hardly any update, or two candidates are one cell.
    """
    named_candidates = candidates(axes, trials)
    for named in settings.configs:
        _check_apart(named, named_candidates)
    rungs = len(rung_sizes(len(named_candidates), halving))
    smallest = settings.budget_seconds * float(halving) ** (1 - rungs)
    for named in settings.configs:
        for candidate in named_candidates:
            calibration = cells.calibration(named, candidate)
            if calibration is not None:
                steps_for(named.label, smallest, calibration)


def rejected_candidates(found: Mapping[str, Any]) -> dict[str, str]:
    """Label of a config -> why no candidate of its last rung counts; of no other config.

    Args:
        found: of ``search``.
    """
    return {
        label: one["rungs"][-1]["trials"][0]["rejected"] or "no candidate's run gives a score"
        for label, one in found.items()
        if one["complete"] and one["best"] is None
    }


def _check_apart(named: NamedConfig, named_candidates: Sequence[Candidate]) -> None:
    """Refuse keys of which cells take no notice, such as ``total_steps``, which the budget sets.

    Raises:
        CommandError: two candidates are one cell.
    """
    cells: dict[str, Candidate] = {}
    for candidate in named_candidates:
        config = named.run(
            steps=MIN_STEPS, seed=0, step_seconds=1.0, save_seconds=MIN_STEPS, overrides=candidate
        )
        other = cells.setdefault(digest(config), candidate)
        if other is not candidate:
            raise CommandError(
                f"--search: {dict(other)} and {dict(candidate)} give {named.label} the same run, "
                "since the command itself sets the length, the seed and what is saved; search "
                "other keys"
            )


def _search_one(
    settings: Settings,
    named: NamedConfig,
    axes: Sequence[Axis],
    halving: int,
    trials: int,
    cells: Cells,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The search for one config, as far as its cells are there or can be had."""
    named_candidates = candidates(axes, trials)
    rungs = halve(
        named_candidates,
        halving,
        lambda candidate, fraction: _trial(settings, named, candidate, fraction, cells, say),
    )
    last = len(rung_sizes(len(named_candidates), halving))
    complete = len(rungs) == last or (bool(rungs) and rungs[-1].trials[0].score is None)
    best = rungs[-1].trials[0] if complete else None
    return {
        "complete": complete,
        "best": dict(best.candidate) if best and best.score is not None else None,
        "rungs": [dataclasses.asdict(rung) for rung in rungs],
    }


def _trial(
    settings: Settings,
    named: NamedConfig,
    candidate: Candidate,
    fraction: float,
    cells: Cells,
    say: Callable[[str], None],
) -> Trial | None:
    reason = settings.rejection(cells.calibration(named, candidate))
    if reason:
        return Trial(candidate, None, (), reason)
    rate = float(candidate.get("schedule.peak", named.peak))
    words = ", ".join(f"{key}={value}" for key, value in candidate.items())
    rows = []
    for seed in range(settings.seeds):
        result = cells.obtain(
            named,
            budget_seconds=fraction * settings.budget_seconds,
            seed=seed,
            overrides=candidate,
            finetunes=settings.finetunes,
        )
        if result is not None:
            rows.append(make_row(settings, named.label, result, rate, fraction, seed))
            if result.name in cells.trained:
                say(f"[{words}] {line(rows[-1])}")
    if len(rows) < settings.seeds:
        return None
    metric = settings.tune_metric
    scores = [metric.sign * row.scores[metric.name] for row in rows if row.status == "counted"]
    return Trial(candidate, statistics.fmean(scores) if scores else None, tuple(rows))
