"""Compilation: the flags before it, the cache across runs, and one program per bucket.

No program is compiled twice in a run: ``CompiledSteps`` compiles ahead of time and calls the
compiled object, so that an argument of another shape or sharding is an error and never a silent
second compile.
"""

import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

_THREADS = 16  # in which steps are compiled at the same time

GPU_FLAGS: Mapping[str, str] = {
    # Overlap collectives with compute; without it XLA:GPU waits for each all-gather of FSDP.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # Record as much as possible into CUDA graphs: an update is thousands of kernels of some
    # microseconds, and launched one by one they leave gaps of 3 microseconds (docs/perf.md).
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    # Products by cuBLAS alone: trying Triton's variants of each takes a third of the compile time
    # of a bucket and gains 3 % (docs/perf.md).
    "xla_gpu_enable_triton_gemm": "false",
}

_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia/version")

Bucket = TypeVar("Bucket", bound=Hashable)
Step = TypeVar("Step")
Result = TypeVar("Result")


def is_gpu_host() -> bool:
    """Whether JAX will run on NVIDIA GPUs, told without initialising it.

    ``JAX_PLATFORMS`` decides where it is set; else a driver and JAX's CUDA plugin must be there.
    """
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return not {"cuda", "gpu"}.isdisjoint(asked.split(","))
    has_plugin = any(importlib.util.find_spec(name) is not None for name in _CUDA_PLUGINS)
    return has_plugin and (_NVIDIA_DRIVER.exists() or pathlib.Path("/dev/nvidia0").exists())


def set_gpu_flags(flags: Mapping[str, str] = GPU_FLAGS) -> dict[str, str]:
    """Add XLA's GPU flags to ``XLA_FLAGS`` on a GPU host; elsewhere do nothing.

    JAX is told as well to draw random bits by its own GPU kernel: same bits, but unrolled into
    XLA's graph they make the initialisation of a base model compile for two minutes.

    XLA reads the variable once, when its first backend starts: call this before any JAX call that
    touches a device. XLA aborts the process over a flag it does not know, so nothing is set where
    no GPU will be used.

    Args:
        flags: flag name without dashes -> value. Flags that ``XLA_FLAGS`` already sets stay as
            the user set them.

    Returns:
        The flags added.
    """
    if not is_gpu_host():
        return {}
    jax.config.update("jax_threefry_gpu_kernel_lowering", True)
    present = os.environ.get("XLA_FLAGS", "").split()
    taken = {flag.removeprefix("--").split("=")[0] for flag in present}
    added = {name: value for name, value in flags.items() if name not in taken}
    os.environ["XLA_FLAGS"] = " ".join([*present, *(f"--{n}={v}" for n, v in added.items())])
    return added


def enable_compile_cache(path: str | os.PathLike[str], min_compile_seconds: float = 1.0) -> None:
    """Keep compiled programs on disk, so that a resumed run starts without compiling.

    JAX keys the entries by program, flags, versions and kind of device. Use the folder only on
    machines you trust: what is in it is executed.

    Args:
        path: the folder; created on first use.
        min_compile_seconds: programs that compile faster are not kept.
    """
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_seconds)
    # A compile before this call has made JAX decide, once, that there is no cache.
    compilation_cache.reset_cache()


class CompiledSteps(Generic[Bucket, Step]):
    """The compiled step of every bucket, each compiled once.

    Attributes:
        seconds: bucket -> seconds its compile took (tracing and lowering included), with the others
            beside it; the wait for all of them is shorter than their sum.
    """

    def __init__(self, limit: int) -> None:
        """Start empty.

        Args:
            limit: the most buckets a run may compile; the schedule knows how many it needs.
        """
        self.seconds: dict[Bucket, float] = {}
        self._limit = limit
        self._steps: dict[Bucket, Step] = {}

    def __getitem__(self, bucket: Bucket) -> Step:
        """The step of a bucket.

        Raises:
            RuntimeError: the bucket was not compiled ahead.
        """
        if bucket not in self._steps:
            raise RuntimeError(f"bucket {bucket} was not among those compiled: {list(self._steps)}")
        return self._steps[bucket]

    @property
    def programs(self) -> tuple[Step, ...]:
        """All that are compiled."""
        return tuple(self._steps.values())

    def compile(
        self,
        buckets: Iterable[Bucket],
        lower: Callable[[Bucket], Callable[[], Step]],
        done: Callable[[Bucket], None] = lambda bucket: None,
    ) -> None:
        """Build the steps of new buckets, at the same time.

        They are traced one after the other, which is Python's work; meanwhile those that are
        traced are compiled in threads, which is XLA's.

        Args:
            buckets: the static sizes of each step.
            lower: traces the step of a bucket and returns what compiles it, such as
                ``jax.jit(...).lower(...).compile``.
            done: told of every bucket once it is compiled, in the given order.

        Raises:
            RuntimeError: a bucket was compiled before, or there are more than the limit; then none
                is compiled.
        """
        buckets = list(buckets)
        self._check(buckets)
        with ThreadPoolExecutor(min(self._limit, _THREADS)) as pool:
            started = [(bucket, *self._start(pool, bucket, lower)) for bucket in buckets]
            for bucket, traced, compiled in started:
                self._steps[bucket], seconds = compiled.result()
                self.seconds[bucket] = traced + seconds
                done(bucket)

    def _check(self, buckets: Sequence[Bucket]) -> None:
        for index, bucket in enumerate(buckets):
            if bucket in self._steps or bucket in buckets[:index]:
                raise RuntimeError(
                    f"bucket {bucket} is compiled already; a second compile is a bug"
                )
        if len(self._steps) + len(buckets) > self._limit:
            raise RuntimeError(
                f"{buckets} would make {len(self._steps) + len(buckets)} compiled programs of a "
                f"run that was planned with {self._limit}; compiled: {list(self._steps)}"
            )

    @staticmethod
    def _start(
        pool: ThreadPoolExecutor, bucket: Bucket, lower: Callable[[Bucket], Callable[[], Step]]
    ) -> tuple[float, "Future[tuple[Step, float]]"]:
        """Trace a step and begin to compile it: seconds of the one, result of the other."""
        compile_step, seconds = _timed(lambda: lower(bucket))
        return seconds, pool.submit(_timed, compile_step)

    def __len__(self) -> int:
        return len(self._steps)


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """What a call returns, and the seconds it takes."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started
