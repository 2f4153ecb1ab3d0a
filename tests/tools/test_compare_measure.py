"""What is read from a run: its metrics file, and in the slow test real runs of the trainer."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPO
from tools.compare.measure import compile_seconds, final_metrics, training_intervals
from vlp_jax.infra.preemption import ExitCode

METRIC = "reconstruction/base/accuracy"


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


class Command:
    """Starts the comparison of two variants of the tiny config in subprocesses."""

    def __init__(self, folder: pathlib.Path):
        self.out = folder / "out"
        self.config = folder / "tiny.py"
        self.config.write_text(
            "from tests.tiny_config import get_config as tiny\n"
            "def get_config(arg=None):\n"
            "    config = tiny()\n"
            "    config.objectives.flm.corruption_rate = float(arg)\n"
            "    return config\n"
        )

    def start(self, *flags: str) -> subprocess.Popen[str]:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tools.compare"),
                *(f"{self.config}:0.1", f"{self.config}:0.5", f"--out={self.out}"),
                *("--budget_seconds=1", "--fractions=1,1/2", f"--metric={METRIC}"),
                # The machine of a test may do anything else at the same time.
                *("--max_input_wait=1", "--calibration_steps=16"),
                *flags,
            ],
            cwd=REPO,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    def facts(self) -> dict:
        return json.loads((self.out / "compare.json").read_text())


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
        assert 0 < row["seconds"] < 60
        assert row["flops"] > 0
        assert not (workdir / "checkpoints").exists()
    halves = {row["config"]: row["steps"] for row in facts["rows"] if row["fraction"] == 0.5}
    wholes = {row["config"]: row["steps"] for row in facts["rows"] if row["fraction"] == 1.0}
    assert halves.keys() == {"tiny:0.1", "tiny:0.5"}
    assert all(abs(wholes[label] - 2 * halves[label]) <= 1 for label in halves)
    assert METRIC in facts["time_to_score"]
    assert (command.out / "compare.png").is_file()
