"""Score runs in three columns: images, texts, and both (fact sheet of MoMo, section 4).

    python -m tools.evaluate_shared runs/momo3
    python -m tools.evaluate_shared runs/momo1 runs/momo2 runs/momo3 --seeds=3 --out=runs/columns
    python -m tools.evaluate_shared runs/momo3 --data=pack --glue=../shared/data/text

Every task is scored on the test split of its data, fractions of one:

image       the frozen tower by nearest neighbours and by a linear probe, and the tower fine-tuned
text        tasks of GLUE, fine-tuned, by their official scores
multimodal  questions and entailment, fine-tuned; retrieval by embeddings (mean of recall at 1 both
            ways), as it is where the run has learned a contrast, and fine-tuned

What is fine-tuned is trained once a seed by the config of the task (configs/transfer/), which
--steps, --batch_size, --rate, --records, --num_edges and --selections change; what is frozen has no
seeds, and is read at the mean of the patches' tokens. A column's average is the mean of those of
its tasks in which all runs have a score, and its spread the standard deviation of that over seeds.

Writes to --out (by default WORKDIR/columns of the first run): ``table.md``, ``scores.json``, and
the runs themselves. What is finished is not run again, so that seeds and tasks can be added; it is
where a flag changes its config, or where the run that it starts from was trained further. All tasks
of all runs are checked before the first begins.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import rich
from absl import app, flags, logging
from rich.table import Table

from tools.columns import (
    Score,
    Settings,
    Task,
    check,
    chosen,
    evaluate,
    tasks_of,
    write_table,
)
from vlp_jax.infra.command import bad_input, parse_flags
from vlp_jax.infra.compilation import enable_compile_cache, set_gpu_flags
from vlp_jax.infra.files import write_text

_SEEDS = flags.DEFINE_integer("seeds", 1, "seeds of everything that is fine-tuned", lower_bound=1)
_DATA = flags.DEFINE_enum("data", "scenes", ["scenes", "pack"], "of tasks with images")
_GLUE = flags.DEFINE_string("glue", "../shared/data/text", "folder of GLUE; empty: no text tasks")
_GLUE_TASKS = flags.DEFINE_list("glue_tasks", ["sst2"], "tasks of GLUE")
_TASKS = flags.DEFINE_list("tasks", None, "names of tasks to run; by default all")
_STEPS = flags.DEFINE_integer("steps", None, "updates of each fine-tuning", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", None, "rows of a batch of these", lower_bound=1)
_RECORDS = flags.DEFINE_integer("records", None, "training records of scenes", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", None, "of a test split that has no end", lower_bound=1)
_LEVEL = flags.DEFINE_enum("level", "hard", ["easy", "hard"], "of scenes")
_RATE = flags.DEFINE_float("rate", None, "peak learning rate of each fine-tuning", lower_bound=0)
_EDGES = flags.DEFINE_integer("num_edges", None, "text lengths of each fine-tuning", lower_bound=1)
_SELECTIONS = flags.DEFINE_integer(
    "selections", None, "how often each fine-tuning is validated", lower_bound=1
)
_BASE = flags.DEFINE_string("base", "", "of runs of tunables: where their base lies, if moved")
_OUT = flags.DEFINE_string("out", None, "folder to write to")


def main(argv: Sequence[str]) -> None:
    """Score every run in every task, and write the table after each."""
    workdirs = [pathlib.Path(arg) for arg in argv[1:]]
    if not workdirs:
        raise app.UsageError("name the workdir of a run: python -m tools.evaluate_shared WORKDIR")
    logging.set_verbosity(logging.ERROR)
    with bad_input({"init_base": "--base"}):
        if len({workdir.resolve().name for workdir in workdirs}) < len(workdirs):
            raise ValueError("two of the workdirs have one name; rename one")
        tasks = list(chosen(tasks_of(_DATA.value, _GLUE.value, _GLUE_TASKS.value), _TASKS.value))
        out = pathlib.Path(_OUT.value) if _OUT.value else workdirs[0] / "columns"
        settings = Settings(
            tuple(range(_SEEDS.value)),
            _STEPS.value,
            _BATCH.value,
            _RECORDS.value,
            _EXAMPLES.value,
            _LEVEL.value,
            _RATE.value,
            _EDGES.value,
            _SELECTIONS.value,
            out,
            base=_BASE.value,
        )
        enable_compile_cache(out / "compile_cache")
        for workdir in workdirs:  # before anything is trained
            for task in tasks:
                with _told(workdir, task):
                    check(workdir, task, settings)
        scores: dict[str, dict[str, Score]] = {}
        for workdir in workdirs:
            found = scores[workdir.resolve().name] = {}
            for task in tasks:
                with _told(workdir, task):
                    score = evaluate(workdir, task, settings)
                if score is not None:
                    found[task.name] = score
                    table = _write(out, scores, tasks)
            if not found:
                raise ValueError(
                    f"{workdir}: none of its parts is read by a task; give a run of a shared stack "
                    "or of towers, or other --tasks"
                )
    rich.print(table)
    print(out / "table.md")


@contextlib.contextmanager
def _told(workdir: pathlib.Path, task: Task) -> Iterator[None]:
    """Say of which run and task an error is."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{workdir}, {task.name}: {error}") from error


def _write(
    out: pathlib.Path, scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[Task]
) -> Table:
    plain = {
        run: {name: list(score.values) for name, score in found.items()}
        for run, found in scores.items()
    }
    write_text(out / "scores.json", json.dumps(plain, indent=2) + "\n")
    return write_table(out / "table.md", scores, tasks)


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
