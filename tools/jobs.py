"""What a study asks for: runs to train, tasks to score them in, and in which order.

A run is known by what it computes, its config and the runs that it needs, so that runs that begin
alike share their beginning, and what an archive holds is not computed again. ``tools.execution``
does the jobs.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tools.columns import Settings, Task
from tools.compare.configs import digest

ROOT = ".root"  # keys of folders end in it


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a chain.

    Attributes:
        config: complete but for where it starts from.
        parent: the run before; None: it starts from scratch.
        search: the run, from the same parent, that has chosen what is skipped; None: nothing is.
        cut: shares of heads and of channels that the parent has lost before; None: none.
        eight: nothing is trained: the tests of the parent are made again, with eight bits a weight.
    """

    config: ConfigDict
    parent: "Run | None" = None
    search: "Run | None" = None
    cut: tuple[float, float] | None = None
    eight: bool = False

    @functools.cached_property
    def key(self) -> str:
        """What the run computes, in 16 hexadecimal digits."""
        return self._key(self.search.key if self.search else "")

    def key_of_choice(self, skipped: Collection[str]) -> str:
        """Like ``key``, but by what was chosen to be skipped, whichever search has chosen it."""
        return f"{self._key_without_search} {sorted(skipped)}"

    @functools.cached_property
    def _key_without_search(self) -> str:
        return self._key("")

    def _key(self, chosen: str) -> str:
        before = [self.parent.key] if self.parent else []
        before += [chosen] if chosen else []
        before += [f"cut {self.cut}"] if self.cut else []
        before += ["eight bits"] if self.eight else []
        return digest(self.config, " ".join(before))[:16]

    @property
    def root(self) -> "Run":
        """The first of its chain, which starts from scratch."""
        return self if self.parent is None else self.parent.root


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        run: what is trained, or scored.
        task: in which it is scored; None: it is trained.
        settings: of the scoring; ``helpers`` of the training too.
    """

    run: Run
    task: Task | None
    settings: Settings

    @property
    def key(self) -> str:
        """Of the job, for an archive: the run, and what is asked of it in which way."""
        return self.run.key if self.task is None else f"{self.run.key}/{_asked(self)}"

    @property
    def name(self) -> str:
        """Of the task or the stage: what jobs that take about as long have in common."""
        if self.task is not None:
            return self.task.name
        return f"{self.run.config.name}{', int8' if self.run.eight else ''}"

    @property
    def needs(self) -> str:
        """Key of the job that must be done before; empty: none."""
        if self.task is not None:
            return self.run.key
        before = self.run.search or self.run.parent  # a search has the same parent
        return "" if before is None else before.key


def _asked(job: Job) -> str:
    """A task and how it is asked, without where."""
    assert job.task is not None
    what = {**dataclasses.asdict(job.task), **dataclasses.asdict(job.settings)}
    for place in ("out", "seeds", "helpers"):
        del what[place]
    what["overrides"] = {k: v for k, v in what["overrides"].items() if not k.endswith(ROOT)}
    text = json.dumps(what, sort_keys=True, default=list)
    return f"{job.task.name} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are on this machine.

    Attributes:
        out: folder of runs and of what they share.
        texts: folder of free texts, and of tasks of texts.
        base: workdir or parameter file in the place of every run that starts from scratch; None:
            these are trained.
        bases: key of a run that starts from scratch -> SHA-256 of the parameters that it must end
            with, for others have started from these (``tools.bases``); of those that are absent any
            will do.
    """

    out: pathlib.Path
    texts: str
    base: pathlib.Path | None = None
    bases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def workdir(self, run: Run) -> pathlib.Path:
        """Of a run, or what is in its place."""
        if self.base is not None and run.parent is None:
            return self.base
        return self.out / "runs" / run.key


def listed_jobs(
    study: Any,
    cells: Sequence[str],
    first: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    only_bases: bool = False,
) -> list[Job]:
    """What is to be done for cells of a study, each once, in the order in which it is begun.

    Args:
        study: with ``cells``, and ``jobs`` of some of them.
        cells: names.
        first: those of them that come before the others, with all seeds.
        seeds: of the runs.
        settings: of the jobs.
        only_bases: whether all are left out but the runs that start from scratch.

    Raises:
        ValueError: there are no such cells.
    """
    for flag, names, among in (("cells", cells, study.cells), ("first", first, cells)):
        if unknown := [name for name in names if name not in among]:
            raise ValueError(f"--{flag}: {unknown[0]!r} is none of {', '.join(among)}")
    ordered = [*study.jobs(first, seeds, settings), *study.jobs(cells, seeds, settings)]
    jobs = {job.key: job for job in ordered}.values()
    return [job for job in jobs if not (only_bases and job.needs)]


def wanted_jobs(jobs: Sequence[Job], known: Mapping[str, Any]) -> list[Job]:
    """Those that are not known, and what they need; of what chains begin with, only that."""
    wanted: set[str] = set()
    needed = {job.needs for job in jobs}
    for job in reversed(jobs):
        missing = job.key not in known and (job.needs or job.key not in needed)
        if missing or job.key in wanted:
            wanted |= {job.key, job.needs}
    return [job for job in jobs if job.key in wanted]


def expected_seconds(
    job: Job, jobs: Sequence[Job], known: Mapping[str, Any], longest: Mapping[str, float]
) -> float:
    """How long it takes until something is had of a job.

    What is not scored, or has been done before, is done for others: with the quickest of these. If
    the time ran out in between, it would have to be done again on the next machine.

    Args:
        job: of ``jobs``.
        jobs: all that is asked for.
        known: what an archive holds, by key.
        longest: seconds by name, of jobs that are done; of others nothing is expected.
    """
    alone = longest.get(job.name, 0.0)
    if job.key not in known and (job.task is not None or job.run.config.evals):
        return alone
    others = [other for other in jobs if other.needs == job.key and other.key not in known]
    return alone + min((longest.get(other.name, 0.0) for other in others), default=0.0)


def named_study(argument: str) -> Any:
    """The study that MODULE or MODULE:FUNCTION gives, by default of its function ``study``.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = argument.partition(":")
    try:
        return getattr(importlib.import_module(module), name or "study")()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{argument}: {error}; name a module with study()") from error


def read_archive(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What has been done, by key; of a job that was done twice, the first.

    Args:
        file: of a JSON object a line; where there is none, nothing has.

    Raises:
        ValueError: a line is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: {error}; remove the line") from error
        if "error" not in record:
            found.setdefault(record["job"], record)
    return found
