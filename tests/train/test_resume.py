"""A run that was killed goes on as if nothing had happened: real processes, real signals.

With all of XLA's optimisations, as users compile, among the slow tests: compiles take most of the
time.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.compiler_flags import QUICK_COMPILES
from tests.conftest import REPO
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.preemption import ExitCode

TOTAL = 60
# Every update encodes another part of its images: which one must not depend on what ran before.
MIXED_VIEWS = (
    "--config.compression.schedule=random",
    "--config.compression.buckets=('p8@16k2','whole')",
    "--config.compression.costs=(1.0,1.0)",
)
# What measures the machine and not the model.
TIMED = ("speed/", "memory/", "compile/")


class Trainer:
    """Starts runs of the tiny config in subprocesses that share one compile cache."""

    def __init__(self, folder: pathlib.Path, compiler_flags: str):
        self.folder = folder
        self._compiler_flags = compiler_flags

    def start(self, workdir: pathlib.Path, devices: int = 8, *flags: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": (
                f"--xla_force_host_platform_device_count={devices} {self._compiler_flags}"
            ),
            "PYTHONWARNINGS": "error::DeprecationWarning:vlp_jax",
        }
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vlp_jax.main",
                f"--config={REPO / 'tests' / 'tiny_config.py'}",
                f"--workdir={workdir}",
                f"--config.compile_cache={self.folder / 'cache'}",
                f"--config.total_steps={TOTAL}",
                "--config.evals.reconstruction.every_steps=20",
                "--config.mesh.fsdp=2",
                *MIXED_VIEWS,
                *flags,
            ],
            cwd=REPO,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def signal_at(
        self, process: subprocess.Popen[str], workdir: pathlib.Path, step: int, sig: int
    ) -> None:
        """Send a signal once the run has logged ``step``."""
        deadline = time.monotonic() + 200
        while last_step(workdir) < step:
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline, f"step {step} not reached"
            time.sleep(0.02)
        process.send_signal(sig)


def records(workdir: pathlib.Path) -> list[dict[str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def last_step(workdir: pathlib.Path) -> int:
    try:
        lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return -1
    return json.loads(lines[-1])["step"] if lines else -1


def learned(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    """Every logged figure that measures the model, by step and name."""
    return {
        (record["step"], name): value
        for record in records(workdir)
        for name, value in record.items()
        if name != "step" and not name.startswith(TIMED)
    }


def flat(params: object, prefix: str = "") -> dict[str, np.ndarray]:
    if not isinstance(params, dict):
        return {prefix: np.asarray(params)}
    return {k: v for key in params for k, v in flat(params[key], f"{prefix}/{key}").items()}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(QUICK_COMPILES, id="quick"),
        pytest.param("", id="optimised", marks=pytest.mark.slow),
    ],
)
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("runs"), request.param)


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> pathlib.Path:
    """An uninterrupted run on 8 devices."""
    workdir = trainer.folder / "whole"
    code, out, err = trainer.finish(trainer.start(workdir))
    assert code == 0, err[-3000:]
    assert "Involuntary full rematerialization" not in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["step"] == TOTAL
    assert pathlib.Path(summary["report"]).is_file()
    assert summary["workdir"] == str(workdir)
    assert "reconstruction/grounding_gap" in summary["metrics"]
    return workdir


@pytest.fixture(scope="module")
def killed(trainer: Trainer, whole: pathlib.Path) -> pathlib.Path:
    """A run of the same config, killed without warning after its 33rd step."""
    workdir = trainer.folder / "killed"
    process = trainer.start(workdir)
    trainer.signal_at(process, workdir, 33, signal.SIGKILL)
    code, _, _ = trainer.finish(process)
    assert code == -signal.SIGKILL
    return workdir


@pytest.fixture(scope="module")
def resumed(trainer: Trainer, killed: pathlib.Path) -> pathlib.Path:
    """The killed run, resumed, stopped by SIGTERM after step 45, and resumed again to its end."""
    workdir = trainer.folder / "resumed"
    shutil.copytree(killed, workdir)
    process = trainer.start(workdir)
    trainer.signal_at(process, workdir, 45, signal.SIGTERM)
    code, out, err = trainer.finish(process)
    assert code == ExitCode.PREEMPTED, err[-3000:]
    stopped = json.loads(out.splitlines()[-1])["step"]
    assert 45 <= stopped < TOTAL
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    code, out, err = trainer.finish(trainer.start(workdir))
    assert code == 0, err[-3000:]
    assert f"resumed from step {stopped}" in out
    return workdir


def test_resumed_metrics_equal_uninterrupted_bit_for_bit(whole, resumed):
    expected, found = learned(whole), learned(resumed)
    assert expected.keys() == found.keys()
    assert {key for key in expected if expected[key] != found[key]} == set()
    assert {step for step, _ in expected} >= set(range(1, TOTAL + 1))


def test_resumed_parameters_equal_uninterrupted_bit_for_bit(whole, resumed):
    for subtree in ("params", "extras/ema"):
        expected = flat(load_params(whole / "checkpoints", TOTAL, subtree).state)
        found = flat(load_params(resumed / "checkpoints", TOTAL, subtree).state)
        assert expected.keys() == found.keys()
        for path, value in expected.items():
            assert value.tobytes() == found[path].tobytes(), path


@pytest.mark.slow
def test_resume_on_fewer_devices_sees_the_same_batches(trainer, whole, killed):
    """8 devices, then 4: the batches are the same, and losses agree within 1e-3 relative."""
    workdir = trainer.folder / "fewer"
    shutil.copytree(killed, workdir)
    code, out, err = trainer.finish(trainer.start(workdir, 4))
    assert code == 0, err[-3000:]
    assert "resumed from step" in out
    expected, found = learned(whole), learned(workdir)
    assert expected.keys() == found.keys()
    batches = [key for key in expected if key[1] == "data/fingerprint"]
    assert len(batches) == TOTAL
    assert all(expected[key] == found[key] for key in batches)
    assert len({expected[key] for key in batches}) == TOTAL
    losses = [key for key in expected if key[1] == "train/loss"]
    np.testing.assert_allclose(
        [found[key] for key in losses], [expected[key] for key in losses], rtol=1e-3
    )


def test_bad_input_exits_with_its_own_code_and_one_line(trainer):
    process = trainer.start(trainer.folder / "bad", 8, "--config.data.batch_size=17")
    code, _, err = trainer.finish(process)
    assert code == ExitCode.BAD_INPUT
    assert "config.data.batch_size: 17 rows" in err
    assert "Traceback" not in err
    assert not (trainer.folder / "bad" / "metrics.jsonl").exists()
    process = trainer.start(trainer.folder / "bad", 8, "--config.data.batchsize=8")
    code, _, err = trainer.finish(process)
    assert code == ExitCode.BAD_INPUT
    assert "batchsize" in err
    assert "Traceback" not in err
