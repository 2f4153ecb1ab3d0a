"""Measure the gradient error of compressed images along a run, and derive a schedule from it.

    python -m vlp_jax.main --config=configs/invariance.py:moco_v3 --workdir=runs/pilot \\
        --config.checkpoint.every_percent=25.0 --config.checkpoint.keep_latest=9
    python -m tools.gradient_error --config=configs/invariance.py:moco_v3 --workdir=runs/pilot \\
        --config.compression.schedule=staged \\
        --config.compression.buckets="('p16@64','p8@64k16','p8@64k32','whole')"
    python -m vlp_jax.main --config=configs/invariance.py:moco_v3 --workdir=runs/fast \\
        --config.compression.file=runs/pilot/gradient_error/schedule.json

At every checkpoint of the run, and at its fresh parameters, the gradients of the same batches are
compared in every bucket of ``config.compression`` (``vlp_jax.train.gradient_error``). Batches are
those that follow the checkpoint in the run's order. Costs are measured here, on the update of each
bucket, unless ``config.compression.costs`` gives them.

Writes to ``WORKDIR/gradient_error`` (or ``--out``): ``table.md``, ``gradient_error.png``,
``results.json``, and ``schedule.json``: at each checkpoint the bucket of the least cost-adjusted
error, under costs that never fall, for ``config.compression.file``. All but the last are written
after every checkpoint.
"""

import copy
import dataclasses
import functools
import json
import pathlib
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from tools.timing import UpdateTime, busy_ms, cost_shares, repeat
from vlp_jax.compress.buckets import StepBucket, bucket_text
from vlp_jax.data.build import open_loader
from vlp_jax.infra.checkpoint import restore_step
from vlp_jax.infra.checkpoint_reader import steps_of
from vlp_jax.infra.command import bad_input, parse_flags
from vlp_jax.infra.compilation import CompiledSteps, enable_compile_cache, set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.infra.hardware import device_facts, timings
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.train.bucket_schedule import Resolved
from vlp_jax.train.gradient_error import (
    MIN_BATCHES,
    Estimate,
    GradientErrors,
    derive,
    probe_batches,
    stages_at,
)
from vlp_jax.train.initial import CHECKPOINT_FOLDER
from vlp_jax.train.setup import TOKENIZER_FILE, Setup, prepare
from vlp_jax.train.state import TrainState

_CONFIG = config_flags.DEFINE_config_file("config", None, "of the run, with compression.buckets")
_WORKDIR = flags.DEFINE_string("workdir", None, "of the run whose checkpoints are looked at")
_STEPS = flags.DEFINE_list("checkpoints", None, "their steps; 0: fresh parameters; by default all")
_BATCHES = flags.DEFINE_integer(
    "batches", 64, "batches compared at each checkpoint", lower_bound=MIN_BATCHES
)
_UPDATE_COST = flags.DEFINE_float(
    "update_cost", 1.0, "what one update may cost, in updates of whole images", lower_bound=1e-6
)
_TAIL = flags.DEFINE_float(
    "tail_percent", 0.0, "share of the derived schedule, at its end, for whole images", 0.0, 99.0
)
_OUT = flags.DEFINE_string("out", None, "folder to write to; by default WORKDIR/gradient_error")

_TIMED, _SECONDS, _REPEATS = 8, 2.0, 3  # updates in a timing, or as many as fit, and timings


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one checkpoint.

    Attributes:
        step: its updates.
        progress: share of its run's budget.
        estimates: of every bucket, in the order of the config's.
    """

    step: int
    progress: float
    estimates: Sequence[Estimate]


def measure(config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Measure, derive, and write everything that the module names.

    Args:
        config: of the run, with ``compression.buckets``.
        workdir: of the run.
        out: made if absent.

    Raises:
        ConfigError, ValueError, OSError: the message names the key or the file.
    """
    checkpoints, total = _checkpoints(workdir)
    if not config.compression.schedule or config.compression.file:
        raise ConfigError(
            "compression.schedule",
            "says what is to be compared, together with compression.buckets",
            "Give both, and no compression.file",
        )
    config.tokenizer.path = str(workdir / TOKENIZER_FILE)
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.evals = ConfigDict()
    if config.compile_cache != "off":
        enable_compile_cache(config.compile_cache or workdir / "compile_cache")
    with tempfile.TemporaryDirectory() as scratch:
        setup = prepare(config, pathlib.Path(scratch))
        program, names = setup.program, [bucket_text(b) for b in setup.program.compression.buckets]
        out.mkdir(parents=True, exist_ok=True)
        errors = GradientErrors(program, program.compression.buckets)
        fresh, _ = setup.first_state()
        costs = program.compression.costs
        if not config.compression.costs:
            costs = _measured_costs(setup, fresh)
        found: list[Measured] = []
        for step in checkpoints:
            state = fresh
            if step:
                elsewhere = setup.tunables.elsewhere
                state = restore_step(_folder(workdir), step, program.state_spec, elsewhere).state
            steps = range(step, step + _BATCHES.value)
            errors.compile(dict.fromkeys(setup.plan.bucket(t) for t in steps))
            probed = probe_batches(program, setup.plan, step, _BATCHES.value)
            estimates = errors.measure(state, probed, costs, _UPDATE_COST.value)
            found.append(Measured(step, _progress(workdir, step, total), estimates))
            print(_table(names, costs, found[-1]), flush=True)
            # Whatever ends this before the last checkpoint, those before it are kept; only a
            # schedule for part of a run is none.
            complete = step == checkpoints[-1]
            _write(out, setup, names, costs, found, errors, complete=complete)
    print(f"written: {out}")


