"""How long the device is busy with an update, whatever its host has to do beside it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tools.profile_table import device_busy_ms
from vlp_jax.infra.profiling import ProfilerWindow


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
    """
    if jax.default_backend() == "cpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with ProfilerWindow(Path(folder), start_step=0, num_steps=count) as profiler:
            for number in range(count):
                with profiler.step(number):
                    update(number)
        return device_busy_ms(Path(folder))
