"""What the report says of a run beside its metrics: machine, versions, data, parameters."""

import collections
import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

from vlp_jax.infra.files import write_text
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.models.pretrained import Report
from vlp_jax.models.pretrained.merge import STATUSES
from vlp_jax.models.sizes import parameter_table
from vlp_jax.train.setup import Setup

BAD_EXAMPLES_FILE = "bad_examples.txt"
LOADED_FILE = "init_from.tsv"
# Keys of run.json, seconds over all starts of the run: of updates, with what these wait for input;
# and of what its decider does between them, without compiling. Absent until a start has ended.
TRAINING_SECONDS, DECISIONS_SECONDS = "training_seconds", "decisions_seconds"


def run_facts(setup: Setup, resumed: pathlib.Path | None) -> dict[str, Any]:
    """What the report says of a run beside its metrics; a resumed run keeps its start and counts.

    Args:
        setup: of the run.
        resumed: the workdir, where an earlier start left its facts; None for a new run.
    """
    device = device_facts()
    facts = {
        "name": setup.config.name,
        "start": now(),
        "total_steps": setup.total_steps,
        "command": shlex.join(["python", "-m", "vlp_jax.main", *sys.argv[1:]]),
        "device": device.pop("device_kind"),
        **device,
        "mesh": dict(setup.mesh.shape),
        "batch_size": setup.budget.batch_size,
        "batches": dict(setup.program.batch_sizes),
        "text_edges": list(setup.plan.edges),
        "padding_waste": round(setup.plan.padding_waste(setup.plan.window_batches), 4),
        "guarded_examples": sum(len(p.guarded) for p in setup.plan.sources) or None,
        "guarded_updates": round(setup.program.compression.guarded, 4) or None,
        "vocabulary": setup.tokenizer.vocab_size,
        "missing_images": setup.missing_images,
        "unknown_tokens": {name: round(x, 4) for name, x in setup.unknown_tokens.items()},
        "captions_truncated": sum(p.captions.num_truncated for p in setup.plan.sources),
        "bad_examples": setup.dropped_captions,
        "parameters": [
            {"module": module, "parameters": count}
            for module, count in parameter_table(setup.program.state_spec.params)
        ],
        "trained_parameters": setup.program.trained_parameters,
    }
    if resumed is not None and (resumed / RUN_FILE).exists():
        earlier = json.loads((resumed / RUN_FILE).read_text())
        kept = ("start", "bad_examples", TRAINING_SECONDS, DECISIONS_SECONDS)
        facts |= {key: earlier[key] for key in kept if key in earlier}
    return facts


def time_facts(facts: Mapping[str, Any], trained: float, decided: float | None) -> dict[str, float]:
    """Where the time of the run went, over all of its starts.

    Args:
        facts: with what earlier starts have taken.
        trained: seconds of updates in this one.
        decided: seconds of decisions in this one; None: the run decides nothing as it goes.
    """
    spent = facts.get(TRAINING_SECONDS, 0.0) + trained
    found = {TRAINING_SECONDS: round(spent, 3)}
    if decided is not None:
        decisions = facts.get(DECISIONS_SECONDS, 0.0) + decided
        found[DECISIONS_SECONDS] = round(decisions, 3)
        if spent:
            found["decisions_share_of_time"] = round(decisions / (decisions + spent), 4)
    return found


def facts_table(rows: list[dict[str, Any]]) -> rich.table.Table:
    """The parameters of every module, for the terminal."""
    table = rich.table.Table("module", rich.table.Column("parameters", justify="right"))
    for row in rows:
        table.add_row(row["module"], f"{row['parameters']:,}")
    return table


def write_facts(setup: Setup, facts: Mapping[str, Any], primary: bool) -> None:
    """Write ``run.json``, on the first process alone."""
    if primary:
        write_text(setup.workdir / RUN_FILE, json.dumps(dict(facts), indent=2) + "\n")


def write_bad_examples(setup: Setup, places: Sequence[tuple[str, str]], primary: bool) -> None:
    """Add what could not be read to a list in the workdir, on the first process alone.

    Args:
        setup: of the run.
        places: kind and place of damaged examples, see ``BadCounts.places``.
        primary: whether this is the first process.
    """
    if not primary or not places:
        return
    file = setup.workdir / BAD_EXAMPLES_FILE
    before = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    lines = dict.fromkeys([*before, *(f"{kind}\t{where}" for kind, where in places)])
    write_text(file, "\n".join(lines) + "\n")


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_loaded(workdir: pathlib.Path, report: Report) -> None:
    """Write what became of every tensor that a run starts from: a row for each."""
    rows = ["status\tparameter\tshape\tmade of\tnote"]
    for row in report.rows:
        shape = "x".join(map(str, row.shape))
        rows.append("\t".join((row.status, row.parameter, shape, " ".join(row.sources), row.note)))
    write_text(workdir / LOADED_FILE, "\n".join(rows) + "\n")


def loaded_table(report: Report, origin: str) -> rich.table.Table:
    """What became of the parameters that a run starts from, by part of the model, in counts."""
    table = rich.table.Table(title=f"parameters from {origin}", caption=f"each: {LOADED_FILE}")
    table.add_column("part")
    for status in STATUSES:
        table.add_column(status, justify="right")
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in report.rows:
        name = row.parameter or ", ".join(row.sources)
        counts[name.partition("/")[0]][row.status] += 1
    for part, count in counts.items():
        table.add_row(part, *(str(count[status] or "") for status in STATUSES))
    for note in report.notes:
        table.add_row(note)
    return table
