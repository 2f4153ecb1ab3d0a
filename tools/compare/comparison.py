"""Which cells a comparison needs, in which order, and what they say together."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tools.compare.cells import Cells, Measurement, Result
from tools.compare.configs import CommandError, NamedConfig
from tools.compare.statistics import Budget, deviation, time_to_score
from vlp_jax.infra import units
from vlp_jax.infra.errors import ConfigError

# Names of these words are better when they are lower.
LOWER_IS_BETTER = ("loss", "perplexity")
OFF_BUDGET = 0.1
COSTS = ("seconds", "samples", "flops")
DEFAULT_FRACTIONS = (1 / 4, 1 / 2.5, 1 / 1.5, 1.0)

Status = Literal["counted", "rejected", "stopped"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure to compare by.

    Attributes:
        name: as an evaluator calls it, such as ``vqa/accuracy``.
        sign: 1 where more is better, -1 where less is.
    """

    name: str
    sign: int

    @classmethod
    def parse(cls, text: str) -> "Metric":
        """Read NAME, NAME:max or NAME:min; without either, losses are to be low, all else high."""
        name, _, mode = text.partition(":")
        if mode not in ("", "max", "min"):
            raise CommandError(f"--metric: {text!r} ends in neither :max nor :min")
        low = mode == "min" or (not mode and units.unit_word(name) in LOWER_IS_BETTER)
        return cls(name, -1 if low else 1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        configs: the methods.
        budget_seconds: the whole budget, of training.
        fractions: of it, increasing, the last is 1.
        seeds: runs of every config at every budget, seeds 0 and up.
        rates: grid of learning rates: numbers, or factors of a config's own such as "x0.5"; the
            same for every config.
        metrics: to compare by.
        tune_metric: by which rates are chosen.
        finetunes: run from the checkpoint of every cell.
        baselines: labels; the best of them at the whole budget is the baseline of a metric.
        max_input_wait: a run that waits for input for a larger share of its time is rejected.
    """

    configs: tuple[NamedConfig, ...]
    budget_seconds: float
    fractions: tuple[float, ...]
    seeds: int
    rates: tuple[str, ...]
    metrics: tuple[Metric, ...]
    tune_metric: Metric
    finetunes: tuple[NamedConfig, ...]
    baselines: tuple[str, ...]
    max_input_wait: float

    def to_json(self) -> dict[str, Any]:
        """As tables say it."""
        return {
            "configs": {named.label: named.source for named in self.configs},
            "finetunes": {named.label: named.source for named in self.finetunes},
            "budget_seconds": self.budget_seconds,
            "fractions": list(self.fractions),
            "seeds": self.seeds,
            "rates": list(self.rates),
            "metrics": {m.name: "max" if m.sign > 0 else "min" for m in self.metrics},
            "tune_metric": self.tune_metric.name,
            "baselines": list(self.baselines),
            "max_input_wait": self.max_input_wait,
            "teachers": {n.label: list(n.teachers) for n in self.configs if n.teachers},
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell in the tables: what was asked for and what came of it.

    Attributes:
        cell: name of its folder.
        config: label.
        rate: peak learning rate.
        seed: of the run.
        fraction: nominal share of the budget.
        asked_seconds: the share in seconds.
        status: only a "counted" row enters a mean.
        reason: why it is not counted.
        off_budget: its time differs from the share by more than a tenth.
        steps, samples, flops, seconds: trained.
        compile_seconds: not part of them.
        input_wait_fraction: share of ``seconds`` spent waiting for input.
        finetune_seconds: training seconds of the fine-tuning runs, not part of ``seconds``.
        scores: metric -> value; empty where the run was not evaluated.
        versions: of the packages that computed.
        commit: of the code.
    """

    cell: str
    config: str
    rate: float
    seed: int
    fraction: float
    asked_seconds: float
    status: Status
    reason: str
    off_budget: bool
    steps: int
    samples: int
    flops: float
    seconds: float
    compile_seconds: float
    input_wait_fraction: float
    finetune_seconds: float
    scores: Mapping[str, float]
    versions: Mapping[str, str]
    commit: str


def compare(settings: Settings, cells: Cells, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train what is missing as long as there is time, and put together what there is.

    The rates of a config are compared at its smallest budget by seed 0, and the best one is used
    at all budgets. Small budgets and low seeds come first, so that each invocation leaves every
    config with the same cells or nearly so.

    Args:
        settings: what is compared.
        cells: finished ones, and the way to others.
        say: takes a line about every cell.

    Returns:
        The comparison, ready for JSON; see ``summarise``.
    """
    check_metrics(settings)
    rows: dict[tuple[str, str, float], Row] = {}

    def obtain(named: NamedConfig, rate: float, fraction: float, seed: int) -> Row | None:
        result = cells.obtain(
            named,
            budget_seconds=fraction * settings.budget_seconds,
            seed=seed,
            overrides={"schedule.peak": rate},
            finetunes=settings.finetunes,
        )
        if result is None:
            return None
        row = make_row(settings, named.label, result, rate, fraction, seed)
        key = (named.label, row.cell, fraction)
        if key not in rows:
            say(line(row))
        return rows.setdefault(key, row)

    for named in settings.configs:
        cells.step_seconds(named, {})
    first = settings.fractions[0]
    grid = {named.label: grid_of_rates(settings.rates, named.peak) for named in settings.configs}
    tried: dict[str, list[Row | None]] = {named.label: [] for named in settings.configs}
    for index in range(len(settings.rates)):
        for named in settings.configs:
            tried[named.label].append(obtain(named, grid[named.label][index], first, 0))
    chosen = {label: best_rate(rows, settings.tune_metric) for label, rows in tried.items()}
    for seed in range(settings.seeds):
        for fraction in settings.fractions:
            for named in settings.configs:
                rate = chosen[named.label]
                if rate is not None:
                    obtain(named, rate, fraction, seed)
    planned = len(settings.configs) * (
        len(settings.rates) - 1 + settings.seeds * len(settings.fractions)
    )
    return summarise(settings, list(rows.values()), grid, chosen) | {"planned": planned}


def grid_of_rates(rates: Sequence[str], own: float) -> list[float]:
    """The grid of a config: ``"x0.5"`` is half its own rate, ``"1e-3"`` is itself.

    Raises:
        CommandError: neither of them, not above 0, or twice the same.
    """
    grid = []
    for text in rates:
        try:
            rate = own * float(text[1:]) if text.startswith("x") else float(text)
        except ValueError:
            rate = math.nan
        if not rate > 0:
            raise CommandError(f"--rates: {text!r} is no rate; give such as 1e-3 or x0.5")
        if rate in grid:
            raise CommandError(f"--rates: {rate:g} is in the grid twice")
        grid.append(rate)
    return grid


def best_rate(tried: Sequence[Row | None], metric: Metric) -> float | None:
    """The rate of the best counted row; None before all are there, or where none is counted."""
    complete = [row for row in tried if row is not None]
    counted = [row for row in complete if row.status == "counted"]
    if len(complete) < len(tried) or not counted:
        return None
    return max(counted, key=lambda row: metric.sign * row.scores[metric.name]).rate


def make_row(
    settings: Settings, label: str, result: Result, rate: float, fraction: float, seed: int
) -> Row:
    """What the tables say of a cell; its own label may differ where two configs are the same."""
    measured = result.measurement
    status, reason = _status(settings, result)
    asked = fraction * settings.budget_seconds
    scores = {}
    if status == "counted":
        wanted = {metric.name for metric in (*settings.metrics, settings.tune_metric)}
        scores = {name: find_metric(result, name) for name in sorted(wanted)}
        strange = [name for name, value in scores.items() if not math.isfinite(value)]
        if strange:
            status, reason, scores = "stopped", f"{', '.join(strange)} not finite", {}
    return Row(
        cell=result.name,
        config=label,
        rate=rate,
        seed=seed,
        fraction=fraction,
        asked_seconds=asked,
        status=status,
        reason=reason,
        off_budget=abs(measured.seconds - asked) > OFF_BUDGET * asked,
        steps=measured.steps,
        samples=measured.samples,
        flops=measured.samples * measured.flops_per_sample,
        seconds=measured.seconds,
        compile_seconds=measured.compile_seconds,
        input_wait_fraction=measured.input_wait_fraction,
        finetune_seconds=sum(tuned.seconds for tuned in result.finetuning.values()),
        scores=scores,
        versions=dict(result.versions),
        commit=result.commit,
    )


def check_metrics(settings: Settings) -> None:
    """Refuse a metric of which it is plain beforehand that no run will have it, or two will.

    Raises:
        ConfigError: its evaluator is in no fine-tuning config or in several; or, without
            fine-tuning, is missing in one of the configs.
    """
    groups = [settings.finetunes] if settings.finetunes else [(c,) for c in settings.configs]
    for metric in (*settings.metrics, settings.tune_metric):
        evaluator = metric.name.partition("/")[0]
        for runs in groups:
            having = [named.label for named in runs if evaluator in named.config.evals]
            if len(having) != 1:
                known = sorted({name for named in runs for name in named.config.evals})
                raise ConfigError(
                    f"evals.{evaluator}",
                    f"the metric {metric.name!r} needs this evaluator in one of "
                    f"{[named.source for named in runs]}, found in {having or 'none'}",
                    f"Use one of {known}" if known else "Add it",
                )


def find_metric(result: Result, name: str) -> float:
    """A figure of a cell: of its fine-tuning runs, or without any of the run itself.

    Raises:
        ConfigError: no run has it, or two have.
    """
    runs: Sequence[Measurement] = list(result.finetuning.values()) or [result.measurement]
    found = [run.metrics[name] for run in runs if name in run.metrics]
    if len(found) == 1:
        return found[0]
    known = sorted({key for run in runs for key in run.metrics})
    if found:
        raise ConfigError("evals", f"{name!r} is a figure of {len(found)} runs", "Rename one")
    raise ConfigError("evals", f"{name!r} is no figure of {result.label}", f"Use one of {known}")


def _status(settings: Settings, result: Result) -> tuple[Status, str]:
    stopped = [
        run.reason
        for run in (result.measurement, *result.finetuning.values())
        if run.status == "stopped"
    ]
    if stopped:
        return "stopped", stopped[0]
    waited = result.measurement.input_wait_fraction
    if waited > settings.max_input_wait:
        limit = units.format_value("fraction", settings.max_input_wait)
        share = units.format_value("fraction", waited)
        return "rejected", f"waited for input {share} of the time, more than {limit}"
    return "counted", ""


def line(row: Row) -> str:
    """A finished cell in one line, for the terminal."""
    scores = ", ".join(f"{n} {units.format_value(n, v)}" for n, v in row.scores.items())
    return (
        f"{row.config}: budget {row.fraction:.3g}, rate {row.rate:.3g}, seed {row.seed}: "
        f"{row.steps:,} steps in {row.seconds:.1f} s of {row.asked_seconds:.1f} s; "
        + (scores or f"{row.status}: {row.reason}")
    )


def summarise(
    settings: Settings,
    rows: Sequence[Row],
    grid: Mapping[str, Sequence[float]],
    chosen: Mapping[str, float | None],
) -> dict[str, Any]:
    """Means, spreads and times to score of counted rows.

    Args:
        settings: of the comparison.
        rows: all cells that there are.
        grid: label -> rates tried.
        chosen: label -> the best of them, None where it is not known yet.

    Returns:
        ``rows``; ``rates`` (label -> grid and choice); ``curves`` (metric -> label -> a dict for
        each budget: fraction, seeds, mean cost of every kind, mean and standard deviation of the
        score); ``time_to_score`` (metric -> baseline, and label -> kind of cost -> share).
    """
    curves: dict[str, Any] = {}
    times: dict[str, Any] = {}
    labels = [named.label for named in settings.configs]
    for metric in settings.metrics:
        budgets = {
            label: [
                group
                for fraction in settings.fractions
                if (group := _counted(rows, label, fraction, chosen[label]))
            ]
            for label in labels
        }
        curves[metric.name] = {
            label: [_point(group, metric) for group in groups] for label, groups in budgets.items()
        }
        whole = {
            label: metric.sign * statistics.fmean(row.scores[metric.name] for row in groups[-1])
            for label, groups in budgets.items()
            if groups and groups[-1][0].fraction == settings.fractions[-1]
        }
        candidates = [label for label in settings.baselines if label in whole]
        # With a baseline still to be trained, the best of the others would be a weaker one.
        if len(candidates) == len(settings.baselines):
            baseline = max(candidates, key=lambda label: whole[label])
            times[metric.name] = {
                "baseline": baseline,
                "score": metric.sign * whole[baseline],
                "configs": _times(budgets, baseline, metric),
            }
    return {
        "settings": settings.to_json(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "rates": {label: {"grid": grid[label], "chosen": chosen[label]} for label in labels},
        "curves": curves,
        "time_to_score": times,
    }


def _counted(rows: Sequence[Row], label: str, fraction: float, rate: float | None) -> list[Row]:
    """The rows of a config at one budget that count, at the chosen rate."""
    return [
        row
        for row in rows
        if (row.config, row.fraction, row.rate, row.status) == (label, fraction, rate, "counted")
    ]


def _times(budgets: Mapping[str, list[list[Row]]], baseline: str, metric: Metric) -> dict[str, Any]:
    """Label -> kind of cost -> the time to the baseline's score."""
    times: dict[str, Any] = {}
    for cost in COSTS:
        curves = {
            label: [_budget(group, metric, cost) for group in groups]
            for label, groups in budgets.items()
        }
        whole = curves[baseline]
        for label, curve in curves.items():
            if curve:
                share = dataclasses.asdict(time_to_score(curve, whole))
                share["target"] *= metric.sign
                times.setdefault(label, {})[cost] = share
    return times


def _budget(group: Sequence[Row], metric: Metric, cost: str) -> Budget:
    return Budget(
        group[0].fraction,
        statistics.fmean(getattr(row, cost) for row in group),
        tuple(metric.sign * row.scores[metric.name] for row in group),
    )


def _point(group: Sequence[Row], metric: Metric) -> dict[str, Any]:
    scores = [row.scores[metric.name] for row in group]
    return {
        "fraction": group[0].fraction,
        "seeds": [row.seed for row in group],
        **{cost: statistics.fmean(getattr(row, cost) for row in group) for cost in COSTS},
        "mean": statistics.fmean(scores),
        "deviation": deviation(scores),
    }
