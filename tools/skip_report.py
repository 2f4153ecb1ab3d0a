"""What a search for units to skip has chosen, why, and what it saves: one page.

    python -m tools.skip_report runs/search
    python -m tools.skip_report runs/search --out=FOLDER --repeats=50

Writes ``skip_report.html``, which needs nothing else, and ``skip_report.json`` with all numbers, to
WORKDIR or FOLDER, and prints a short table. The page has the units of every stack, kept or skipped,
with the harm of their absence and what they take of the forward FLOPs; the preferences over the
search; loss and metrics of the choices of 0, 1, ... units; and the full network beside the pruned
one: parameters, forward FLOPs by formula, and milliseconds of a forward pass, measured here.

Both networks are tuned and without switches: ``full`` has every unit, ``pruned`` lacks those that
are skipped and has an adapter in the place of each. A pass is the loss of the run's objectives on
random inputs of the run's sizes, its longest texts, without dropout; medians over --repeats, the
two in turns. It is measured for 1 and 64 examples on the accelerator, if there is one, and for 1 on
the CPU.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich
import rich.table
from absl import logging
from ml_collections import ConfigDict

from tools.latency import forward_pass, forward_times
from tools.searched import SearchRun, read_search, restored
from vlp_jax.infra import charts, units
from vlp_jax.infra.charts import Chart, Series
from vlp_jax.infra.command import bad_input, fail
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.files import write_text
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.manifest import DamagedCheckpointError
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.report import write_page
from vlp_jax.infra.report.from_facts import as_pairs, flat_config
from vlp_jax.infra.report.views import BarsView, Headline, Section, TableView, table_view
from vlp_jax.infra.report.words import as_title
from vlp_jax.models.sizes import build_model
from vlp_jax.models.tuning import split_unit
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.base import Objective
from vlp_jax.train.setup import Setup
from vlp_jax.train.state import TrainState
from vlp_jax.transfer.units import pruned

PAGE, NUMBERS = "skip_report.html", "skip_report.json"
REPEATS = 20
NETWORKS = ("full", "pruned")
ACCELERATOR_ROWS, CPU_ROWS = (1, 64), (1,)
_MEASURED = "measured: "  # begins the line of the process that measures on the CPU
_CHOICE_KEYS = ("skipped", "flops_saved")  # of by_count; the others are figures


def numbers_of(
    run: SearchRun, setup: Setup, state: TrainState, latency: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the page shows, ready for JSON.

    Args:
        run: of ``searched.read_search``.
        setup: of ``searched.restored``.
        state: of the same.
        latency: see ``latency_here``, by device: ``accelerator`` and ``cpu``.

    Returns:
        - ``workdir``, ``method``, ``reward``, ``split``, ``step``, ``skipped`` and ``flops_saved``;
        - ``units``: of each ``unit``, ``stack``, ``layer``, ``part``, ``kept``, ``harm``, ``error``
          (None: not known) and ``flops_share``;
        - ``parameters`` and ``forward_flops`` (of an example) of ``full`` and ``pruned``;
        - ``latency``;
        - ``by_count`` of ``search.json``;
        - ``history``: ``preference`` and ``harm`` of each unit, lists of step and value.
    """
    found = run.found
    errors = found.get("error", [None] * len(found["units"]))
    told = zip(found["units"], found["costs"], found["harm"], errors, strict=True)
    networks = {name: _network(setup, state, run, name) for name in NETWORKS}
    lengths = setup.budget.text_lengths
    return {
        "workdir": str(run.workdir),
        **{key: found[key] for key in ("method", "reward", "split", "step", "skipped")},
        "flops_saved": found["flops_saved"],
        "units": [
            {
                "unit": unit,
                **_place(unit),
                "kept": unit not in found["skipped"],
                "harm": harm,
                "error": error,
                "flops_share": cost,
            }
            for unit, cost, harm, error in told
        ],
        "parameters": {
            name: sum(leaf.size for leaf in jax.tree.leaves(params))
            for name, (_, params) in networks.items()
        },
        "forward_flops": {
            name: setup.program.forward_flops(lengths, objectives=objectives)
            for name, (objectives, _) in networks.items()
        },
        "latency": dict(latency),
        "by_count": found["by_count"],
        "history": _history(run),
    }


