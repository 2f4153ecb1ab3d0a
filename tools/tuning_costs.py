"""What ways of tuning a model cost and reach: one table of several finished runs.

    python -m tools.tuning_costs runs/vqa_full runs/vqa_lora runs/vqa_adapter
    python -m tools.tuning_costs runs/vqa_* --json

Columns: the method (``transfer.methods``); the parameters that are trained, and how many of them
not every method trains, which is what tables of papers count; forward multiply-accumulates of an
example beyond those of the model as it was pretrained, of which a FLOP count is twice as many;
memory of the compiled update; time of an update, waiting for input included; bytes of a checkpoint;
and the best value of ``config.checkpoint.best_metric``. All of it is what the runs have left
(``run.json``, ``config.json``, ``metrics.jsonl``): memory and time compare on one machine alone.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich
import rich.table

from vlp_jax.infra import units
from vlp_jax.infra.command import argument_parser, bad_input
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.report import CONFIG_FILE, RUN_FILE
from vlp_jax.train.costs import COSTS
from vlp_jax.transfer.methods import method_of


def costs_of(workdir: pathlib.Path) -> dict[str, Any]:
    """What one run costs and reaches.

    Args:
        workdir: of the run.

    Returns:
        ``workdir``, ``method``, the costs of ``train.costs.end_facts``, ``device``, ``metric`` by
        which checkpoints are ranked (empty: none) and its ``best`` value (None: none).

    Raises:
        ValueError: there is no run, or it has not finished.
    """
    for name in (RUN_FILE, CONFIG_FILE):
        if not (workdir / name).is_file():
            raise ValueError(f"{workdir} holds no run: {name} is absent; give a workdir")
    run = json.loads((workdir / RUN_FILE).read_text())
    config = json.loads((workdir / CONFIG_FILE).read_text())
    if run.get("status") != "finished":
        raise ValueError(
            f"{workdir} has not finished ({RUN_FILE} says {run.get('status')!r}); start it again"
        )
    if not run.get(COSTS):
        raise ValueError(
            f"{workdir}: {RUN_FILE} has no costs, since an earlier version wrote it; start the run "
            "again, which trains nothing anew"
        )
    metric, mode = config["checkpoint"]["best_metric"], config["checkpoint"]["best_mode"]
    values = [record[metric] for record in read_metrics(workdir) if metric in record]
    values = [value for value in values if not math.isnan(value)]
    return {
        "workdir": str(workdir),
        "method": method_of(config),
        **run[COSTS][0],
        "device": run["device"],
        "metric": metric,
        "best": {"max": max, "min": min}[mode](values) if values else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """The rows of ``costs_of`` for the terminal."""
    shown = rich.table.Table("run", "method", caption="extra MACs: forward, of an example")
    heads = ("trained", "without heads", "extra MACs", "memory", "ms/update", "checkpoint", "best")
    for head in heads:
        shown.add_column(head, justify="right")
    for row in rows:
        share = f"{100 * row['extra_share']:+.2f} %"
        seconds, best = row["update_seconds"], row["best"]
        shown.add_row(
            pathlib.Path(row["workdir"]).name,
            row["method"],
            f"{row['trained_parameters']:,}",
            f"{row['without_heads_parameters']:,}",
            f"{row['extra_macs'] / 1e9:+.3f} G ({share})",
            _told(row["update_bytes"], units.format_bytes),
            "–" if seconds is None else f"{1e3 * seconds:.1f}",
            units.format_bytes(row["checkpoint_bytes"]),
            "–" if best is None else f"{units.format_value(row['metric'], best)} {row['metric']}",
        )
    return shown


def _told(value: float | None, how: Any) -> str:
    return "–" if value is None else str(how(value))


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or JSON.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argument_parser("tools.tuning_costs", __doc__)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, help="of finished runs")
    parser.add_argument("--json", action="store_true", help="all figures, as a list of objects")
    given = parser.parse_args(arguments)
    with bad_input():
        rows = [costs_of(workdir) for workdir in given.workdirs]
    if given.json:
        print(json.dumps(rows, indent=2))
    else:
        rich.print(table(rows))


if __name__ == "__main__":
    main()
