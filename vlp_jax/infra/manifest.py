"""The manifest of a checkpoint: what it consists of, and whether all of that is still there.

``manifest.json`` lies beside the arrays. It names the shape and dtype of every array, the size and
CRC-32 of every file, and the metrics by which a run ranks its checkpoints.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from etils import epath

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 22

BestMode = Literal["max", "min"]


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is incomplete or its bytes changed since it was written."""


class CheckpointMismatchError(ValueError):
    """A checkpoint is sound, but holds other arrays than those asked for, or in another format."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one checkpoint consists of.

    Attributes:
        step: the step it was saved at.
        metrics: evaluated at that step; empty where none were.
        best_metric: the metric that ranks the checkpoints of this run, if any does.
        best_mode: whether more or less of it is better.
        arrays: path -> (shape, dtype).
        files: path within the checkpoint -> (bytes, CRC-32).
        format: version of this record.
    """

    step: int
    metrics: dict[str, float]
    best_metric: str | None
    best_mode: BestMode
    arrays: dict[str, tuple[list[int], str]]
    files: dict[str, tuple[int, int]]
    format: int = FORMAT


def score(metrics: Mapping[str, float], name: str | None, mode: BestMode) -> float:
    """The ranking metric ``name``, so that more is better; -inf for NaN and where it is absent."""
    value = metrics.get(name, math.nan) if name is not None else math.nan
    if math.isnan(value):
        return -math.inf
    return value if mode == "max" else -value


def checksums(root: epath.Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Bytes and CRC-32 of files within a checkpoint, by name; OSError if one is absent."""
    names = list(names)
    with ThreadPoolExecutor() as pool:
        found = pool.map(_size_and_crc, [root / name for name in names])
        return dict(zip(names, found, strict=True))


def read_manifest(root: epath.PathLike) -> Manifest:
    """The manifest of a checkpoint, as it was written.

    Raises:
        DamagedCheckpointError: it is absent, or no manifest.
        CheckpointMismatchError: another version of this project wrote it.
    """
    try:
        manifest = Manifest(**json.loads((epath.Path(root) / MANIFEST).read_text()))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"checkpoint {root} is incomplete: no {MANIFEST}") from None
    except (ValueError, TypeError) as error:
        raise DamagedCheckpointError(
            f"checkpoint {root} is damaged: {MANIFEST} is not readable ({error})"
        ) from error
    if manifest.format != FORMAT:
        raise CheckpointMismatchError(
            f"{root} has format {manifest.format}, this version reads {FORMAT}"
        )
    return manifest


def write_manifest(root: epath.Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint, or replace it at one stroke."""
    fresh = root / f"{MANIFEST}.new"
    fresh.write_text(json.dumps(dataclasses.asdict(manifest)))
    fresh.replace(root / MANIFEST)


def verify(root: epath.Path) -> Manifest:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: the manifest cannot be read, or a file differs; names the first.
        CheckpointMismatchError: another version of this project wrote it.
    """
    manifest = read_manifest(root)
    missing = [name for name in manifest.files if not (root / name).is_file()]
    if missing:
        raise DamagedCheckpointError(
            f"checkpoint {root} is damaged: {root / missing[0]} is missing"
        )
    for name, (size, crc) in checksums(root, manifest.files).items():
        bytes_then, crc_then = manifest.files[name]
        if size != bytes_then:
            raise DamagedCheckpointError(
                f"checkpoint {root} is damaged: {root / name} has {size} bytes instead of "
                f"{bytes_then}"
            )
        if crc != crc_then:
            raise DamagedCheckpointError(
                f"checkpoint {root} is damaged: the content of {root / name} has changed"
            )
    return manifest


def _size_and_crc(path: epath.Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return size, crc
