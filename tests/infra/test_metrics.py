import importlib.machinery
import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console

from vlp_jax.infra import metrics
from vlp_jax.infra.errors import ConfigError


def _reject(constant: str) -> float:
    raise AssertionError(f"{constant} is not strict JSON")


def _write(path: Path, steps: range, resume_step: int | None = None) -> None:
    writer = metrics.JsonlWriter(path, resume_step)
    for step in steps:
        writer.write(
            step, {"train/loss": 1 / (step + 3), "train/norm": float(np.float32(0.1)) * step}
        )
    writer.close()


def test_jsonl_keeps_every_bit(tmp_path: Path) -> None:
    value = float(np.float32(0.1)) / 3
    writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(12, {"train/loss": value, "train/skipped": 0})
    # Read before closing: each line is on disk once it is written.
    assert metrics.read_metrics(tmp_path) == [
        {"step": 12, "train/loss": value, "train/skipped": 0.0}
    ]
    writer.close()


def test_jsonl_is_strict_json_with_non_finite_values(tmp_path: Path) -> None:
    writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=_reject)["a"] == "NaN"
    (record,) = metrics.read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("killed_at", [7, 8, 10])
@pytest.mark.parametrize("torn", ["", "{", '{"step": 11, "train/lo', '{"step": 1}\0\0'])
def test_resumed_file_equals_uninterrupted(tmp_path: Path, killed_at: int, torn: str) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    _write(whole, range(1, 13))
    _write(killed, range(1, killed_at + 1))
    with killed.open("a") as file:
        file.write(torn)
    _write(killed, range(8, 13), resume_step=7)
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


def test_new_run_replaces_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(0, 5))
    _write(path, range(0, 2))
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [0, 1]


def test_reading_tolerates_a_torn_last_line_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics.read_metrics(tmp_path) == []
    path.write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "a": 2.0}]
    path.write_text('{"step": 1, "a"\n{"step": 2, "a": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: .*remove this line"):
        metrics.read_metrics(tmp_path)


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    writer = metrics.TensorBoardWriter(tmp_path, resume_step=3)
    writer.write(4, {"train/loss": 1.5, "train/norm": 2, "train/bad": math.nan})
    writer.close()
    (events,) = tmp_path.glob("events*")
    assert b"train/loss" in events.read_bytes()


def test_wandb_missing_names_key_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.wandb: 'p' needs .*pip install vlp_jax\[wandb\]"):
        metrics.open_writer(tmp_path, 10, primary=True, wandb_project="p")


def test_wandb_runs_are_told_apart_by_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", lambda **given: begun.append(given), raising=False)
    for folder in ("a/vqa", "b/vqa", "a/vqa"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        metrics.WandbWriter(tmp_path / folder, "project", "vqa")
    first, second, again = (given["id"] for given in begun)
    assert first == again != second
    assert {given["name"] for given in begun} == {"vqa"}
    (tmp_path / "old").mkdir()
    metrics.WandbWriter(tmp_path / "old", "project", "vqa", resumed=True)
    assert begun[-1]["id"] == "vqa", "begun when a run was told by its name"


def test_only_the_primary_process_writes(tmp_path: Path) -> None:
    writer = metrics.open_writer(tmp_path, 10, primary=False)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_primary_process_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = metrics.open_writer(tmp_path, 10, primary=True)
    writer.write(10, {"train/loss": 1.5, "speed/samples_per_second": 1234.0, "speed/mfu": 0.5})
    writer.write(10, {"eval/accuracy": 0.25})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    assert list((tmp_path / "tensorboard").glob("events*"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 10/10  100 %  loss 1.500  1,234 samples/s  MFU 50.0 %",
        "step 10  eval/accuracy 25.0 %",
    ]


def test_terminal_prints_plain_lines_at_intervals_without_a_tty() -> None:
    out = io.StringIO()
    terminal = metrics.Terminal(
        100, start_step=40, console=rich.console.Console(file=out), interval_seconds=3600
    )
    for step in range(41, 101):
        terminal.write(step, {"train/loss": 1.0})
    terminal.message("saved [bold]checkpoint[/bold] 100")
    terminal.close()
    first, last, message = out.getvalue().splitlines()
    assert first.startswith("step 41/100  41 %  loss 1  ETA ")
    assert last == "step 100/100  100 %  loss 1"
    assert message == "saved [bold]checkpoint[/bold] 100"


def test_terminal_draws_a_bar_on_a_tty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=120)
    terminal = metrics.Terminal(200, start_step=100, console=console)
    terminal.write(150, {"train/loss": 2.5, "memory/peak_bytes": 12.3e9})
    terminal.write(150, {"eval/accuracy": 0.5})
    terminal.close()
    assert "150/200" in out.getvalue()
    assert "loss 2.500  memory 12.3 GB  ETA" in out.getvalue()
    assert "step 150  eval/accuracy 50.0 %" in out.getvalue()
