"""What is read from a run: its metrics file, and in the slow test real runs of the trainer."""

import dataclasses
import json
import signal
import time
import types

import pytest

from tests.tiny_config import get_config
from tests.tools.compared import METRIC, Command, named
from tools.compare import measure
from tools.compare.configs import CommandError, NamedConfig, cost_digest
from tools.compare.measure import (
    Trainer,
    calibration,
    compile_seconds,
    final_metrics,
    group_scores,
    training_intervals,
)
from tools.compare.records import Calibration, Group, Measurement
from vlp_jax.infra.artifacts import Gallery, Table
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.loop import RunStopped
from vlp_jax.train.setup import prepare


def speed(step: int, rate: float, wait: float) -> dict[str, float]:
    return {
        "step": step,
        "train/loss": 1.0,
        "speed/samples_per_second": rate,
        "speed/input_wait_fraction": wait,
    }


def test_training_time_is_the_sum_of_intervals_without_what_lies_between():
    records = [
        {"step": 0, "compile/seconds/12x16": 20.0, "compile/seconds/14x16": 5.0},
        speed(10, 32.0, 0.5),
        {"step": 10, "val/accuracy": 0.1},
        speed(30, 64.0, 0.0),
        speed(35, 16.0, 0.1),
        {"step": 35, "val/accuracy": 0.3, "val/loss": 2.0},
    ]
    assert training_intervals(records, batch_size=16) == [
        (10, 10, 5.0, 2.5),
        (30, 20, 5.0, 0.0),
        (35, 5, 5.0, 0.5),
    ]
    assert compile_seconds(records) == 25.0
    assert final_metrics(records) == {"val/accuracy": 0.3, "val/loss": 2.0}


def test_a_resumed_run_reports_the_compile_of_its_first_start_and_counts_steps_once():
    records = [
        {"step": 0, "compile/seconds/12x16": 20.0},
        speed(10, 16.0, 0.0),
        # Killed after step 15, restored there; its clock began anew.
        {"step": 15, "compile/seconds/12x16": 0.5},
        speed(20, 16.0, 0.0),
    ]
    intervals = training_intervals(records, batch_size=16)
    assert sum(steps for _, steps, _, _ in intervals) == 20
    assert sum(seconds for _, _, seconds, _ in intervals) == 20.0
    assert compile_seconds(records) == 20.0


def test_a_run_without_records_took_no_time():
    assert training_intervals([], 16) == []
    assert compile_seconds([]) == 0.0
    assert final_metrics([]) == {}


def test_calibration_counts_the_second_half_and_keeps_its_spread():
    seconds = [9.0, 9.0, 9.0, 0.64, 0.32, 0.48]
    intervals = [(32 * (n + 1), 32, s, 0.01 * s) for n, s in enumerate(seconds)]
    found = calibration(intervals, 192, 12.5)
    assert (found.median_ms, found.min_ms, found.max_ms) == (15.0, 10.0, 20.0)
    assert found.seconds == 0.015
    assert (found.intervals, found.interval_steps, found.compile_seconds) == (3, 32, 12.5)
    assert found.input_wait_fraction == pytest.approx(0.01)


def test_the_clock_is_that_of_the_device_where_it_is_known():
    found = calibration([(32, 32, 0.64, 0.0), (64, 32, 0.64, 0.0)], 64, 1.0)
    assert found.device_ms is None
    assert found.seconds == 0.02
    assert dataclasses.replace(found, device_ms=5.0).seconds == 0.005


