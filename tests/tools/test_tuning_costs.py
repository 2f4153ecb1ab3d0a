"""The table of what ways of tuning cost, out of what runs have left."""

import json
import pathlib

import pytest
import rich

from tools.tuning_costs import main
from vlp_jax.infra.metrics import JsonlWriter
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.config import default_config
from vlp_jax.train.setup import plain
from vlp_jax.transfer.methods import set_method

COSTS = {
    "trained_parameters": 290_000,
    "without_heads_parameters": 150_000,
    "forward_flops": 101e9,
    "extra_flops": 1e9,
    "extra_macs": 0.5e9,
    "extra_share": 0.01,
    "update_bytes": 12_300_000,
    "device_peak_bytes": None,
    "update_seconds": 0.0255,
    "checkpoint_bytes": 1_300_000,
    "base_bytes": 98_000_000,
}


def make_run(workdir: pathlib.Path, method: str, **facts: object) -> pathlib.Path:
    config = default_config()
    set_method(config, method)
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val/loss", "min"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(plain(config)))
    run = {"status": "finished", "device": "cpu", "costs": [COSTS], **facts}
    (workdir / "run.json").write_text(json.dumps(run))
    writer = JsonlWriter(workdir / "metrics.jsonl")
    for step, loss in enumerate((0.5, 0.25, float("nan"), 0.375)):
        writer.write(step, {"val/loss": loss})
    writer.close()
    return workdir


def test_a_row_for_each_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(rich, "_console", None)  # the one of earlier tests has its own width
    runs = [make_run(tmp_path / name, name) for name in ("lora", "adapter")]
    main([str(run) for run in runs])
    shown = capsys.readouterr().out
    for text in ("290,000", "150,000", "+0.500 G (+1.00 %)", "12.3 MB", "25.5", "1.3 MB"):
        assert shown.count(text) == 2, text
    assert "adapter" in shown
    main([str(run) for run in runs] + ["--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["lora", "adapter"]
    assert (rows[0]["metric"], rows[0]["best"]) == ("val/loss", 0.25)
    assert COSTS.items() <= rows[0].items()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"status": "running"}, "has not finished (run.json says 'running'); start it again"),
        (
            {"costs": None},
            "run.json has no costs, since an earlier version wrote it; start the run",
        ),
    ],
)
def test_a_run_without_costs_says_why(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, object],
    message: str,
) -> None:
    run = make_run(tmp_path / "run", "head", **facts)
    with pytest.raises(SystemExit) as ended:
        main([str(run)])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no run: run.json is absent" in capsys.readouterr().err
