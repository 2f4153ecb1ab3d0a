"""Claims: which process trains a cell, so that several share a folder and none does work twice.

A claim is a file in the cell's folder, created with ``O_EXCL`` and removed when the cell is left.
It holds the process, its host and the group of workers that it belongs to. That of a process that
has died is taken over, but not by its own group: what has brought one worker down would bring
down the next. The next invocation of the command is another group, and tries again.
"""

import contextlib
import enum
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from vlp_jax.infra.files import write_text

CLAIM_FILE = "claim.json"
_LOCK_FILE = ".claim.lock"
# A process of the same number that started at another time is another process. The time of start
# is derived from that of the boot, which a change of the clock moves.
_SAME_START_SECONDS = 2.0


class Outcome(enum.Enum):
    """What came of an attempt to claim a cell.

    Attributes:
        TAKEN: it is this process's now.
        BUSY: another process has it.
        CRASHED: a worker of this group has died of it.
    """

    TAKEN = enum.auto()
    BUSY = enum.auto()
    CRASHED = enum.auto()


class Claims:
    """The claims of this process."""

    def __init__(self, group: int | None = None):
        """Claim nothing yet.

        Args:
            group: process id of the parent of all workers of one invocation; by default this
                process is on its own.
        """
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "group": os.getpid() if group is None else group,
        }

    def take(self, folder: Path) -> Outcome:
        """Try to claim a cell's folder, which is made when needed."""
        folder.mkdir(parents=True, exist_ok=True)
        # Of two that find a dead owner, the second must not remove the claim of the first.
        with (folder / _LOCK_FILE).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            owner = read_claim(folder)
            if owner is not None and (owner["host"] != self._me["host"] or _is_alive(owner)):
                return Outcome.BUSY
            if owner is not None and owner["group"] == self._me["group"]:
                return Outcome.CRASHED
            (folder / CLAIM_FILE).unlink(missing_ok=True)
            return Outcome.TAKEN if self._create(folder) else Outcome.BUSY

    def note(self, folder: Path, **about: Any) -> None:
        """Write into a claim of this process what it is doing, for those who look for it later."""
        write_text(folder / CLAIM_FILE, json.dumps(self._me | about) + "\n")

    def release(self, folder: Path) -> None:
        """Give back a claim of this process."""
        (folder / CLAIM_FILE).unlink()

    def _create(self, folder: Path) -> bool:
        """Create the claim; False where a host that does not share the lock was faster."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(folder / CLAIM_FILE, flags, 0o644)
            os.write(descriptor, (json.dumps(self._me) + "\n").encode())
            os.close(descriptor)
            return True
        return False


def read_claim(folder: Path) -> dict[str, Any] | None:
    """The claim on a cell; None where there is none, or where its writer died in the middle."""
    try:
        claim: dict[str, Any] = json.loads((folder / CLAIM_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return claim


def read_claims(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and claim of every claimed cell in a folder of cells."""
    for file in sorted(folder.glob(f"*/{CLAIM_FILE}")):
        claim = read_claim(file.parent)
        if claim is not None:
            yield file.parent.name, claim


def _is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether the owner of a claim of this host is a running process."""
    try:
        process = psutil.Process(owner["pid"])
        started, status = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    same = abs(started - owner["started"]) < _SAME_START_SECONDS
    return same and status != psutil.STATUS_ZOMBIE
