"""The bench prints what it promises, from the program that trains."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from tiny import make_program
from tiny_config import get_config

from tests.conftest import REPO
from vlp_jax.compress.buckets import bucket_text
from vlp_jax.infra.preemption import ExitCode

TASKS = {
    "vqa": {"num_classes": 5, "readout": "auto"},
    "nlvr2": {"readout": "auto"},
    "itc": {"pool": "auto"},
}
CAPTIONS = {"ar": {}}  # updates of FLM are the slowest to compile


def config_file(folder: pathlib.Path, objectives: dict[str, Any]) -> pathlib.Path:
    """The tiny config with other objectives and no evaluator, as a process reads it."""
    file = folder / "config.py"
    file.write_text(f"""
from tests.tiny_config import get_config as tiny
def get_config():
    config = tiny()
    with config.unlocked():
        config.evals, config.objectives = {{}}, {objectives!r}
    return config
""")
    return file


def test_bench_step_prints_one_json_line():
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.bench",
            "step",
            f"--config={REPO / 'tests' / 'tiny_config.py'}",
            "--config.data.text_edges=(20,)",
            "--batch=16",
            "--steps=2",
            "--repeats=2",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["batch"] == 16
    assert figures["skipped"] == 0
    low, high = figures["samples_per_second_range"]
    assert 0 < low <= figures["samples_per_second"] <= high
    assert 0 < figures["mfu"] < 1
    assert 8 <= figures["text_length_mean"] <= 20
    assert list(figures["compile_seconds"]) == ["20x16"]
    expected = {
        "gflops_per_sample",
        "matmul_peak_tflops",
        "peak_memory_gb",
        "versions",
        "device_kind",
    }
    assert expected <= set(figures)


@pytest.mark.slow
def test_bench_step_draws_the_fields_that_objectives_read(tmp_path: pathlib.Path) -> None:
    file = config_file(tmp_path, TASKS)
    command = [sys.executable, "-m", "tools.bench", "step", f"--config={file}"]
    command += ["--batch=8", "--max_length=14", "--steps=1", "--repeats=1"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["skipped"] == 0
    assert 0 < figures["loss"] < 10


@pytest.mark.slow
def test_bench_buckets_measures_each_and_writes_what_a_run_reads(tmp_path: pathlib.Path) -> None:
    file, out = config_file(tmp_path, CAPTIONS), tmp_path / "schedule.json"
    command = [sys.executable, "-m", "tools.bench", "buckets", f"--config={file}", f"--out={out}"]
    command += ["--config.compression.schedule=staged", "--max_length=14"]
    command += ["--config.compression.buckets=('p16@16','p8@16k2','whole')"]
    command += ["--steps=2", "--repeats=1"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["buckets"]
    assert list(found) == ["whole", "p16@16", "p8@16k2"]
    assert found["whole"]["cost"] == found["whole"]["flops_share"] == 1.0
    assert all(0 < found[name]["flops_share"] < 1 for name in ("p16@16", "p8@16k2"))
    for figures in found.values():
        share = figures["flops_share"] / figures["cost"]
        assert figures["speedup_share"] == pytest.approx(share, abs=2e-3)

    config = get_config()
    with config.unlocked():
        config.objectives = CAPTIONS
    config.compression.file = str(out)
    compression = make_program(config).compression
    assert [bucket_text(views) for views in compression.buckets] == ["p16@16", "p8@16k2", "whole"]
    assert list(compression.costs) == [found[name]["cost"] for name in found if name != "whole"] + [
        1.0
    ]


@pytest.mark.slow
def test_bench_step_gives_no_figures_of_updates_that_are_not_finite(tmp_path: pathlib.Path) -> None:
    file = config_file(tmp_path, CAPTIONS)
    command = [sys.executable, "-m", "tools.bench", "step"]
    command += [f"--config={file}", "--config.schedule.peak=1e30"]
    command += ["--max_length=14", "--steps=4", "--repeats=1"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == ExitCode.TOO_MANY_BAD_UPDATES
    assert result.stdout == ""
    assert "not finite" in result.stderr
    assert "Traceback" not in result.stderr


def test_fixed_views_change_every_recipe_of_the_config_and_need_one() -> None:
    """In a process of its own, for two tools cannot both define --config."""
    check = """
from configs import invariance, scenes
from tools.bench import FIXED, fix_views
config = invariance.get_config("dino")
fix_views(config)
section = config.objectives.dino
assert [section[k].to_dict() for k in ("augment", "augment_second", "augment_small")] == 3 * [FIXED]
try:
    fix_views(scenes.get_config("flm"))
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", check], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no objective of the config makes random views" in result.stdout


def test_costs_without_views_are_not_written_as_those_of_training(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "buckets", "--fixed_views"]
    command += [f"--config={REPO / 'tests' / 'tiny_config.py'}", f"--out={tmp_path / 'costs.json'}"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == ExitCode.BAD_INPUT
    assert "leave --fixed_views" in result.stderr
