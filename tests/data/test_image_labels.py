"""Images with one class each: lists, folders of classes, and scenes."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data.scenes import Scenes, ScenesLabels
from vlp_jax.data.scenes.labels import CLASSES
from vlp_jax.data.source import Labelled
from vlp_jax.data.tasks import ImageLabels
from vlp_jax.infra.errors import ConfigError


def save(path: pathlib.Path, shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(path)


def entries(root: pathlib.Path) -> list[dict[str, str]]:
    rows = [
        ("a.jpg", "water_lilly", "train"),
        ("b.jpg", "anchor", "train"),
        ("c.png", "anchor", "val"),
        ("d.jpg", "water_lilly", "test"),
    ]
    for number, (image, *_) in enumerate(rows):
        save(root / image, 20 * number)
    return [{"image": i, "name": n, "split": s, "label": 7} for i, n, s in rows]


def write(root: pathlib.Path, rows: object) -> None:
    (root / "labels.json").write_text(json.dumps(rows))


def test_a_list_of_labels(tmp_path):
    write(tmp_path, entries(tmp_path))
    train = ImageLabels(tmp_path, "train")
    assert train.classes == ("anchor", "water_lilly")  # by name, whatever numbers say
    assert train.num_records == 2
    assert train.caption(0, 0) == "water lilly"
    assert [int(train.extras(r, 32)["label"]) for r in range(2)] == [1, 0]
    assert train.image(1, 32).shape == (32, 32, 3)
    assert isinstance(train, Labelled)
    np.testing.assert_array_equal(train.labels(np.arange(2))["class"], [1, 0])
    val = ImageLabels(tmp_path, "val", groups=("name",), key="data.sources.images.root")
    assert val.classes == train.classes
    assert val.group(0) == {"name": "anchor"}
    assert int(val.extras(0, 32)["label"]) == 0


def test_a_folder_for_every_class(tmp_path):
    for place in ("train/cat/a.jpg", "train/cat/deep/b.JPEG", "train/dog/c.png", "train/dog/x.txt"):
        if place.endswith("txt"):
            (tmp_path / place).write_text("no picture")
        else:
            save(tmp_path / place)
    save(tmp_path / "validation/dog/d.jpg")
    train = ImageLabels(tmp_path, "train")
    assert train.classes == ("cat", "dog")
    assert train.num_records == 3
    np.testing.assert_array_equal(train.labels(np.arange(3))["class"], [0, 0, 1])
    val = ImageLabels(tmp_path, "val")
    assert val.num_records == 1
    assert int(val.extras(0, 16)["label"]) == 1


def test_faults_name_file_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageLabels(tmp_path / "absent", "train")
    with pytest.raises(FileNotFoundError, match=r"neither labels\.json nor a folder 'train'"):
        ImageLabels(tmp_path, "train")
    rows = entries(tmp_path)
    write(tmp_path, [*rows, {"image": "a.jpg", "name": "zebra", "split": "val"}])
    with pytest.raises(ValueError, match="split 'val' has class 'zebra', which no training"):
        ImageLabels(tmp_path, "val")
    write(tmp_path, [row for row in rows if row["split"] != "train"])
    with pytest.raises(ValueError, match="no picture of split 'train'"):
        ImageLabels(tmp_path, "val")
    write(tmp_path, rows)
    with pytest.raises(ValueError, match="'tset'"):
        ImageLabels(tmp_path, "tset")
    write(tmp_path, [{"image": "a.jpg", "split": "train"}])
    with pytest.raises(ValueError, match=r"labels\.json: entry 0.*name"):
        ImageLabels(tmp_path, "train")
    write(tmp_path, rows)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg"):
        ImageLabels(tmp_path, "train")
    assert ImageLabels(tmp_path, "train", missing_images="skip").num_missing == 1


@pytest.mark.pack
def test_the_pack(pack):
    sizes = {"train": 350, "val": 70, "test": 80}
    for split, size in sizes.items():
        source = ImageLabels(pack, split)
        assert source.num_records == size
        assert len(source.classes) == 10
        counts = np.bincount(source.labels(np.arange(size))["class"], minlength=10)
        assert counts.min() > 0


@pytest.mark.parametrize("label", CLASSES)
def test_scenes_are_labelled_by_their_largest_object(label):
    source = ScenesLabels("val", level="hard", label=label)
    plain = Scenes("val", level="hard")
    expected = plain.labels(np.arange(20))[label]
    found = [int(source.extras(r, 32)["label"]) for r in range(20)]
    np.testing.assert_array_equal(found, expected)
    assert max(found) < len(source.classes)
    np.testing.assert_array_equal(source.image(3, 32), plain.image(3, 32))
    assert source.image_key(3) == plain.image_key(3)
    assert source.identity != plain.identity


def test_an_unknown_label_of_scenes_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sources\.images\.label: 'hue'"):
        ScenesLabels(label="hue", name="images")
