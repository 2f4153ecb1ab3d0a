"""What chains of runs begin with, and that it stays the same.

Ways to tune compare around one base. A base that is trained again, on another machine or by other
kernels, comes to other parameters; so records of a study say which run their chain begins with
(``root``, its key) and with which parameters (``base``, their SHA-256), and nothing is added that
begins with others.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tools.jobs import Job, Places, Run
from vlp_jax.infra.files import write_text
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.train.base import SHOWN_DIGITS, fingerprint
from vlp_jax.train.initial import read_origin

BASE_FILE = "base.sha256"  # of a workdir: of the parameters that its chain begins with


def checked_base(run: Run, places: Places) -> str:
    """SHA-256 of the parameters that the chain of a run begins with: 64 digits.

    Args:
        run: whose root is trained, or given.
        places: of this machine.

    Raises:
        ConfigError, ValueError, OSError: these are not those that others have started from, or
            there are none.
    """
    workdir = places.workdir(run.root)
    found, asked = _fingerprint(workdir), places.bases.get(run.root.key)
    if asked not in (None, found):
        raise ValueError(
            f"{workdir} has parameters with SHA-256 {found[:SHOWN_DIGITS]}, and what the archive "
            f"holds was made from {asked[:SHOWN_DIGITS]}: give that base by --base, or another "
            "archive and --out"
        )
    return found


@functools.cache
def _fingerprint(workdir: pathlib.Path) -> str:
    """Of the parameters of a run that is over, or of a file."""
    facts = workdir / RUN_FILE
    if facts.exists() and (status := json.loads(facts.read_text())["status"]) != "finished":
        raise ValueError(f"the run in {workdir} is {status}; finish it before it is tuned")
    return fingerprint(read_origin(workdir).arrays)


def claim(workdir: pathlib.Path, base: str) -> None:
    """Note what a run begins with, for one that has begun goes on from its own checkpoint.

    Args:
        workdir: of the run; made when needed.
        base: of ``checked_base``.

    Raises:
        ValueError: it has begun with other parameters, or does not say with which.
    """
    file = workdir / BASE_FILE
    if not file.exists() and not (workdir / RUN_FILE).exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(file, base + "\n")
        return
    before = file.read_text().strip() if file.exists() else "unknown"
    if before != base:
        raise ValueError(
            f"{workdir} was begun from parameters with SHA-256 {before[:SHOWN_DIGITS]}, and the "
            f"base has {base[:SHOWN_DIGITS]}; give another --out"
        )


def bases_to_keep(jobs: Sequence[Job], archive: Mapping[str, Any]) -> dict[str, str]:
    """What the chains of jobs must begin with, since runs of the archive have: ``Places.bases``.

    Args:
        jobs: that are done (``tools.jobs.wanted_jobs``), of a study around one base.
        archive: of ``tools.jobs.read_archive``.

    Returns:
        Key of a run that starts from scratch -> SHA-256, where something has started from it.

    Raises:
        ValueError: runs have started from several, or do not tell from which.
    """
    kept: dict[str, str] = {}
    for key in {job.run.root.key for job in jobs}:
        found = {one.get("base") for one in archive.values() if one.get("root") == key}
        if None in found:
            raise ValueError(
                f"the archive does not tell from which parameters its runs from {key} have "
                "started, so that none can be added; give another archive and --out"
            )
        if len(found) > 1:
            told = ", ".join(sorted(one[:SHOWN_DIGITS] for one in found))
            raise ValueError(
                f"the archive's runs from {key} have started from several parameters (SHA-256 "
                f"{told}); keep those of one"
            )
        if found:
            [kept[key]] = found
    return kept


def check_given(jobs: Sequence[Job], places: Places) -> None:
    """See that the base that is given can be in the place of the one that jobs start from.

    Args:
        jobs: that are done, of a study around one base.
        places: of this machine, with a base, and what it must be.

    Raises:
        ConfigError, ValueError, OSError: it is another, or would be in the place of several.
    """
    roots = {job.run.root.key: job.run.root for job in jobs}
    if len(roots) > 1:
        raise ValueError(
            f"--base would be in the place of {len(roots)} bases ({', '.join(roots)}); ask for "
            "cells that start from the same one (--cells)"
        )
    for root in roots.values():
        checked_base(root, places)
