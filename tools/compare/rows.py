"""What is compared, and a cell as the tables have it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from tools.compare.configs import CommandError, NamedConfig
from tools.compare.metrics import (
    Metric,
    find_metric,
    finetunes_with,
    has_metric,
    is_of_test_split,
)
from tools.compare.records import SCRATCH, Calibration, Result
from vlp_jax.infra import units

Status = Literal["counted", "stopped", "tuning"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        configs: the methods.
        budget_seconds: the whole budget, of training.
        fractions: of it, increasing, the last is 1.
        tune_fraction: one of them, at which rates are compared.
        seeds: runs of every config at each of its budgets, seeds 0 and up.
        rates: grid of learning rates: numbers, or factors of a config's own such as "x0.5"; the
            same for every config.
        metrics: to compare by.
        tune_metric: by which rates are chosen.
        finetunes: run from the checkpoint of every cell.
        baselines: labels; the best of them at the whole budget is the baseline of a metric.
        max_input_wait: a config whose calibration waited for input for a larger share of its time
            is rejected.
        scratch: whether to fine-tune without pretraining too.
        others_until: the largest share of the budget at which configs that are no baseline are
            trained, where all that is asked is whether they have a baseline's score in less time.
    """

    configs: tuple[NamedConfig, ...]
    budget_seconds: float
    fractions: tuple[float, ...]
    tune_fraction: float
    seeds: int
    rates: tuple[str, ...]
    metrics: tuple[Metric, ...]
    tune_metric: Metric
    finetunes: tuple[NamedConfig, ...]
    baselines: tuple[str, ...]
    max_input_wait: float
    scratch: bool = False
    others_until: float = 1.0

    def fractions_of(self, label: str) -> tuple[float, ...]:
        """The shares of the budget at which a config is trained."""
        if label in self.baselines:
            return self.fractions
        return tuple(share for share in self.fractions if share <= self.others_until)

    @property
    def pretraining(self) -> ConfigDict:
        """A config with the geometry and the tokenizer of all.

        Raises:
            CommandError: they differ, so that fine-tuning from scratch would be several.
        """
        first = self.configs[0]
        for named in self.configs[1:]:
            for section in ("model", "tokenizer"):
                if named.config[section].to_dict() != first.config[section].to_dict():
                    raise CommandError(
                        f"--scratch: {first.label} and {named.label} differ in `{section}`; "
                        f"compare those of one `{section}` at a time"
                    )
        return first.config

    @property
    def tuning_finetunes(self) -> tuple[NamedConfig, ...]:
        """The fine-tuning runs by which rates are chosen; all of them where there is no choice."""
        if len(self.rates) == 1:
            return self.finetunes
        return finetunes_with(self.tune_metric, self.configs, self.finetunes)

    def rejection(self, calibration: Calibration | None) -> str:
        """Why a config takes no part; empty where it does, or where that is not known yet."""
        if calibration is None or calibration.input_wait_fraction <= self.max_input_wait:
            return ""
        limit = units.format_value("fraction", self.max_input_wait)
        share = units.format_value("fraction", calibration.input_wait_fraction)
        return f"an update measured alone waited for input {share} of the time, more than {limit}"

    def to_json(self) -> dict[str, Any]:
        """As tables say it."""
        return {
            "configs": {named.label: named.source for named in self.configs},
            "finetunes": {named.label: named.source for named in self.finetunes},
            "budget_seconds": self.budget_seconds,
            "fractions": list(self.fractions),
            "tune_fraction": self.tune_fraction,
            "others_until": self.others_until,
            "seeds": self.seeds,
            "rates": list(self.rates),
            "metrics": {m.name: m.mode for m in self.metrics},
            "tune_metric": self.tune_metric.name,
            "tune_mode": self.tune_metric.mode,
            "tuned_on_test": is_of_test_split(self.tune_metric, self.configs, self.finetunes),
            "baselines": list(self.baselines),
            "max_input_wait": self.max_input_wait,
            "scratch": self.scratch,
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
        status: only a "counted" row enters a mean; one of "tuning" helped to choose a rate, and
            has the scores for that alone.
        reason: why it is not counted, where it should be.
        steps, samples, flops: trained.
        seconds: of training: updates times the calibrated seconds of one.
        wall_seconds: of training as the run itself logged them, for information: they depend on
            what else the device did.
        wall_input_wait_fraction: share of ``wall_seconds`` spent waiting for input.
        compile_seconds: not part of any.
        finetune_seconds: training seconds that the fine-tuning runs logged.
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
    steps: int
    samples: int
    flops: float
    seconds: float
    wall_seconds: float
    wall_input_wait_fraction: float
    compile_seconds: float
    finetune_seconds: float
    scores: Mapping[str, float]
    versions: Mapping[str, str]
    commit: str


def make_row(
    settings: Settings,
    label: str,
    result: Result,
    rate: float,
    fraction: float,
    seed: int,
    *,
    complete: bool = True,
) -> Row:
    """What the tables say of a cell; its own label may differ where two configs are the same.

    One that is not ``complete`` only helps to choose a rate.
    """
    measured = result.measurement
    assert result.seconds is not None  # only a fine-tuning run has no calibration
    reasons = [
        run.reason for run in (measured, *result.finetuning.values()) if run.status == "stopped"
    ]
    scores = {}
    if not reasons:
        wanted = {settings.tune_metric.name}
        if complete:
            wanted |= {metric.name for metric in settings.metrics}
        if label == SCRATCH:  # what pretraining scores has no part in it
            wanted &= {name for name in wanted if has_metric(result, name)}
        scores = {name: find_metric(result, name) for name in sorted(wanted)}
        shown = {metric.name for metric in settings.metrics if not metric.sign}
        shown.discard(settings.tune_metric.name)
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        strange = [name for name in scores if name not in finite and name not in shown]
        scores = finite
        if strange:
            reasons, scores = [f"{', '.join(strange)} not finite"], {}
    return Row(
        cell=result.name,
        config=label,
        rate=rate,
        seed=seed,
        fraction=fraction,
        asked_seconds=fraction * settings.budget_seconds,
        status="stopped" if reasons else "counted" if complete else "tuning",
        reason=reasons[0] if reasons else "",
        steps=measured.steps,
        samples=measured.samples,
        flops=measured.samples * measured.flops_per_sample,
        seconds=result.seconds,
        wall_seconds=measured.wall_seconds,
        wall_input_wait_fraction=measured.wall_input_wait_seconds / (measured.wall_seconds or 1.0),
        compile_seconds=measured.compile_seconds,
        finetune_seconds=sum(tuned.wall_seconds for tuned in result.finetuning.values()),
        scores=scores,
        versions=dict(result.versions),
        commit=result.commit,
    )


def line(row: Row) -> str:
    """A finished cell in one line, for the terminal."""
    scores = ", ".join(f"{n} {units.format_value(n, v)}" for n, v in row.scores.items())
    return (
        f"{row.config}: budget {row.fraction:.3g}, rate {row.rate:.3g}, seed {row.seed}: "
        f"{row.steps:,} steps, {row.seconds:.1f} s; " + (scores or f"{row.status}: {row.reason}")
    )
