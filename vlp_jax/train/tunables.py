"""Checkpoints that hold the tunables alone: what a run leaves out, and where it is found again.

With ``config.checkpoint.tunables_only``, frozen parameters that are those of ``config.init_from``
bit for bit are not saved again, nor is their moving average, which stays what they are. Beside the
state, the checkpoint names their base (``train.base``). Everything else is saved: what is trained,
what the base lacks or what was resized on the way (fresh heads, whether they are trained or not),
statistics that an update renews without a gradient, and what tuning adds, whose switches move so.
What a base has from a base of its own is looked for there, so that no chain of them can break.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path
from vlp_jax.infra.units import format_bytes
from vlp_jax.models.tuning import is_added
from vlp_jax.objectives.tower import STATISTICS
from vlp_jax.train.base import Base
from vlp_jax.train.initial import Origin, parts_elsewhere, state_paths
from vlp_jax.train.program import Program


class Tunables:
    """What the checkpoints of a run leave out.

    Attributes:
        base: what they are made on; None: they are whole.
    """

    def __init__(self, config: ConfigDict, program: Program, origin: Origin | None):
        """Of a run that begins; one that goes on takes up its own by ``follow``.

        Args:
            config: of the run.
            program: of the run.
            origin: where its first parameters come from, without what it does not use.

        Raises:
            ConfigError: nothing is frozen.
        """
        self._config = config
        self.base: Base | None = None
        if not config.checkpoint.tunables_only:
            return
        if not program.frozen:
            raise ConfigError(
                "checkpoint.tunables_only",
                "no parameter is frozen, so that all are tunables",
                "Set it to False, or give a group of optim.groups the rate_factor 0",
            )
        if origin is not None:
            self.base = _base(origin, by_path(program.state_spec.params), program.frozen)

    @property
    def left_out(self) -> frozenset[str]:
        """Paths in the state that checkpoints do not hold."""
        if self.base is None:
            return frozenset()
        return frozenset(state_paths(self.base.arrays, self._config.optim.ema_decay))

    @property
    def extra(self) -> dict[str, Any]:
        """What names the base beside the state."""
        return {} if self.base is None else {"base": self.base.to_json()}

    def elsewhere(self, root: str, extra: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What a checkpoint of this run has left out; see ``checkpoint_reader.Elsewhere``.

        Raises:
            ConfigError: the base is absent, or another one.
        """
        return parts_elsewhere(root, extra, self._config.init_base)

    def follow(self, extra: Mapping[str, Any]) -> None:
        """Leave out what the checkpoint does that the run goes on from, as far as is asked for.

        Args:
            extra: saved beside its state.
        """
        asked, told = self._config.checkpoint.tunables_only, extra.get("base")
        if asked and told:
            base = Base.from_json(told)
            self.base = dataclasses.replace(base, where=self._config.init_base or base.where)
        elif asked and self._config.init_from:
            logging.warning(
                "config.checkpoint.tunables_only: the last checkpoint of this run is whole, and "
                "so are those that follow; what it shares with %s was not looked at",
                self._config.init_from,
            )

    def told(self, size: int) -> str:
        """What a checkpoint of so many bytes consists of, for the log and the report."""
        if self.base is None:
            return format_bytes(size)
        return (
            f"{format_bytes(size)} of tunables, base of {format_bytes(self.base.size)}: "
            f"{self.base.where}"
        )


def _base(origin: Origin, specs: Mapping[str, Any], frozen: Iterable[str]) -> Base | None:
    """What a run shares with its origin for good; None: nothing."""
    given = origin.arrays if origin.base is None else origin.base.arrays
    shared = [
        path
        for path in frozen
        if path in given
        and path in origin.arrays
        and origin.arrays[path].shape == specs[path].shape
        and not is_added(path)
        and not path.startswith(f"{STATISTICS}/")
    ]
    if not shared:
        return None
    arrays = {path: origin.arrays[path].astype(specs[path].dtype) for path in sorted(shared)}
    if origin.base is not None:
        return Base.of(origin.base.where, origin.base.step, arrays)
    return Base.of(origin.where, origin.step, arrays)