def latency_here(
    run: SearchRun, setup: Setup, state: TrainState, rows: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Milliseconds of a forward pass on the first device of this process.

    Args:
        run: of ``searched.read_search``.
        setup: of ``searched.restored``.
        state: of the same.
        rows: examples of a batch, each measured.
        repeats: passes that count.

    Returns:
        ``device``, ``text_length`` by batch, ``repeats``, and ``ms``: rows (as text) -> network ->
        milliseconds.
    """
    bucket = setup.plan.buckets()[-1]
    bucket = bucket if not setup.plan.take_turns else tuple(setup.plan.bucket(0))
    networks = {name: _network(setup, state, run, name) for name in NETWORKS}
    extras, device = state.extras["objectives"], jax.local_devices()[0]
    measured = {}
    for count in rows:
        passes = {
            name: forward_pass(setup, objectives, params, extras, bucket, count, device)
            for name, (objectives, params) in networks.items()
        }
        measured[str(count)] = forward_times(passes, repeats)
    cpu = device.platform == "cpu"
    return {
        "device": (platform.processor() or platform.machine()) if cpu else device.device_kind,
        "text_length": {name: sizes.text_length for name, sizes in bucket},
        "repeats": repeats,
        "ms": measured,
    }


def _network(
    setup: Setup, state: TrainState, run: SearchRun, name: str
) -> tuple[Sequence[Objective], Any]:
    """Objectives and parameters of the full or of the pruned network, without switches."""
    config, words = setup.config, setup.tokenizer.vocabulary
    skipped = tuple(run.found["skipped"]) if name == "pruned" else ()
    section = ConfigDict(config.model.to_dict())
    section.tuning.update(skip=skipped, gated=())
    model = build_model(section, words.size, words.mask_id, config.data.image_size)
    return build_objectives(config.objectives, model, words), pruned(state.params, skipped)


def _place(unit: str) -> dict[str, Any]:
    """Where a unit is: its stack, its layer there and its part of the block."""
    block, part = split_unit(unit)
    place = re.fullmatch(r"(.*?)_?(\d+)", block)
    stack, layer = (block, 0) if place is None else (place[1], int(place[2]))
    return {"stack": stack.removesuffix("_block"), "layer": layer, "part": part}


def _history(run: SearchRun) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What was logged of every unit; empty where the method learns nothing as the run goes."""
    records = read_metrics(run.workdir)
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for kind in ("preference", "harm"):
        for unit in run.found["units"]:
            key = f"search/{kind}/{unit}"
            points = [(int(r["step"]), r[key]) for r in records if key in r]
            if points:
                found.setdefault(kind, {})[unit] = points
    return found


def _latency(given: argparse.Namespace, run: SearchRun, setup: Setup, state: TrainState) -> Any:
    """By device; on the CPU by a process of its own where this one has an accelerator."""
    if not _has_accelerator():
        here = latency_here(run, setup, state, CPU_ROWS, given.repeats)
        return {"accelerator": {"absent": "this machine has none"}, "cpu": here}
    # Models choose their kernels by the default backend, which is one for all of a process.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # those of the accelerator
    command = [sys.executable, "-m", "tools.skip_report", str(run.workdir), "--measure_cpu"]
    command += [f"--repeats={given.repeats}", f"--base={given.base}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MEASURED)]
    if done.returncode or not lines:
        raise RuntimeError(f"measuring on the CPU has failed:\n{done.stderr[-2000:]}")
    return {
        "accelerator": latency_here(run, setup, state, ACCELERATOR_ROWS, given.repeats),
        "cpu": json.loads(lines[-1].removeprefix(_MEASURED)),
    }


def _has_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def write(numbers: Mapping[str, Any], run: SearchRun, out: pathlib.Path) -> pathlib.Path:
    """Write page and numbers; gives the path of the page.

    Args:
        numbers: of ``numbers_of``.
        run: of the search.
        out: folder, made if absent.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / NUMBERS, json.dumps(numbers, indent=1) + "\n")
    facts = device_facts()
    return write_page(
        out / PAGE,
        f"{run.facts.get('name') or run.workdir.resolve().name}: units skipped",
        [
            _chosen_section(numbers),
            _saved_section(numbers),
            _learned_section(numbers),
            _count_section(numbers),
        ],
        subtitle=(
            f"search by {numbers['method']}, reward {numbers['reward']}",
            f"{numbers['step']:,} updates, compared on {numbers['split']}",
        ),
        headlines=_headlines(numbers),
        config=flat_config(run.config),
        command=shlex.join(["python", "-m", "tools.skip_report", str(run.workdir)]),
        versions=as_pairs(facts["versions"]),
    )


def _headlines(numbers: Mapping[str, Any]) -> list[Headline]:
    parameters, counts = numbers["parameters"], [one["loss"] for one in numbers["by_count"]]
    fewer = 1 - parameters["pruned"] / parameters["full"]
    line = charts.sparkline(list(enumerate(counts)))
    found = [
        Headline("Units skipped", f"{len(numbers['skipped'])}", f"of {len(numbers['units'])}", ""),
        Headline("Forward FLOPs saved", f"{100 * _saved(numbers['forward_flops']):.1f}", "%", ""),
        Headline("Parameters saved", f"{100 * fewer:.1f}", "%", ""),
    ]
    for row in _latency_rows(numbers):
        if row[3]:
            label = f"Time saved, {row[0]}, {row[1]}"
            share = f"{100 * (1 - row[3] / row[2]):.1f}".replace("-", "−")
            found.append(Headline(label, share, "%", ""))
    return [*found, Headline("Loss by units skipped", f"{min(counts):.4f}", "at best", line)]


def _chosen_section(numbers: Mapping[str, Any]) -> Section:
    """The pattern, and every unit."""
    kept = "Harm: what a unit's absence adds to the loss, as the search has estimated it."
    if numbers["reward"] == "paper":
        kept = "Harm: minus the preference of the paper's bandit, which has no error."
    elif numbers["method"] == "random":
        kept = "Harm: a rank drawn by the seed, for the choice is random."
    elif numbers["method"] == "similarity":
        kept = "Harm: 1 less the cosine of what enters and what leaves a unit."
    elif numbers["method"] == "greedy":
        kept = "Harm: what a unit's absence alone adds to the loss."
    worst = [(one["unit"], one["harm"]) for one in numbers["units"]]
    return Section(
        "chosen",
        "What was chosen",
        notes=(f"Skipped: {', '.join(numbers['skipped'])}.", kept),
        bars=(BarsView("Harm of each unit", charts.bars("harm", worst)),),
        tables=(_pattern(numbers), *_stack_tables(numbers)),
    )


def _pattern(numbers: Mapping[str, Any]) -> TableView:
    """Stacks by layers: what is kept and what is not."""
    rows: dict[tuple[str, str], dict[int, bool]] = {}
    for one in numbers["units"]:
        rows.setdefault((one["stack"], one["part"]), {})[one["layer"]] = one["kept"]
    layers = sorted({layer for row in rows.values() for layer in row})
    signs = {True: "■ kept", False: "□ skipped", None: "·"}
    return table_view(
        "Pattern: stacks by layers",
        ("stack", *(f"{layer}" for layer in layers)),
        [
            (
                stack if part == "block" else f"{stack}, {part}",
                *(signs[row.get(layer)] for layer in layers),
            )
            for (stack, part), row in rows.items()
        ],
    )


def _stack_tables(numbers: Mapping[str, Any]) -> list[TableView]:
    stacks = dict.fromkeys(one["stack"] for one in numbers["units"])
    return [
        table_view(
            stack,
            ("unit", "", "harm", "standard error", "flops_share"),
            [
                (
                    one["unit"].removeprefix(stack).lstrip("_/"),
                    "kept" if one["kept"] else "skipped",
                    f"{one['harm']:+.4f}".replace("-", "−"),
                    "–" if one["error"] is None else f"{one['error']:.4f}",
                    float(one["flops_share"]),
                )
                for one in numbers["units"]
                if one["stack"] == stack
            ],
        )
        for stack in stacks
    ]


def _saved_section(numbers: Mapping[str, Any]) -> Section:
    """Full beside pruned."""
    rows: list[tuple[str, ...]] = []
    for key, label in (("parameters", "parameters"), ("forward_flops", "forward FLOPs, example")):
        of = numbers[key]
        rows.append((label, *(f"{of[name]:,.0f}" for name in NETWORKS), f"{-_saved(of):+.1%}"))
    for device, count, full, less in _latency_rows(numbers):
        change = f"{less / full - 1:+.1%}" if less else "–"
        rows.append((f"ms, {device}, {count}", _ms(full), _ms(less), change))
    notes = ["Both networks are tuned; neither has switches."]
    for device, measured in numbers["latency"].items():
        if "absent" in measured:
            notes.append(f"Not measured on an accelerator: {measured['absent']}.")
        else:
            lengths = ", ".join(f"{n} tokens" for n in measured["text_length"].values())
            notes.append(
                f"Forward pass on the {device} ({measured['device']}): median of "
                f"{measured['repeats']} passes of each in turns, {lengths}."
            )
    bars = tuple(
        BarsView(f"Forward pass, {device}, {count}", _bars_ms(full, less))
        for device, count, full, less in _latency_rows(numbers)
        if less
    )
    rows = [tuple(cell.replace("-", "−") for cell in row) for row in rows]
    table = table_view("", ("", *NETWORKS, "change"), rows)
    return Section("saved", "What it saves", notes=tuple(notes), bars=bars, tables=(table,))


def _bars_ms(full: float, less: float) -> tuple[charts.Bar, ...]:
    """Milliseconds, which seconds of the page's units would round."""
    most = max(full, less)
    given = zip(NETWORKS, (full, less), strict=True)
    return tuple(charts.Bar(name, f"{_ms(ms)} ms", 100 * ms / most, False) for name, ms in given)


def _learned_section(numbers: Mapping[str, Any]) -> Section:
    """Preferences and harms over the search."""
    history = numbers["history"]
    if not history:
        note = f"The method {numbers['method']} learns nothing as the search goes."
        return Section("learned", "How it came about", notes=(note,))
    drawn = [
        _learned_chart(numbers, kind, stack, part)
        for kind in history
        for stack, part in _groups(numbers)
    ]
    notes = (
        "The higher its preference, the rather a unit is skipped. Dashed: what is kept at last.",
    )
    return Section("learned", "How it came about", notes=notes, charts=tuple(drawn))


def _groups(numbers: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Stacks with their units, as many at a time as there are colours."""
    found: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for stack in dict.fromkeys(one["stack"] for one in numbers["units"]):
        mine = [one for one in numbers["units"] if one["stack"] == stack]
        parts = range(0, len(mine), charts.COLOURS)
        found += [(stack, mine[start : start + charts.COLOURS]) for start in parts]
    return found


def _learned_chart(
    numbers: Mapping[str, Any], kind: str, stack: str, members: Sequence[Mapping[str, Any]]
) -> Chart:
    series = [
        Series(
            one["unit"].removeprefix(stack).lstrip("_/"),
            numbers["history"][kind][one["unit"]],
            colour,
            dashed=one["kept"],
        )
        for colour, one in enumerate(members)
    ]
    return charts.line_chart(f"{as_title(kind)}: {stack}", kind, series)


def _count_section(numbers: Mapping[str, Any]) -> Section:
    """Figures of the choices of 0, 1, ... units."""
    rows = numbers["by_count"]
    names = [name for name in rows[0] if name not in _CHOICE_KEYS]
    drawn = [
        charts.line_chart(
            as_title(name),
            name,
            [Series("", [(float(n), row[name]) for n, row in enumerate(rows)])],
            x_label="units skipped",
        )
        for name in names
    ]
    table = table_view(
        "",
        ("units", "skipped last", "flops_share", *names),
        [
            (
                len(row["skipped"]),
                _last(rows, number),
                float(row["flops_saved"]),
                *(float(row[name]) for name in names),
            )
            for number, row in enumerate(rows)
        ],
    )
    note = (
        f"Of the network of the search, on its last batches of {numbers['split']}; units in the "
        "order in which they would be skipped."
    )
    return Section(
        "count", "By number of units", notes=(note,), charts=tuple(drawn), tables=(table,)
    )


def _last(rows: Sequence[Mapping[str, Any]], number: int) -> str:
    """What a choice skips beyond the one before it."""
    before = rows[number - 1]["skipped"] if number else []
    return ", ".join(unit for unit in rows[number]["skipped"] if unit not in before) or "–"


def _latency_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """Device, batch, and milliseconds of full and pruned; 0 where there is no such device."""
    found = []
    for device, measured in numbers["latency"].items():
        if "absent" in measured:
            found.append((device, "not measured", 0.0, 0.0))
            continue
        for count, of in measured["ms"].items():
            found.append((device, f"batch {count}", of["full"], of["pruned"]))
    return found


def _saved(of: Mapping[str, float]) -> float:
    return 1.0 - of["pruned"] / of["full"]


def _ms(value: float) -> str:
    return units.format_number(float(f"{value:.4g}")) if value else "–"


def table(numbers: Mapping[str, Any]) -> rich.table.Table:
    """Full beside pruned, for the terminal."""
    title = f"skipped: {', '.join(numbers['skipped'])}"
    shown = rich.table.Table("", title=title, caption=_caption(numbers))
    for head in (*NETWORKS, "change"):
        shown.add_column(head, justify="right")
    for key in ("parameters", "forward_flops"):
        of = numbers[key]
        shown.add_row(
            key.replace("_", " "),
            *(f"{of[name]:,.0f}" for name in NETWORKS),
            f"{-100 * _saved(of):+.1f} %",
        )
    for device, count, full, less in _latency_rows(numbers):
        change = f"{100 * (less / full - 1):+.1f} %" if less else "–"
        shown.add_row(f"ms, {device}, {count}", _ms(full), _ms(less), change)
    losses = [numbers["by_count"][n]["loss"] for n in (0, len(numbers["skipped"]))]
    change = f"{losses[1] - losses[0]:+.4f}"
    shown.add_row("loss in the search", *(f"{loss:.4f}" for loss in losses), change)
    return shown


def _caption(numbers: Mapping[str, Any]) -> str | None:
    absent = numbers["latency"]["accelerator"].get("absent")
    return f"no accelerator: {absent}" if absent else None


def main(arguments: list[str] | None = None) -> ExitCode:
    """Measure, write the page, and print the table.

    Args:
        arguments: the command line without the program; that of the process by default.

    Returns:
        ``OK``, or ``DAMAGED_CHECKPOINTS`` where there is nothing to measure.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.skip_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=pathlib.Path, help="of a finished search")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write to; by default WORKDIR")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="passes that are timed")
    parser.add_argument("--base", default="", help="of a run of tunables: its base, if moved")
    parser.add_argument("--measure_cpu", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    try:
        with bad_input({"init_base": "--base"}):
            if given.repeats < 1:
                raise ValueError(f"--repeats={given.repeats}: use 1 or more")
            run = read_search(given.workdir)
            with restored(run, given.base) as (setup, state):
                if given.measure_cpu:
                    here = latency_here(run, setup, state, CPU_ROWS, given.repeats)
                    print(f"{_MEASURED}{json.dumps(here)}")
                    return ExitCode.OK
                measured = _latency(given, run, setup, state)
                numbers = numbers_of(run, setup, state, measured)
            page = write(numbers, run, given.out or run.workdir)
    except DamagedCheckpointError as error:
        return fail(ExitCode.DAMAGED_CHECKPOINTS, error)
    rich.print(table(numbers))
    print(page)
    return ExitCode.OK


if __name__ == "__main__":
    set_gpu_flags()
    sys.exit(main())