@pytest.mark.parametrize(("platform", "device_ms"), [("cpu", None), ("gpu", 6.25)])
def test_accelerators_are_traced_before_what_is_measured(
    tmp_path, monkeypatch, platform, device_ms
):
    config = named().calibration(steps=96, overrides={})
    interval = config.log.every_steps
    trainer, trained = Trainer(), []
    trainer.machine = {"platform": platform}

    def train(config, workdir):
        trained.append(config)
        lines = [speed(interval * n, 100.0, 0.0) for n in range(1, 7)]
        workdir.mkdir()
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        budget = types.SimpleNamespace(batch_size=16)
        return types.SimpleNamespace(workdir=workdir, budget=budget, total_steps=6 * interval)

    monkeypatch.setattr(trainer, "_train", train)
    monkeypatch.setattr("tools.compare.measure.device_busy_ms", lambda trace: 6.25)
    found = trainer.calibrate(config, tmp_path / "run")
    assert (found.device_ms, found.intervals) == (device_ms, 3)
    window = trained[0].profile
    # Whole, over before the second half begins, and not the first use of a bucket.
    expected = (interval, interval) if device_ms else (config.profile.start_step, 0)
    assert (window.start_step, window.num_steps) == expected


def compressed(**compression):
    config = get_config()
    config.total_steps = 40
    config.compression.update({"buckets": ("p16@16", "whole"), "schedule": "staged"})
    config.compression.update(compression)
    return NamedConfig("tiny", "tiny.py", config.lock())


def test_compressed_updates_cost_their_measured_share_of_one_of_whole_images(tmp_path):
    named_config = compressed(costs=(0.25, 1.0))
    config = named_config.run(steps=40, seed=0, step_seconds=0.1, save_seconds=60.0, overrides={})
    setup = prepare(config, tmp_path / "run")
    assert setup.total_steps == 80 + 20  # half the budget in each
    assert measure._spent(setup, 80) == pytest.approx(20)
    assert measure._spent(setup, 100) == pytest.approx(40)
    flops = [
        setup.program.flops({"pairs": mean_length(setup)}, setup.program.bucket(planned, step))
        for planned in [setup.plan.bucket(0)]
        for step in (0, 99)
    ]
    expected = 0.8 * flops[0] + 0.2 * flops[1]
    assert measure._flops_per_sample(setup) == pytest.approx(expected)
    calibrated = Calibration(100.0, 99.0, 101.0, 3, 32, 0.0, 1.0)
    ran = Measurement("finished", "", 100, 1600, 1.0, 0.0, 1.0, 1.0, {}, spent=40.0)
    assert ran.seconds(calibrated) == pytest.approx(4.0)
    assert dataclasses.replace(ran, spent=None).seconds(calibrated) == pytest.approx(10.0)
    # What one of whole images costs is measured without the schedule, once for both.
    plain = NamedConfig("tiny", "tiny.py", get_config().lock())
    digests = {cost_digest(c.calibration(steps=6, overrides={})) for c in (named_config, plain)}
    assert len(digests) == 1


def mean_length(setup):
    batches = range(min(setup.total_steps, setup.plan.window_batches))
    return sum(setup.plan.batch("pairs", t).length.mean() for t in batches) / len(batches)


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ({}, "compression.costs: are those of FLOPs"),
        ({"schedule": "online", "costs": (0.5, 1.0)}, "compression.schedule: the decisions"),
    ],
)
def test_costs_that_nobody_has_measured_are_refused(compression, message):
    with pytest.raises(ConfigError, match=message):
        compressed(**compression).run(
            steps=40, seed=0, step_seconds=0.1, save_seconds=60.0, overrides={}
        )


def test_damaged_data_is_a_fault_to_mend_and_no_score(tmp_path, monkeypatch):
    def stopped(code):
        def train(setup):
            raise RunStopped(code, "the run stopped")

        return train

    monkeypatch.setattr(measure, "train", stopped(ExitCode.TOO_MANY_BAD_EXAMPLES))
    with pytest.raises(CommandError, match="the run stopped"):
        Trainer().run(get_config(), tmp_path / "damaged")
    monkeypatch.setattr(measure, "train", stopped(ExitCode.TOO_MANY_BAD_UPDATES))
    monkeypatch.setattr(measure, "read_metrics", lambda workdir: [])
    assert Trainer().run(get_config(), tmp_path / "diverged").status == "stopped"


