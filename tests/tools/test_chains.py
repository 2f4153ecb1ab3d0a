"""Chains of runs share their beginnings, are done once, and compared on the same seeds."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from ml_collections import ConfigDict

from docs.results import momo, pcetl
from tests.tools.small_stages import small_stage
from tools import chains, columns
from tools.bases import checked_base
from tools.chains import Study, scores_of
from tools.columns import Score, Settings, Task, train_to_end
from tools.compare.configs import with_overrides
from tools.compare.workers import VISIBLE_DEVICES
from tools.execution import _origin, do, execute
from tools.jobs import Job, Places, Run, listed_jobs, read_archive, wanted_jobs
from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.config import check_keys, default_config
from vlp_jax.train.searching import SEARCH_FILE

SETTINGS = Settings((), 2, 8, 8, 8, "easy", None, 1, 1, pathlib.Path())
TASKS = [Task("image", "shapes", "A", ()), Task("text", "words", "B", ())]


def named(name: str, peak: float = 1e-3) -> ConfigDict:
    return with_overrides(default_config(), {"name": name, "schedule.peak": peak})


@pytest.fixture
def study() -> Study:
    first, second = named("stage 1", 0.1), named("stage 2", 0.2)
    cells = {
        "both": (first, second),
        "other": (first, named("stage 2", 0.3)),
        "second": (second,),
    }
    return Study(cells, TASKS, ("both",), SETTINGS)


def test_a_run_is_known_by_all_that_it_comes_from(study: Study) -> None:
    both, other, second = (study.chain(cell, 0) for cell in study.cells)
    assert both[0].key == other[0].key
    assert len({both[1].key, other[1].key, second[0].key}) == 3
    assert study.chain("both", 1)[0].key != both[0].key
    early = dataclasses.replace(study, early=("text",))
    assert [(name, len(tasks)) for name, _, tasks in study.scored("both", 0)] == [
        ("both, stage 1", 2),
        ("both", 2),
    ]
    assert [tasks for _, _, tasks in early.scored("both", 0)] == [TASKS[1:], TASKS]
    assert study.scored("other", 0)[0][1].key == other[1].key


def test_every_job_is_listed_once_after_what_it_needs(study: Study, tmp_path: pathlib.Path) -> None:
    jobs = study.jobs(
        list(study.cells), range(2), dataclasses.replace(study.settings, out=tmp_path)
    )
    # Of a seed: stage 1, its second, another second, the second alone; four runs less none scored.
    assert len(jobs) == 2 * (4 + 4 * len(TASKS))
    before: set[str] = {""}
    for job in jobs:
        assert job.needs in before
        before.add(job.key)
    assert {job.settings.seeds for job in jobs} == {(0,), (1,)}
    assert {job.settings.out for job in jobs} == {tmp_path}


def test_what_is_asked_differently_is_another_job_but_where_it_lies_is_none(study: Study) -> None:
    [run] = study.chain("second", 0)
    job = Job(run, TASKS[0], SETTINGS)
    assert job.key.startswith(f"{run.key}/shapes ")

    def but(**changes: Any) -> str:
        return dataclasses.replace(job, **changes).key

    there = dataclasses.replace(SETTINGS, out=pathlib.Path("there"), seeds=(3,), helpers=2)
    assert but(settings=there) == job.key
    assert but(settings=dataclasses.replace(SETTINGS, steps=3)) != job.key
    assert but(task=dataclasses.replace(TASKS[0], overrides={"a.root": "there"})) == job.key
    assert but(task=dataclasses.replace(TASKS[0], overrides={"a.size": 1})) != job.key


def fake(job: Job, places: Places) -> dict[str, object]:
    """In place of ``do``: fails where the second stage of ``other`` is trained."""
    assert (places.out / job.needs).exists(), "what it needs was not done before"
    if job.run.config.schedule.peak == 0.3:
        raise ConfigError("schedule.peak", "is too high", "Lower it")
    (places.out / job.key.replace("/", " ")).touch()
    device = os.environ.get(VISIBLE_DEVICES)
    return {"job": job.key, "values": None if job.task is None else [0.5], "device": device}


def test_jobs_are_done_in_order_and_what_needs_a_failed_one_is_left_out(
    study: Study, tmp_path: pathlib.Path
) -> None:
    jobs = study.jobs(list(study.cells), [0], dataclasses.replace(study.settings, out=tmp_path))
    places = Places(tmp_path, "")
    records = list(execute(jobs, places, 2, {}, lambda job: True, work=fake))
    [failed] = [record for record in records if "error" in record]
    assert failed["job"] == study.chain("other", 0)[1].key
    assert "Lower it" in failed["error"]
    assert len(records) == len(jobs) - len(TASKS)

    archive = tmp_path / "archive.jsonl"
    archive.write_text("".join(json.dumps(record) + "\n" for record in records))
    known = read_archive(archive)
    assert failed["job"] not in known
    # What is known is not done again, but for runs that a missing job needs.
    again = [job.key for job in wanted_jobs(jobs, known)]
    assert again == [
        *(study.chain("other", 0)[i].key for i in (0, 1)),
        *(job.key for job in jobs if job.needs == failed["job"]),
    ]
    assert not list(execute(jobs, places, 1, known, lambda job: False, work=fake))
    # One that may not be begun does not hold up the others.
    few = ("stage 1", "words")
    some = list(
        execute(jobs, places, 1, {}, lambda job: job.name in few, work=fake, devices=("3", "5"))
    )
    assert {record["device"] for record in some} == {"3"}  # one process, on the first
    done = [known[record["job"]] for record in some]
    assert [record["job"].partition("/")[2].split(" ")[0] for record in done] == ["", "words"]
    scores = scores_of(study, known, range(3))
    assert scores == {
        name: {0: {"shapes": Score((0.5,)), "words": Score((0.5,))}}
        for name in ("both, stage 1", "both", "second")
    }


def whence(job: Job, places: Places) -> dict[str, object]:
    """In place of ``do``: tells where a run would start from."""
    return {"job": job.key, "from": str(_origin(job.run, places))}


def test_a_base_that_is_given_is_tuned_and_not_trained(
    study: Study, tmp_path: pathlib.Path
) -> None:
    jobs = study.jobs(list(study.cells), [0], dataclasses.replace(study.settings, out=tmp_path))
    trained = [job for job in jobs if job.task is None]
    places = Places(tmp_path, "", base=tmp_path / "base.safetensors")
    found = {r["job"]: r["from"] for r in execute(trained, places, 1, {}, lambda _: True, whence)}
    first, second = study.chain("other", 0)
    assert found[second.key] == str(places.base)
    assert first.key not in found
    assert {*found} == {job.key for job in trained if job.run.parent is not None}


def test_what_a_search_has_chosen_is_taken_from_its_record(tmp_path: pathlib.Path) -> None:
    run = pcetl.study().run("DAS 4", "nlvr2", 0)
    jobs = pcetl.study().jobs(["nlvr2: DAS 4"], [0], SETTINGS)
    places = Places(tmp_path, "", base=tmp_path / "base.safetensors")
    found = {"skipped": ["text_lower_0"], "flops_saved": 0.1}
    known = {run.search.key: {"job": run.search.key, "search": found}}
    [only] = execute(jobs, places, 1, known, lambda _: True, whence)
    assert only["job"] == run.key
    assert json.loads((places.workdir(run.search) / SEARCH_FILE).read_text()) == found


def chosen(job: Job, places: Places) -> dict[str, object]:
    """In place of ``do``: every search with the text tower's first block, or that of its seed."""
    record: dict[str, object] = {"job": job.key, "name": job.name, "seconds": 1.0}
    if job.run.config.name.endswith("search"):
        alike = job.run.config.seed == 0
        record["search"] = {"skipped": ["text_lower_0" if alike else job.key]}
    time.sleep(0.2)  # long enough for others to be begun beside it
    return record


