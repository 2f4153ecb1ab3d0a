"""What the run runs on: devices and versions, memory in use, and the matmul peak as measured.

The peak is the denominator of MFU. It is measured rather than taken from a datasheet, which names
what no program reaches; and inside one jitted call, because products that are synchronised one by
one under-read it by a fifth (630 against 801 TFLOP/s on one H200).
"""

import functools
import importlib.metadata
import math
import platform
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil
from jax.typing import DTypeLike

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class PeakSetting(NamedTuple):
    """How the matmul peak of a kind of machine is measured.

    Attributes:
        dtype: of the factors and the product.
        size: rows and columns of the square factors.
        chain: products in one jitted call, each of which needs the one before.
        rest_seconds: pause before each timed call, so that the power limit does not set the clock.
    """

    dtype: DTypeLike
    size: int
    chain: int
    rest_seconds: float = 0.0


# 32 products of 8192 take 45 ms on an H200, 8 of 1024 about 0.1 s on two CPU cores.
ACCELERATOR_PEAK = PeakSetting(jnp.bfloat16, size=8192, chain=32, rest_seconds=0.3)
CPU_PEAK = PeakSetting(jnp.float32, size=1024, chain=8)

_UNROLL = 4  # a loop of single products copies the carried factor every time: 4 % on an H200


class MemoryUse(NamedTuple):
    """Memory in bytes.

    Attributes:
        in_use: now, on the fullest local device.
        peak: the most since the process started.
        source: "device" (the allocator's statistics) or "process RSS" (CPU backends have no
            allocator statistics).
    """

    in_use: int
    peak: int
    source: str


def device_facts() -> dict[str, Any]:
    """Kind, count and platform of the devices, and the versions of what computes on them.

    Returns:
        ``device_kind``, ``device_count``, ``process_count``, ``platform``, and ``versions`` by
        package, for logs and benchmark lines.
    """
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "platform": jax.default_backend(),
        "versions": versions,
    }


def memory() -> MemoryUse:
    """Memory of the fullest local device, or of the process where the backend does not count."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    counted = [entry for entry in stats if entry]
    if counted:
        return MemoryUse(
            in_use=max(entry["bytes_in_use"] for entry in counted),
            peak=max(entry["peak_bytes_in_use"] for entry in counted),
            source="device",
        )
    resident = psutil.Process().memory_info().rss
    return MemoryUse(resident, max(resident, _peak_rss()), "process RSS")


def program_bytes(program: jax.stages.Compiled) -> int | None:
    """Memory of one device that a compiled program takes while it runs, by its compiler.

    Arguments, results that do not take an argument's place, and the most that is held in between;
    also where the backend's allocator does not count. None where its compiler does not either.
    """
    sizes = program.memory_analysis()
    if sizes is None:
        return None
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return int(sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes)


def measure_matmul_peak(
    setting: PeakSetting | None = None, repeats: int = 5, device: jax.Device | None = None
) -> float:
    """Floating-point operations per second of one device in chained square products.

    Random factors, because products of zeros run faster than real ones (894 against 788 TFLOP/s on
    one H200: they draw less power). The fixed factor has variance 1 / size, which keeps the carried
    one finite. With rests the H200 reads 785 to 798 TFLOP/s; without them it falls to 685 within a
    second, because its power limit of 700 W takes over, as it does in training.

    Args:
        setting: what to multiply; by default 32 products of 8192 in bf16 on GPU and TPU, and 8 of
            1024 in fp32 on CPU.
        repeats: timed calls, after one that compiles and one that warms up; the best counts.
        device: the device; the first local one by default.

    Returns:
        FLOP/s, with 2 * size ** 3 for each product.
    """
    device = jax.local_devices()[0] if device is None else device
    if setting is None:
        setting = CPU_PEAK if device.platform == "cpu" else ACCELERATOR_PEAK
    shape = (setting.size, setting.size)
    keys = jax.random.split(jax.device_put(jax.random.key(0), device))
    carried, fixed = (jax.random.normal(key, shape, setting.dtype) for key in keys)
    fixed = fixed * jnp.asarray(setting.size**-0.5, setting.dtype)
    for _ in range(2):
        jax.block_until_ready(_chained_products(carried, fixed, setting.chain))
    best = math.inf
    for _ in range(repeats):
        time.sleep(setting.rest_seconds)
        started = time.perf_counter()
        jax.block_until_ready(_chained_products(carried, fixed, setting.chain))
        best = min(best, time.perf_counter() - started)
    return 2 * setting.size**3 * setting.chain / best


def timings(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of some runs, whose results are waited for."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return seconds


@functools.partial(jax.jit, static_argnums=2)
def _chained_products(carried: jax.Array, fixed: jax.Array, chain: int) -> jax.Array:
    """``carried @ fixed @ fixed @ ...`` with ``chain`` products."""
    return jax.lax.fori_loop(0, chain, lambda _, x: x @ fixed, carried, unroll=_UNROLL)


def _peak_rss() -> int:
    """The largest resident set of this process so far, in bytes."""
    units = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units
