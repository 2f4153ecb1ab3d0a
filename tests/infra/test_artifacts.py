import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlp_jax.infra import artifacts
from vlp_jax.infra.artifacts import Card, Curve, Gallery, Picture, Span, Table

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'é' \u2028 \0"


def _picture(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Picture.from_array(pixels, HOSTILE)


def _gallery(*seeds: int) -> Gallery:
    cards = tuple(
        Card(
            images=(_picture(seed), _picture(seed + 1)),
            title=HOSTILE,
            spans=(Span("a "), Span(HOSTILE, "wrong", HOSTILE), Span("cube", "right")),
            columns=("hidden", "prediction", "probability"),
            rows=(("cube", HOSTILE, 0.25), ("red", "blue", math.inf)),
        )
        for seed in seeds
    )
    return Gallery("cloze", cards, note="n", step=3)


@pytest.mark.parametrize(
    "artifact",
    [
        Table("t", ("name", "accuracy", "loss"), (("a", 0.5, 3), ("b", 1.0, -math.inf)), "n"),
        Table("empty", (), (), highlight="", step=7),
        _gallery(0, 1, 2),
        Gallery("one", (Card(rows=(("no", "header"),)),)),
        Curve("c", "step", "loss", {"x": ((0.0, 1.5), (1.0, math.inf)), "y": ()}, step=9),
    ],
)
def test_round_trip(tmp_path: Path, artifact: artifacts.Artifact) -> None:
    artifact.save(tmp_path / "artifacts" / "group" / "name")
    assert artifacts.load_all(tmp_path) == {"group/name": artifact}


def test_numpy_scalars_come_back_as_python_numbers(tmp_path: Path) -> None:
    row: artifacts.Row = (np.float32(0.5), np.int64(3))  # type: ignore[assignment]
    Table("t", ("a", "b"), (row,)).save(tmp_path)
    assert artifacts.load(tmp_path) == Table("t", ("a", "b"), ((0.5, 3),))


def test_nan_survives_strict_json(tmp_path: Path) -> None:
    Table("t", ("a",), ((math.nan,),)).save(tmp_path)
    text = (tmp_path / "artifact.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    loaded = artifacts.load(tmp_path)
    assert isinstance(loaded, Table)
    assert math.isnan(loaded.rows[0][0])  # type: ignore[arg-type]


def test_png_holds_the_pixels() -> None:
    pixels = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)
    decoded = Image.open(io.BytesIO(Picture.from_array(pixels).png))
    assert np.array_equal(np.asarray(decoded), pixels)


def test_newest_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    _gallery(0, 1, 2).save(tmp_path)
    _gallery(1).save(tmp_path)
    assert artifacts.load(tmp_path) == _gallery(1)
    assert len(list(tmp_path.glob("*.png"))) == 2
    Table("t", (), ()).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact.json"]


def test_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    old = _gallery(0)
    old.save(tmp_path)
    with pytest.raises(TypeError, match="text and numbers, got object"):
        Table("t", ("a",), ((object(),),)).save(tmp_path)  # type: ignore[arg-type]
    assert artifacts.load(tmp_path) == old


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'t': a row has 1 cells.*\('a', 'b'\)"):
        Table("t", ("a", "b"), ((1,),))
    with pytest.raises(ValueError, match="highlight='c' is none of"):
        Table("t", ("a",), (), highlight="c")
    with pytest.raises(ValueError, match="bytes of a PNG"):
        Picture(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"got float32 \(2, 2\)"):
        Picture.from_array(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="got 'bold'"):
        Span("a", "bold")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"artifact\.json is no artefact"):
        artifacts.load(tmp_path)


@pytest.mark.parametrize("name", ["../../secret.png", "0123456789abcdef.png"])
def test_pictures_outside_or_missing_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(_picture(0).png)
    directory = tmp_path / "artifacts" / "a"
    _gallery(0).save(directory)
    content = json.loads((directory / "artifact.json").read_text())
    content["cards"][0]["images"][0]["png"] = name
    (directory / "artifact.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"artifact\.json is no artefact"):
        artifacts.load(directory)
