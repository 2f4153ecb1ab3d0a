"""An exported run is its parameters, bit for bit, with what one must know to use them."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from public_weights import blank, config_for, model_for

from tools.export_weights import export_weights, main
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.checkpoint import Checkpoints
from vlp_jax.infra.metrics import JsonlWriter
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import check_vocabulary, load_metadata, load_parameters, merge
from vlp_jax.train.setup import plain

TOKENIZER = Tokenizer.train(["a red square and a blue circle"] * 3, 60)
CLASSES = ["no", "yes"]


def params_of(seed: int) -> Any:
    draw = np.random.default_rng(seed)
    zeros = blank(model_for(config_for()))
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), zeros)


def make_run(workdir: pathlib.Path, ema: bool) -> dict[str, Any]:
    """Two checkpoints of which the first is the best; returns name -> parameters."""
    config = config_for(**{"optim.ema_decay": 0.9 if ema else 0.0})
    with config.unlocked():
        config.data.sources.scenes = {"type": "scenes", "level": "easy"}
    extra = {"config": plain(config), "tokenizer": TOKENIZER.to_json(), "classes": CLASSES}
    trees = {name: params_of(seed) for seed, name in enumerate(("10", "20", "ema 10", "ema 20"))}
    with Checkpoints(workdir / "checkpoints", best_metric="val/accuracy") as checkpoints:
        for step, accuracy in ((10, 0.75), (20, 0.5)):
            average = {"ema": trees[f"ema {step}"]} if ema else {}
            state = {"params": trees[str(step)], "extras": average}
            checkpoints.save(step, state, {"val/accuracy": accuracy}, extra)
    (workdir / "run.json").write_text(json.dumps({"device": "cpu", "command": "python -m x"}))
    return trees


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_is_exact(tmp_path: pathlib.Path, ema: bool) -> None:
    trees = make_run(tmp_path / "run", ema)
    for checkpoint, step in (("latest", 20), ("best", 10), ("10", 10)):
        file = export_weights(tmp_path / "run", tmp_path / checkpoint, checkpoint)
        expected = trees[f"ema {step}" if ema else str(step)]
        merged, report = merge(blank(model_for(config_for())), load_parameters(file))
        assert len(report.of("used")) == len(report.rows)
        for path, array in by_path(merged).items():
            np.testing.assert_array_equal(array, by_path(expected)[path], err_msg=path)
        metadata = load_metadata(file)
        assert metadata.step == step
        assert metadata.metrics == {"val/accuracy": 0.75 if step == 10 else 0.5}


def test_one_checkpoint_can_be_named(tmp_path: pathlib.Path) -> None:
    trees = make_run(tmp_path / "run", ema=False)
    file = export_weights(tmp_path / "run" / "checkpoints" / "10", tmp_path / "out")
    assert load_metadata(file).metrics == {"val/accuracy": 0.75}
    expected = by_path(trees["10"])
    assert all((array == expected[path]).all() for path, array in load_parameters(file).items())


def test_metadata_tokenizer_and_card(tmp_path: pathlib.Path) -> None:
    make_run(tmp_path / "run", ema=True)
    out = tmp_path / "exported"
    main([str(tmp_path / "run"), f"--out={out}", "--checkpoint=best"])
    metadata = load_metadata(out)
    assert metadata.config["model"]["image"]["width"] == 16
    assert metadata.config["classes"] == CLASSES
    assert metadata.sources == {"run": "vlp"}
    kept = Tokenizer.load(out)
    assert kept.vocab_size == TOKENIZER.vocab_size
    check_vocabulary(metadata, kept.to_json(), out)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vlp_jax\n")
    total = sum(array.size for array in load_parameters(out).values())
    for text in (
        "trained with `vlp_jax` for Free Language Modeling; initial parameters: random.",
        "| objectives | `flm`: Free Language Modeling |",
        "| updates | 10 |",
        "| parameters | moving average |",
        f"| vocabulary | {kept.vocab_size} tokens |",
        "| `scenes` | type=scenes, level=easy |",
        "| `val/accuracy` | 0.75 |",
        f"| `total` | {total:,} |",
        "| device | cpu |",
    ):
        assert text in card


def make_finetuned(workdir: pathlib.Path) -> None:
    """A run on VQA whose test split was scored on checkpoint 10, and after it went on, on 20."""
    config = config_for(init_from="runs/flm", init_checkpoint="best")
    with config.unlocked():
        config.objectives = {"answers": {"type": "vqa", "num_classes": 2}}
        config.checkpoint.best_metric = "val/accuracy"
        config.evals = {
            "val": {"type": "task", "split": "val"},
            "test": {"type": "task", "split": "test", "on": "best"},
        }
    extra = {"config": plain(config), "tokenizer": TOKENIZER.to_json(), "classes": CLASSES}
    with Checkpoints(
        workdir / "checkpoints", keep_latest=3, best_metric="val/accuracy"
    ) as checkpoints:
        for step, accuracy in ((10, 0.5), (15, 0.25), (20, 0.75)):
            state = {"params": params_of(step), "extras": {}}
            checkpoints.save(step, state, {"val/accuracy": accuracy}, extra)
    writer = JsonlWriter(workdir / "metrics.jsonl")
    writer.write(10, {"val/accuracy": 0.5})
    writer.write(15, {"test/accuracy": 0.4, "test/worst_gap/source": 12.5, "test/step": 10})
    writer.write(20, {"test/accuracy": 0.7, "test/worst_gap/source": 2.5, "test/step": 20})
    writer.close()
    (workdir / "run.json").write_text(json.dumps({"device": "cpu"}))


def test_card_of_a_fine_tuned_run_tells_its_task_and_its_own_test_score(
    tmp_path: pathlib.Path,
) -> None:
    make_finetuned(tmp_path / "run")
    for number, (place, checkpoint, step, scores) in enumerate((
        ("", "best", 20, (0.75, 0.7, 2.5)),
        ("", "10", 10, (0.5, 0.4, 12.5)),
        ("checkpoints/10", "latest", 10, (0.5, 0.4, 12.5)),
    )):  # fmt: skip
        out = tmp_path / str(number)
        file = export_weights(tmp_path / "run" / place, out, checkpoint)
        names = ("val/accuracy", "test/accuracy", "test/worst_gap/source")
        assert load_metadata(file).metrics == dict(zip(names, scores, strict=True))
        card = (out / "README.md").read_text()
        assert f"| `test/accuracy` | {scores[1]} |" in card
        assert f"on this checkpoint (update {step}), which `val/accuracy` had chosen" in card
        for text in (
            "for visual question answering; initial parameters: `runs/flm` (best).",
            "| objectives | `answers`: visual question answering |",
            "| initial parameters | `runs/flm` (best) |",
            "| device | cpu |",
        ):
            assert text in card
        assert "pretrained with" not in card
        assert "There are no figures" not in card


def test_card_has_no_score_of_another_checkpoint(tmp_path: pathlib.Path) -> None:
    make_finetuned(tmp_path / "run")
    file = export_weights(tmp_path / "run", tmp_path / "out", "15")
    assert load_metadata(file).metrics == {"val/accuracy": 0.25}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "There are no figures under `test/` for update 15" in card
    assert "had chosen" not in card


def test_files_that_are_there_stay(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", ema=False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), f"--out={out}"])
    assert "already has README.md" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["README.md"]
    assert (out / "README.md").read_text() == "mine"
    main([str(tmp_path / "run"), f"--out={out}", "--overwrite"])
    assert (out / "README.md").read_text() != "mine"
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "nowhere"), f"--out={tmp_path / 'other'}"])
    assert ended.value.code == ExitCode.BAD_INPUT
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"error: workdir: {tmp_path / 'nowhere'} is neither")
    assert complaint.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "run"), f"--out={tmp_path / 'other'}", "--checkpoint=newest"])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith("error: --checkpoint: 'newest' is no checkpoint")
    assert not (tmp_path / "other").exists()
    for exported in (out, out / "model.safetensors"):
        with pytest.raises(SystemExit):
            main([str(exported), f"--out={tmp_path / 'other'}"])
        assert "is a parameter file already; name the run" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