def test_runs_of_equal_choices_are_trained_once(tmp_path: pathlib.Path) -> None:
    study = pcetl.study()
    places = Places(tmp_path, "", base=tmp_path / "base.safetensors")

    def key(way: str, seed: int = 0) -> str:
        return study.run(way, "nlvr2", seed).key

    def done(ways: Sequence[str], seeds: range, known: Mapping[str, Any], in_time: bool) -> Any:
        jobs = study.jobs([f"nlvr2: {way}" for way in ways], seeds, SETTINGS)
        found = execute(jobs, places, 3, known, lambda _: in_time, chosen)
        return {record["job"]: record for record in found}

    ways = ("DAS 4", "DAS 25%", "similarity 4", "DAS 4, scaled parallel")
    records = done(ways, range(2), {}, True)
    assert {key(way, seed) for way in ways for seed in range(2)} <= {*records}
    [first] = {record["same_as"] for record in records.values() if "same_as" in record}
    alike = [key(way) for way in ways[:3]]
    assert first in alike
    for other in {*alike} - {first}:
        assert records[other] == {**records[first], "job": other, "same_as": first}
    assert sum("same_as" in record for record in records.values()) == 2

    # What an archive holds is not trained under another name either, whether there is time or not.
    known = {key: record for key, record in records.items() if "search" in record}
    known[alike[2]] = {**records[first], "job": alike[2]}
    again = done(ways[:3], range(1), known, False)
    assert {k: record["same_as"] for k, record in again.items()} == dict.fromkeys(
        alike[:2], alike[2]
    )
    # But a run is there for those that need what it leaves, and waits for no other.
    again = done((*ways[:2], "DAS 4, int8"), range(1), known, True)
    assert {k for k, record in again.items() if "same_as" not in record} == {
        *(alike[0], key("DAS 4, int8"))
    }
    del known[alike[2]]
    again = done((ways[1], ways[0], "DAS 4, int8"), range(1), known, True)
    assert {*again} == {*alike[:2], key("DAS 4, int8")}
    assert not any("same_as" in record for record in again.values())
    # A copy of a copy names what was trained, and what was trained does not name itself.
    known[alike[1]] = {**records[first], "job": alike[1], "same_as": "trained"}
    [copy] = done((ways[2], ways[1]), range(1), known, False).values()
    assert (copy["job"], copy["same_as"]) == (alike[2], "trained")
    known[alike[1]] |= {"same_as": alike[2]}
    [own] = done((ways[2], ways[1]), range(1), known, False).values()
    assert own == {**records[first], "job": alike[2]}