def _checkpoints(workdir: pathlib.Path) -> tuple[list[int], int]:
    """Steps to look at, in order, and the updates of the run."""
    facts = workdir / "run.json"
    if not facts.is_file():
        raise ValueError(f"--workdir={workdir} holds no run: {facts.name} is absent")
    there = [0, *sorted(steps_of(_folder(workdir)))]
    asked = there
    if _STEPS.value:
        if not all(step.isdigit() for step in _STEPS.value):
            raise ValueError(f"--checkpoints={','.join(_STEPS.value)}: write steps, such as 0,500")
        asked = sorted({int(step) for step in _STEPS.value})
        missing = sorted(set(asked) - set(there))
        if missing:
            raise ValueError(
                f"--checkpoints: {workdir} has none of step {missing[0]}; there are "
                f"{', '.join(map(str, there))}"
            )
    return asked, json.loads(facts.read_text())["total_steps"]


def _folder(workdir: pathlib.Path) -> epath.Path:
    return epath.Path(workdir) / CHECKPOINT_FOLDER


def _progress(workdir: pathlib.Path, step: int, total: int) -> float:
    """Share of the budget that the run had spent: of updates, where it did not compress."""
    spent = {
        record["step"]: record["compression/budget_share"]
        for record in read_metrics(workdir)
        if "compression/budget_share" in record and record["step"] <= step
    }
    if spent and step:
        return float(spent[max(spent)])
    return min(1.0, step / total)


def _measured_costs(setup: Setup, state: TrainState) -> tuple[float, ...]:
    """What an update of each bucket costs, as a share of one of whole images."""
    program, planned = setup.program, setup.plan.bucket(0)
    with open_loader(setup.config, setup.plan, range(1), program.fields) as loader:
        batches = program.batches(next(loader))
    keys = {
        views: program.with_views(planned, views)
        for views in dict.fromkeys(((), *program.compression.buckets))
    }
    steps: CompiledSteps[StepBucket, Any] = CompiledSteps(limit=len(keys))
    steps.compile(keys.values(), lambda key: program.lower(key).compile)
    moment, times = program.moment(0), {}
    for views, key in keys.items():
        own = jax.tree.map(jnp.copy, state)

        def update(number: int, key: StepBucket = key) -> Any:
            del number
            nonlocal own
            own, _ = steps[key](own, batches, moment)
            return own

        repeat(update, 1)  # warms up
        [one] = timings(functools.partial(repeat, update, 1), 1)
        count = min(_TIMED, max(1, round(_SECONDS / one)))
        passed = statistics.median(timings(functools.partial(repeat, update, count), _REPEATS))
        times[views] = UpdateTime(1e3 * passed / count, busy_ms(update, count))
    shares = cost_shares(times, unit=())
    return tuple(shares[views] for views in program.compression.buckets)


