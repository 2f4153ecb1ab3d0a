"""What finished cells of a folder came to, in one small file that outlives the folder.

A comparison that takes longer than a machine is lent goes on from it on another machine of the
same kind; committed beside a table, it holds every figure of every run, and there the command that
made the table makes it again with ``--max_seconds=0``. Each line is a JSON object with the path of
a file of OUT and its content; lines are sorted by path. A name that ends in ``.gz`` is compressed.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

from tools.compare.cells import CALIBRATION_FOLDER, CELLS_FOLDER, RESULT_FILE
from tools.compare.configs import CommandError
from vlp_jax.infra.files import write_bytes, write_text

_KEPT = (f"{CALIBRATION_FOLDER}/*.json", f"{CELLS_FOLDER}/*/{RESULT_FILE}")


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive into OUT; what is there already stays.

    Args:
        archive: nothing is done where there is none.
        folder: OUT; made when needed.

    Raises:
        CommandError: the archive is damaged, or no archive.
    """
    if not archive.exists():
        return
    try:
        lines = _decode(archive).splitlines()
        kept = dict(_entry(json.loads(line)) for line in lines)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{archive} is damaged or no archive of finished cells ({error}); mend it, or move it "
            "away to begin a new one"
        ) from error
    for name, content in kept.items():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(content, indent=2) + "\n")


def pack(folder: Path, archive: Path) -> None:
    """Write the finished cells and the calibrations of OUT into an archive, in its place.

    Args:
        folder: OUT.
        archive: to be written; its folder is made when needed.
    """
    files = sorted(file for pattern in _KEPT for file in folder.glob(pattern))
    lines = [
        json.dumps({"file": file.relative_to(folder).as_posix(), **_content(file)}) + "\n"
        for file in files
    ]
    data = "".join(lines).encode()
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Without a time of writing the same cells are the same bytes.
    write_bytes(archive, gzip.compress(data, mtime=0) if _is_compressed(archive) else data)


def _content(file: Path) -> dict[str, Any]:
    return {"content": json.loads(file.read_text(encoding="utf-8"))}


def _entry(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and content of a line.

    Raises:
        ValueError: the path leads elsewhere.
    """
    name, content = line["file"], line["content"]
    if not any(Path(name).match(pattern) for pattern in _KEPT) or ".." in Path(name).parts:
        raise ValueError(f"{name} is no file of finished cells")
    return name, content


def _decode(archive: Path) -> str:
    data = archive.read_bytes()
    return (gzip.decompress(data) if _is_compressed(archive) else data).decode()


def _is_compressed(archive: Path) -> bool:
    return os.fspath(archive).endswith(".gz")
