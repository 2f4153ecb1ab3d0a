"""How long the networks of a study take: the latency column of its tables.

    python -m tools.study_latency docs.results.pcetl --archive=docs/results/pcetl.jsonl
    python -m tools.study_latency docs.results.pcetl --archive=... --tasks=vqa --rows=1,64 --seeds=3

The argument names a module with ``study()`` (of another function: MODULE:FUNCTION), a
``tools.tuning_study.TuningStudy``. Of every way and task the network is built from its config and,
where units are skipped, from what the search in --archive has chosen (ways whose search is not
there are left out). Weights, pictures and texts are random: no run is needed. A pass is the loss of
the task on --rows examples without dropout, in the dtype of the study, with low-rank updates merged
into the weights, as they would be used. All networks of a task take turns in one process, so that
they compare, and ways whose networks are the same (all but the weights) are measured once.

What is found is added to --archive, as milliseconds beside those of the study's first way; what it
holds already is not measured again. Most of the time goes into tracing and compiling: several of
these commands at a time, each of other --tasks, compile side by side and time one after the other
where they have the same --lock (and share the memory of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION).
What else needs the device for a while can hold the lock meanwhile (``flock LOCK COMMAND``); tracing
goes on beside it, and takes little memory of a GPU by XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tools.jobs import Run, read_archive
from tools.latency import NO_OTHERS, ForwardPass, Turns, forward_pass, forward_times
from tools.random_data import program_without_data
from tools.tuning_study import Known, TuningStudy, latency_key, named_tuning_study
from vlp_jax.compress.buckets import Bucket
from vlp_jax.infra.command import argument_parser, bad_input
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.hardware import device_facts
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.train.adopted import adopt
from vlp_jax.train.initial import Origin
from vlp_jax.transfer.quantize import quantized

REPEATS = 50
ROWS = (1, 64, 1024)  # a small model on small pictures: 64 rows of it do not fill a large GPU
TEXT_LENGTH = 16  # tokens; questions of scenes have 6 to 15


@dataclasses.dataclass(frozen=True)
class Network:
    """What a run tunes, as far as its latency goes.

    Attributes:
        config: of the run, with the geometry of its base and the units that it skips.
        eight: whether its weights have eight bits.
    """

    config: ConfigDict
    eight: bool

    @property
    def key(self) -> str:
        """The same for networks that differ in weights alone."""
        told = [self.config.model.to_dict(), self.config.objectives.to_dict(), self.eight]
        return json.dumps(told, sort_keys=True, default=list)


def network_of(run: Run, known: Known) -> Network | None:
    """The network of a run, as it would be used; None: what it skips is not searched for yet.

    Low-rank updates are merged into the weights.

    Args:
        run: of a study, with a parent.
        known: records of an archive.
    """
    if run.eight:
        assert run.parent is not None
        whole = network_of(run.parent, known)
        return whole and dataclasses.replace(whole, eight=True)
    config, base = run.config.copy_and_resolve_references(), run.root
    made = base.config.to_dict()  # by which the run would find its geometry and its readout
    adopt(config, None, Origin(base.key, None, {}, made, tokenizer="", classes=()))
    tuning = config.model.tuning
    tuning.lora.rank = 0
    if not tuning.adapter.kind and not tuning.prompt.kind:
        tuning.blocks = tuning_config().blocks  # of additions, of which there are none
    if run.search is not None:
        if "search" not in known.get(run.search.key, {}):
            return None
        tuning.skip = tuple(known[run.search.key]["search"]["skipped"])
    if run.cut is not None:
        heads, mlp = run.cut
        tuning.prune.update(heads=heads, mlp=mlp, blocks="all")
    return Network(config, run.eight)


def latencies(
    study: TuningStudy,
    known: Known,
    task: str,
    seeds: Sequence[int],
    rows: Sequence[int],
    repeats: int,
    turns: Turns = NO_OTHERS,
) -> Iterator[dict[str, Any]]:
    """Measure what an archive lacks of a task; yields what it keeps of every run.

    Args:
        study: whose first way is what the others are compared with.
        known: records of the archive.
        task: of the study.
        seeds: of the runs.
        rows: examples of a pass.
        repeats: passes that count.
        turns: with other processes that do this for other tasks.
    """
    made = (study.run(way, task, seed) for way in study.ways for seed in seeds)
    runs = {run.key: run for run in made if run is not None}
    found = {key: network for key, run in runs.items() if (network := network_of(run, known))}
    first = next(iter(found.values()), None)
    missing = {key: one for key, one in found.items() if latency_key(key) not in known}
    if first is None or not missing:
        return
    networks = {network.key: network for network in (first, *missing.values())}
    passes: dict[tuple[str, int], ForwardPass] = {}
    for key, network in networks.items():
        pass_of = _passes(network)
        passes |= {(key, count): pass_of(count) for count in rows}
    measured: dict[str, dict[str, float]] = {}
    # Those of the first network are ahead.
    times = forward_times(passes, repeats, turns=turns, ahead=len(rows))
    for (key, count), time in times.items():
        measured.setdefault(key, {})[str(count)] = round(time, 4)
    for key, network in missing.items():
        yield {
            "job": latency_key(key),
            "name": f"{task}, latency",
            "ms": measured[network.key],
            "first_ms": measured[first.key],
            "repeats": repeats,
            "machine": device_facts(),
        }


def _passes(network: Network) -> Callable[[int], ForwardPass]:
    """From rows to a call of the network on random inputs, with random weights."""
    config = network.config.copy_and_resolve_references()
    program = program_without_data(config, TEXT_LENGTH)
    state = program.state_spec
    specs = jax.eval_shape(quantized, state.params) if network.eight else state.params
    params, extras = _random((specs, state.extras["objectives"]))
    sizes = Bucket(TEXT_LENGTH, config.data.image_size)
    bucket = tuple((name, sizes) for name in program.batch_names)
    device = jax.local_devices()[0]
    return lambda rows: forward_pass(
        program, program.objectives, params, extras, bucket, rows, device
    )


def _random(specs: Any) -> Any:
    """Arrays of these shapes, none of whose values slows a product down; counts are 0."""
    draw = np.random.default_rng(0)

    def one(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        if spec.dtype == np.int8:  # weights
            return draw.integers(-127, 128, spec.shape, np.int8)
        if not np.issubdtype(spec.dtype, np.floating):
            return np.zeros(spec.shape, spec.dtype)
        return (0.02 * draw.standard_normal(spec.shape)).astype(spec.dtype)

    return jax.tree.map(one, specs)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a line for each run.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argument_parser("tools.study_latency", __doc__)
    parser.add_argument("study", help="MODULE[:FUNCTION], as docs.results.pcetl")
    parser.add_argument("--archive", type=pathlib.Path, required=True, help="what was done")
    parser.add_argument("--tasks", default="", help="of the study, with commas; by default all")
    parser.add_argument("--seeds", type=int, default=1, help="of the runs")
    parser.add_argument("--rows", default="", help="examples of a pass, with commas; 1,64,1024")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="passes that are timed")
    parser.add_argument("--lock", type=pathlib.Path, help="file that commands at a time share")
    given = parser.parse_args(arguments)
    logging.set_verbosity(logging.INFO)
    with bad_input():
        study = named_tuning_study(given.study)
        tasks = [task for task in given.tasks.split(",") if task] or list(study.figures)
        if unknown := [task for task in tasks if task not in study.figures]:
            raise ValueError(f"--tasks: {unknown[0]!r} is none of {', '.join(study.figures)}")
        try:
            rows = [int(count) for count in given.rows.split(",") if count] or list(ROWS)
        except ValueError as error:
            raise ValueError(f"--rows={given.rows}: {error}; write 1,64,1024") from error
        if min(given.repeats, given.seeds, *rows) < 1:
            raise ValueError("--repeats, --seeds and --rows: use 1 or more")
        known = read_archive(given.archive)
        turns = Turns(given.lock)
        if given.lock is not None:
            given.lock.touch()  # whether it can be made; others may hold it
    for task in tasks:
        for record in latencies(study, known, task, range(given.seeds), rows, given.repeats, turns):
            line = json.dumps(record)
            print(line[:200], flush=True)
            with given.archive.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    set_gpu_flags()
    main()
