"""Where the time of training goes, and how much was trained in it."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from vlp_jax.compress.buckets import StepBucket
from vlp_jax.data.planned import PlannedBatch
from vlp_jax.train.program import Program


@dataclasses.dataclass
class Clock:
    """Where the time between two log lines went, in seconds.

    Attributes:
        waited: for input.
        paused: for compiling, evaluating and saving.
        trained: bucket -> updates made, and tokens of the texts of each named batch in them.
    """

    started: float = dataclasses.field(default_factory=time.perf_counter)
    waited: float = 0.0
    paused: float = 0.0
    trained: dict[StepBucket, tuple[int, Counter[str]]] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of training."""
        return max(time.perf_counter() - self.started - self.paused, 1e-9)

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Time that is not training."""
        begun = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begun

    def count(self, bucket: StepBucket, batches: Mapping[str, PlannedBatch]) -> None:
        """Add what an update trained on."""
        updates, tokens = self.trained.get(bucket, (0, Counter()))
        found = {name: int(batch.length.sum()) for name, batch in batches.items()}
        self.trained[bucket] = updates + 1, tokens + Counter(found)

    def speed(self, program: Program, peak: float) -> dict[str, float]:
        """Samples/s, seconds of an update, MFU and the share of the time that waited for input."""
        seconds = self.seconds
        examples, flops = 0, 0.0
        updates = sum(count for count, _ in self.trained.values())
        for bucket, (count, tokens) in self.trained.items():
            rows = count * program.examples(name for name, _ in bucket)
            lengths = {name: tokens[name] / (count * program.batch_sizes[name]) for name in tokens}
            examples, flops = examples + rows, flops + rows * program.flops(lengths, bucket)
        return {
            "speed/samples_per_second": examples / seconds,
            "speed/update_seconds": seconds / max(updates, 1),
            "speed/mfu": flops / seconds / (peak * program.mesh.size),
            "speed/input_wait_fraction": self.waited / seconds,
        }
