"""The command line of the comparison: its flags, and the settings that they make."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from tools.compare.comparison import DEFAULT_FRACTIONS
from tools.compare.configs import CommandError, load_all, parse_value
from tools.compare.metrics import Metric
from tools.compare.rows import Settings
from tools.compare.workers import Role

OWN_RATE = "x1"


def read_settings(
    options: argparse.Namespace,
    overrides: Mapping[str, Any],
    tuning_overrides: Mapping[str, Any],
) -> Settings:
    """What a command line compares.

    Args:
        options: of ``parser``.
        overrides: keys of the configs, see ``configs.load_all``.
        tuning_overrides: keys of the fine-tuning configs.

    Raises:
        CommandError, ConfigError: a flag is missing, or does not fit the others or a config.
    """
    if not options.configs or options.budget_seconds is None or not options.metric:
        raise CommandError("CONFIG..., --budget_seconds and --metric are needed; see --help")
    configs = load_all(options.configs, overrides)
    metrics = tuple(Metric.parse(text) for text in options.metric.split(","))
    tune_metric = _tune_metric(options.tune_metric, metrics)
    if not tune_metric.sign or not any(metric.sign for metric in metrics):
        raise CommandError("--metric: of one that is shown only, none is the best; drop :show")
    labels = [named.label for named in configs]
    baselines = tuple(options.baseline) or (labels[0],)
    for label in baselines:
        if label not in labels:
            raise CommandError(f"--baseline={label} is no config; use one of {labels}")
    fractions = _fractions(options.fractions)
    for flag in ("tune_fraction", "others_until"):
        if (share := getattr(options, flag)) not in fractions:
            raise CommandError(
                f"--{flag}={share:.4g} is none of the budgets; use one of "
                f"{', '.join(f'{fraction:.4g}' for fraction in fractions)}"
            )
    if options.others_until < 1 and options.scratch:
        raise CommandError(
            "--scratch compares with what all configs learn in the whole budget; leave "
            "--others_until"
        )
    if options.others_until < options.tune_fraction and len(options.rates.split(",")) > 1:
        raise CommandError(
            f"--others_until={options.others_until:.4g} is below --tune_fraction="
            f"{options.tune_fraction:.4g}, at which rates are compared; lower the latter to it"
        )
    return Settings(
        configs=configs,
        budget_seconds=options.budget_seconds,
        fractions=fractions,
        tune_fraction=options.tune_fraction,
        seeds=options.seeds,
        rates=tuple(options.rates.split(",")),
        metrics=metrics,
        tune_metric=tune_metric,
        finetunes=load_all(options.finetune, tuning_overrides),
        baselines=baselines,
        max_input_wait=options.max_input_wait,
        scratch=options.scratch,
        others_until=options.others_until,
    )


def _tune_metric(text: str | None, metrics: Sequence[Metric]) -> Metric:
    """What --tune_metric names; which way it is better, --metric may say alone.

    Raises:
        CommandError: the two contradict each other.
    """
    if not text:
        return metrics[0]
    asked = Metric.parse(text)
    for metric in metrics:
        if metric.name == asked.name and metric.sign not in (0, asked.sign):
            if text != asked.name:
                raise CommandError(f"--tune_metric={text}: --metric says {metric.mode} of it")
            return metric
    return asked


def _fractions(text: str) -> tuple[float, ...]:
    """Increasing shares of the budget from "1,1/1.5,0.4".

    Raises:
        CommandError: one is no number, not in (0, 1], or 1 is missing.
    """
    if not text:
        return DEFAULT_FRACTIONS
    try:
        fractions = sorted({_fraction(part) for part in text.split(",")})
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"--fractions={text}: {error}") from None
    if not fractions[0] > 0 or fractions[-1] != 1:
        raise CommandError(f"--fractions={text}: give shares above 0, the largest of them 1")
    return tuple(fractions)


def _fraction(text: str) -> float:
    """0.4 from "1/2.5".

    Raises:
        ArgumentTypeError: it is no number.
    """
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give such as 1/2.5") from None


def assignments(options: argparse.Namespace, flag: str) -> dict[str, Any]:
    """The values of a repeated KEY=VALUE flag.

    Raises:
        CommandError: one has no value.
    """
    values = {}
    for text in getattr(options, flag):
        key, equals, value = text.partition("=")
        if not equals:
            raise CommandError(f"--{flag}={text} has no value; write --{flag}=KEY=VALUE")
        values[key] = parse_value(value)
    return values


def _positive(kind: type[int] | type[float]) -> Any:
    def convert(text: str) -> int | float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return convert


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags, which ``--help`` explains."""
    command = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = command.add_argument
    add("configs", nargs="*", metavar="CONFIG", help="config file, or FILE:ARG")
    add("--out", type=Path, required=True, help="folder of cells and tables; kept and extended")
    add("--budget_seconds", type=_positive(float), help="whole budget in seconds of training")
    add(
        "--metric",
        help="figures to compare by, with commas; NAME:min where less is better, NAME:show for one "
        "that is only shown at each budget, such as a control",
    )
    add("--tune_metric", help="figure that chooses rates, or ranks a search; the first --metric")
    add("--seeds", type=_positive(int), default=1, help="runs of each, seeds 0 to N-1")
    add("--fractions", default="", help="shares of the budget; by default 1,1/1.5,1/2.5,1/4")
    add(
        "--rates",
        default=OWN_RATE,
        help="grid of peak rates for every config: 1e-3, or x0.5 of own",
    )
    add(
        "--tune_fraction",
        type=_fraction,
        default=1.0,
        help="the share of the budget, one of --fractions, at which rates are compared; the whole",
    )
    add(
        "--others_until",
        type=_fraction,
        default=1.0,
        help="largest share of the budget, one of --fractions, at which configs that are no "
        "--baseline are trained: whether they have the baseline's score in less time; by default 1",
    )
    add(
        "--finetune",
        action="append",
        default=[],
        metavar="CONFIG",
        help="fine-tune each run by this config (repeatable) and take the metrics from there",
    )
    add("--scratch", action="store_true", help="run --finetune without pretraining too")
    add(
        "--baseline",
        action="append",
        default=[],
        metavar="LABEL",
        help="the config to compare with; repeatable: the best of them; by default the first",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="key of every CONFIG, or LABEL/KEY of one; evals.NAME=None drops an evaluator; "
        "repeatable",
    )
    add(
        "--set_finetune",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="key of every --finetune config, such as total_steps=500, or of one, such as "
        "vqa/total_steps=500; repeatable",
    )
    add(
        "--workers",
        type=_positive(int),
        default=1,
        help="processes that train cells at the same time",
    )
    add("--devices", default="", help="indices of CUDA devices for the workers, such as 0,1")
    # What a process that --workers has started does; it writes no table.
    add("--role", choices=get_args(Role), default="", help=argparse.SUPPRESS)
    add(
        "--max_seconds",
        type=float,
        default=math.inf,
        help="start no run after so many seconds of this invocation; 0: only write the table, on "
        "any machine",
    )
    add(
        "--max_input_wait",
        type=float,
        default=0.03,
        help="reject configs whose update, measured alone, waits for input for a larger share",
    )
    add(
        "--calibration_steps",
        type=_positive(int),
        default=256,
        help="least updates of the run that measures the cost of one; made 6 whole windows "
        "(data.window_batches), of which the second half counts",
    )
    add("--keep_checkpoints", action="store_true", help="keep the final state of every cell")
    add(
        "--search",
        action="append",
        default=[],
        metavar="KEY:VALUES",
        help="search KEY:A,B,C or KEY:log:LOW:HIGH (or lin, int); repeatable",
    )
    add("--halving", type=int, default=3, help="factor between the rungs of a search")
    add("--trials", type=_positive(int), default=9, help="candidates, where a range is searched")
    add(
        "--archive",
        type=Path,
        metavar="FILE",
        help="what finished cells came to, such as cells.jsonl.gz: cells that are there are not "
        "trained, and those finished here are added",
    )
    add("--report_only", action="store_true", help="write page and plot again from the JSON in OUT")
    return command
