"""Scores of runs in three columns, images, texts and both: what ``tools.evaluate_shared`` tells."""

import contextlib
import dataclasses
import gc
import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.table
from ml_collections import ConfigDict

from tools.compare.configs import digest, load, with_overrides
from tools.compare.table import markdown_table
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.models.pretrained import NoPartFits
from vlp_jax.objectives.contrastive import CONTRASTIVE_HEAD
from vlp_jax.train.loop import train
from vlp_jax.train.setup import Setup, prepare

COLUMNS = ("image", "text", "multimodal")
RECALL = ("i2t_r1", "t2i_r1")
# Of the largest object, and how many there are: frozen features are asked for all of them.
SCENE_LABELS = ("shape", "colour", "size", "texture", "count")
PROBE_ITERATIONS = 1_000  # of each fit, at most; given, so that overrides of the task may change it
_REPO = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Task:
    """One figure of a run.

    Attributes:
        column: of the table.
        name: of the task.
        config: file and argument of its config.
        figures: of the run's metrics, whose mean is the score; of what is frozen, of its evaluator.
        frozen: nothing is trained.
        overrides: of the config; they count more than ``Settings``.
        evaluator: section of ``frozen``, in place of the config's own evaluators.
        needs: part of the parameters without which there is no score.
    """

    column: str
    name: str
    config: str
    figures: tuple[str, ...]
    frozen: bool = False
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluator: Mapping[str, Any] | None = None
    needs: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
    """What a run reached in a task: one value a seed, of what is frozen one."""

    values: tuple[float, ...]

    def of(self, seed: int) -> float:
        """With a seed."""
        return self.values[min(seed, len(self.values) - 1)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
        seeds: of what is fine-tuned, one run each.
        steps: updates of a fine-tuning; None: those of the config.
        batch_size: rows of its batch; None: as the config.
        records: training records of scenes; None: as the config.
        examples: of a test split of scenes; None: as the config.
        level: of scenes.
        rate: peak learning rate of a fine-tuning; None: that of the config.
        num_edges: text lengths, each a program to compile; None: as the config.
        selections: how often a fine-tuning is validated, of which the best is tested; None: as the
            config.
        out: where runs are kept.
        helpers: processes that render the pictures of a data set, ``data.cache_workers``.
        base: where the base of runs lies whose checkpoints hold tunables alone, if it was moved.
    """

    seeds: tuple[int, ...]
    steps: int | None
    batch_size: int | None
    records: int | None
    examples: int | None
    level: str
    rate: float | None
    num_edges: int | None
    selections: int | None
    out: pathlib.Path
    helpers: int = 0
    base: str = ""


def tasks_of(data: str, glue: str, glue_tasks: Sequence[str]) -> list[Task]:
    """Every task, in the order of the columns.

    Args:
        data: ``scenes`` or ``pack``, of tasks with images.
        glue: folder of GLUE; empty: no text tasks.
        glue_tasks: names of its tasks.
    """
    source = {"scenes": {"source": "scenes"}, "pack": {"source": "images"}}[data]
    tower = {"scenes": "configs/invariance.py:simclr", "pack": "configs/transfer/classification.py"}
    arg = {"scenes": "", "pack": ":pack"}[data]
    labels = {"scenes": SCENE_LABELS, "pack": ("label",)}[data]

    def frozen(name: str, kind: str, figure: str, **more: Any) -> Task:
        # Masked patches alone, which stages begin with, ask nothing of a class token.
        evaluator = {"type": kind, "split": "test", "pool": "mean", **source, **more}
        return Task(
            "image",
            name,
            tower[data] + arg,
            tuple(f"{label}/{figure}" for label in labels),
            frozen=True,
            evaluator=evaluator,
        )

    def tuned(column: str, name: str, file: str, *figures: str) -> Task:
        named = tuple(f"test/{figure}" for figure in figures)
        return Task(column, name, f"configs/transfer/{file}.py:{data}", named)

    texts = [
        Task(
            "text",
            name,
            f"configs/transfer/glue.py:{name}",
            ("test/score", "mismatched/score") if name == "mnli" else ("test/score",),
            overrides={"data.sources.sentences.root": glue},
        )
        for name in (glue_tasks if glue else ())
    ]
    return [
        frozen("neighbours", "neighbours", "knn_accuracy"),
        frozen("linear probe", "linear_probe", "accuracy", max_iterations=PROBE_ITERATIONS),
        tuned("image", "classification", "classification", "accuracy"),
        *texts,
        tuned("multimodal", "vqa", "vqa", "accuracy"),
        tuned("multimodal", "entailment", "entailment", "accuracy"),
        Task(
            "multimodal",
            "zero-shot retrieval",
            f"configs/transfer/retrieval.py:{data}",
            RECALL,
            frozen=True,
            overrides={"objectives.itm": None, "evals.val": None, "evals.test.matching": ""},
            needs=CONTRASTIVE_HEAD,
        ),
        tuned("multimodal", "retrieval", "retrieval", *RECALL),
    ]


def evaluate(workdir: pathlib.Path, task: Task, settings: Settings) -> Score | None:
    """Score a run in a task; None: it has learned nothing of what the task reads.

    Args:
        workdir: of the run.
        task: what is asked.
        settings: how it is run.

    Raises:
        ConfigError, ValueError, OSError: the run does not fit the task, or data are missing.
    """
    try:
        return _evaluate(workdir, task, settings)
    except NoPartFits:  # such as texts, of a run of images in a tower of its own
        return None


def _evaluate(workdir: pathlib.Path, task: Task, settings: Settings) -> Score | None:
    if task.frozen:
        config = _config(task, workdir, settings, 0)
        return _as_it_is(prepare(config, _place(config, workdir, task, settings)), task)
    values = []
    for seed in settings.seeds:
        config = _config(task, workdir, settings, seed)
        run = _place(config, workdir, task, settings)
        train_to_end(config, run)
        found: dict[str, float] = {}
        for record in read_metrics(run):
            found |= record
        values.append(statistics.fmean(found[figure] for figure in task.figures))
    return Score(tuple(values))


def check(workdir: pathlib.Path, task: Task, settings: Settings) -> None:
    """Raise what ``evaluate`` would before it computes anything: once for all of its seeds."""
    config = _config(task, workdir, settings, settings.seeds[0])
    with contextlib.suppress(NoPartFits):
        prepare(config, _place(config, workdir, task, settings))


def _place(
    config: ConfigDict, workdir: pathlib.Path, task: Task, settings: Settings
) -> pathlib.Path:
    """Folder of what is fine-tuned: another one as soon as its config is, or the run before it."""
    facts = workdir / RUN_FILE  # of when it was trained, and for how long
    origin = facts.read_text() if facts.exists() else str(workdir.resolve())
    name = f"{workdir.resolve().name}-{task.name}-seed{config.seed}-{digest(config, origin)[:8]}"
    return settings.out / "runs" / _slug(name)


def train_to_end(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Train a run, unless it is finished; what it prints goes to ``log.txt`` in its workdir.

    Args:
        config: of the run.
        workdir: made when needed.

    Raises:
        ConfigError, ValueError, OSError: of ``train.setup.prepare``.
        SystemExit: with the code of a run that did not come to its end.
    """
    facts = workdir / RUN_FILE
    if facts.exists() and json.loads(facts.read_text())["status"] == "finished":
        return
    setup = prepare(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        code = train(setup)
    del setup
    gc.collect()  # a run holds its state and its programs in cycles
    if code is not ExitCode.OK:
        raise SystemExit(code)


def _as_it_is(setup: Setup, task: Task) -> Score | None:
    """The score of a run's own parameters."""
    origin = setup.origin
    parts = {path.split("/")[0] for path in origin.arrays} if origin is not None else set()
    if task.needs and task.needs not in parts:
        return None
    state, _ = setup.first_state()
    [evaluator] = setup.evaluators.values()
    figures = dict(evaluator.run(setup.program.served(state), 0))
    return Score((statistics.fmean(figures[figure] for figure in task.figures),))


def _config(task: Task, workdir: pathlib.Path, settings: Settings, seed: int) -> ConfigDict:
    path, _, arg = task.config.partition(":")
    config = load(f"{_REPO / path}:{arg}" if arg else str(_REPO / path)).config
    with config.unlocked():
        config.seed = seed
        config.init_from, config.init_base = str(workdir), settings.base
        config.adopt_model = True
        config.compile_cache = str(settings.out / "compile_cache")
        config.data.cache_dir = str(settings.out / "data")
        config.data.cache_workers = settings.helpers
        config.log.tensorboard = False
        if task.evaluator is not None:
            config.evals = {"frozen": dict(task.evaluator)}
        if settings.steps is not None:
            config.total_steps, config.total_epochs = settings.steps, 0.0
        if settings.batch_size is not None:
            config.data.batch_size = settings.batch_size
        if settings.num_edges is not None:
            config.data.num_edges = settings.num_edges
        if settings.rate is not None:
            config.schedule.peak = settings.rate
        # What shows a run's answers is for one run to look at.
        shown = ("val", "test", "mismatched", "frozen")
        config.evals = {n: s for n, s in config.evals.items() if n in shown}
        if task.frozen:
            config.checkpoint.best_metric = ""
            for section in config.evals.values():
                section.on = "last"
        for name, section in config.data.sources.items():
            if _is_scenes(config, name):
                section.level, config.data.image_size = settings.level, _image_size(workdir)
                if settings.records is not None:
                    section.update(num_records=settings.records, cache=True)
        if settings.selections is not None:
            config.checkpoint.every_percent = 100.0 / settings.selections
        for name, section in config.evals.items():
            kind = section.get("type", name)
            if settings.selections is not None and "every_percent" in section:
                section.every_percent = 100.0 / settings.selections
            if kind == "task":
                section.controls = False
            source = section.get("source", "")
            if settings.examples is not None and _is_scenes(config, source):
                section.num_examples = settings.examples
                if kind in ("neighbours", "linear_probe"):
                    section.num_train = settings.records or section.get("num_train", 10_000)
    return with_overrides(config, task.overrides)


def _is_scenes(config: ConfigDict, source: str) -> bool:
    """Whether a source of a config draws its records, of which there is no end."""
    kind: str = config.data.sources.get(source, {}).get("type", source)
    return kind.startswith("scenes")


def _image_size(workdir: pathlib.Path) -> int:
    """The side of the pictures that a run has read, in pixels."""
    file = workdir / "config.json"
    if not file.exists():
        raise ConfigError(
            "init_from", f"{workdir} is no workdir of a run", "Give a folder with a config.json"
        )
    return int(json.loads(file.read_text())["data"]["image_size"])


def averages(scores: Mapping[str, Score], tasks: Sequence[Task]) -> dict[str, Score]:
    """The mean of every column's tasks, for every seed; of a column without a score, none."""
    seeds = max((len(score.values) for score in scores.values()), default=0)
    found = {}
    for column in COLUMNS:
        mine = [
            scores[task.name] for task in tasks if task.column == column and task.name in scores
        ]
        if mine:
            means = [statistics.fmean(score.of(seed) for score in mine) for seed in range(seeds)]
            found[column] = Score(tuple(means))
    return found


def told(score: Score | None) -> str:
    """In percent, with the spread over seeds where there are several."""
    if score is None:
        return "–"
    mean = f"{100 * statistics.fmean(score.values):.1f}"
    if len(score.values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(score.values):.1f}"


def common(scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[Task]) -> list[Task]:
    """The tasks in which every run has a score that has any in their column."""
    columns = {task.name: task.column for task in tasks}
    kept = []
    for task in tasks:
        of_column = [
            found
            for found in scores.values()
            if any(columns.get(name) == task.column for name in found)
        ]
        if of_column and all(task.name in found for found in of_column):
            kept.append(task)
    return kept


def rows_of(scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[Task]) -> list[list[str]]:
    """The lines of the table: a run, its three averages, and every task.

    Averages are over the tasks that all runs have a score in, or they would not compare; a run
    without any in a column is not counted there.
    """
    compared = common(scores, tasks)
    means = {run: averages(found, compared) for run, found in scores.items()}
    return [
        [
            run,
            *(told(means[run].get(column)) for column in COLUMNS),
            *(told(found.get(task.name)) for task in tasks),
        ]
        for run, found in scores.items()
    ]


def header_of(tasks: Sequence[Task]) -> list[str]:
    """Names of the columns of ``rows_of``."""
    return ["run", *(column.upper() for column in COLUMNS), *(task.name for task in tasks)]


def terminal(header: Sequence[str], rows: Sequence[Sequence[str]]) -> rich.table.Table:
    """The same for the terminal."""
    table = rich.table.Table(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def write_table(
    file: pathlib.Path, scores: Mapping[str, Mapping[str, Score]], tasks: Sequence[Task]
) -> rich.table.Table:
    """Write the table in Markdown; returns it for the terminal.

    Args:
        file: to write.
        scores: run -> task -> its score.
        tasks: in the order of the columns.
    """
    header, rows = header_of(tasks), rows_of(scores, tasks)
    write_text(file, markdown_table(header, rows) + "\n")
    return terminal(header, rows)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")


def asked(tasks: Sequence[Task], changes: Mapping[str, Mapping[str, Any]]) -> list[Task]:
    """The tasks of these names, with keys of their configs changed.

    Args:
        tasks: of ``tasks_of``.
        changes: name of a task -> value by dotted key.

    Raises:
        ValueError: there is no such task.
    """
    return [
        dataclasses.replace(task, overrides={**task.overrides, **changes[task.name]})
        for task in chosen(tasks, list(changes))
    ]


def chosen(tasks: Sequence[Task], names: Sequence[str] | None) -> Iterator[Task]:
    """The tasks of these names, in their own order; None: all.

    Raises:
        ValueError: there is no such task.
    """
    known = [task.name for task in tasks]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--tasks: {name!r} is none of {', '.join(known)}")
    yield from (task for task in tasks if names is None or task.name in names)
