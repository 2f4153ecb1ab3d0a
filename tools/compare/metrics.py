"""The figures that a comparison is about, and where they are found."""

import dataclasses
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from tools.compare.configs import CommandError, NamedConfig
from tools.compare.records import Measurement, Result
from vlp_jax.infra import units
from vlp_jax.infra.errors import ConfigError

# Names of these words are better when they are lower, and so is a name with this part; other gaps
# are distances from a control, better when they are larger.
LOWER_IS_BETTER = ("loss", "perplexity")
WORST_GAP = "worst_gap"
# What --metric says behind a name, and the sign that makes of it.
MODES = {"max": 1, "min": -1, "show": 0}
# Stands for the run itself where a name begins with the label of a run.
PRETRAINING = "pretraining"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure to compare by, or to show beside those.

    Attributes:
        name: as an evaluator of the pretraining run or of a fine-tuning run calls it, such as
            ``vqa/accuracy``; where several runs have it, with the label of the fine-tuning config
            (or ``pretraining``) in front, such as ``nlvr2:scenes/test/accuracy``.
        sign: 1 where more is better, -1 where less is, 0 where it is only shown, as a control is.
    """

    name: str
    sign: int

    @classmethod
    def parse(cls, text: str) -> "Metric":
        """Read NAME, NAME:max, NAME:min or NAME:show.

        Without any, losses and worst gaps are to be low, all else high.
        """
        name, colon, mode = text.rpartition(":")
        if not colon or "/" in mode:  # the colon of a label
            name, mode = text, ""
        if mode and mode not in MODES:
            raise CommandError(f"--metric: {text!r} ends in none of :max, :min and :show")
        lower = units.unit_word(name) in LOWER_IS_BETTER or WORST_GAP in name.split("/")
        return cls(name, MODES[mode or ("min" if lower else "max")])

    @property
    def mode(self) -> str:
        """``max``, ``min`` or ``show``."""
        return next(mode for mode, sign in MODES.items() if sign == self.sign)


def check_metric(
    metric: Metric, configs: Sequence[NamedConfig], finetunes: Sequence[NamedConfig]
) -> None:
    """Refuse a metric of which it is plain beforehand that no run will have it, or two will.

    Raises:
        ConfigError: of a config's pretraining run and its fine-tuning runs, none has the metric's
            evaluator, or several have.
    """
    for named in configs:
        runs = {PRETRAINING: named} | {tune.label: tune for tune in finetunes}
        having = list(_evaluators(metric, runs))
        if len(having) > 1:
            raise _ambiguous(metric.name, having)
        if not having:
            known = sorted({name for run in runs.values() for name in run.config.evals})
            evaluator = metric.name.partition("/")[0]
            raise ConfigError(
                f"evals.{evaluator}",
                f"the metric {metric.name!r} needs this evaluator in one of "
                f"{[run.source for run in runs.values()]}, found in none",
                f"Use one of {known}" if known else "Add it",
            )


def is_of_test_split(
    metric: Metric, configs: Sequence[NamedConfig], finetunes: Sequence[NamedConfig]
) -> bool:
    """Whether an evaluator that has the metric reads a test split, which must choose nothing."""
    runs = {tune.label: tune for tune in finetunes}
    return any(
        section.get("split") == "test"
        for named in configs
        for section in _evaluators(metric, {PRETRAINING: named} | runs).values()
    )


def finetunes_with(
    metric: Metric, configs: Sequence[NamedConfig], finetunes: Sequence[NamedConfig]
) -> tuple[NamedConfig, ...]:
    """The fine-tuning runs that have the metric; none where it is one of the pretraining runs."""
    runs = {tune.label: tune for tune in finetunes}
    having = {
        label for named in configs for label in _evaluators(metric, {PRETRAINING: named} | runs)
    }
    return tuple(tune for tune in finetunes if tune.label in having)


def find_metric(result: Result, name: str) -> float:
    """A figure of a cell: of the run itself, or of one of its fine-tuning runs.

    Raises:
        ConfigError: no run has it, or two have.
    """
    found = _find(result, name)
    if len(found) > 1:
        raise _ambiguous(name, found)
    if not found:
        known = sorted({key for run in _runs(result).values() for key in run.metrics})
        raise ConfigError(
            "evals", f"{name!r} is no figure of {result.label}", f"Use one of {known}"
        )
    return next(iter(found.values()))


def has_metric(result: Result, name: str) -> bool:
    """Whether a run of a cell has the figure."""
    return bool(_find(result, name))


def _evaluators(metric: Metric, runs: Mapping[str, NamedConfig]) -> dict[str, ConfigDict]:
    """Label of a run -> the section of its evaluator that has the metric."""
    return {
        label: run.config.evals[evaluator]
        for label, run in runs.items()
        for evaluator in [n.partition("/")[0] for n in _own_names(metric.name, label)]
        if evaluator in run.config.evals
    }


def _find(result: Result, name: str) -> dict[str, float]:
    """Label of a run -> its figure of this name."""
    return {
        label: run.metrics[own]
        for label, run in _runs(result).items()
        for own in _own_names(name, label)
        if own in run.metrics
    }


def _runs(result: Result) -> dict[str, Measurement]:
    """All runs of a cell, by label."""
    return {PRETRAINING: result.measurement, **result.finetuning}


def _own_names(name: str, label: str) -> tuple[str, ...]:
    """What the run of this label may call a metric: an evaluator may have the name of a run."""
    return tuple(dict.fromkeys([name, name.removeprefix(f"{label}/")]))


def _ambiguous(name: str, labels: Sequence[str] | Mapping[str, float]) -> ConfigError:
    return ConfigError(
        "evals",
        f"{name!r} is a figure of several runs: {', '.join(labels)}",
        f"Write {next(iter(labels))}/{name} for that of {next(iter(labels))}",
    )
