"""Means, spreads and times to score of cells, ready for JSON."""

import dataclasses
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tools.compare.metrics import Metric
from tools.compare.records import SCRATCH
from tools.compare.rows import Row, Settings
from tools.compare.statistics import Budget, deviation, time_to_score

COSTS = ("seconds", "samples", "flops")


def summarise(
    settings: Settings,
    rows: Sequence[Row],
    grid: Mapping[str, Sequence[float]],
    chosen: Mapping[str, float | None],
    rejected: Collection[str],
) -> dict[str, Any]:
    """Means, spreads and times to score of counted rows.

    Args:
        settings: of the comparison.
        rows: all cells that there are.
        grid: label -> rates tried.
        chosen: label -> the best of them, None where it is not known yet.
        rejected: labels of configs that take no part and are no baseline.

    Returns:
        ``rows``; ``rates`` (label -> grid and choice); ``curves`` (metric -> label -> a dict for
        each budget: fraction, seeds, mean cost of every kind, mean and standard deviation of the
        score); ``time_to_score`` (metric -> baseline, and label -> kind of cost -> share);
        ``scratch`` (metric -> seeds, mean and standard deviation without pretraining; empty where
        that was not asked for).
    """
    curves: dict[str, Any] = {}
    times: dict[str, Any] = {}
    labels = [named.label for named in settings.configs]
    scratch = _counted(rows, SCRATCH, 0.0, 0.0)
    baselines = [label for label in settings.baselines if label not in rejected]
    for metric in settings.metrics:
        budgets = {
            label: [
                group
                for fraction in settings.fractions
                if (group := _counted(rows, label, fraction, chosen[label], metric.name))
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
        # With a baseline still to be trained, the best of the others would be a weaker one.
        if metric.sign and baselines and all(label in whole for label in baselines):
            baseline = max(baselines, key=lambda label: whole[label])
            times[metric.name] = {
                "baseline": baseline,
                "score": metric.sign * whole[baseline],
                "configs": _times(settings, budgets, baseline, metric),
            }
    return {
        "settings": settings.to_json(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "rates": {label: {"grid": grid[label], "chosen": chosen[label]} for label in labels},
        "curves": curves,
        "time_to_score": times,
        "scratch": {
            metric.name: _point(scored, metric)
            for metric in settings.metrics
            if (scored := [r for r in scratch if metric.name in r.scores])
        },
    }


def _counted(
    rows: Sequence[Row], label: str, fraction: float, rate: float | None, metric: str = ""
) -> list[Row]:
    """The rows of a config at one budget that count, at the chosen rate; with a metric, if given.

    A figure that is only shown and not finite is missing in a row that counts.
    """
    return [
        row
        for row in rows
        if (row.config, row.fraction, row.rate, row.status) == (label, fraction, rate, "counted")
        and (not metric or metric in row.scores)
    ]


def _times(
    settings: Settings, budgets: Mapping[str, list[list[Row]]], baseline: str, metric: Metric
) -> dict[str, Any]:
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
                until = settings.fractions_of(label)[-1]
                share = dataclasses.asdict(time_to_score(curve, whole, until=until))
                share["is_shorter"] = until < settings.fractions[-1]
                share["target"] *= metric.sign
                share["seeds"] = len(curve[-1].scores)
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
