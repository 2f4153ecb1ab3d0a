"""Writes the report of a run: ``python -m tools.report WORKDIR``."""

import argparse
from pathlib import Path

from vlp_jax.infra import report


def main(arguments: list[str] | None = None) -> None:
    """Writes ``WORKDIR/report.html`` and prints its path.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("workdir", type=Path, help="folder that was given to the trainer")
    workdir = parser.parse_args(arguments).workdir
    try:
        print(report.write_report(workdir))
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
