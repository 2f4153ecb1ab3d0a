"""Several workers on one folder: with trainers that pretend, and the processes that start them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.tools.compared import FakeTrainer, finetune, named, open_cells, settings, silent
from tools.compare import comparison, workers
from tools.compare.cells import MIN_STEPS
from tools.compare.claims import Claims
from tools.compare.comparison import compare
from tools.compare.prepare import prepare
from tools.compare.search import Axis, search
from vlp_jax.infra.preemption import ExitCode


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(comparison, "POLL_SECONDS", 0.01)
    monkeypatch.setattr("tools.compare.search.POLL_SECONDS", 0.01)
    monkeypatch.setattr("tools.compare.prepare.POLL_SECONDS", 0.01)
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.01)


class SlowTrainer(FakeTrainer):
    """Takes its time, so that others come between."""

    def run(self, config, workdir):
        time.sleep(0.02)
        return super().run(config, workdir)


def together(work, count=3):
    """What threads with a trainer each come to, in a folder that is calibrated."""
    results, trainers = {}, [SlowTrainer() for _ in range(count)]
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: work(trainers[n])}))
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[n] for n in range(count)], trainers


def test_workers_train_every_cell_once_and_the_table_is_that_of_one_process(tmp_path):
    what = settings(named("a"), named("b", 2.0), rates=("x1", "x2", "x4"))
    alone = compare(what, open_cells(tmp_path / "alone", FakeTrainer()), silent)
    comparison.calibrate(what, open_cells(tmp_path / "shared", FakeTrainer()))

    def work(trainer):
        return compare(what, open_cells(tmp_path / "shared", trainer, may_calibrate=False), silent)

    found, trainers = together(work)
    runs = [workdir for trainer in trainers for workdir, _ in trainer.runs]
    assert len(runs) == len(set(runs)) == alone["planned"]
    assert all(trainer.runs for trainer in trainers)
    assert not any(trainer.calibrations for trainer in trainers)
    assert max(len(facts["rows"]) for facts in found) == alone["planned"]
    # Each has waited for the rates, which the others' cells have decided.
    assert all(facts["rates"] == alone["rates"] for facts in found)
    again = compare(what, open_cells(tmp_path / "shared", FakeTrainer(), runs=0), silent)
    assert {key: again[key] for key in ("rates", "curves", "time_to_score")} == {
        key: alone[key] for key in ("rates", "curves", "time_to_score")
    }
    assert not list(tmp_path.glob("shared/cells/*/claim.json"))


def test_workers_fill_the_caches_by_short_runs_of_all_that_is_compiled(tmp_path):
    other = named("c", **{"objectives.flm.corruption_rate": 0.5})
    configs, tunes = [named("a"), named("b", 2.0), other], (finetune("vqa"), finetune("nlvr2"))
    what = settings(*configs, finetunes=tunes, scratch=True)
    _, trainers = together(lambda trainer: prepare(what, open_cells(tmp_path, trainer)), 4)
    runs = [run for trainer in trainers for run in trainer.runs]
    assert len(runs) == 3 + 2 * 2 + 2, "pretraining; fine-tuning from each kind; from scratch"
    assert {config.total_steps for _, config in runs} == {MIN_STEPS}
    assert all(config.evals for _, config in runs), "evaluators are compiled, too"
    # How a model is read depends on what it was pretrained by, so each kind is fine-tuned: those of
    # a and b, which differ in the decay of weights, are one.
    pretrained = {str(w): config.name for w, config in runs if config.name in ("a", "b", "c")}
    started = sorted(pretrained[config.init_from] for _, config in runs if config.init_from)
    assert started == ["a", "a", "c", "c"]
    assert not list(tmp_path.glob("prepared/*/claim.json"))
    again = FakeTrainer()
    prepare(what, open_cells(tmp_path, again))
    assert not again.runs
    assert not again.calibrations


def test_a_signal_ends_preparing_and_the_next_invocation_goes_on(tmp_path):
    what, trainer = settings(named("a"), named("b", 2.0), finetunes=(finetune(),)), FakeTrainer()
    trainer.stop_at = 1
    cells = open_cells(tmp_path, trainer)
    prepare(what, cells)
    assert cells.interrupted
    trainer.stop_at = None
    prepare(what, open_cells(tmp_path, trainer))
    assert [config.name for _, config in trainer.runs] == ["a", "b", "b", "vqa"]


def test_what_has_brought_a_worker_down_is_not_waited_for(tmp_path):
    what = settings(named("a"), named("b", 2.0), finetunes=(finetune(),))
    trainer = FakeTrainer()
    prepare(what, open_cells(tmp_path, trainer))
    first = trainer.runs[0][0]
    shutil.rmtree(first.parent)
    first.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claim = {"host": socket.gethostname(), "pid": dead.pid, "started": 0.0, "group": 7}
    (first / "claim.json").write_text(json.dumps(claim))
    trainer = FakeTrainer()
    prepare(what, open_cells(tmp_path, trainer, group=7))
    assert [config.name for _, config in trainer.runs] == ["b", "vqa"]
    assert trainer.runs[1][1].init_from == str(trainer.runs[0][0])


def test_workers_share_a_search(tmp_path):
    what, axes = settings(named("a"), seeds=1), [Axis.parse("schedule.peak:1e-3,2e-3,4e-3")]
    open_cells(tmp_path, FakeTrainer()).calibration(named("a"), {})

    def work(trainer):
        cells = open_cells(tmp_path, trainer, may_calibrate=False)
        return search(what, axes, 3, 9, cells, silent)

    found, trainers = together(work)
    assert sum(len(trainer.runs) for trainer in trainers) == 3 + 1
    assert {facts["a"]["best"]["schedule.peak"] for facts in found} == {2e-3}


def test_without_calibration_a_worker_does_nothing(tmp_path):
    trainer = FakeTrainer()
    facts = compare(
        settings(named("a")), open_cells(tmp_path, trainer, may_calibrate=False), silent
    )
    assert facts["rows"] == []
    assert not trainer.calibrations


def test_what_another_process_trains_is_left_to_it(tmp_path):
    what, trainer = settings(named("a"), rates=("x1", "x2"), seeds=1), FakeTrainer()
    compare(what, open_cells(tmp_path, trainer), silent)
    first = trainer.runs[0][0]
    (first / "result.json").unlink()
    other = Claims()
    other.take(first)
    cells = open_cells(tmp_path, FakeTrainer())
    waiting = threading.Thread(target=lambda: compare(what, cells, silent))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive(), "its rate depends on that cell"
    other.release(first)
    waiting.join(5)
    assert cells.trained == {first.name}


def test_an_error_leaves_the_claim_and_names_the_cell(tmp_path):
    trainer = FakeTrainer()

    def fail(config, facts):
        raise RuntimeError("out of memory")

    trainer.alter = fail
    cells = open_cells(tmp_path, trainer, group=7)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(settings(named("a")), cells, silent)
    [(workdir, _)] = trainer.runs
    (workdir / "log.txt").write_text("line 1\nline 2\n")
    report = workers.crash_report(tmp_path, os.getpid(), 1)
    assert f"ended with code 1 in cell {workdir.name} (a, seed 0)" in report
    assert report.endswith("line 2")
    assert "was ended by SIGKILL outside of any cell" in workers.crash_report(tmp_path, 1, -9)


class Processes:
    """Stand-ins for the processes of a command: Python scripts by role."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.complaints, self.kept = folder, [], []
        self.scripts = {"prepare": "", "calibrate": "", "train": ""}
        monkeypatch.setattr(
            workers, "_start", lambda command, environment: self.start(command, environment)
        )

    def start(self, command, environment):
        [script] = command
        return subprocess.Popen(
            [sys.executable, "-c", f"import os, signal, sys, time\n{script}"],
            env=os.environ | environment,
        )

    def run(self, count=2, devices=(), requested=lambda: False):
        return workers.run_phases(
            lambda role: [self.scripts[role]],
            workers=count,
            devices=devices,
            folder=self.folder,
            requested=requested,
            complain=self.complaints.append,
            keep=lambda: self.kept.append(len(list(self.folder.iterdir()))),
        )


