"""The bench of encoders counts what it says, and ratios are to the first size."""

import json
import subprocess
import sys

import jax
import pytest

from tests.conftest import REPO
from tools.bench_encoders import Setting, bench_encoders
from vlp_jax.infra.preemption import ExitCode

SIZES = ["shared_tiny", "towers_tiny"]


@pytest.mark.slow
def test_figures_of_two_sizes_belong_together() -> None:
    setting = Setting(2, 6, 16, 50, "float32", steps=2, repeats=2)
    figures = bench_encoders(SIZES, setting)
    json.dumps(figures)
    assert (figures["batch"], figures["platform"]) == (2, jax.default_backend())
    shared, towers = (figures["sizes"][size] for size in SIZES)
    for mode in ("image", "text", "pair"):
        for size in (shared, towers):
            low, high = size[mode]["samples_per_second_range"]
            assert 0 < low <= size[mode]["samples_per_second"] <= high
        assert shared[mode]["speed_vs_first"] == shared[mode]["gflops_vs_first"] == 1.0
        speed = towers[mode]["samples_per_second"] / shared[mode]["samples_per_second"]
        assert towers[mode]["speed_vs_first"] == pytest.approx(speed, rel=1e-2)
    # An image or a text alone costs the same; of a pair the towers have a fusion tower on top.
    assert towers["image"]["gflops_vs_first"] == pytest.approx(1.0, abs=0.01)
    assert towers["text"]["gflops_vs_first"] == pytest.approx(1.0, abs=0.01)
    assert towers["pair"]["gflops_vs_first"] > 1.4
    # A block of width 128 has 198,272 parameters: 4 of texts and 2 of pairs, with their norms and
    # maps; the vectors of modalities and of streams are those of the shared stack alone.
    block, width = 198_272, 128
    more = 6 * block + 2 * 2 * width + 2 * (width + 1) * width - 2 * width - 2 * width
    parameters = [size["parameters"] for size in (shared, towers)]
    for key in ("all", "without_heads"):
        assert parameters[1][key] - parameters[0][key] == more
        ratio = parameters[1][key] / parameters[0][key]
        assert parameters[1][f"{key}_vs_first"] == pytest.approx(ratio, abs=1e-4)
    assert parameters[0]["without_heads"] < parameters[0]["all"]


def test_what_is_skipped_is_told_beside_what_it_costs() -> None:
    changes = ("tuning.adapter.kind=serial", "fusion.depth=2")
    setting = Setting(2, 6, 16, 50, "float32", 2, 2, ("pair",), changes)
    units = "fusion_tower/image_block_00,fusion_tower/text_block_01"
    figures = bench_encoders(["co_attention_tiny"], setting, [units])
    whole, less = figures["sizes"].values()
    assert set(whole) == {"parameters", "pair"}
    pair = less["pair"]
    assert "time_fell" not in whole["pair"]
    assert 0 < pair["gflops_fell"] < 1
    assert pair["gflops_fell"] == pytest.approx(1 - pair["gflops_vs_first"], abs=1e-4)
    assert pair["time_fell"] == pytest.approx(1 - 1 / pair["speed_vs_first"], abs=1e-3)
    share = pair["time_fell"] / pair["gflops_fell"]
    assert pair["fell_by_share"] == pytest.approx(share, rel=0.02, abs=0.02)
    assert less["parameters"]["all"] < whole["parameters"]["all"]


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--skip=text_tower", "model.tuning.skip: 'text_tower' is no unit of this model"),
        ("--set=image.deep=3", "--set=image.deep=3: config.model has no such key"),
        ("--modes=video", "--modes: 'video' is none of image, text, pair"),
        ("--sizes=huge", "model size 'huge' is none of"),
        ("--sizes=towers_tiny,towers_tiny", "--sizes=towers_tiny,towers_tiny: give different ones"),
        ("--text_length=513", "--text_length=513: more tokens than"),
    ],
)
def test_bad_flags_are_named(flag: str, complaint: str) -> None:
    command = [sys.executable, "-m", "tools.bench_encoders", flag]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == ExitCode.BAD_INPUT
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr
