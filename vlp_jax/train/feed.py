"""What a run reads, update by update, in whichever stage it is."""

from types import TracebackType
from typing import Self

from vlp_jax.data.batch import HostBatch
from vlp_jax.data.build import open_loader
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.loader import BadCounts, JointLoader
from vlp_jax.train.setup import Setup


class Feed:
    """The loader of the stage that a run is in; close it, or use it as a context manager.

    Attributes:
        stage: number of the stage.
    """

    def __init__(self, setup: Setup, stage: int, step: int):
        """Opens the loader of a stage.

        Args:
            setup: of the run.
            stage: whose batches are read.
            step: of the first update.

        Raises:
            ConfigError: see ``Loader``.
        """
        self._setup, self.stage = setup, stage
        self._closed_bad = BadCounts()
        self._loader = self._open(step)

    @property
    def plan(self) -> JointPlan:
        """Of the stage."""
        return self._setup.plans[self.stage]

    @property
    def bad(self) -> BadCounts:
        """Bad examples of all stages since this start of the run."""
        return BadCounts.joined((self._closed_bad, self._loader.bad))

    def __next__(self) -> dict[str, HostBatch]:
        """The batches of the next update, by name; raises as ``Loader``."""
        return next(self._loader)

    def move(self, stage: int, step: int) -> None:
        """Read the batches of another stage from update ``step`` on; nothing if it is the same."""
        if stage == self.stage:
            return
        self._closed_bad = self.bad
        self._loader.close()
        self.stage = stage
        self._loader = self._open(step)

    def _open(self, step: int) -> JointLoader:
        program = self._setup.program
        steps = range(step, program.longest)
        return open_loader(self._setup.config, self.plan, steps, program.fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loader.close()
