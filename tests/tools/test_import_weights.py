"""The import tool writes what a run can start from, or nothing."""

import io
import json
import pathlib
import shutil
import string
import subprocess
import sys

import numpy as np
import pytest
import rich.console
from public_weights import FOLDER, VOCAB, blank, config_for, model_for, to_timm

from tests.conftest import REPO
from tools.import_weights import import_weights, report_table
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import (
    WeightsError,
    load_metadata,
    load_parameters,
    merge,
    read_weights,
)

CLIP, ROBERTA = FOLDER / "clip.safetensors", FOLDER / "roberta.safetensors"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A RoBERTa vocabulary of as many tokens as the golden checkpoints have."""
    folder = tmp_path_factory.mktemp("roberta")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *string.ascii_letters]
    tokens = [*tokens[: VOCAB - 1], *"!?,"[: VOCAB - 1 - len(tokens)], "<mask>"]
    assert len(tokens) == VOCAB
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_a_run_can_start_from_both_towers(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = config_for(**{"data.image_size": 24, "model.text.max_positions": 20})
    out = tmp_path / "init.safetensors"
    report = import_weights(config, out, vision=CLIP, text=ROBERTA, tokenizer=str(tokenizer))
    assert [(row.parameter, row.note) for row in report.of("resized")] == [
        ("image_tower/position_embedding", "4 x 4 -> 6 x 6, bicubic"),
        ("text_embedding/position/embedding", "16 rows; the 4 beyond them start fresh"),
    ]
    names = [row.parameter for row in report.rows if row.parameter]
    assert len(set(names)) == len(names)
    sources = {source for row in report.rows for source in row.sources}
    assert sources == {*read_weights(CLIP).arrays, *read_weights(ROBERTA).arrays}
    new = {name.split("/")[0].rstrip("_01") for name in (r.parameter for r in report.of("new"))}
    assert {"image_projection", "text_upper", "reconstructor_lower", "vocabulary_head"} <= new

    loaded = load_parameters(out)
    expected = {row.parameter for row in report.of("used") + report.of("resized")}
    assert set(loaded) == expected
    merged, again = merge(blank(model_for(config)), loaded, str(out))
    assert {row.parameter for row in again.of("used") + again.of("resized")} == expected
    for path, array in by_path(merged).items():
        if path in loaded:
            np.testing.assert_array_equal(array[: len(loaded[path])], loaded[path])
    metadata = load_metadata(out)
    assert metadata.step is None
    assert json.loads(metadata.tokenizer)["model"]["vocab"]["<mask>"] == VOCAB - 1
    assert metadata.sources == {
        "image": "CLIP (transformers): clip.safetensors",
        "text": "RoBERTa: roberta.safetensors",
    }
    assert metadata.config["model"]["image"]["width"] == 16
    assert "objectives" not in metadata.config


def test_the_head_is_imported_on_request(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "text.safetensors"
    arguments = {"text": ROBERTA, "tokenizer": str(tokenizer)}
    without = import_weights(config_for(), out, **arguments)
    assert not any(path.startswith("vocabulary_head") for path in load_parameters(out))
    assert "lm_head.dense.weight" in {row.sources[0] for row in without.of("unused")}
    import_weights(config_for(), out, mlm_head=True, **arguments)
    loaded = load_parameters(out)
    assert loaded["vocabulary_head/decoder_kernel"].shape == (16, 128)
    assert not loaded["vocabulary_head/decoder_kernel"][:, VOCAB:].any()


def test_bad_input_writes_nothing(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out" / "init.safetensors"
    text = {"text": ROBERTA, "tokenizer": str(tokenizer)}
    with pytest.raises(ValueError, match="nothing to import"):
        import_weights(config_for(), out)
    with pytest.raises(ConfigError, match=r"config\.tokenizer\.path: .*--tokenizer"):
        import_weights(config_for(), out, text=ROBERTA)
    with pytest.raises(WeightsError, match="no image tower"):
        import_weights(config_for(), out, vision=ROBERTA, **text)
    wide = config_for(**{"model.text.width": 32})
    with pytest.raises(ConfigError, match=r"config\.model\.text\.width: is 32"):
        import_weights(wide, out, vision=CLIP, **text)
    with pytest.raises(WeightsError, match=r"End it in \.safetensors"):
        import_weights(config_for(), out.with_suffix(".npz"), vision=CLIP)
    small = tmp_path / "small"
    small.mkdir()
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    vocabulary = {token: i for token, i in vocabulary.items() if i < 50} | {"<mask>": 50}
    (small / "vocab.json").write_text(json.dumps(vocabulary))
    shutil.copy(tokenizer / "merges.txt", small)
    with pytest.raises(ConfigError, match="vocabulary of 60 tokens, the tokenizer 51"):
        import_weights(config_for(), out, text=ROBERTA, tokenizer=str(small))
    assert not out.parent.exists()


def test_pixels_are_asked_for_and_named(tmp_path: pathlib.Path) -> None:
    timm = tmp_path / "timm.npz"
    np.savez(timm, **to_timm(read_weights(FOLDER / "vit.safetensors").arrays))
    out = tmp_path / "out.safetensors"
    with pytest.raises(WeightsError, match="--pixels"):
        import_weights(config_for("vit"), out, vision=str(timm))
    report = import_weights(config_for("vit"), out, vision=str(timm), pixels="half")
    assert any("mean (0.5, 0.5, 0.5)" in note for note in report.notes)


def test_table_has_a_row_for_every_tensor(tmp_path: pathlib.Path) -> None:
    report = import_weights(config_for(), tmp_path / "o.safetensors", vision=CLIP)
    console = rich.console.Console(width=250, file=io.StringIO())
    console.print(report_table(report))
    lines = console.file.getvalue().splitlines()
    for row in report.rows:
        name = row.parameter or row.sources[0]
        assert any({row.status, name} <= set(line.split()) for line in lines), name
    assert any("vision_model.pre_layrnorm.weight" in line for line in lines)


CONFIG = """
import sys
sys.path.insert(0, "tests")
from public_weights import config_for
def get_config(arg=None):
    return config_for()
"""


@pytest.mark.slow
def test_command_line(tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.py").write_text(CONFIG)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.import_weights", f"--config={tmp_path}/config.py"]
        return subprocess.run(
            [*command, f"--out={tmp_path}/init.safetensors", *arguments],
            cwd=REPO,
            capture_output=True,
            text=True,
        )

    bad = run(f"--vision={CLIP}", "--config.model.image.patch_size=8")
    assert bad.returncode == ExitCode.BAD_INPUT
    assert bad.stderr.startswith("error: config.model.image.patch_size: is 8")
    assert not (tmp_path / "init.safetensors").exists()
    good = run(f"--vision={CLIP}", f"--text={ROBERTA}", f"--tokenizer={tokenizer}")
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-1].endswith(f"wrote {tmp_path}/init.safetensors")
    assert "text_lower_0/self_attention/query/kernel" in load_parameters(
        tmp_path / "init.safetensors"
    )
