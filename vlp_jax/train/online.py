"""An online schedule: which bucket comes next is decided by the run's own gradients.

    config.compression.schedule = "online"
    config.compression.buckets = ("p16@64", "p8@64k32", "whole")   # cheapest first
    config.compression.decisions = 10

The budget is cut into equal parts. Before each, the gradient errors of the present bucket and of
the dearer ones are measured on the batches that come next (``train.gradient_error``), and the part
goes to the bucket of the least cost-adjusted error; so costs never fall. A decision is made between
two updates from values that all hosts have, and kept in the state: a run that is stopped within one
makes it again, from the same batches and parameters.

How many batches a decision takes follows from ``overhead_percent``: all decisions together cost at
most that share of the budget. ``compression/probe_seconds`` has what each took, and the facts of
the run what share of the time they took together.
"""

import time

import jax
import numpy as np

from vlp_jax.compress.buckets import bucket_text
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.gradient_error import MIN_BATCHES, GradientErrors, probe_batches
from vlp_jax.train.program import Program
from vlp_jax.train.state import TrainState


class Decider:
    """Makes the decisions of an online schedule.

    Attributes:
        batches: compared in a decision.
        seconds: that decisions have taken, compiling left out.
        compile_seconds: that their programs took to compile.
    """

    def __init__(self, program: Program, plan: JointPlan):
        """Compiles nothing yet.

        Args:
            program: of the run; its schedule is an online one.
            plan: of its batches.

        Raises:
            ConfigError: the budget is too short for so many decisions.
        """
        self._program, self._plan = program, plan
        section, costs = program.config.compression, program.compression.costs
        # A gradient costs no more than an update; whole images are compared with in any case.
        measured = 1.0 + sum(cost for cost in costs if cost != 1.0)
        allowed = section.overhead_percent / 100 * program.full_steps / section.decisions
        self.batches = int(allowed / measured)
        if self.batches < MIN_BATCHES:
            raise ConfigError(
                "compression.decisions",
                f"{section.decisions} of them may take {allowed:.1f} updates of whole images each, "
                f"and comparing {MIN_BATCHES} batches takes {MIN_BATCHES * measured:.1f}",
                "Use fewer decisions or buckets, or raise compression.overhead_percent",
            )
        self._errors = GradientErrors(program, program.compression.buckets)
        self.seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        """Of all programs, as if one after the other."""
        return sum(self._errors.seconds.values())

    def compile(self) -> None:
        """Compile what decisions need, ahead of the first."""
        self._errors.compile(self._plan.buckets())

    def is_due(self, step: int) -> bool:
        """Whether a part of the budget begins with this update whose bucket is not decided."""
        count, places = len(self._program.decided), self._program.schedule.decided_at
        return count < len(places) and places[count] <= step

    def decide(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        """Decide for the part that begins with this update.

        Args:
            state: before it.
            step: its number.

        Returns:
            The state with the decision in it, which the program follows from now on, and figures to
            log.
        """
        begun = time.perf_counter()
        program, compression = self._program, self._program.compression
        decided = program.decided
        first = decided[-1] if decided else 0
        values: dict[str, float] = {}
        choice = first
        if first < len(compression.buckets) - 1:
            probed = probe_batches(program, self._plan, step, self.batches)
            found = self._errors.measure(state, probed, compression.costs, first=first)
            for views, estimate in zip(compression.buckets[first:], found, strict=True):
                values[f"compression/mse/{bucket_text(views)}"] = estimate.mse
            choice = first + int(np.argmin([estimate.mse for estimate in found]))
        spec = program.state_spec.extras["decided"]
        kept = np.full(spec.shape, -1, np.int32)
        kept[: len(decided) + 1] = [*decided, choice]
        state = state.replace(
            extras={**state.extras, "decided": jax.device_put(kept, spec.sharding)}
        )
        program.follow(state)
        taken = time.perf_counter() - begun
        self.seconds += taken
        return state, values | {
            "compression/decided": float(choice),
            "compression/probe_seconds": taken,
        }

    def conclude(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        """After the last update nothing is left to decide."""
        del step
        return state, {}

    def close(self) -> None:
        """Nothing is open between two decisions."""
