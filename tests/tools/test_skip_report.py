"""The page of what a search has chosen, of a run whose checkpoints hold tunables alone."""

import json
import pathlib
import re
import shutil
import subprocess

import jax
import pytest
from tiny_search import UNITS, search_config

from tools import skip_report
from tools.skip_report import main
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.sharding import by_path
from vlp_jax.train.loop import train
from vlp_jax.train.searching import SEARCH_FILE
from vlp_jax.train.setup import prepare
from vlp_jax.transfer.units import pruned


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished search, from a base that is another one's parameters."""
    folder = tmp_path_factory.mktemp("search")
    short = {"total_steps": 12, "checkpoint.every_steps": 12, "search.every_steps": 3}
    assert train(prepare(search_config(**short), folder / "base")) == ExitCode.OK
    own = {"init_from": str(folder / "base"), "search.prior": 1.0}
    config = search_config(**short, **own)
    assert train(prepare(config, folder / "run")) == ExitCode.OK
    return folder / "run"


@pytest.mark.slow
def test_the_page_and_its_numbers(search, tmp_path, capsys):
    assert main([str(search), f"--out={tmp_path / 'out'}", "--repeats=3"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert "this machine has none" in shown
    assert str(tmp_path / "out" / "skip_report.html") in shown
    numbers = json.loads((tmp_path / "out" / "skip_report.json").read_text())
    found = json.loads((search / SEARCH_FILE).read_text())
    assert [one["unit"] for one in numbers["units"]] == list(UNITS)
    assert [one["unit"] for one in numbers["units"] if not one["kept"]] == found["skipped"]
    assert [one["harm"] for one in numbers["units"]] == found["harm"]
    assert [one["expected"] for one in numbers["units"]] == found["expected"]
    assert all(0 < one < 2 for one in found["expected"])
    assert numbers["units"][1] | {"stack": "fusion_tower/image", "layer": 1} == numbers["units"][1]
    of = numbers["forward_flops"]
    assert 1 - of["pruned"] / of["full"] == pytest.approx(found["flops_saved"], rel=1e-5)
    whole = load_params(search / "checkpoints", "latest", elsewhere=_base(search)).state
    for name, gone in (("full", ()), ("pruned", found["skipped"])):
        expected = sum(leaf.size for leaf in jax.tree.leaves(pruned(whole, gone)))
        assert numbers["parameters"][name] == expected
    assert numbers["latency"]["accelerator"] == {"absent": "this machine has none"}
    assert set(numbers["latency"]["cpu"]["ms"]) == {"1"}
    assert all(ms > 0 for ms in numbers["latency"]["cpu"]["ms"]["1"].values())
    steps = [step for step, _ in numbers["history"]["preference"][UNITS[0]]]
    assert steps == sorted(steps)
    assert len(steps) == 2  # after 3 of warm-up, every 3
    assert numbers["by_count"] == found["by_count"]
    page = (tmp_path / "out" / "skip_report.html").read_text()
    assert "Of it expected" in page
    for text in ("Pattern: stacks by layers", "Preference: fusion_tower/text", "units skipped"):
        assert text in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # self-contained
    assert not (search / "skip_report.html").exists()


@pytest.mark.slow
def test_a_base_that_was_moved_is_said(search, tmp_path, capsys):
    """The checkpoint names its base, and the tool the flag."""
    moved = tmp_path / "moved"
    shutil.copytree(search, tmp_path / "run")
    base = search.parent / "base"
    base.rename(moved)
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / "run"), "--repeats=1"])
        assert ended.value.code == ExitCode.BAD_INPUT
        assert "--base" in capsys.readouterr().err
        assert main([str(tmp_path / "run"), "--repeats=1", f"--base={moved}"]) == ExitCode.OK
        assert (tmp_path / "run" / "skip_report.html").exists()
    finally:
        moved.rename(base)


@pytest.mark.slow
def test_where_there_is_an_accelerator_both_are_measured(search, tmp_path, capsys, monkeypatch):
    """On it by this process, on the CPU by another, which is stood in for by this one here."""

    def run(command, env, **_):
        assert env["JAX_PLATFORMS"] == "cpu"
        assert "XLA_FLAGS" not in env
        assert command[1:3] == ["-m", "tools.skip_report"]
        capsys.readouterr()
        code = main(command[3:])
        return subprocess.CompletedProcess(command, code, capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(skip_report, "_has_accelerator", lambda: True)
    assert main([str(search), f"--out={tmp_path}", "--repeats=1"]) == ExitCode.OK
    latency = json.loads((tmp_path / "skip_report.json").read_text())["latency"]
    assert {device: list(of["ms"]) for device, of in latency.items()} == {
        "accelerator": ["1", "64"],
        "cpu": ["1"],
    }


def test_no_repeats_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--repeats=0"])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert "--repeats=0: use 1 or more" in capsys.readouterr().err


def _base(search: pathlib.Path):
    """What the run's checkpoints leave to their base."""
    base = by_path(load_params(search.parent / "base" / "checkpoints", "latest").state)

    def elsewhere(root, extra):
        return {f"params/{path}": base[path] for path in extra["base"]["arrays"]}

    return elsewhere