def dying(job: Job, places: Places) -> dict[str, object]:
    """As ``fake``, but two processes die as if they were killed.

    That of the stage with a peak of 0.3 while it is trained, and that of the stage which needs none
    other once it has nothing to do.
    """
    peak, last = job.run.config.schedule.peak, places.out / "died"
    if job.task is None and peak == 0.3:
        last.touch()
        os._exit(9)
    if job.task is None and peak == 0.1:  # long enough for the other to be idle, and die
        time.sleep(2.0)
    if job.task is None and peak == 0.2 and job.run.parent is None:
        threading.Timer(0.5, os._exit, (9,)).start()
    if job.task is None and peak == 0.2 and job.run.parent is not None:
        for _ in range(200):  # is trained beside the one that dies
            time.sleep(0.05)
            if last.exists():
                break
        time.sleep(0.5)
    return fake(job, places)


def test_a_process_that_dies_loses_its_job_and_no_other(
    study: Study, tmp_path: pathlib.Path
) -> None:
    """Neither one that is done beside it, nor one that comes after it on the same device."""
    settings = dataclasses.replace(study.settings, out=tmp_path)
    whole = study.jobs(list(study.cells), [0], settings)
    jobs = [job for job in whole if job.task is None]
    first, alone = (next(job for job in jobs if job.run.config.schedule.peak == 0.1), jobs[-1])
    assert alone.run.parent is None
    order = [first, alone, *(job for job in jobs if job not in (first, alone))]
    records = list(
        execute(order, Places(tmp_path, ""), 2, {}, lambda job: True, dying, devices=("3", "5"))
    )
    assert {record["job"] for record in records} == {job.key for job in jobs}
    [failed] = [record for record in records if "error" in record]
    assert failed["job"] == study.chain("other", 0)[1].key
    assert "its process died" in failed["error"]
    assert (tmp_path / "died").exists()
    devices = {record["job"]: record["device"] for record in records if "error" not in record}
    assert devices[first.key] == "3"
    assert devices[alone.key] == "5"


