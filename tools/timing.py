"""How long updates take: as time passes, and how long the device is busy with them."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from tools.profile_table import device_busy_ms
from vlp_jax.infra.profiling import ProfilerWindow

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class UpdateTime:
    """Milliseconds of an update.

    Attributes:
        passed: from one to the next, by the clock on the wall.
        busy: for which an accelerator has anything to do; None on CPUs.
    """

    passed: float
    busy: float | None


def repeat(update: Callable[[int], Any], count: int) -> Any:
    """Run the updates 0 to ``count`` - 1, one or more; the result of the last, not waited for."""
    for number in range(count):
        last = update(number)
    return last


def busy_ms(update: Callable[[int], Any], count: int) -> float | None:
    """Milliseconds for which an accelerator is busy with an update, by a trace of some.

    The clock of ``tools.compare``: a small update waits for its host, the longer the more the host
    has to do for others, and costs of buckets measured by the wall clock have been off by a factor
    of three.

    Args:
        update: runs the update of a number, and need not wait for it.
        count: how many are traced.

    Returns:
        Their mean; None on CPUs, which have no host beside them.

    Raises:
        ValueError: the profiler has not seen any kernel.
    """
    if jax.default_backend() == "cpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with ProfilerWindow(Path(folder), start_step=0, num_steps=count) as profiler:
            for number in range(count):
                with profiler.step(number):
                    update(number)
        return device_busy_ms(Path(folder))


def cost_shares(times: Mapping[T, UpdateTime], unit: T) -> dict[T, float]:
    """What each update costs, as a share of the one called ``unit``.

    All by the same clock: the time for which the device is busy, where each has been traced, else
    the time that passes.
    """
    busy = {key: time.busy for key, time in times.items() if time.busy is not None}
    clock = busy if len(busy) == len(times) else {key: t.passed for key, t in times.items()}
    return {key: clock[key] / clock[unit] for key in times}
