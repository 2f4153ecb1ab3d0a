"""Does what a search has chosen still stand on new data? By the search's own checkpoint.

    python -m tools.skip_check runs/search --data=../photographs
    python -m tools.skip_check runs/search --data=level=easy,seed=7 --json=check.json
    python -m tools.skip_check runs/search --data=split=test --batches=64

--data is a folder, which takes the place of the source's ``root``, or KEY=VALUE,... of the source's
section (``config.data.sources.NAME``) and its ``split``, which is that of the search unless it is
named; of a run with several sources, NAME.KEY=VALUE. Nothing is trained: the network of the
search, whose units are gated and whose adapters and replacements are trained, is scored with and
without units on batches of the new data, and on batches of the data that the choice was made on as
reference; on those that the search has not read, where there are so many (the output says so). The
choice falls if skipping costs more on the new data than on the reference, if an exchange of two
units is better there, or if the new data are not such as the choice was made on, each by more than
a tolerance and beyond chance (``tools.standing`` has the tests).

Prints every unit with the harm that its absence does on both, and the verdict in words. Exit codes:
0, the choice stands; 3, it does not; 64, bad input; 74, the checkpoint is damaged.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import rich
import rich.table
from absl import logging
from ml_collections import ConfigDict

from tools.new_data import Batches, Overrides, batches_of, check_kin, overrides_of, plan_of_batches
from tools.searched import SearchRun, read_search, restored, search_of
from tools.standing import (
    Compared,
    Margins,
    Statement,
    judge,
    plan_of,
    standard_error,
    table_rows,
)
from vlp_jax.data.sources import build_source
from vlp_jax.infra.command import argument_parser, bad_input, fail
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.files import write_text
from vlp_jax.infra.manifest import DamagedCheckpointError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.searching import Searcher
from vlp_jax.train.setup import Setup
from vlp_jax.train.state import TrainState

BATCHES = 32
LEVEL = 0.01  # chance of a false alarm
TOLERANCE, SHIFT = 0.01, 0.05  # shares of the loss of the full network on the reference


class Checker:
    """Losses of a search's network, with and without units, on any data.

    Those on the reference are computed once for all data of one size.

    Attributes:
        compared: the choices that are compared.
    """

    def __init__(self, run: SearchRun, setup: Setup, state: TrainState, batches: int = BATCHES):
        """Computes nothing yet.

        Args:
            run: of ``searched.read_search``.
            setup: of ``searched.restored``.
            state: of the same.
            batches: on each of reference and new data.
        """
        self._run, self._setup, self._state, self._count = run, setup, state, batches
        search = search_of(setup)
        # As a search by held-out losses compares, whatever this one has: without dropout, and not
        # on one batch alone.
        self._search = dataclasses.replace(search, paper=False)
        self.compared = plan_of(search.choice, run.found["skipped"])
        # By rows: tokens of the reference. By both: what compares, and losses on the reference.
        self._edges: dict[Hashable, int] = {}
        self._searchers: dict[Hashable, tuple[Searcher, np.ndarray]] = {}

    def losses(self, overrides: Overrides) -> tuple[np.ndarray, np.ndarray, Batches]:
        """Losses of ``compared`` on the reference and on new data.

        Args:
            overrides: of the sections of sources, see ``overrides_of``.

        Returns:
            Float64 [batches, m] twice, and which batches these were.

        Raises:
            ConfigError, ValueError, OSError: the new data cannot be read, or are of another kind;
                the message names the key or the file.
        """
        setup, split = self._setup, self._search.split
        own, other = self._config({}), self._config(overrides)
        reference = {name: build_source(own, name, split=split) for name in setup.sources}
        new = {}
        for name, source in setup.sources.items():
            section = overrides.get(name, {})
            new[name] = build_source(
                other, name, section.get("split", split), section.get("num_records")
            )
            check_kin(name, source, new[name])
        used = setup.decider.read(self._run.step) if isinstance(setup.decider, Searcher) else 0
        chosen = batches_of(own, reference, new, self._count, used, setup.program.batch_sizes)
        sizes = tuple(sorted(chosen.rows.items()))
        if sizes not in self._edges:
            self._edges[sizes] = plan_of_batches(own, reference, setup, chosen).edges[-1]
        plan = plan_of_batches(other, new, setup, chosen)
        edge = max(self._edges[sizes], plan.edges[-1])
        if plan.edges != (edge,):  # all texts are padded alike, so that there is one program
            plan = plan_of_batches(other, new, setup, chosen, edge)
        if (edge, sizes) not in self._searchers:
            on = plan_of_batches(own, reference, setup, chosen, edge)
            searcher = Searcher(setup.program, self._search, on, setup.workdir)
            searcher.compile()
            numbers = range(chosen.first, chosen.first + self._count)
            self._searchers[edge, sizes] = searcher, self._on(searcher, numbers)
        searcher, before = self._searchers[edge, sizes]
        there = searcher.over(plan)
        return before, self._on(there, range(self._count)), chosen

    def _on(self, searcher: Searcher, numbers: Sequence[int]) -> np.ndarray:
        try:
            return searcher.on(self._state, self.compared.choices, numbers).losses
        finally:
            searcher.close()

    def _config(self, overrides: Overrides) -> ConfigDict:
        """That of the run with other sections of sources, whose pictures are read and not kept."""
        config = ConfigDict(self._setup.config.to_dict())
        with config.unlocked():
            for name, section in config.data.sources.items():
                section.update({k: v for k, v in overrides.get(name, {}).items() if k != "split"})
                section.cache = False
        return config


def verdict(
    run: SearchRun,
    compared: Compared,
    found: tuple[np.ndarray, np.ndarray, Batches],
    tolerance: float | None = None,
    shift: float = SHIFT,
    level: float = LEVEL,
) -> dict[str, Any]:
    """Whether a choice stands, with all figures, ready for JSON.

    Args:
        run: of the search.
        compared: see ``Checker``.
        found: of ``Checker.losses``.
        tolerance: in the unit of the loss; None: ``TOLERANCE`` of the reference's loss.
        shift: share of the full network's loss on the reference that counts for none.
        level: chance of a false alarm, at most.

    Returns:
        ``stands``, ``reasons`` in words, ``units`` (``standing.table_rows``), ``tests``, the
        losses of the full network and of the chosen one, and what was measured on.
    """
    reference, new, batches = found
    if tolerance is None:
        tolerance = TOLERANCE * abs(float(reference[:, 0].mean()))
    tests = judge(compared, reference, new, Margins(tolerance, shift, level))
    return {
        "workdir": str(run.workdir),
        "step": run.step,
        "stands": not any(test.holds for test in tests),
        "reasons": [_reason(test, compared, reference, tolerance) for test in tests if test.holds],
        "units": table_rows(compared, reference, new),
        "tests": [dataclasses.asdict(test) for test in tests],
        "losses": {
            name: {
                which: {"loss": float(of[:, at].mean()), "error": standard_error(of[:, at])}
                for at, which in enumerate(("full", "chosen"))
            }
            for name, of in (("reference", reference), ("new", new))
        },
        "batches": len(new),
        "rows": dict(batches.rows),
        "unread": batches.unread,
        "tolerance": tolerance,
        "shift": shift,
        "level": level,
    }


def _reason(test: Statement, compared: Compared, reference: np.ndarray, tolerance: float) -> str:
    if test.kind == "shift":
        return (
            f"the new data are not such as the choice was made on: {test.words}; what the search "
            "has estimated does not hold there, search anew"
        )
    if test.kind == "cost":
        return f"the choice costs more on the new data: {test.words}"
    gains = compared.gains(reference).mean(axis=0)
    both = gains.max(initial=-math.inf) > tolerance
    also = "; the reference has such exchanges as well, which the search has missed" if both else ""
    return f"another choice is better: {test.words}{also}"


def table(result: Mapping[str, Any]) -> rich.table.Table:
    """Every unit with its harm on both, for the terminal."""
    shown = rich.table.Table(
        "unit",
        "",
        caption="harm: what its absence adds to the loss beside the rest of the choice",
    )
    for head in ("reference", "new"):
        shown.add_column(f"harm on {head}", justify="right")
    for row in result["units"]:
        harms = (row["reference"], row["new"])
        shown.add_row(
            row["unit"],
            "kept" if row["kept"] else "skipped",
            *(f"{each['harm']:+.4f} ± {each['error']:.4f}" for each in harms),
        )
    shown.add_section()
    for which, name in (("full", "loss of the full network"), ("chosen", "loss of the chosen one")):
        losses = (result["losses"][of][which] for of in ("reference", "new"))
        shown.add_row(name, "", *(f"{one['loss']:.4f} ± {one['error']:.4f}" for one in losses))
    return shown


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argument_parser("tools.skip_check", __doc__)
    add = parser.add_argument
    add("workdir", type=pathlib.Path, help="of a finished search")
    add("--data", required=True, help="a folder, or KEY=VALUE,... of the source's section")
    add("--batches", type=int, default=BATCHES, help="of each of reference and new data")
    add("--tolerance", type=float, help="in the unit of the loss; by default 1 %% of the reference")
    add("--shift", type=float, default=SHIFT, help="share of the loss that counts for no shift")
    add("--level", type=float, default=LEVEL, help="chance of a false alarm, at most")
    add("--base", default="", help="of a run of tunables: where its base lies, if moved")
    add("--json", type=pathlib.Path, help="file to write all figures to")
    return parser.parse_args(arguments)


def _check_numbers(given: argparse.Namespace) -> None:
    if given.batches < 8:
        raise ValueError(
            f"--batches={given.batches}: use 8 or more, or nothing is told from chance"
        )
    if not 0 < given.level < 0.5:
        raise ValueError(f"--level={given.level}: use a chance between 0 and 0.5")
    if not 0 <= given.shift < 1:
        raise ValueError(f"--shift={given.shift}: use 0 to below 1")
    if given.tolerance is not None and not 0 <= given.tolerance < math.inf:
        raise ValueError(f"--tolerance={given.tolerance}: use 0 or more")


def main(arguments: list[str] | None = None) -> ExitCode:
    """Print the table and the verdict.

    Args:
        arguments: the command line without the program; that of the process by default.

    Returns:
        ``OK`` or ``CHOICE_FALLS``; ``DAMAGED_CHECKPOINTS`` where there is nothing to check with.
    """
    given = _parsed(arguments)
    logging.set_verbosity(logging.ERROR)
    try:
        with bad_input({"init_base": "--base"}):
            _check_numbers(given)
            run = read_search(given.workdir)
            with restored(run, given.base) as (setup, state):
                overrides = overrides_of(given.data, setup.config)
                checker = Checker(run, setup, state, given.batches)
                found = checker.losses(overrides)
            result = verdict(
                run, checker.compared, found, given.tolerance, given.shift, given.level
            )
    except DamagedCheckpointError as error:
        return fail(ExitCode.DAMAGED_CHECKPOINTS, error)
    rich.print(table(result))
    rows = ", ".join(f"{count} of {name}" for name, count in result["rows"].items())
    print(f"{result['batches']} batches each, rows: {rows}")
    if not result["unread"]:
        print("the search has read records of the reference, so that the choice looks good there")
    for reason in result["reasons"]:
        print(f"- {reason}")
    print("the choice stands" if result["stands"] else "the choice does not stand")
    if given.json is not None:
        with bad_input():
            write_text(given.json, json.dumps({"data": given.data, **result}, indent=1) + "\n")
    return ExitCode.OK if result["stands"] else ExitCode.CHOICE_FALLS


if __name__ == "__main__":
    set_gpu_flags()
    sys.exit(main())
