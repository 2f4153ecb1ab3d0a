"""The bench prints what it promises, from the program that trains."""

import json
import subprocess
import sys

from tests.conftest import REPO


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
