"""Bad input: an error that names the key or the file and the remedy, or counted and replaced."""

import json
import pathlib
import types

import cv2
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.tiny_config import get_config
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.loop import RunStopped, _check_health, train
from vlp_jax.train.setup import prepare

IMAGES = 48


@pytest.fixture
def photographs(tmp_path: pathlib.Path) -> pathlib.Path:
    """A small folder in the format of the pack: 48 pictures for training, 16 for validation."""
    root = tmp_path / "photographs"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = []
    for i in range(IMAGES + 16):
        pixels = cv2.GaussianBlur(rng.integers(0, 256, (40, 56, 3), np.uint8), (5, 5), 0)
        cv2.imwrite(str(root / "images" / f"{i}.jpg"), pixels)
        entries.append(
            {
                "image": f"images/{i}.jpg",
                "split": "train" if i < IMAGES else "val",
                "captions": [f"a picture of thing {i % 7}", f"thing {i % 5} on a table"],
            }
        )
    (root / "captions.json").write_text(json.dumps(entries))
    return root


def folder_config(root: pathlib.Path, **changes: object) -> ConfigDict:
    config = get_config()
    config.total_steps = 4
    config.data.root = str(root)
    with config.unlocked():
        config.data.sources = ConfigDict({"photographs": {"type": "folder"}})
        config.data.sources.photographs.root = config.data.get_oneway_ref("root")
        config.evals = ConfigDict()
        config.update_from_flattened_dict(dict(changes))
    config.checkpoint.best_metric = ""
    return config


def quick_config(root: pathlib.Path, **changes: object) -> ConfigDict:
    """``folder_config`` of AR, for runs that train: updates of FLM are the slowest to compile."""
    config = folder_config(root, **changes)
    with config.unlocked():
        config.objectives = {"ar": {}}
    return config


def edit_captions(root: pathlib.Path, edit) -> None:
    file = root / "captions.json"
    entries = json.loads(file.read_text())
    edit(entries)
    file.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data.batchsize",
            8,
            r"config\.data\.batchsize: unknown key\. Perhaps you mean 'batch_size'",
        ),
        ("optimiser", 1, r"config\.optimiser: unknown key"),
        (
            "optim.groups.heads",
            {"patern": "^head"},
            r"config\.optim\.groups\.heads\.patern: unknown key",
        ),
        ("data.sources.photographs.rot", "x", r"config\.data\.sources\.photographs\.rot: unknown"),
        ("data.sources.photographs.type", "zip", r"sources\.photographs\.type: 'zip' is no source"),
        ("objectives.flm.rate", 0.5, r"config\.objectives\.flm\.rate: unknown key"),
        (
            "objectives.flm.corruption_rate",
            {"kind": "bandit", "metric": "reconstruction/0.3/loss"},
            r"objectives\.flm: learns from 'reconstruction/0\.3/loss', which no evaluator reports "
            r"while .* Add evals\.reconstruction with every_steps",
        ),
        ("objectives.flm.corruption_rate", 1.5, r"1\.5 is no corruption rate"),
        ("data.batch_size", 20, r"config\.data\.batch_size: 20 rows cannot be shared equally"),
        ("mesh.fsdp", 3, r"config\.mesh\.fsdp: .* does not fit 8 devices"),
        ("total_steps", None, r"config\.total_steps: the run has no length"),
        ("schedule.decay", "cosin", r"config\.schedule\.decay: 'cosin' is unknown"),
        ("model.image.patch_size", 7, r"patch_size=7 does not divide data\.image_size=16"),
        ("data.max_text_length", 100, r"config\.data\.max_text_length: 100 tokens exceed"),
        ("data.text_edges", (40, 65), r"config\.data\.text_edges: the last of \(40, 65\) exceeds"),
        ("data.root", "", r"config\.data\.sources\.photographs\.root: missing"),
        (
            "objectives.flm.batch",
            "texts",
            r"flm\.batch: no source feeds a batch 'texts'",
        ),
        ("mesh", {"data": 4, "fsdp": 1, "model": 2}, r"config\.mesh\.model: no parameter is cut"),
        ("model.reconstructor.depth", 0, r"model\.reconstructor\.depth=0 must be even, 2 or more"),
        ("model.text.lower_depth", 0, r"model\.text\.lower_depth=0 must be 1 or more"),
        ("objectives.flm.chunk_rows", 0, r"config\.objectives\.flm\.chunk_rows: 0 rows"),
        (
            "objectives.flm.loss_weights",
            {"reconstruction": -1.0, "forward": 1.0, "reverse": 1.0},
            r"config\.objectives\.flm\.loss_weights: .* are no weights",
        ),
        ("checkpoint.best_metric", "vqa/score", r"config\.checkpoint\.best_metric: 'vqa/score'"),
        ("model.attention", "flash", r"model\.attention='flash' is none of"),
        ("total_epochs", 2.0, r"config\.total_epochs: total_steps=4 is given as well"),
        ("tokenizer.path", "/nowhere", r"/nowhere"),
    ],
)
def test_errors_name_the_key(photographs, tmp_path, key, value, message):
    config = folder_config(photographs)
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises((ValueError, OSError), match=message):
        prepare(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_without_jit_trains(photographs, tmp_path):
    """The debug setting: one device, no jit, NaN checks."""
    config = quick_config(photographs, debug=True, total_steps=1)
    config.optim.ema_decay = 0.0  # operations are compiled one by one: the fewer, the better
    config.model.text.dropout = 0.0
    config.objectives = {"itc": {"embedding_dim": 8}}
    with jax.disable_jit():
        assert train(prepare(config, tmp_path / "run")) == ExitCode.OK


def test_missing_root_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=rf"data\.sources\.photographs\.root.*{missing}"):
        prepare(folder_config(missing), tmp_path / "run")


def test_empty_split_is_named_with_those_present(photographs, tmp_path):
    config = folder_config(photographs, **{"data.sources.photographs.split": "test"})
    with pytest.raises(ValueError, match=r"'test' is empty; present: train, val"):
        prepare(config, tmp_path / "run")


def test_missing_image_is_named_with_the_remedy(photographs, tmp_path):
    (photographs / "images" / "3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.jpg.*missing_images"):
        prepare(folder_config(photographs), tmp_path / "run")


def test_bad_captions_are_counted_up_to_the_limit(photographs, tmp_path):
    def spoil(entries):
        entries[0]["captions"][0] = "   "
        entries[1]["captions"][0] = "\ud800 broken"

    edit_captions(photographs, spoil)
    message = r"data\.max_bad_fraction: 2 of 96 captions are bad \(data\.sources\.\w+: "
    with pytest.raises(ConfigError, match=message):
        prepare(folder_config(photographs), tmp_path / "run")
    config = folder_config(photographs, **{"data.max_bad_fraction": 0.1})
    setup = prepare(config, tmp_path / "run")
    assert sum(setup.dropped_captions.values()) == 2


def test_damaged_pictures_are_replaced_counted_and_reported(photographs, tmp_path, capsys):
    """One truncated JPEG in 48: trained on without a stop, or stopped where the limit is lower."""
    file = photographs / "images" / "5.jpg"
    file.write_bytes(file.read_bytes()[:300])
    config = quick_config(photographs, **{"data.max_bad_fraction": 0.2})
    assert train(prepare(config, tmp_path / "run")) == ExitCode.OK
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["metrics"]["train/replaced"] >= 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "finished"
    assert sum(facts["bad_examples"].values()) == summary["metrics"]["train/replaced"]
    listed = (tmp_path / "run" / "bad_examples.txt").read_text().splitlines()
    assert len(listed) == 1
    assert listed[0].startswith("truncated image\t")
    assert "images/5.jpg" in listed[0]

    config = quick_config(photographs, **{"data.max_bad_fraction": 0.0})
    with pytest.raises(RunStopped, match=r"data\.max_bad_fraction=0\.00%.*last good") as stopped:
        train(prepare(config, tmp_path / "strict"))
    assert stopped.value.code == ExitCode.TOO_MANY_BAD_EXAMPLES
    assert json.loads((tmp_path / "strict" / "run.json").read_text())["status"] == "failed"


def test_too_many_skipped_updates_stop_the_run(photographs, tmp_path):
    setup = prepare(folder_config(photographs), tmp_path / "run")
    healthy = {"skipped_in_a_row": 9.0, "replaced": 0.0}
    checkpoints = types.SimpleNamespace(latest_path="DIR/10")
    _check_health(setup, healthy, 12, checkpoints)
    with pytest.raises(RunStopped, match=r"not finite 10 times.*checkpoint: DIR/10") as stopped:
        _check_health(setup, healthy | {"skipped_in_a_row": 10.0}, 12, checkpoints)
    assert stopped.value.code == ExitCode.TOO_MANY_BAD_UPDATES
