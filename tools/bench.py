"""Measure the update of a config on the machine at hand, without reading any data.

    python -m tools.bench step --config=configs/flm_base.py --batch=512

prints one JSON line: samples/s (median and range over repeats), model FLOPs per sample, MFU against
a matmul peak measured in the same run, peak memory, compile seconds by bucket, versions, device.

    python -m tools.bench buckets --config=CONFIG --config.compression.buckets="('p16@64','whole')"

measures the update of every bucket of ``config.compression`` and of whole images so, one after the
other in one process, and what share of the speed-up that FLOPs predict each reaches; the JSON line
has them under ``buckets``. Costs are shares of the time for which the device is busy (on CPUs, of
the time that passes). With ``--out=FILE`` it writes the config's schedule with the costs measured,
for ``config.compression.file``.

With `--fixed_views` the pictures themselves, some of them mirrored, stand for random views: what is
saved is what those cost.

Batches are planned as in training (windows sorted by length, cut, permuted; edges fitted to the
lengths) from caption lengths uniform in [min_length, max_length]; of packed texts rows are full, of
documents of such lengths. Pixels, tokens and labels are
random and lie on the device, so that the figure is that of the update alone. What is ``auto`` is
settled as in a run that starts from nothing.
"""

import dataclasses
import inspect
import json
import math
import pathlib
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from tools.random_data import classes_of, program_without_data, random_extra
from tools.timing import UpdateTime, busy_ms, cost_shares, repeat
from vlp_jax.compress.buckets import (
    WHOLE,
    StepBucket,
    bucket_label,
    bucket_text,
)
from vlp_jax.data.batch import EXTRA_FIELDS, Batch, batch_spec
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.named import batch_section
from vlp_jax.data.plan import Plan
from vlp_jax.data.planned import PlannedBatch, PlannedSource
from vlp_jax.data.text_edges import batch_maxima, fit_edges
from vlp_jax.infra.command import bad_input, check_length, fail, parse_flags
from vlp_jax.infra.compilation import CompiledSteps, set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.hardware import device_facts, measure_matmul_peak, memory, timings
from vlp_jax.infra.mesh import global_batch
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.objectives import OBJECTIVES
from vlp_jax.train.bucket_schedule import stages_of
from vlp_jax.train.program import Program

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration to measure")
_BATCH = flags.DEFINE_integer(
    "batch", None, "data.batch_size; the config's own if not given", lower_bound=1
)
_STEPS = flags.DEFINE_integer("steps", 32, "updates timed in one repeat", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed repeats", lower_bound=1)
_MIN_LENGTH = flags.DEFINE_integer("min_length", 8, "shortest caption in tokens", lower_bound=3)
_OUT = flags.DEFINE_string("out", None, "schedule file to write, with the costs measured")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 20, "longest caption in tokens", lower_bound=3)

_FIXED_VIEWS = flags.DEFINE_boolean(
    "fixed_views", False, "read the pictures themselves instead of random views of them"
)

# No two views of a picture are one to the compiler, which would compute them once.
FIXED = {"crop": False, "flip": 0.5, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0}
_PICTURES = ("image", "second_image")  # fields that all batches of a name share


