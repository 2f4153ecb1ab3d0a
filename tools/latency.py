"""How long forward passes take on the machine at hand, several networks in turns.

forward_times({"full": forward_pass(...), "pruned": ...}, repeats=20)     # milliseconds by name
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import pathlib
import statistics
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from tools.random_data import classes_of, random_extra
from vlp_jax.compress.buckets import StepBucket
from vlp_jax.data.batch import HostBatch, batch_spec
from vlp_jax.infra.hardware import timings
from vlp_jax.objectives.base import Objective
from vlp_jax.train.program import Program

WARM_UP = 3  # calls before any that counts
_Name = TypeVar("_Name", bound=Hashable)
_SPECIAL = 5  # ids below may be special tokens


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """A jitted function, what it is called with, and where.

    Attributes:
        function: from ``jax.jit``.
        arguments: trees of arrays, anywhere.
        device: that computes it.
    """

    function: Any
    arguments: tuple[Any, ...]
    device: jax.Device

    def lowered(self) -> jax.stages.Lowered:
        """The function for arguments like these: traced, which leaves the device alone."""
        place = jax.sharding.SingleDeviceSharding(self.device)
        specs = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.arguments,
        )
        lowered: jax.stages.Lowered = self.function.lower(*specs)
        return lowered

    def placed(self, known: dict[tuple[int, jax.Device], jax.Array]) -> tuple[Any, ...]:
        """The arguments on the device.

        Args:
            known: arrays that are there, by the one they are a copy of; those of this call are
                added. Networks that are timed with several batches have their parameters once.
        """

        def place(leaf: Any) -> jax.Array:
            key = id(leaf), self.device
            if key not in known:
                known[key] = jax.device_put(leaf, self.device)
            return known[key]

        placed: tuple[Any, ...] = jax.tree.map(place, self.arguments)
        return placed


@dataclasses.dataclass(frozen=True)
class Turns:
    """Several processes on one machine, of which only one times anything while no other compiles.

    Attributes:
        lock: a file that all of them name, made on first use; None: this process is alone.
    """

    lock: pathlib.Path | None = None

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """While others may compile, and none times anything."""
        return self._held(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """While the others do neither."""
        return self._held(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _held(self, how: int) -> Iterator[None]:
        if self.lock is None:
            yield
            return
        with self.lock.open("a") as file:  # given up as it is closed
            fcntl.flock(file, how)
            yield


NO_OTHERS = Turns()


def forward_times(
    passes: Mapping[_Name, ForwardPass],
    repeats: int,
    warm_up: int = WARM_UP,
    turns: Turns = NO_OTHERS,
    ahead: int = 0,
) -> dict[_Name, float]:
    """Milliseconds of each pass, its result waited for.

    They take turns, so that whatever else the machine does meets all of them; the median is told.
    They compile side by side before, but never run so: on a GPU that fails while one of them is
    recorded as a CUDA graph. Tracing, which comes first, waits for no other process.

    Args:
        passes: by name, on one device.
        repeats: calls of each that count, 1 or more.
        warm_up: calls of each before.
        turns: with other processes that do the same at the same time.
        ahead: passes, the first ones, that compile before the others. Which of cuBLAS' kernels
            suits a product is tried out on the GPU, one at a time, and remembered: networks that
            share most of their products would all try the same side by side.
    """
    started = time.perf_counter()

    def took(what: str) -> None:
        logging.info("%s within %.0f s", what, time.perf_counter() - started)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        lowered = list(pool.map(lambda one: one.lowered(), passes.values()))
        took("traced")
        with turns.beside():
            took("the device was free")
            compiled = list(pool.map(lambda one: one.compile(), lowered[:ahead]))
            took(f"{len(compiled)} of {len(lowered)} passes compiled")
            compiled += pool.map(lambda one: one.compile(), lowered[ahead:])
            took("all passes compiled")
            known: dict[tuple[int, jax.Device], jax.Array] = {}
            placed = [one.placed(known) for one in passes.values()]
            runs = {
                name: functools.partial(call, *arguments)
                for name, call, arguments in zip(passes, compiled, placed, strict=True)
            }
    seconds: dict[_Name, list[float]] = {name: [] for name in runs}
    with turns.alone():
        for run in runs.values():
            timings(run, warm_up)
        for _ in range(repeats):
            for name, run in runs.items():
                seconds[name] += timings(run, 1)
    return {name: 1e3 * statistics.median(each) for name, each in seconds.items()}


def forward_pass(
    program: Program,
    objectives: Sequence[Objective],
    params: Any,
    extras: Mapping[str, Any],
    bucket: StepBucket,
    rows: int,
    device: jax.Device,
) -> ForwardPass:
    """The loss of objectives on random inputs, without dropout and without gradient.

    Args:
        program: of a run, for its vocabulary, fields of batches and weights of losses.
        objectives: the run's, of its model or of another one.
        params: of that model.
        extras: of the objectives, by name.
        bucket: sizes of the run's batches.
        rows: of a batch.
        device: where it is computed.

    Returns:
        What gives float32 [].
    """

    @jax.jit
    def loss(params: Any, extras: Any, batches: Any) -> jax.Array:
        key = jax.random.key(0)
        return program.loss(params, extras, batches, bucket, key, objectives=objectives)[0]

    batches = {name: random_batch(program, name, bucket, rows) for name, _ in bucket}
    return ForwardPass(loss, (params, dict(extras), batches), device)


def random_batch(program: Program, name: str, bucket: StepBucket, rows: int) -> HostBatch:
    """Random rows of a named batch of a run, texts as long as the bucket's.

    Raises:
        ValueError: the run reads something that cannot be drawn.
    """
    draw, sizes = np.random.default_rng(0), dict(bucket)[name]
    classes = classes_of(program.objectives)
    found = {}
    for field, spec in batch_spec(sizes, rows, program.fields[name]).items():
        shape = spec.shape
        if field in ("image", "second_image"):
            values = draw.integers(0, 256, shape)
        elif field == "text_ids":
            values = draw.integers(_SPECIAL, program.vocabulary.size, shape)
        elif field == "text_length":
            values = np.full(shape, sizes.text_length)
        elif field == "position":
            values = np.arange(rows)
        elif field in ("valid", "text_document"):
            values = np.ones(shape)
        elif field == "replaced":
            values = np.zeros(shape)
        else:
            values = random_extra(draw, field, spec, classes)
        found[field] = values.astype(spec.dtype)
    return found