def test_losses_are_told_of_every_run_that_has_a_row(study: Study) -> None:
    losses = {0: {"heldout_text/loss": 1.5, "heldout_text/loss_train": 0.5}}
    losses[1] = {"heldout_text/loss": 2.5, "train/loss": 0.5}
    known = {study.chain("both", n)[1].key: {"metrics": losses[n]} for n in losses}
    known[study.chain("second", 0)[0].key] = {"metrics": {"heldout_pairs/loss": 0.25}}
    assert chains.losses_of(study, known, range(3)) == (
        ["heldout_pairs", "heldout_text"],
        [["both", "–", "2.000 ± 0.707"], ["second", "0.250", "–"]],
    )


def test_differences_are_those_of_equal_seeds(study: Study) -> None:
    def of(shapes: float, words: float | None, **others: float) -> dict[str, Score]:
        values = {"shapes": shapes, "words": words, **others}
        return {task: Score((value,)) for task, value in values.items() if value is not None}

    scores = {
        "both": {0: of(0.5, 0.2, colours=0.2), 1: of(0.6, 0.4, colours=0.2)},
        "better": {0: of(0.6, 0.2, colours=0.2), 1: of(0.9, 0.4, colours=0.2)},
        "second seed": {1: of(0.7, 0.5)},
        "third seed": {2: of(0.7, 0.5)},
        "other tasks": {0: of(0.6, None), 1: of(0.7, None)},
        "better still": {0: of(0.7, 0.2, colours=0.2), 1: of(0.9, 0.5, colours=0.2)},
    }
    tasks = [*TASKS, Task("image", "colours", "C", ())]
    study = dataclasses.replace(study, tasks=tasks, against={"better still": "better"})
    assert chains.differences(study, scores) == [
        ["better", "both", "2", "+10.0 ± 5.0", "+0.0 ± 0.0", "–"],  # over both tasks of images
        ["second seed", "both", "1", "+10.0", "+10.0", "–"],
        ["other tasks", "both", "2", "+10.0 ± 0.0", "–", "–"],  # over the one that it has
        ["better still", "better", "2", "+2.5 ± 2.5", "+5.0 ± 5.0", "–"],
    ]
    assert chains.joined(scores["better"])["shapes"] == Score((0.6, 0.9))


@pytest.mark.slow
def test_a_chain_of_two_stages_is_trained_and_scored(tmp_path: pathlib.Path) -> None:
    """The study of docs/results, with runs of a few updates of a tiny model on a few pictures."""
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [f"the old captain saw {n} red ships and a blue square" for n in range(400)]
    (texts / "wikitext.txt").write_text("\n".join(lines))

    study = Study({"cell": (small_stage(1), small_stage(2))}, momo.study().tasks[1:2], (), SETTINGS)
    settings = dataclasses.replace(SETTINGS, records=40, examples=8)
    study = dataclasses.replace(study, settings=settings)
    jobs = study.jobs(["cell"], [0], dataclasses.replace(study.settings, out=tmp_path / "out"))
    places = Places(tmp_path / "out", str(texts))
    records = [do(job, places) for job in jobs]
    assert [record.get("name") for record in records] == ["stage 1", "stage 2", "linear probe"]
    [score] = records[-1]["values"]
    assert 0.0 < score < 1.0
    begun = json.loads((places.workdir(jobs[1].run) / "config.json").read_text())
    assert begun["init_from"] == str(places.workdir(jobs[0].run))
    # All that is trained is known by what its chain begins with.
    assert {record["base"] for record in records[:2]} == {checked_base(jobs[0].run, places)}
    another = dataclasses.replace(places, bases={jobs[0].run.key: "0" * 64})
    with pytest.raises(ValueError, match="the archive holds was made from 000000000000:"):
        do(jobs[0], another)
    # A run that is finished is not trained again.
    log = places.workdir(jobs[1].run) / "log.txt"
    written = log.stat().st_mtime_ns
    do(jobs[1], places)
    train_to_end(jobs[1].run.config, places.workdir(jobs[1].run))
    assert log.stat().st_mtime_ns == written