class UniformLengths:
    """An unbounded source, and its encoded captions, of which only the lengths exist."""

    name = "uniform_lengths"
    num_records = None

    def __init__(self, shortest: int, longest: int):
        self.shortest, self.longest = shortest, longest

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """One caption a record: int64 [n] -> int64 [n]."""
        return np.ones_like(records)

    def lengths(self, records: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """A uniform length for each record, a function of its number: int32 [n]."""
        rng = np.random.default_rng(int(records[0]))
        return rng.integers(self.shortest, self.longest + 1, len(records)).astype(np.int32)

    def histogram(self) -> np.ndarray:
        """Equal counts from shortest to longest: int64 [longest + 1]."""
        counts = np.zeros(self.longest + 1, np.int64)
        counts[self.shortest :] = 1
        return counts


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All of an update but its compiled step.

    Attributes:
        config: of the run.
        program: what is compiled.
        planned: batches, by name, whose updates are measured, in turn.
        keys: what step each takes.
        pictures: what all batches of a name read, on the device.
        batches: what each reads beside it, by name, on the device.
    """

    config: Any
    program: Program
    planned: Sequence[Mapping[str, PlannedBatch]]
    keys: Sequence[StepBucket]
    pictures: Mapping[str, Batch]
    batches: Sequence[Mapping[str, Batch]]


Steps = CompiledSteps[tuple[int, StepBucket], Any]  # by number of the config, and key
Measured = tuple[dict[str, Any], UpdateTime]  # the figures of a config, ready for JSON


def bench_step(config: Any) -> dict[str, Any]:
    """Time the update of a config.

    Args:
        config: a run's config; its data section gives batch size, image size and the edge fit.

    Returns:
        The figures, ready for JSON.

    Raises:
        ConfigError, ValueError: a flag or a key does not fit; the message names it.
        FloatingPointError: an update's loss or gradients were not finite.
    """
    [(figures, _)] = _measure([_prepare(config)], traced=False)
    return figures


def _prepare(config: Any, like: Prepared | None = None) -> Prepared:
    """Plan, and put on the device what a config's updates read; ``like`` has the same pictures."""
    positions = config.model.text.max_positions
    if _MIN_LENGTH.value > _MAX_LENGTH.value:
        raise ValueError(
            f"--min_length={_MIN_LENGTH.value} is above --max_length={_MAX_LENGTH.value}; "
            "lower the one or raise the other"
        )
    check_length("max_length", _MAX_LENGTH.value, positions)
    program = _program(config)  # every fault of the config shows here
    if _FIXED_VIEWS.value:
        fix_views(config)
        program = _program(config)
    if len({*program.schedule.index.tolist()}) > 1:
        raise ConfigError(
            "compression.schedule",
            f"{config.compression.schedule!r} uses several buckets, and one is measured",
            "Take `python -m tools.bench buckets`, which measures each",
        )
    packed = {name: "text_document" in fields for name, fields in program.fields.items()}
    plan = JointPlan({name: _plan(config, name, several) for name, several in packed.items()})
    updates = range(min(_STEPS.value, plan.window_batches))
    planned = [plan.batches(t) for t in updates]
    rng = np.random.default_rng(config.seed)
    pictures = like.pictures if like else _pictures(rng, program)
    batches = [
        {name: _batch(rng, name, batch, program) for name, batch in some.items()}
        for some in planned
    ]
    keys = [program.bucket(plan.bucket(t), t) for t in updates]
    return Prepared(config, program, planned, keys, pictures, batches)


def _plan(config: Any, name: str, packed: bool) -> Plan:
    """Of a named batch; a section without edges has them fitted as in training.

    Args:
        config: of the run.
        name: of the batch.
        packed: whether its rows hold several texts.
    """
    data, section = config.data, batch_section(config, name)
    source = UniformLengths(_MIN_LENGTH.value, _MAX_LENGTH.value)
    if packed:  # rows are full
        source = UniformLengths(section.max_text_length, section.max_text_length)
    maxima = batch_maxima(source.histogram(), section.batch_size, data.window_batches)
    edges = section.text_edges or fit_edges(
        maxima, section.num_edges, data.edge_multiple, longest=source.longest
    )
    positions = config.model.text.max_positions
    if edges[-1] > positions:
        raise ConfigError(
            "data.text_edges",
            f"the last of {edges} is above model.text.max_positions={positions}",
            "Lower it, or data.edge_multiple where edges are fitted",
        )
    return Plan(
        [PlannedSource(source, source)],  # type: ignore[arg-type]
        section.batch_size,
        config.seed,
        edges,
        data.image_size,
        data.window_batches,
    )


def _pictures(rng: np.random.Generator, program: Program) -> Mapping[str, Batch]:
    size, found = program.config.data.image_size, {}
    for name, rows in program.batch_sizes.items():
        shape = (rows, size, size, 3)
        fields = [field for field in program.fields[name] if field in _PICTURES]
        pixels = {field: rng.integers(0, 256, shape, dtype=np.uint8) for field in fields}
        found[name] = dict(global_batch(pixels, program.mesh))
    return found


def _measure(several: Sequence[Prepared], traced: bool) -> list[Measured]:
    """Compile all steps at the same time, then time one config after the other."""
    peak = measure_matmul_peak()
    owners = {(n, key): one for n, one in enumerate(several) for key in one.keys}
    steps: Steps = CompiledSteps(limit=len(owners))
    # Before the device is busy: compiling measures kernels on it.
    steps.compile(owners, lambda key: owners[key].program.lower(key[1]).compile)
    return [_time(one, n, steps, peak, traced) for n, one in enumerate(several)]


def _time(prepared: Prepared, number: int, steps: Steps, peak: float, traced: bool) -> Measured:
    config, program, planned = prepared.config, prepared.program, prepared.planned
    rows = program.examples(program.batch_names)
    batches = [
        {name: {**batch, **prepared.pictures[name]} for name, batch in some.items()}
        for some in prepared.batches
    ]
    state, moment, metrics = program.init(), program.moment(0), {}

    def update(t: int) -> Any:
        nonlocal state, metrics
        index = t % len(planned)
        state, metrics = steps[number, prepared.keys[index]](state, batches[index], moment)
        return state

    jax.block_until_ready(repeat(update, len(planned)))
    count = _STEPS.value
    seconds = [taken / count for taken in timings(lambda: repeat(update, count), _REPEATS.value)]
    busy = busy_ms(update, count) if traced else None
    loss, skipped = float(metrics["loss"]), int(metrics["skipped"])
    if skipped or not math.isfinite(loss):
        raise FloatingPointError(
            f"{config.name}: loss or gradients of {skipped} updates were not finite, the last loss "
            f"is {loss}; nothing is reported of updates that would be skipped: check the config"
        )
    each = [batch for some in planned for batch in some.values()]
    lengths = np.concatenate([batch.length for batch in each])
    padded = np.concatenate([np.full(len(b), b.bucket.text_length) for b in each])
    flops = statistics.fmean(
        program.flops({name: float(b.length.mean()) for name, b in some.items()}, key)
        for some, key in zip(planned, prepared.keys, strict=True)
    )
    rates = sorted(rows / s for s in seconds)
    rate = statistics.median(rates)
    figures = {
        "samples_per_second": round(rate, 2),
        "samples_per_second_range": [round(rates[0], 2), round(rates[-1], 2)],
        "step_ms": round(1e3 * rows / rate, 3),
        "mfu": round(rate * flops / (peak * program.mesh.size), 4),
        "gflops_per_sample": round(flops / 1e9, 4),
        "matmul_peak_tflops": round(peak / 1e12, 2),
        "peak_memory_gb": round(memory().peak / 1e9, 3),
        "memory_source": memory().source,
        "compile_seconds": {
            bucket_label(key): round(s, 1) for (n, key), s in steps.seconds.items() if n == number
        },
        "batch": rows,
        "text_length_mean": round(float(lengths.mean()), 3),
        "text_padding_waste": round(1 - float(lengths.sum() / padded.sum()), 4),
        "loss": round(loss, 4),
        "skipped": skipped,
        "config": config.name,
        **device_facts(),
    }
    return figures, UpdateTime(1e3 * rows / rate, busy)


def bench_buckets(config: Any) -> dict[str, Any]:
    """Time the update of every bucket of ``config.compression``, and of whole images.

    Args:
        config: a run's config, see ``bench_step``.

    Returns:
        What ``bench_step`` gives for whole images, and under ``buckets`` by name: ``step_ms``,
        ``device_ms``, ``samples_per_second``, ``mfu``, ``cost`` (share of the time for which the
        device is busy with whole images), ``flops_share`` (the same of the FLOPs) and
        ``speedup_share`` (how much of the speed-up that FLOPs predict is reached, of the time that
        passes).

    Raises:
        ConfigError, ValueError, FloatingPointError: see ``bench_step``.
    """
    program = _program(config)  # every fault of the section shows here
    if config.compression.file or not config.compression.schedule:
        raise ConfigError(
            "compression.schedule",
            "says what is to be measured, together with compression.buckets",
            "Give both, and no compression.file",
        )
    if _OUT.value is not None:
        stages_of(config.compression, program.compression.costs)
        if not pathlib.Path(_OUT.value).resolve().parent.is_dir():
            raise ValueError(f"--out={_OUT.value}: its folder does not exist; make it first")
    names = [bucket_text(views) for views in program.compression.buckets]
    prepared: dict[str, Prepared] = {}
    for name in dict.fromkeys((WHOLE, *names)):
        one = config.copy_and_resolve_references()
        one.compression.update({"schedule": "constant", "buckets": (name,), "costs": ()})
        one.compression.update({"shares": (), "tail_percent": 0.0})
        prepared[name] = _prepare(one, like=prepared.get(WHOLE))
    measured = dict(zip(prepared, _measure(list(prepared.values()), traced=True), strict=True))
    times = {name: time for name, (_, time) in measured.items()}
    shares = cost_shares(times, unit=WHOLE)
    whole = measured[WHOLE][0]
    found = {}
    for name, (figures, time) in measured.items():
        flops = figures["gflops_per_sample"] / whole["gflops_per_sample"]
        found[name] = {
            **{key: figures[key] for key in ("step_ms", "samples_per_second", "mfu")},
            "device_ms": time.busy,
            "cost": round(shares[name], 4),
            "flops_share": round(flops, 4),
            "speedup_share": round(flops * times[WHOLE].passed / time.passed, 4),
        }
    return {**whole, "buckets": found}


def fix_views(config: Any) -> None:
    """Let every objective that augments see the pictures themselves.

    Raises:
        ValueError: there is none.
    """
    recipes = [
        (section, key)
        for name, section in config.objectives.items()
        for key in inspect.signature(OBJECTIVES[section.get("type", name)]).parameters
        if key.startswith("augment")
    ]
    if not recipes:
        raise ValueError("--fixed_views: no objective of the config makes random views; leave it")
    with config.unlocked():
        for section, key in recipes:
            section[key] = dict(FIXED)


def _write_schedule(config: Any, figures: dict[str, Any], out: pathlib.Path) -> None:
    """Write the config's schedule with the costs that ``bench_buckets`` has measured."""
    program = _program(config)
    measured = [
        figures["buckets"][bucket_text(views)]["cost"] for views in program.compression.buckets
    ]
    resolved = dataclasses.replace(
        program.compression, costs=tuple(measured), stages=stages_of(config.compression, measured)
    )
    facts = {"command": shlex.join(["python", "-m", "tools.bench", *sys.argv[1:]])}
    resolved.write(out, program.made_for, facts | device_facts())


def _program(config: Any) -> Program:
    return program_without_data(config, (_MIN_LENGTH.value + _MAX_LENGTH.value) / 2)


def _batch(rng: np.random.Generator, name: str, planned: PlannedBatch, program: Program) -> Batch:
    """All arrays of a named batch but the pictures."""
    rows, tokens = len(planned), planned.bucket.text_length
    vocab_size = program.config.tokenizer.vocab_size
    host = {
        "text_ids": rng.integers(5, vocab_size, (rows, tokens), dtype=np.int32),
        "text_length": planned.length.astype(np.int32),
        "position": planned.position.astype(np.int32),
        "valid": np.ones(rows, np.bool_),
        "replaced": np.zeros(rows, np.int32),
    }
    if "text_document" in program.fields[name]:
        host["text_document"] = _documents(rng, rows, tokens)
    classes = classes_of(program.objectives)
    extra = EXTRA_FIELDS.keys() - {*_PICTURES}
    fields = tuple(field for field in program.fields[name] if field in extra)
    for field, spec in batch_spec(planned.bucket, rows, fields).items():
        host[field] = random_extra(rng, field, spec, classes)
    return global_batch(host, program.mesh)


def _documents(rng: np.random.Generator, rows: int, tokens: int) -> np.ndarray:
    """Full rows of documents of --min_length to --max_length tokens: int32 [rows, tokens]."""
    mean = (_MIN_LENGTH.value + _MAX_LENGTH.value) / 2
    # A document begins where the ends of those before it are passed.
    drawn = rng.integers(
        _MIN_LENGTH.value, _MAX_LENGTH.value + 1, (rows, 2 * math.ceil(tokens / mean) + 2)
    )
    ends = np.cumsum(drawn, axis=1)
    return 1 + (ends[:, None, :] <= np.arange(tokens)[None, :, None]).sum(axis=2, dtype=np.int32)


def main(argv: Sequence[str]) -> None:
    """Run the measurement named on the command line."""
    measures = {"step": bench_step, "buckets": bench_buckets}
    if len(argv) != 2 or argv[1] not in measures:
        raise app.UsageError(
            "say what to measure: python -m tools.bench step --config=CONFIG (or buckets)"
        )
    config = _CONFIG.value
    if config is None:
        raise app.UsageError("--config=configs/NAME.py is needed")
    with bad_input():
        if _OUT.value is not None and argv[1] != "buckets":
            raise ValueError("--out is for the costs of buckets: python -m tools.bench buckets")
        if _OUT.value is not None and _FIXED_VIEWS.value:
            raise ValueError("--out is for costs of training, which has views; leave --fixed_views")
        if _BATCH.value is not None:
            config.data.batch_size = _BATCH.value
        try:
            figures = measures[argv[1]](config)
        except FloatingPointError as error:
            sys.exit(fail(ExitCode.TOO_MANY_BAD_UPDATES, error))
    print(json.dumps(figures))
    if _OUT.value is not None:
        with bad_input():
            _write_schedule(config, figures, pathlib.Path(_OUT.value))


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
