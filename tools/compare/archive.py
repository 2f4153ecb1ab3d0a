"""What finished cells of a folder came to, in one small file that outlives the folder.

A comparison that takes longer than a machine is lent goes on from it on another machine of the
same kind; committed beside a table, it holds every figure of every run, and the command that made
the table makes it again on any machine with ``--max_seconds=0``. Each line is a JSON object with
the path of a file of OUT and its content; lines are sorted by path. A name that ends in ``.gz`` is
compressed.
"""

import contextlib
import fcntl
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.compare.cells import CALIBRATION_FOLDER, CELLS_FOLDER, RESULT_FILE
from tools.compare.configs import CommandError
from vlp_jax.infra.files import write_bytes, write_text

_KEPT = (f"{CALIBRATION_FOLDER}/*.json", f"{CELLS_FOLDER}/*/{RESULT_FILE}")
# The same of an archive, whose names must not lead out of OUT: the starred part is one plain word.
_KEPT_NAME = re.compile("|".join(re.escape(p).replace(r"\*", r"\w+") for p in _KEPT))


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive into OUT; what is there already stays.

    Args:
        archive: nothing is done where there is none.
        folder: OUT; made when needed.

    Raises:
        CommandError: the archive is damaged, or no archive.
    """
    for name, content in _read(archive).items():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(content, indent=2) + "\n")


def pack(folder: Path, archive: Path) -> None:
    """Add the finished cells and the calibrations of OUT to an archive.

    What another folder has added meanwhile stays.

    Args:
        folder: OUT.
        archive: its folder is made when needed.

    Raises:
        CommandError: the archive is damaged, or no archive.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    with _locked(archive.parent):
        kept = _read(archive)
        for file in (file for pattern in _KEPT for file in folder.glob(pattern)):
            name = file.relative_to(folder).as_posix()
            kept[name] = json.loads(file.read_text(encoding="utf-8"))
        lines = [
            json.dumps({"file": name, "content": content}) + "\n"
            for name, content in sorted(kept.items())
        ]
        data = "".join(lines).encode()
        # Without a time of writing the same cells are the same bytes.
        write_bytes(archive, gzip.compress(data, mtime=0) if _is_compressed(archive) else data)


def _read(archive: Path) -> dict[str, dict[str, Any]]:
    """Path -> content; empty where there is no archive.

    Raises:
        CommandError: the archive is damaged, or no archive.
    """
    if not archive.exists():
        return {}
    try:
        return dict(_entry(json.loads(line)) for line in _decode(archive).splitlines())
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{archive} is damaged or no archive of finished cells ({error}); mend it, or move it "
            "away to begin a new one"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change the archives of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _entry(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and content of a line.

    Raises:
        ValueError: the path leads elsewhere.
    """
    name, content = line["file"], line["content"]
    if not _KEPT_NAME.fullmatch(name):
        raise ValueError(f"{name} is no file of finished cells")
    return name, content


def _decode(archive: Path) -> str:
    data = archive.read_bytes()
    return (gzip.decompress(data) if _is_compressed(archive) else data).decode()


def _is_compressed(archive: Path) -> bool:
    return os.fspath(archive).endswith(".gz")
