"""Ways to tune compare around one base: nothing is added that begins with other parameters."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from docs.results import pcetl
from tests.tools.bases import parameters
from tools.bases import BASE_FILE, bases_to_keep, check_given, checked_base
from tools.execution import do
from tools.jobs import Job, Places, Run, read_archive, wanted_jobs
from vlp_jax.infra.report import RUN_FILE

STUDY, FIRST = pcetl.study(), pcetl.first_base()
ARCHIVE = pathlib.Path(pcetl.__file__).with_name("pcetl.jsonl")
REPO = pathlib.Path(__file__).parents[2]


def jobs_of(*ways: str) -> list[Job]:
    """Of VQA with two seeds."""
    return STUDY.jobs([f"vqa: {way}" for way in ways], range(2), STUDY.settings)


def record(run: Run, **more: str) -> dict[str, str]:
    return {"job": run.key, "root": run.root.key, **more}


def test_what_was_made_from_one_base_is_not_continued_from_another(tmp_path: pathlib.Path) -> None:
    jobs, das = jobs_of("adapter", "DAS 4"), STUDY.run("DAS 4", "vqa", 0)
    here, there = (Places(tmp_path, "", base=parameters(tmp_path, value)) for value in (0, 1))
    made = checked_base(das, here)
    assert made == checked_base(das.root, here) != checked_base(das, there)
    assert bases_to_keep(jobs, {}) == {}  # the first of an archive

    known = {key: record(das, base=made) for key in ("the base", "a search")}
    known |= {"of another base": record(FIRST.run("adapter", "vqa", 0))}  # nobody asks for it
    kept = bases_to_keep(jobs, known)
    assert kept == {das.root.key: made}
    here, there = (Places(tmp_path, "", place.base, kept) for place in (here, there))
    check_given(jobs, here)
    with pytest.raises(ValueError, match=f"1.safetensors has .* was made from {made[:12]}"):
        check_given(jobs, there)

    known["another"] = record(das, base="f" * 64)
    with pytest.raises(ValueError, match=r"from several parameters \(SHA-256 .*ffffffffffff"):
        bases_to_keep(jobs, known)


def test_nothing_is_added_to_runs_that_do_not_tell_what_they_began_with() -> None:
    das = STUDY.run("DAS 4", "vqa", 0)
    known = {"of another way": record(das), "more": record(das, base="f" * 64)}
    with pytest.raises(ValueError, match="does not tell from which parameters"):
        bases_to_keep(jobs_of("adapter"), known)


def test_one_base_is_not_put_in_the_place_of_several(tmp_path: pathlib.Path) -> None:
    jobs = [*jobs_of("adapter"), *FIRST.jobs(["vqa: adapter"], [0], FIRST.settings)]
    with pytest.raises(ValueError, match="in the place of 2 bases"):
        check_given(jobs, Places(tmp_path, "", base=parameters(tmp_path, 0)))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs that only seem to be trained start from."""
    trained = []

    def train(config, workdir: pathlib.Path) -> None:
        trained.append(config.init_from)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / RUN_FILE).write_text(json.dumps({"status": "finished"}))

    monkeypatch.setattr("tools.execution.train_to_end", train)
    monkeypatch.setattr("tools.execution.read_metrics", lambda workdir: [])
    monkeypatch.setattr("tools.execution.final_metrics", lambda metrics: {})
    return trained


