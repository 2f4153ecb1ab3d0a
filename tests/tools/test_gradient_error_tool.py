"""From a run's checkpoints to a schedule that the next run loads."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.conftest import REPO
from tests.tiny_config import get_config
from vlp_jax.compress.buckets import WHOLE, bucket_text
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare

BUCKETS = ("p16@16", "p8@16k2", WHOLE)


# An objective that compiles fast.
FILE = """
from tests.tiny_config import get_config as tiny
def get_config():
    config = tiny()
    config.objectives = {"itc": {"embedding_dim": 8}}
    return config
"""


def pilot_config() -> ConfigDict:
    config = get_config()
    config.objectives = {"itc": {"embedding_dim": 8}}
    config.total_steps = 4
    config.checkpoint.every_steps = 2
    config.checkpoint.keep_latest = 9
    config.evals = {}
    config.checkpoint.best_metric = ""
    return config


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("pilot") / "run"
    assert train(prepare(pilot_config(), workdir)) == ExitCode.OK
    return workdir


def tool(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    file = workdir.parent / "config.py"
    file.write_text(FILE)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.gradient_error",
            f"--config={file}",
            f"--workdir={workdir}",
            *flags,
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_schedule_is_derived_from_a_run_and_loaded_by_the_next(pilot):
    flags = ("--config.compression.schedule=staged", f"--config.compression.buckets={BUCKETS}")
    # Of four updates one at least starts in the second half, whatever the buckets' costs.
    result = tool(pilot, *flags, "--batches=4", "--tail_percent=50")
    assert result.returncode == 0, result.stderr[-3000:]
    out = pilot / "gradient_error"
    found = json.loads((out / "results.json").read_text())
    assert [c["step"] for c in found["checkpoints"]] == [0, 2, 4]
    assert [c["progress"] for c in found["checkpoints"]] == [0.0, 0.5, 1.0]
    assert found["costs"][WHOLE] == 1.0
    for index, checkpoint in enumerate(found["checkpoints"]):
        estimates = checkpoint["estimates"]
        assert list(estimates) == list(BUCKETS)
        assert estimates[WHOLE]["bias"] == 0
        for name, figures in estimates.items():
            assert figures["variance"] > 0
            expected = figures["bias"] + found["costs"][name] * figures["variance"]
            assert figures["mse"] == pytest.approx(expected)
            assert (figures["adam_mse"] is None) == (index == 0)  # no update, no scale
    costs = [found["costs"][c["choice"]] for c in found["checkpoints"]]
    assert costs == sorted(costs)
    table = (out / "table.md").read_text()
    assert "Step 2, 50% of the budget" in table
    assert "Derived schedule" in table
    assert (out / "gradient_error.png").stat().st_size > 5_000

    config = pilot_config()
    config.compression.file = str(out / "schedule.json")
    schedule = prepare(config, pilot.parent / "next").program.schedule
    assert bucket_text(schedule.views(0)) == found["checkpoints"][0]["choice"]
    assert schedule.views(schedule.total_steps - 1) == ()  # the tail
    used = {bucket_text(schedule.buckets[i]) for i in np.unique(schedule.index)}
    assert used <= {*(c["choice"] for c in found["checkpoints"]), WHOLE}
    assert "gradient_error" in json.loads((out / "schedule.json").read_text())["facts"]["command"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--checkpoints=0,3",), "--checkpoints: .* has none of step 3; there are 0, 2, 4"),
        (("--checkpoints=last",), "--checkpoints=last: write steps"),
        ((), "compression.schedule: says what is to be compared"),
        (
            ("--config.compression.schedule=staged", "--config.compression.buckets=('p5@16',)"),
            "compression.buckets: 'p5@16'",
        ),
    ],
)
def test_bad_input_ends_with_one_line(pilot, flags, message):
    result = tool(pilot, *flags)
    assert result.returncode == ExitCode.BAD_INPUT
    assert len(result.stderr.strip().splitlines()[-1:]) == 1
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


def test_a_folder_without_a_run_is_named(tmp_path):
    result = tool(tmp_path)
    assert result.returncode == ExitCode.BAD_INPUT
    assert "holds no run" in result.stderr