def test_every_stage_of_the_study_is_a_config() -> None:
    study = momo.study()
    runs = {run.key: run for cell in study.cells for run in study.chain(cell, 0)}
    assert len(study.cells) >= 14
    for run in runs.values():
        check_keys(run.config)
    assert {type(run) for run in runs.values()} == {Run}
    base = study.chain("shared", 0)
    for cell in ("with ITM", "without ITC", "alternating", "automatic", "text 3"):
        chain = study.chain(cell, 0)
        assert [run.key for run in chain[:2]] == [run.key for run in base[:2]]
        assert chain[2].key != base[2].key
    assert study.against.keys() | set(study.against.values()) <= study.cells.keys()
    alternating = study.chain("alternating", 0)[-1].config
    assert alternating.total_steps == 2 * base[-1].config.total_steps
    [alone] = study.chain("stage 3", 0)
    cost = sum(run.config.total_steps * momo.TFLOPS[n] for n, run in enumerate(base, 1))
    assert alone.config.total_steps * momo.TFLOPS[3] == pytest.approx(cost, rel=1e-3)


def test_every_task_of_the_study_is_a_config(tmp_path: pathlib.Path) -> None:
    study = momo.study()
    (tmp_path / "config.json").write_text(json.dumps({"data": {"image_size": 32}}))
    for task in study.tasks:
        check_keys(columns._config(task, tmp_path, study.settings, 0))


def test_cells_that_are_asked_for_first_come_first_with_all_seeds(study: Study) -> None:
    def keys(*first: str) -> list[str]:
        jobs = listed_jobs(study, list(study.cells), first, range(2), study.settings)
        return [job.key for job in jobs]

    every, ahead = keys(), keys("second")
    mine = [job.key for job in study.jobs(["second"], range(2), study.settings)]
    assert len(mine) == 2 * (1 + len(TASKS))
    assert every[: len(mine)] != mine == ahead[: len(mine)]
    assert sorted(every) == sorted(ahead) == sorted(set(every))
    # Or what chains begin with, alone.
    cells = list(study.cells)
    roots = listed_jobs(study, cells, [], range(2), study.settings, only_bases=True)
    begun = [study.chain(cell, seed)[0].key for seed in (0, 1) for cell in ("both", "second")]
    assert [job.key for job in roots] == begun


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["docs.results.momo", "--max_seconds=0"], 0, "| run | IMAGE | TEXT | MULTIMODAL |"),
        (["docs.results.nothing"], 64, "docs.results.nothing: No module named"),
        (["docs.results.momo", "--texts=NOWHERE"], 64, "--texts: NOWHERE does not exist"),
        (["docs.results.momo", "--cells=none"], 64, "--cells: 'none' is none of shared, "),
        (["docs.results.momo", "--cells=shared", "--first=text 3"], 64, "--first: 'text 3' is "),
        (["docs.results.momo", "--base=x", "--train_bases"], 64, "give one of them"),
        (["docs.results.momo", "--base=NOWHERE"], 64, "NOWHERE does not exist; name a workdir"),
        (["docs.results.momo", "--devices=0,1"], 64, "--workers=1: fewer than --devices"),
    ],
)
def test_the_command(tmp_path: pathlib.Path, arguments: list[str], code: int, told: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    places = [f"--texts={texts}", f"--out={tmp_path / 'out'}", f"--archive={tmp_path / 'a.jsonl'}"]
    command = [sys.executable, "-m", "tools.compare_stages", *places, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2]
    )
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr
    assert (tmp_path / "out" / "table.md").exists() == (code == 0)
