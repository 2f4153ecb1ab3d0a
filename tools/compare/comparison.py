"""Which cells a comparison needs, and in which order."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.compare.cells import Cells, steps_for
from tools.compare.configs import CommandError, check_annealed
from tools.compare.groups import group_tables
from tools.compare.metrics import Metric, check_metric
from tools.compare.records import SCRATCH, Calibration, Result
from tools.compare.rows import Row, Settings, line, make_row
from tools.compare.summary import summarise
from vlp_jax.train.config import check_keys

DEFAULT_FRACTIONS = (1 / 4, 1 / 2.5, 1 / 1.5, 1.0)
# Between two looks at cells that other processes are training and that others depend on.
POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A cell that a comparison needs: a config at a rate, a share of the budget, and a seed.

    That of ``SCRATCH`` has a share and a rate of 0. One that is not ``complete`` only helps to
    choose a rate, and has no fine-tuning runs but those that this takes.
    """

    label: str
    rate: float
    fraction: float
    seed: int
    complete: bool = True


def compare(settings: Settings, cells: Cells, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train what is missing as long as there is time, and put together what there is.

    The rates of a config are compared at one budget (``tune_fraction``) by seed 0, and the best one
    is used at all budgets; the runs of the others are fine-tuned only as far as the choice takes
    it. Then small budgets and low seeds come first, so that each invocation leaves every
    config with the same cells or nearly so. A cell that another process is training is left to it;
    what is needed is worked out anew each time a cell is finished.

    Args:
        settings: what is compared.
        cells: finished ones, and the way to others.
        say: takes a line about every cell that is trained.

    Returns:
        The comparison, ready for JSON: see ``summarise``; ``calibrations`` (label -> cost of an
        update, None where it is not known yet), ``rejected`` (label -> why), ``groups`` (see
        ``group_tables``), and ``planned``, the number of cells.

    Raises:
        CommandError, ConfigError: what was asked for cannot be had; the message says why.
    """
    check_settings(settings)
    calibrations = calibrate(settings, cells)
    rejected = {
        label: reason
        for label, calibration in calibrations.items()
        if (reason := settings.rejection(calibration))
    }
    grid = {named.label: grid_of_rates(settings.rates, named.peak) for named in settings.configs}
    by_label = {named.label: named for named in settings.configs}
    running = {label: rates for label, rates in grid.items() if label not in rejected}
    results: dict[Wanted, Result] = {}
    rows: dict[Wanted, Row] = {}

    def obtain(cell: Wanted) -> bool:
        """Whether the cell is there, as it was kept or trained now."""
        if cell.label == SCRATCH:
            result = cells.obtain_scratch(
                settings.finetunes, seed=cell.seed, pretraining=settings.pretraining
            )
        else:
            result = cells.obtain(
                by_label[cell.label],
                budget_seconds=cell.fraction * settings.budget_seconds,
                seed=cell.seed,
                overrides={"schedule.peak": cell.rate},
                finetunes=settings.finetunes if cell.complete else settings.tuning_finetunes,
                keep_checkpoint=not cell.complete,
            )
        if result is None:
            return False
        results[cell] = result
        rows[cell] = make_row(
            settings,
            cell.label,
            result,
            cell.rate,
            cell.fraction,
            cell.seed,
            complete=cell.complete,
        )
        return True

    while True:
        found = False
        for cell in missing(settings, running, rows):
            found |= obtain(cell)
            if cell in rows and rows[cell].cell in cells.trained:
                say(line(rows[cell]))
                break
        chosen = choose_rates(settings, running, rows)
        if found:
            continue
        cells.tell_foreign_claims()
        if None not in chosen.values() or not cells.busy or not cells.can_start():
            break
        cells.busy.clear()
        time.sleep(POLL_SECONDS)

    for cell, row in rows.items():
        if not cell.complete and chosen[cell.label] not in (None, cell.rate):
            cells.remove_checkpoints(row.cell)
    whole: dict[str, list[Result]] = {}
    for cell, row in rows.items():
        if (row.status, cell.fraction, cell.rate) == ("counted", 1.0, chosen.get(cell.label)):
            whole.setdefault(cell.label, []).append(results[cell])
    lacking = {cell.label for cell in missing(settings, running, rows)}
    diverged = {label for label in running if chosen[label] is None} - lacking
    scratch = settings.seeds if settings.scratch else 0
    # A complete cell both chooses and is compared.
    shared = int(_tuning_is_complete(settings))
    planned = {label: len(settings.rates) for label in running}
    for label in running.keys() - diverged:
        planned[label] += settings.seeds * len(settings.fractions_of(label)) - shared
    rejected |= dict.fromkeys(diverged, "no rate of the grid gives a score")
    summary = summarise(settings, list(rows.values()), grid, dict.fromkeys(grid) | chosen, rejected)
    return summary | {
        "calibrations": {
            label: calibration and dataclasses.asdict(calibration)
            for label, calibration in calibrations.items()
        },
        "rejected": rejected,
        "groups": group_tables({label: whole[label] for label in grid if label in whole}),
        "planned": sum(planned.values()) + scratch,
    }


def check_settings(settings: Settings) -> None:
    """Refuse, before anything is trained, what cannot work.

    Raises:
        CommandError: ``--scratch`` has nothing to fine-tune, or no one geometry.
        ConfigError: a config has an unknown key, or no run or two have a metric (see
            ``check_metric``).
    """
    for named in (*settings.configs, *settings.finetunes):
        check_keys(named.config)
    if settings.scratch:
        if not settings.finetunes:
            raise CommandError("--scratch needs a --finetune config to start from scratch")
        _ = settings.pretraining  # checks that there is one
    for metric in (*settings.metrics, settings.tune_metric):
        check_metric(metric, settings.configs, settings.finetunes)


def calibrate(settings: Settings, cells: Cells) -> dict[str, Calibration | None]:
    """The cost of an update of every config, by label; measured where it is missing.

    Raises:
        CommandError: a rate is none, or the smallest budget buys hardly any update.
        ConfigError: a schedule does not come to its end.
    """
    for named in settings.configs:
        grid_of_rates(settings.rates, named.peak)
        check_annealed(named.config)
    calibrations = {named.label: cells.calibration(named, {}) for named in settings.configs}
    for label, calibration in calibrations.items():
        if calibration is not None:
            steps_for(label, settings.fractions[0] * settings.budget_seconds, calibration)
    return calibrations


def missing(
    settings: Settings, grid: Mapping[str, Sequence[float]], rows: Mapping[Wanted, Row]
) -> list[Wanted]:
    """The cells that are needed and not there yet, the most urgent first.

    Args:
        settings: of the comparison.
        grid: label -> rates to try, of the configs that take part.
        rows: the cells that are there.
    """
    chosen = choose_rates(settings, grid, rows)
    best = {label: rate for label, rate in chosen.items() if rate is not None}
    wanted = []
    if len(settings.rates) > 1:
        wanted += [
            _tuning(settings, label, rates[index])
            for index in range(len(settings.rates))
            for label, rates in grid.items()
        ]
        # The cells that have chosen come next: their checkpoints are kept until they are complete.
        wanted += [Wanted(label, rate, settings.tune_fraction, 0) for label, rate in best.items()]
    wanted += [
        Wanted(label, rate, fraction, seed)
        for seed in range(settings.seeds)
        for fraction in settings.fractions
        for label, rate in best.items()
        if fraction in settings.fractions_of(label)
    ]
    if settings.scratch:
        wanted += [Wanted(SCRATCH, 0.0, 0.0, seed) for seed in range(settings.seeds)]
    return [cell for cell in dict.fromkeys(wanted) if cell not in rows]


def choose_rates(
    settings: Settings, grid: Mapping[str, Sequence[float]], rows: Mapping[Wanted, Row]
) -> dict[str, float | None]:
    """Label -> the best rate of its grid; None while that is open, or where none counts."""
    return {
        label: best_rate(
            {rate: rows.get(_tuning(settings, label, rate)) for rate in rates},
            settings.tune_metric,
        )
        for label, rates in grid.items()
    }


def _tuning(settings: Settings, label: str, rate: float) -> Wanted:
    """The cell by which a rate is judged."""
    return Wanted(label, rate, settings.tune_fraction, 0, complete=_tuning_is_complete(settings))


def _tuning_is_complete(settings: Settings) -> bool:
    """Whether a choice of rates takes all there is of a cell."""
    return settings.tuning_finetunes == settings.finetunes


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


def best_rate(tried: Mapping[float, Row | None], metric: Metric) -> float | None:
    """The rate of the best row with a score; None without one, or while more than one is open.

    Args:
        tried: rate -> its row; None where it is not there yet. A rate without rivals is the best
            before it is tried, so that nothing waits for it.
        metric: by which rows are compared.
    """
    scored = {rate: row for rate, row in tried.items() if row and row.status != "stopped"}
    if None in tried.values():
        return next(iter(tried)) if len(tried) == 1 else None
    return max(
        scored, key=lambda rate: metric.sign * scored[rate].scores[metric.name], default=None
    )
