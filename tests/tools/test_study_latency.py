"""Passes of a study's networks are timed from its configs and from what was searched."""

import fcntl
import json
import pathlib
import threading

import jax
import pytest
from ml_collections import ConfigDict

from docs.results import pcetl, pcetl_ways
from tests.tiny_search import UNITS, search_config
from tools import study_latency
from tools.jobs import Run, read_archive
from tools.latency import ForwardPass, Turns
from tools.study_latency import latencies, network_of
from tools.tuning_study import TuningStudy, latency_key
from vlp_jax.data.scenes.tasks import ScenesVQA
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.transfer.methods import set_method


def small(method: str) -> ConfigDict:
    config = search_config()
    with config.unlocked():
        config.model.tuning.gated = ()
        config.objectives = {"vqa": {"num_classes": len(ScenesVQA.classes), "readout": "auto"}}
    config.search.method = ""
    set_method(config, method)
    return config


BASE = Run(search_config())
SEARCH = Run(search_config(), BASE)


@pytest.fixture
def study() -> TuningStudy:
    runs = {
        "full": Run(small("full"), BASE),
        "head": Run(small("head"), BASE),
        "DAS": Run(small("adapter"), BASE, SEARCH),
        "cut": Run(small("full"), BASE, cut=(0.5, 0.5)),
    }
    runs["eight"] = Run(runs["full"].config, runs["full"], eight=True)
    ways = {name: (lambda task, seed, run=run: run) for name, run in runs.items()}
    return TuningStudy(ways, {"vqa": ("test/accuracy",)}, pcetl.SETTINGS, ())


SEARCHED = {SEARCH.key: {"search": {"skipped": list(UNITS[:2])}}}


def test_networks_are_what_runs_tune(study: TuningStudy) -> None:
    found = {way: network_of(of("vqa", 0), SEARCHED) for way, of in study.ways.items()}
    assert found["full"].key == found["head"].key != found["eight"].key
    assert found["DAS"].config.model.tuning.skip == UNITS[:2]
    prune = found["cut"].config.model.tuning.prune
    assert (prune.heads, prune.mlp, prune.blocks) == (0.5, 0.5, "all")
    assert network_of(study.ways["DAS"]("vqa", 0), {}) is None  # not searched for yet
    # Those of the study itself are what training would build.
    run = pcetl.study().ways["DAS 4"]("vqa", 0)
    known = {run.search.key: {"search": {"skipped": list(pcetl_ways.units()[:2])}}}
    geometry = network_of(run, known).config.model
    assert geometry.image == pcetl_ways.base().config.model.image
    assert geometry.tuning.skip == pcetl_ways.units()[:2]
    full, merged, biases, adapters = (
        network_of(pcetl.study().run(way, "vqa", 0), {}).key
        for way in ("full", "lora", "bitfit", "adapter")
    )
    assert full == merged == biases != adapters


def test_what_is_missing_is_measured_once_beside_the_first(
    study: TuningStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    plain = study_latency._passes
    monkeypatch.setattr(
        study_latency, "_passes", lambda network: built.append(network.key) or plain(network)
    )
    known = dict(SEARCHED)
    records = list(latencies(study, known, "vqa", [0], (1, 2), 2))
    runs = {way: of("vqa", 0) for way, of in study.ways.items()}
    assert [record["job"] for record in records] == [latency_key(r.key) for r in runs.values()]
    assert len(built) == len(set(built)) == 4  # head and full are one network
    for record in records:
        assert set(record["ms"]) == {"1", "2"}
        assert all(time > 0 for time in record["ms"].values())
        assert record["first_ms"] == records[0]["ms"]
    assert records[0]["ms"] == records[1]["ms"] != records[2]["ms"]
    known |= {record["job"]: record for record in records if record is not records[2]}
    built.clear()
    [again] = latencies(study, known, "vqa", [0], (1,), 1)
    assert again["job"] == records[2]["job"]
    assert len(built) == 2
    assert not list(latencies(study, known | {again["job"]: again}, "vqa", [0], (1,), 1))


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval"])
def test_every_network_of_the_study_is_measured(task: str) -> None:
    known = read_archive(pathlib.Path(pcetl.__file__).with_name("pcetl.jsonl"))
    study = pcetl.study() if task == "nlvr2" else pcetl.first_base()
    assert not list(latencies(study, known, task, [0], (1,), 1))
    of = study.run("DAS 4", task, 0)
    assert set(known[latency_key(of.key)]["ms"]) == {str(count) for count in study_latency.ROWS}


def test_lines_are_added_to_the_archive(
    study: TuningStudy, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pcetl, "study", lambda: study)
    nothing = ForwardPass(jax.jit(lambda: 0.0), (), jax.devices()[0])
    monkeypatch.setattr(study_latency, "_passes", lambda network: lambda rows: nothing)
    turns, lock = [], tmp_path / "lock"
    plain = study_latency.forward_times
    monkeypatch.setattr(
        study_latency,
        "forward_times",
        lambda *given, **more: turns.append(more["turns"]) or plain(*given, **more),
    )
    archive = tmp_path / "archive.jsonl"
    archive.write_text(json.dumps({"job": "another", "seconds": 1}) + "\n")
    arguments = ["docs.results.pcetl", f"--archive={archive}", "--rows=3,5", "--repeats=1"]
    arguments.append(f"--lock={lock}")
    study_latency.main(arguments)
    found = read_archive(archive)
    assert len(found) == 1 + 4  # nothing was searched for
    assert turns == [Turns(lock)]  # one for all row counts
    again = threading.Thread(target=study_latency.main, args=(arguments,), daemon=True)
    with lock.open("a") as other:  # what needs no device does not wait for one that others have
        fcntl.flock(other, fcntl.LOCK_EX)
        again.start()
        again.join(timeout=60)
        assert not again.is_alive()
    assert len(archive.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows=1,x"], "--rows=1,x"),
        (["--rows=0"], "use 1 or more"),
        (["--tasks=dancing"], "--tasks: 'dancing' is none of vqa"),
    ],
)
def test_bad_input_names_the_flag(
    more: list[str], message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = f"--archive={tmp_path / 'none.jsonl'}"
    with pytest.raises(SystemExit) as ended:
        study_latency.main(["docs.results.pcetl", archive, *more])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_study_of_something_else_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study_latency.main(["docs.results.momo", f"--archive={tmp_path / 'none.jsonl'}"])
    assert "compares no ways to tune" in capsys.readouterr().err