@pytest.fixture
def processes(monkeypatch, tmp_path):
    return Processes(monkeypatch, tmp_path)


def test_workers_see_their_device_and_do_not_take_all_memory(processes, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    template = (
        "names = ('CUDA_VISIBLE_DEVICES', 'XLA_PYTHON_CLIENT_PREALLOCATE')\n"
        f"open(r'{processes.folder}/{{role}}.txt', 'a').write("
        "' '.join(os.environ.get(name, '-') for name in names) + chr(10))"
    )
    processes.scripts = {role: template.replace("{role}", role) for role in processes.scripts}
    assert processes.run(3, devices=("4", "7")) is ExitCode.OK
    lines = {
        role: sorted((processes.folder / f"{role}.txt").read_text().splitlines())
        for role in processes.scripts
    }
    shared = ["4 false", "4 false", "7 false"]
    assert lines == {"prepare": shared, "calibrate": ["4 -"], "train": shared}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    processes.run(1, devices=("4",))
    assert "4 true" in (processes.folder / "train.txt").read_text()


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("sys.exit(75)", ExitCode.PREEMPTED),
        ("sys.exit(64)", ExitCode.BAD_INPUT),
        ("sys.exit(1)", ExitCode.FAILED),
        ("sys.exit(3)", ExitCode.FAILED),
        ("os.kill(os.getpid(), signal.SIGKILL)", ExitCode.FAILED),
    ],
)
def test_a_crash_is_told_and_the_outcome_is_the_worst(processes, script, outcome):
    processes.scripts["calibrate"] = script
    processes.scripts["train"] = "raise AssertionError"
    assert processes.run() is outcome
    assert len(processes.complaints) == (outcome is ExitCode.FAILED)
    processes.scripts |= {"calibrate": "", "train": script}
    assert processes.run(1) is outcome
    processes.scripts |= {"prepare": script, "calibrate": "raise AssertionError"}
    assert processes.run(1) is outcome


def test_what_is_there_is_kept_while_workers_run(processes, monkeypatch):
    monkeypatch.setattr(workers, "KEEP_SECONDS", 0.0)
    processes.scripts["train"] = f"open(r'{processes.folder}/result', 'w').close()\ntime.sleep(1.0)"
    assert processes.run(1) is ExitCode.OK
    assert processes.kept[-1] == 1


def test_a_signal_is_passed_on_and_waited_for(processes):
    ready = processes.folder / "ready"
    processes.scripts["train"] = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open(r'{ready}' + str(os.getpid()), 'w').close()\n"
        "time.sleep(60)"
    )
    begun = time.monotonic()
    outcome = processes.run(2, requested=lambda: len(list(processes.folder.glob("ready*"))) == 2)
    assert outcome is ExitCode.PREEMPTED
    assert time.monotonic() - begun < 30
    assert not processes.complaints


def test_a_worker_that_had_no_time_to_listen_is_no_crash(processes):
    processes.scripts["calibrate"] = "time.sleep(60)"
    assert processes.run(requested=lambda: True) is ExitCode.PREEMPTED
    assert not processes.complaints