def _table(names: Sequence[str], costs: Sequence[float], measured: Measured) -> str:
    """Of one checkpoint, in Markdown; figures relative to the mean variance of the buckets."""
    lines = [
        f"Step {measured.step:,}, {measured.progress:.0%} of the budget; in units of the mean of "
        "the buckets' variances, +- one standard error",
        "",
        "| bucket | cost | squared bias | variance | CA-MSE | by Adam's scale: bias | CA-MSE |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    unit = float(np.mean([e.variance for e in measured.estimates])) or 1.0
    adam = float(np.mean([e.adam_mse for e in measured.estimates])) or 1.0
    least = min(e.mse for e in measured.estimates)
    for name, cost, e in zip(names, costs, measured.estimates, strict=True):
        mark = "**" if e.mse == least else ""
        lines.append(
            f"| `{name}` | {cost:.3f} | {e.bias / unit:.4f} ± {e.bias_error / unit:.4f} "
            f"| {e.variance / unit:.3f} ± {e.variance_error / unit:.3f} "
            f"| {mark}{e.mse / unit:.3f}{mark} ± {e.mse_error / unit:.3f} "
            f"| {e.adam_bias / adam:.4f} | {e.adam_mse / adam:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _write(
    out: pathlib.Path,
    setup: Setup,
    names: Sequence[str],
    costs: Sequence[float],
    found: Sequence[Measured],
    errors: GradientErrors,
    *,
    complete: bool,
) -> None:
    """Write all files; the derived schedule where all checkpoints are there."""
    program = setup.program
    mse = np.array([[estimate.mse for estimate in m.estimates] for m in found])
    choices = derive(mse, costs)
    facts = {"command": shlex.join(["python", "-m", "tools.gradient_error", *sys.argv[1:]])}
    facts |= device_facts()
    results = {
        "costs": dict(zip(names, costs, strict=True)),
        "update_cost": _UPDATE_COST.value,
        "batches": _BATCHES.value,
        "checkpoints": [
            {
                "step": m.step,
                "progress": m.progress,
                "choice": names[choice],
                "estimates": {
                    name: {k: v if np.isfinite(v) else None for k, v in e._asdict().items()}
                    for name, e in zip(names, m.estimates, strict=True)
                },
            }
            for m, choice in zip(found, choices, strict=True)
        ],
        "compile_seconds": round(sum(errors.seconds.values()), 1),
        "facts": facts,
    }
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    tables = [f"`{facts['command']}`\n", *(_table(names, costs, m) for m in found)]
    if complete:
        order = list(dict.fromkeys(choices))
        stages = stages_at([m.progress for m in found], [order.index(choice) for choice in choices])
        schedule = Resolved(
            tuple(program.compression.buckets[choice] for choice in order),
            tuple(costs[choice] for choice in order),
            stages,
            (),
            _TAIL.value / 100,
        )
        schedule.write(out / "schedule.json", program.made_for, facts)
        derived, start = ["| of the budget | bucket | cost |", "| --- | --- | ---: |"], 0.0
        for end, number in stages:
            name, cost = names[order[number]], costs[order[number]]
            derived.append(f"| {start:.0%} to {end:.0%} | `{name}` | {cost:.3f} |")
            start = end
        print("\n".join(derived))
        tables += ["Derived schedule:\n", *derived]
    write_text(out / "table.md", "\n".join(tables) + "\n")
    _draw(out / "gradient_error.png", names, costs, found, choices)


def _draw(
    file: pathlib.Path,
    names: Sequence[str],
    costs: Sequence[float],
    found: Sequence[Measured],
    choices: Sequence[int],
) -> None:
    """Cost-adjusted error, squared bias and cost-adjusted variance over the run."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    progress = [100 * m.progress for m in found]
    # Scales differ from one checkpoint to the next by far: each is its own unit.
    units = np.array([np.mean([e.variance for e in m.estimates]) for m in found])
    for index, (name, cost) in enumerate(zip(names, costs, strict=True)):
        mine = [m.estimates[index] for m in found]
        curves = (
            ([e.mse for e in mine], [e.mse_error for e in mine]),
            ([e.bias for e in mine], [e.bias_error for e in mine]),
            ([cost * e.variance for e in mine], [cost * e.variance_error for e in mine]),
        )
        for axes, (values, spreads) in zip(panels, curves, strict=True):
            axes.errorbar(
                progress,
                np.array(values) / units,
                np.array(spreads) / units,
                marker="o",
                markersize=3,
                capsize=2,
                label=f"{name} (cost {cost:.2f})",
            )
    chosen = [m.estimates[choice].mse for m, choice in zip(found, choices, strict=True)]
    panels[0].plot(progress, np.array(chosen) / units, "k*", markersize=11, label="derived")
    titles = ("cost-adjusted error", "squared bias", "cost-adjusted variance")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("share of the budget, %")
        # Of the strongest compression they are a hundred times those that are chosen between; a
        # bias is zero, or as an estimate below it.
        axes.set_yscale("symlog", linthresh=0.1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("in units of the buckets' mean variance")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1]!r}")
    if _CONFIG.value is None or not _WORKDIR.value:
        raise app.UsageError("--config=configs/NAME.py and --workdir=RUN are needed")
    workdir = pathlib.Path(_WORKDIR.value)
    with bad_input():
        out = pathlib.Path(_OUT.value) if _OUT.value else workdir / "gradient_error"
        measure(copy.deepcopy(_CONFIG.value), workdir, out)


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
