"""What parameters leave to their base: which leaves of it, and whether these are still the same.

A run that tunes few parameters of a model need not save the others again: its checkpoints, and what
is exported of them, hold the tunables and name their base. What a base gives is told by a
fingerprint, so that tunables never meet another model than the one they were made on.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp_jax.infra.errors import ConfigError

KEY = "init_base"  # of the config: where a base lies now
_NAMED = 3  # parameters that an error names
SHOWN_DIGITS = 12  # digits of a fingerprint that an error shows


@dataclasses.dataclass(frozen=True)
class Base:
    """Parameters that lie elsewhere.

    Attributes:
        where: workdir, checkpoint or parameter file that holds them, as it was given.
        step: updates that made them; None for a public checkpoint.
        sha256: of them all, see ``fingerprint``.
        arrays: path in the parameter tree -> shape and dtype, as the model has them.
    """

    where: str
    step: int | None
    sha256: str
    arrays: dict[str, tuple[tuple[int, ...], str]]

    @classmethod
    def of(cls, where: str, step: int | None, arrays: Mapping[str, np.ndarray]) -> "Base":
        """Of these arrays, by path."""
        told = {path: (tuple(array.shape), str(array.dtype)) for path, array in arrays.items()}
        return cls(where, step, fingerprint(arrays), told)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Base":
        """Inverse of ``to_json``."""
        arrays = {path: (tuple(shape), dtype) for path, (shape, dtype) in told["arrays"].items()}
        return cls(told["where"], told["step"], told["sha256"], arrays)

    @property
    def size(self) -> int:
        """Bytes of its arrays."""
        return sum(
            math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.arrays.values()
        )

    def __str__(self) -> str:
        """For messages."""
        at = "" if self.step is None else f" (step {self.step})"
        return f"{self.where}{at}"

    def taken(self, found: Mapping[str, np.ndarray], holder: str, where: str) -> dict[str, Any]:
        """Its arrays out of those that were found, once they are known to be the same.

        Args:
            found: path -> array, of ``where``; it may have others.
            holder: checkpoint or file of the tunables, for messages.
            where: what was read.

        Returns:
            Path -> array, in the shapes and dtypes of the model.

        Raises:
            ConfigError: these are other parameters.
        """
        lacking = [path for path in self.arrays if path not in found]
        if lacking:
            more = "" if len(lacking) <= _NAMED else f" and {len(lacking) - _NAMED} more"
            raise self._another(holder, f"{where} lacks {', '.join(lacking[:_NAMED])}{more}")
        for path, (shape, _) in self.arrays.items():
            if found[path].shape != shape:
                raise self._another(
                    holder,
                    f"in {where}, {path} is {list(found[path].shape)} and not {list(shape)}",
                )
        arrays = {path: found[path].astype(dtype) for path, (_, dtype) in self.arrays.items()}
        sha256 = fingerprint(arrays)
        if sha256 != self.sha256:
            raise self._another(
                holder,
                f"{where} has other values: SHA-256 {sha256[:SHOWN_DIGITS]} of the same parameters",
            )
        return arrays

    def missing(self, holder: str, where: str, error: Exception) -> ConfigError:
        """The error where nothing can be read."""
        return ConfigError(
            KEY,
            f"{self._made(holder)}, and {where} cannot be read: {str(error).rstrip('.')}",
            "Give the workdir, checkpoint or parameter file in which that base lies now",
        )

    def _another(self, holder: str, problem: str) -> ConfigError:
        return ConfigError(
            KEY,
            f"{self._made(holder)}, and {problem}",
            "Give the base that it was made on, wherever that lies now",
        )

    def _made(self, holder: str) -> str:
        sha256 = self.sha256[:SHOWN_DIGITS]
        return f"{holder} holds tunables alone, made on {self} with SHA-256 {sha256}"


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of paths, shapes, dtypes and bytes, in the order of the paths: 64 digits."""
    found = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        found.update(f"{path} {list(array.shape)} {array.dtype}\n".encode())
        # A view as bytes, for not every dtype of a model is one of NumPy's buffers.
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()