def test_scores_by_group_come_from_the_tables_of_evaluators(tmp_path):
    assert group_scores(tmp_path) == ()
    table = Table(
        title="t",
        columns=("group", "value", "examples", "accuracy", "accuracy text_only"),
        rows=(("all", "", 9, 0.5, 0.1), ("colour", "red", 4, 0.25, 0.1)),
    )
    table.save(tmp_path / "artifacts" / "test_groups")
    Gallery(title="g", cards=()).save(tmp_path / "artifacts" / "test")
    Gallery(title="of groups", cards=()).save(tmp_path / "artifacts" / "all_groups")
    assert group_scores(tmp_path) == (
        Group("test", "all", "", 9, 0.5),
        Group("test", "colour", "red", 4, 0.25),
    )


@pytest.mark.slow
def test_real_runs(tmp_path):
    command = Command(tmp_path)
    code, _, err = command.finish(command.start("--max_seconds=0"))
    assert code == ExitCode.OK, err[-3000:]
    assert command.facts()["rows"] == []

    # Stopped in the middle: what is finished is kept, and the next invocation goes on.
    process = command.start()
    deadline = time.monotonic() + 300
    while not list(command.out.glob("cells/*/result.json")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, err = command.finish(process)
    assert code == ExitCode.PREEMPTED, err[-3000:]
    assert "of 4 cells are there" in (command.out / "compare.md").read_text()
    kept = {file: file.stat().st_mtime_ns for file in command.out.glob("cells/*/result.json")}
    assert kept

    code, _, err = command.finish(command.start())
    assert code == ExitCode.OK, err[-3000:]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "trained again"
    facts = command.facts()
    assert len(facts["rows"]) == facts["planned"] == 4
    assert facts["left_out"] == []
    for row in facts["rows"]:
        workdir = command.out / "cells" / row["cell"]
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert row["status"] == "counted"
        assert row["samples"] == 16 * row["steps"]
        assert json.loads((workdir / "config.json").read_text())["total_steps"] == row["steps"]
        rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
        assert rates[-1] <= 1.1e-3 / row["steps"], "the schedule came to its end"
        evaluated = [line for line in lines if METRIC in line]
        assert [line["step"] for line in evaluated] == [row["steps"]], "evaluated once, at the end"
        assert row["scores"] == {METRIC: evaluated[0][METRIC]}
        assert row["compile_seconds"] > 0
        assert row["seconds"] == pytest.approx(row["fraction"], rel=0.1)
        assert 0 < row["wall_seconds"] < 60
        assert row["flops"] > 0
        assert not (workdir / "checkpoints").exists()
    halves = {row["config"]: row["steps"] for row in facts["rows"] if row["fraction"] == 0.5}
    wholes = {row["config"]: row["steps"] for row in facts["rows"] if row["fraction"] == 1.0}
    assert halves.keys() == {"tiny:0.1", "tiny:0.5"}
    assert all(abs(wholes[label] - 2 * halves[label]) <= 1 for label in halves)
    assert METRIC in facts["time_to_score"]
    assert (command.out / "compare.png").is_file()


@pytest.mark.slow
def test_two_real_workers(tmp_path):
    command = Command(tmp_path)
    code, out, err = command.finish(command.start("--workers=2", "--fractions=1", "--seeds=2"))
    assert code == ExitCode.OK, err[-3000:]
    facts = command.facts()
    assert len(facts["rows"]) == facts["planned"] == 4
    assert {row["status"] for row in facts["rows"]} == {"counted"}
    assert out.count("an update takes") == 2, "calibrated once each, by one process"
    assert out.count(": compiling, log in") == 2, "each config once"
    assert out.count("log in") == 2 + 4, "no cell twice"
    assert len(list(command.out.glob("calibration/*.json"))) == 2
    assert not list(command.out.glob("cells/*/claim.json"))
    assert "Seconds are updates times" in (command.out / "compare.md").read_text()
