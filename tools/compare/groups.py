"""Scores by group, one config beside the other."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.compare.metrics import PRETRAINING
from tools.compare.records import Group, Result
from tools.compare.statistics import deviation


def group_tables(results: Mapping[str, Sequence[Result]]) -> dict[str, list[dict[str, Any]]]:
    """What evaluators say of groups, for every config and in the mean of its seeds.

    Args:
        results: label of a config -> its runs with the whole budget, one for each seed.

    Returns:
        Evaluator, with the label of its run in front unless that is the pretraining run, -> rows
        of ``attribute``, ``value``, ``examples`` and ``configs`` (label -> ``mean`` and
        ``deviation`` of the accuracy). The groups of an attribute are followed by a row whose
        ``value`` and ``examples`` are None: the gap between the best and the worst of them, in
        points, where the evaluator gives it.
    """
    tables: dict[str, dict[tuple[str, str | None], dict[str, Any]]] = {}
    for label, runs in results.items():
        for group in itertools.chain.from_iterable(map(_groups, runs)):
            rows = tables.setdefault(group.evaluator, {})
            row = rows.setdefault(
                (group.attribute, group.value),
                {
                    "attribute": group.attribute,
                    "value": group.value,
                    "examples": group.examples,
                    "configs": {},
                },
            )
            row["configs"].setdefault(label, []).append(group.accuracy)
    for rows in tables.values():
        for row in rows.values():
            row["configs"] = {
                label: {"mean": statistics.fmean(scores), "deviation": deviation(scores)}
                for label, scores in row["configs"].items()
            }
    return {evaluator: list(rows.values()) for evaluator, rows in tables.items()}


@dataclasses.dataclass(frozen=True)
class _Figure:
    """As ``records.Group``; without value and examples it is the worst gap of the attribute."""

    evaluator: str
    attribute: str
    value: str | None
    examples: int | None
    accuracy: float


def _groups(result: Result) -> Iterator[_Figure]:
    """Groups of all runs of a cell, and their worst gaps, the evaluators by their full names."""
    for label, run in {PRETRAINING: result.measurement, **result.finetuning}.items():
        prefix = "" if label == PRETRAINING else f"{label}/"

        def kind(group: Group) -> tuple[str, str]:
            return group.evaluator, group.attribute

        for (evaluator, attribute), members in itertools.groupby(run.groups, kind):
            name = prefix + evaluator
            for group in members:
                yield _Figure(name, attribute, group.value, group.examples, group.accuracy)
            gap = run.metrics.get(f"{evaluator}/worst_gap/{attribute}")
            if gap is not None:  # kinds of text have none, nor groups that are too small
                yield _Figure(name, attribute, None, None, gap)