def test_a_workdir_is_gone_on_with_from_the_base_that_it_began_with(
    tmp_path: pathlib.Path, trained: list[str]
) -> None:
    adapter = jobs_of("adapter")[1]
    here, there = (Places(tmp_path, "", base=parameters(tmp_path, value)) for value in (0, 1))
    first, again = (do(adapter, here) for _ in range(2))
    assert first["root"] == adapter.run.root.key
    assert first["base"] == again["base"] == checked_base(adapter.run, here)
    assert first["machine"]["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    with pytest.raises(ValueError, match=r"was begun from .*; give another --out"):
        do(adapter, there)
    (here.workdir(adapter.run) / BASE_FILE).unlink()  # nor with one that does not say
    with pytest.raises(ValueError, match="was begun from parameters with SHA-256 unknown"):
        do(adapter, here)
    assert trained == [str(here.base)] * 2


def test_a_base_that_is_trained_again_to_others_is_a_failure(
    tmp_path: pathlib.Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = jobs_of("adapter")[0]
    monkeypatch.setattr("tools.bases._fingerprint", lambda workdir: "a" * 64)
    assert do(base, Places(tmp_path, ""))["base"] == "a" * 64
    with pytest.raises(ValueError, match="the archive holds was made from bbbbbbbbbbbb:"):
        do(base, Places(tmp_path, "", bases={base.key: "b" * 64}))
    assert trained == ["", ""]


def test_a_base_is_over_before_it_is_tuned(tmp_path: pathlib.Path) -> None:
    run, places = STUDY.run("adapter", "vqa", 0), Places(tmp_path, "")
    workdir = places.workdir(run.root)
    workdir.mkdir(parents=True)
    (workdir / RUN_FILE).write_text(json.dumps({"status": "preempted"}))
    with pytest.raises(ValueError, match="is preempted; finish it before it is tuned"):
        checked_base(run, places)


def test_commands_whose_cells_are_all_done_train_nothing() -> None:
    known = read_archive(ARCHIVE)
    for study, tasks, seeds in (
        (pcetl.first_base(), ("vqa", "retrieval"), 6),
        (pcetl.first_rates(), ("vqa", "retrieval"), 2),
        (pcetl.rates(), ("nlvr2",), 2),
        (pcetl.second_base(), ("vqa",), 3),
        (pcetl.alone(), ("vqa",), 1),
        (pcetl.robustness(), ("vqa",), 5),
        (pcetl.timed(), ("vqa",), 1),
        (pcetl.faster_heads(), ("nlvr2",), 2),
    ):
        cells = [name for name, (task, _) in study.cells.items() if task in tasks]
        assert not wanted_jobs(study.jobs(cells, range(seeds), study.settings), known)


# What the command hands over to its processes, without any.
HANDED = """
import json, sys
from tools import compare_stages
from vlp_jax.infra.command import parse_flags

def told(jobs, places, workers, known, may_start, devices):
    found = {"jobs": [job.key for job in jobs], "known": len(known), "bases": dict(places.bases)}
    found["may_start"] = [may_start(job) for job in jobs]
    print("HANDED", json.dumps(found))
    yield from ()

compare_stages.execute = told
compare_stages.main(parse_flags(sys.argv))
"""


def handed(folder: pathlib.Path, archive: pathlib.Path, *more: str) -> dict | str:
    """What processes would be given, or what the command complains of."""
    arguments = [f"--out={folder / 'out'}", f"--texts={folder}", f"--archive={archive}", *more]
    done = subprocess.run(
        [sys.executable, "-c", HANDED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("HANDED ")]
    if not lines:
        return done.stderr if done.returncode else "nothing"
    return json.loads(lines[0].removeprefix("HANDED "))


def test_the_command_hands_over_what_bases_must_be(tmp_path: pathlib.Path) -> None:
    run, made = STUDY.run("full", "nlvr2", 0), "e" * 64
    archive = tmp_path / "archive.jsonl"
    records = [
        record(run.root, base=made, name="base", seconds=100),
        record(run, base=made, name="nlvr2, full", seconds=400),
    ]
    archive.write_text("".join(json.dumps(one) + "\n" for one in records))
    cells = ("docs.results.pcetl", "--cells=nlvr2: full", "--seeds=2")
    again = handed(tmp_path, archive, *cells, "--max_seconds=300", "--train_bases")
    # Trained though it is known, and to be what it was.
    assert again["jobs"] == [run.root.key]
    assert again["known"] == 0
    assert again["bases"] == {run.root.key: made}
    assert again["may_start"] == [True]
    # The archive tells how long each takes: 100 s, and 400 s.
    for seconds, enough in ((300, False), (600, True)):
        more = handed(tmp_path, archive, *cells, f"--max_seconds={seconds}")
        assert more["bases"] == {run.root.key: made}
        assert (more["known"], more["may_start"]) == (2, [enough] * 3)


def test_the_command_refuses_another_base_before_anything_is_done(tmp_path: pathlib.Path) -> None:
    archive, base = tmp_path / "archive.jsonl", parameters(tmp_path, 0)
    told = record(STUDY.run("adapter", "nlvr2", 0), base="f" * 64)
    archive.write_text(json.dumps(told) + "\n")
    study = ("docs.results.pcetl", f"--base={base}")
    assert "made from ffffffffffff" in handed(tmp_path, archive, *study, "--cells=nlvr2: lora")
    assert not (tmp_path / "out").exists()


def test_what_does_not_tell_its_base_has_its_tables_and_nothing_is_added(
    tmp_path: pathlib.Path,
) -> None:
    cells = ("docs.results.pcetl:first_base", "--cells=vqa: adapter", "--seeds=6")
    archive = tmp_path / "archive.jsonl"
    archive.write_text(json.dumps(record(FIRST.run("full", "vqa", 0))) + "\n")
    assert "does not tell from which parameters" in handed(tmp_path, archive, *cells)
    assert handed(tmp_path, ARCHIVE, *cells, "--max_seconds=0") == "nothing"
    # Times are measured around whatever one update makes.
    timed = ("docs.results.pcetl:timed", "--cells=retrieval: DAS 4", "--seeds=1")
    assert handed(tmp_path, ARCHIVE, *timed)["bases"] == {}
