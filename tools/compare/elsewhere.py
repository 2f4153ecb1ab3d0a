"""The table of cells that another machine has measured: nothing is trained for it."""

import json
from pathlib import Path
from typing import NoReturn

from ml_collections import ConfigDict

from tools.compare.cells import CELLS_FOLDER, RESULT_FILE
from tools.compare.configs import CommandError
from tools.compare.records import Result, Runner, describe


class Elsewhere:
    """Stands for the machine that has measured a cell, and trains nothing.

    Attributes:
        machine, versions, commit: of the cell.
    """

    def __init__(self, result: Result):
        """Take the machine of ``result``."""
        self.machine = result.machine
        self.versions = result.versions
        self.commit = result.commit

    def calibrate(self, config: ConfigDict, workdir: Path) -> NoReturn:
        """Raises AssertionError: asked for nothing but what is there, cells never call it."""
        raise AssertionError("another machine measures nothing here")

    def run(self, config: ConfigDict, workdir: Path) -> NoReturn:
        """Raises AssertionError: as ``calibrate``."""
        raise AssertionError("another machine trains nothing here")


def measured_by(folder: Path, here: Runner) -> Runner:
    """Who has measured the cells of a folder.

    Args:
        folder: OUT.
        here: of this machine.

    Returns:
        ``here`` where a cell is of this machine or none is there.

    Raises:
        CommandError: the cells are of several machines, and this is none of them.
    """
    results = [
        Result.from_json(json.loads(file.read_text()))
        for file in sorted((folder / CELLS_FOLDER).glob(f"*/{RESULT_FILE}"))
    ]
    machines = {json.dumps(dict(result.machine), sort_keys=True): result for result in results}
    if not machines or any(dict(found.machine) == dict(here.machine) for found in results):
        return here
    if len(machines) > 1:
        several = ", ".join(sorted(describe(result.machine) for result in machines.values()))
        raise CommandError(
            f"the cells of {folder} are of several machines ({several}), and none of this one; "
            "give those of each an --archive and an --out of their own"
        )
    return Elsewhere(results[0])
