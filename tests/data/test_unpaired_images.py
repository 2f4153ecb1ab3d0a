"""Pictures of a folder without texts, and stage 1 on them."""

import importlib
import pathlib

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data.hashed_splits import SPLITS
from vlp_jax.data.tasks import UnpairedImages
from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.setup import prepare


def save(path: pathlib.Path, shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(path)


def names(root: pathlib.Path, split: str, **arguments: float) -> set[str]:
    source = UnpairedImages(root, split, **arguments)
    paths = [pathlib.Path(source.image_key(record)[0]) for record in range(source.num_records)]
    return {path.relative_to(root.resolve()).as_posix() for path in paths}


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> pathlib.Path:
    for number in range(60):
        save(tmp_path / f"{number % 3}" / f"{number}.png", number)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_hash_of_the_path_makes_splits_that_stay(pictures):
    shares = {"val_percent": 20.0, "test_percent": 20.0}
    before = {split: names(pictures, split, **shares) for split in SPLITS}
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 60
    save(pictures / "more" / "deep" / "x.JPEG")
    for split, found in before.items():
        assert names(pictures, split, **shares) - found <= {"more/deep/x.JPEG"}


def test_folders_of_splits_are_splits(tmp_path):
    save(tmp_path / "train" / "cat" / "a.jpg")
    save(tmp_path / "validation" / "b.jpg")
    assert names(tmp_path, "train") == {"train/cat/a.jpg"}
    assert names(tmp_path, "val") == {"validation/b.jpg"}
    with pytest.raises(ConfigError, match=r"no picture of split 'test' below"):
        UnpairedImages(tmp_path, "test")


def test_a_picture_is_that_of_the_file(tmp_path):
    save(tmp_path / "a.png", 77)
    source = UnpairedImages(tmp_path, "train", val_percent=0.0, test_percent=0.0)
    np.testing.assert_array_equal(source.image(0, 16), 77)
    assert source.caption(0, 0) == "picture"


@pytest.mark.parametrize(
    ("root", "arguments", "message"),
    [
        ("none", {}, r"data\.sources\.x\.root: .*none is no folder\. Point it at"),
        ("empty", {}, r"data\.sources\.x\.root: no picture of split 'val' below .*empty\. Put"),
        (
            "",
            {"val_percent": 0.0},
            r"no picture of split 'val' of 60 .* or raise data\.sources",
        ),
        ("", {"val_percent": 120.0}, r"data\.sources\.x\.val_percent: 120\.0\. Use a share"),
    ],
)
def test_bad_folders_are_named(pictures, root, arguments, message):
    (pictures / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        UnpairedImages(pictures / root, "val", key="data.sources.x.root", **arguments)


def test_stage_one_reads_them(pictures, tmp_path_factory):
    config = importlib.import_module("configs.momo.stage1").get_config("pictures,shared_tiny")
    config.data.root = str(pictures)
    config.data.sources.pictures.val_percent = 20.0
    config.data.image_size = 32
    config.data.batch_size = 16
    config.total_steps = 2
    setup = prepare(config, tmp_path_factory.mktemp("run"))
    assert setup.plan.sources[0].source.num_records > 30
    with pytest.raises(ValueError, match="pictures alone are no pairs"):
        importlib.import_module("configs.momo.stage3").get_config("pictures,shared_tiny")
