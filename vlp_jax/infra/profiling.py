"""A profile of a few steps in the middle of a run, chosen by config."""

import contextlib
import pathlib
from types import TracebackType
from typing import Self

import jax

from vlp_jax.infra.errors import ConfigError

PROFILE_FOLDER = "profile"  # of a run's workdir


class ProfilerWindow:
    """Traces steps [start_step, start_step + num_steps) into ``directory``.

    The trace opens in TensorBoard's profile plugin, XProf or Perfetto. Inactive when ``num_steps``
    is 0: then nothing is written and ``step`` costs nothing.

    Example::

        with ProfilerWindow(workdir / "profile", start_step=20, num_steps=5) as profiler:
            for step in range(total):
                with profiler.step(step):
                    state, metrics = train_step(state, batch)
    """

    def __init__(self, directory: pathlib.Path, start_step: int, num_steps: int) -> None:
        """Plan the window.

        Args:
            directory: where the trace goes.
            start_step: the first traced step; a run that starts or resumes later than that traces
                from its first step on, up to the same end.
            num_steps: how many steps; 0 for none.

        Raises:
            ConfigError: a number is negative.
        """
        for key, value in (("start_step", start_step), ("num_steps", num_steps)):
            if value < 0:
                raise ConfigError(f"profile.{key}", f"{value} is negative", "Use 0 or more")
        self._directory = directory
        self._steps = range(start_step, start_step + num_steps)
        self._tracing = False

    def step(self, step: int) -> contextlib.AbstractContextManager[object]:
        """Start or stop the trace as the step demands, and annotate the step.

        Args:
            step: number of the step that is about to run.
        """
        if step not in self._steps:
            self.stop()
            return contextlib.nullcontext()
        if not self._tracing:
            options = jax.profiler.ProfileOptions()
            # The calls of XLA and JAX are traced; those of Python beside them would lengthen the
            # steps that are looked at.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def stop(self) -> None:
        """End the trace if one is being taken, once the devices have finished the traced steps."""
        if self._tracing:
            jax.block_until_ready(jax.live_arrays())
            jax.profiler.stop_trace()
            self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
