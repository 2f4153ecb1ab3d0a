"""The ranking bench runs both ways, its figures belong together, and a run's recall comes along."""

import json
import subprocess
import sys

import pytest
from tiny_config import get_config

from tests.conftest import REPO
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.models.flops import reconstructor_flops, text_flops, vit_flops
from vlp_jax.models.sizes import build_model
from vlp_jax.train.setup import prepare


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with both objectives that stopped before its first update."""
    folder = tmp_path_factory.mktemp("run")
    config = get_config()
    config.optim.ema_decay = 0.0
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.evals = {}
        config.objectives = {"itc": {"embedding_dim": 8}, "itm": {"readout": "query"}}
    setup = prepare(config, folder)
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, setup.first_state()[0], {}, setup.checkpoint_extra())
        checkpoints.wait()
    return folder


@pytest.mark.slow
def test_bench_rank_prints_one_json_line(workdir) -> None:
    command = [sys.executable, "-m", "tools.bench_rank", f"--workdir={workdir}", "--repeats=1"]
    sizes = {"all_pairs_images": 3, "images": 6, "captions": 2, "shortlist": 2, "text_length": 12}
    sizes |= {"batch": 4, "pairs": 8, "pairs_measured": 12}
    result = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in sizes.items())],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(result.stdout.splitlines()[-1])

    towers, flops = figures["cached_towers"], figures["cached_towers"]["flops"]
    assert (towers["images"], towers["texts"], towers["pairs"]) == (3, 6, 18)
    assert towers["largest_difference"] < 1e-5
    cached = 3 * flops["image"] + 6 * flops["text"] + 18 * flops["pair"]
    assert towers["flop_ratio"] == pytest.approx(18 * flops["pair_anew"] / cached, abs=1e-3)
    seconds = towers["anew_seconds"] / towers["cached_seconds"]
    assert towers["speedup"] == pytest.approx(seconds, rel=2e-2, abs=1e-3)
    assert towers["share"] == pytest.approx(seconds / towers["flop_ratio"], rel=2e-2, abs=1e-3)

    config = get_config()
    model = build_model(config.model, config.tokenizer.vocab_size, 4, config.data.image_size)
    c = model.config
    whole = vit_flops(c.image) + text_flops(c, 12, 2) + reconstructor_flops(c, 1, keys=24)
    assert flops["pair_anew"] == pytest.approx(whole, rel=1e-6)

    short = figures["shortlist"]
    assert short["pairs_in_all"] == 6 * 12
    # At least the two best images of each text, at most the two best texts of each image as well.
    assert 12 * 2 <= short["pairs"] <= 12 * 2 + 6 * 2
    assert short["pair_ratio"] == pytest.approx(72 / short["pairs"], abs=1e-3)
    ratio = short["all_pairs_seconds"] / short["seconds"]
    assert short["speedup"] == pytest.approx(ratio, rel=2e-2, abs=1e-3)
    matching = short["pairs_in_all"] / short["pairs_per_second"]
    assert short["all_pairs_seconds"] == pytest.approx(short["encode_seconds"] + matching, rel=1e-2)

    recall = figures["recall"]
    assert set(recall["lost"]) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    for way, lost in recall["lost"].items():
        assert lost == pytest.approx(recall["all_pairs"][way] - recall["shortlist"][way])
    assert recall["all_pairs"]["t2i_r10"] == 1.0  # of six images


def test_bench_rank_names_the_flag_that_does_not_fit_the_run(workdir) -> None:
    command = [sys.executable, "-m", "tools.bench_rank", f"--workdir={workdir}", "--source=absent"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == ExitCode.BAD_INPUT
    complaint = "error: --source=absent: use a source of the run: scenes"
    assert complaint in result.stderr.splitlines()
    assert "Traceback" not in result.stderr
