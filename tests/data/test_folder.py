import gzip
import json
import logging
import os
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from tests.data.fake import MAX_LENGTH, TOKENIZER
from vlp_jax.data.captions import EncodedCaptions
from vlp_jax.data.folder import Folder
from vlp_jax.data.loader import Loader
from vlp_jax.data.plan import Plan
from vlp_jax.data.planned import PlannedSource
from vlp_jax.data.source import BadExample


def save_image(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(path)


def entry(image, split="train", captions=("a red square",)):
    return {"image": image, "split": split, "captions": list(captions)}


@pytest.fixture
def root(tmp_path):
    """Four images, three of them in the train split."""
    entries = []
    for number in range(4):
        save_image(tmp_path / f"images/{number}.png", shade=50 * number)
        captions = [f"caption {number} {index}" for index in range(1 + number)]
        entries.append(entry(f"images/{number}.png", "val" if number == 1 else "train", captions))
    write(tmp_path, entries)
    return tmp_path


def write(root, content, name="captions.json"):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / name).write_bytes(data)


def test_own_format(root):
    folder = Folder(root, "train")
    assert folder.num_records == 3
    np.testing.assert_array_equal(folder.num_captions(np.asarray([2, 0, 1])), [4, 1, 3])
    assert folder.caption(1, 2) == "caption 2 2"
    image = folder.image(2, 16)
    assert image.shape == (16, 16, 3)
    assert (image == 150).all()
    assert folder.word_classes() == {}
    assert Folder(root, "val").path(0) == root / "images/1.png"
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.caption(1, 2) == "caption 2 2"


@pytest.mark.parametrize(
    ("filepath", "layout"),
    [
        ("val2014", "val2014/"),
        ("val2014", "images/val2014/"),
        ("val2014", "images/"),
        ("val2014", ""),
        (None, "flickr30k-images/"),  # flickr30k has no file paths
        (None, "flickr30k_images/"),
        (None, "images/flickr30k_images/"),
        (None, "images/flickr30k-images/"),
        (None, "images/"),
        (None, ""),
    ],
)
def test_karpathy_format(tmp_path, filepath, layout):
    items = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        save_image(tmp_path / f"{layout}{number}.jpg")
        item = {"filename": f"{number}.jpg", "split": split, "imgid": number}
        if filepath:
            item["filepath"] = filepath
        item["sentences"] = [{"raw": f"text {number}", "tokens": ["text"]}]
        items.append(item)
    name = "dataset_coco.json" if filepath else "dataset_flickr30k.json"
    write(tmp_path, {"images": items, "dataset": "coco"}, name)
    train = Folder(tmp_path, "train")
    assert [train.caption(record, 0) for record in range(2)] == ["text 0", "text 1"]
    assert train.num_records == 2  # restval is train
    assert Folder(tmp_path, "train", restval=False).num_records == 1
    assert train.image(1, 8).shape == (8, 8, 3)
    assert Folder(tmp_path, "test").caption(0, 0) == "text 3"


def test_annotations_by_name(root):
    write(root, [entry("images/0.png", "other")], "mine.json")
    assert Folder(root, "other", annotations="mine.json").num_records == 1
    assert Folder(root, "other", annotations=root / "mine.json").num_records == 1
    with pytest.raises(FileNotFoundError, match=r"looked for .*gone\.json"):
        Folder(root, "other", annotations="gone.json")


def test_missing_root_names_its_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.sources\.photos\.root=.*no such folder"):
        Folder(tmp_path / "gone", "train", key="data.sources.photos.root")
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*no annotation file; looked for"):
        Folder(tmp_path, "train")


def test_empty_split_lists_those_present(root):
    with pytest.raises(
        ValueError,
        match=r"split 'test' is empty; present: train, val; put examples of split 'test' into the "
        r"file, or choose .* data\.sources\.photos\.split .*evals\.NAME\.split",
    ):
        Folder(root, "test", name="photos")
    write(root, [])
    with pytest.raises(ValueError, match=r"present: none; put examples .* into the file$"):
        Folder(root, "test")


def test_entries_of_one_picture_are_one_record(root, caplog):
    write(root, [
        entry("images/2.png", captions=["two a"]),
        entry("images/0.png", captions=["zero a", "zero b"]),
        entry("images/2.png", captions=["two b"]),
        entry("images/1.png", "val"),
        entry("./images//2.png", captions=["two c"]),
    ])  # fmt: skip
    with caplog.at_level(logging.INFO, "absl"):
        folder = Folder(root, "train")
    assert folder.num_records == 2
    captions = [
        [folder.caption(record, n) for n in range(count)]
        for record, count in enumerate(folder.num_captions(np.arange(2)))
    ]
    assert captions == [["two a", "two b", "two c"], ["zero a", "zero b"]]
    assert folder.path(0) == root / "images/2.png"
    [record] = caplog.records
    assert "captions.json: 2 entries joined" in record.getMessage()
    caplog.clear()
    write(root, [entry("images/2.png"), entry("images/0.png")])
    with caplog.at_level(logging.INFO, "absl"):
        Folder(root, "train")
    assert not caplog.records


def test_a_picture_in_two_splits_is_refused(root):
    write(root, [entry("images/0.png"), entry("images/1.png"), entry("images/0.png", "val")])
    with pytest.raises(
        ValueError,
        match=r"'images/0\.png' is in two splits, 'train' \(entry 0\) and 'val' \(entry 2\); keep",
    ):
        Folder(root, "train")


def test_a_caption_file_of_coco_is_recognised(root):
    content = {
        "info": {"year": 2014},
        "images": [{"id": 1, "file_name": "0.png"}],
        "annotations": [{"id": 2, "image_id": 1, "caption": "a dog"}],
    }
    write(root, content)
    with pytest.raises(ValueError, match=r"captions\.json: COCO's own .*Karpathy's dataset_coco"):
        Folder(root, "train")
    item = {"filename": "0.png", "split": "train", "sentences": [{"raw": "a dog"}]}
    write(root, {**content, "images": [item]})
    assert Folder(root, "train").num_records == 1


def test_missing_images_are_refused_or_counted(root):
    (root / "images/2.png").unlink()
    (root / "images/3.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r'2 of 3 images are missing.*images/2\.png.*missing_images="skip"'
    ):
        Folder(root, "train")
    folder = Folder(root, "train", missing_images="skip")
    assert (folder.num_records, folder.num_missing) == (1, 2)
    (root / "images/0.png").unlink()
    with pytest.raises(ValueError, match="no usable image: 3 of 3 missing"):
        Folder(root, "train", missing_images="skip")
    with pytest.raises(ValueError, match="missing_images='maybe'"):
        Folder(root, "train", missing_images="maybe")


@pytest.mark.parametrize(
    ("annotated", "there"),
    [
        ("images/0.PNG", "images/0.png"),
        ("images/0.jpg", "images/0.png"),
        ("images/0", "images/0.png"),
        ("Images/0.png", "images"),
        ("images\\0.png", "images/0.png"),
        ("images\\0.jpg", "images/0.png"),
        (unicodedata.normalize("NFD", "images/café.png"), "images/café.png"),
        ("back/slash.png", "back\\slash.png"),
        ("images/text.png", None),
        ("images/other.png", None),
        ("gone/0.png", None),
        ("images", None),
    ],
)
def test_a_missing_image_is_told_from_one_of_a_similar_name(root, annotated, there, monkeypatch):
    save_image(root / "images/café.png")
    save_image(root / "back\\slash.png")
    (root / "images/text.txt").touch()
    write(root, [entry("images/1.png"), entry(annotated), entry("images/2.PNG")])
    looks = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: looks.append(path) or listdir(path))
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images are missing, the first") as error:
        Folder(root, "train")
    assert len(looks) <= 1
    if there is None:
        assert "there is" not in str(error.value)
    else:
        assert f"{root / annotated} (there is {root / there}); add the files" in str(error.value)


def test_a_missing_image_is_compared_with_the_first_folder_that_exists(tmp_path):
    save_image(tmp_path / "images/val2014/0.jpg")
    item = {"filepath": "val2014", "filename": "0.JPG", "split": "val", "sentences": []}
    write(tmp_path, {"images": [item]}, "dataset_coco.json")
    with pytest.raises(FileNotFoundError, match=r"\(there is .*/images/val2014/0\.jpg\); add"):
        Folder(tmp_path, "val")


def test_bad_captions_are_left_out_and_counted(root):
    good, empty = "a dog", " . "
    text = json.dumps([
        entry("images/0.png", captions=[good, empty, ""]),
        entry("images/1.png", captions=["BYTES", "a café", "\ud800 lone", 7]),
        entry("images/2.png", captions=[empty]),
    ])  # fmt: skip
    write(root, text.encode().replace(b"BYTES", b"caf\xe9 latin"))
    folder = Folder(root, "train")
    assert folder.num_records == 2
    assert [folder.caption(record, 0) for record in range(2)] == [good, "a café"]
    np.testing.assert_array_equal(folder.num_captions(np.arange(2)), [1, 1])
    assert folder.bad_captions == {
        "empty caption": 3,
        "caption is not valid UTF-8": 2,
        "caption is not text": 1,
        "image without captions": 1,
    }


def test_damaged_annotations_name_file_and_place(root):
    write(root, b'[\n{"image": "a", }]')
    with pytest.raises(ValueError, match=r"captions\.json:2:\d+: not JSON"):
        Folder(root, "train")
    write(root, b"[" * 100_000)
    with pytest.raises(ValueError, match=r"captions\.json.*(nested too deeply|not JSON)"):
        Folder(root, "train")
    write(root, {"pictures": []})
    with pytest.raises(ValueError, match=r"captions\.json: neither a list"):
        Folder(root, "train")
    write(root, [entry("images/0.png"), {"image": "images/0.png", "split": "train"}])
    with pytest.raises(ValueError, match=r"captions\.json: entry 1: needs a field 'captions'"):
        Folder(root, "train")
    write(root, ["images/0.png"])
    with pytest.raises(
        ValueError, match=r"entry 0: needs a field 'image' \(text\), but is text, not an object"
    ):
        Folder(root, "train")
    write(root, [{**entry("images/0.png"), "captions": "a dog"}])
    with pytest.raises(ValueError, match=r"entry 0: field 'captions' is text, not a list"):
        Folder(root, "train")
    write(root, [{**entry("images/0.png"), "image": ["images/0.png"]}])
    with pytest.raises(ValueError, match=r"entry 0: field 'image' is a list, not text"):
        Folder(root, "train")
    write(root, {"images": [{"filename": "0.png", "split": "train", "sentences": [{}]}]})
    with pytest.raises(ValueError, match=r"a sentence: needs a field 'raw' \(text\)"):
        Folder(root, "train")


def test_a_byte_order_mark_is_passed_over(root):
    text = json.dumps([entry("images/0.png", captions=["a café"])], ensure_ascii=False)
    write(root, text.encode("utf-8-sig"))
    assert Folder(root, "train").caption(0, 0) == "a café"


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: gzip.compress(text.encode()), r"is compressed \(gzip\); unpack it"),
        (lambda text: text.encode("utf-16"), "is UTF-16 text; write it again as UTF-8"),
        (lambda text: text.encode("utf-16-be"), "is UTF-16 text; write it again as UTF-8"),
        (lambda text: text.encode("utf-16-le"), "is UTF-16 text; write it again as UTF-8"),
        (lambda text: b"", "is empty; fetch or write it again"),
        (lambda text: b"\xef\xbb\xbf \n", "is empty; fetch or write it again"),
    ],
)
def test_files_that_are_no_utf8_text_say_so(root, encode, message):
    write(root, encode(json.dumps([entry("images/0.png")])))
    with pytest.raises(ValueError, match=rf"captions\.json: {message}"):
        Folder(root, "train")


@pytest.mark.parametrize(
    "path", ["../x.png", "images/../../x.png", "/etc/passwd", "", "a\0b", "..\\x.png", "\ud800"]
)
def test_no_path_leaves_the_folder(root, path):
    write(root, [entry("images/0.png"), entry(path)])
    with pytest.raises(
        ValueError, match=r"entry 1: .* is not a (path inside the folder|file name)"
    ):
        Folder(root, "train")
    item = {"filepath": path, "filename": "x", "split": "train", "sentences": []}
    write(root, {"images": [item]})
    with pytest.raises(
        ValueError, match=r"entry 0: .* is not a (path inside the folder|file name)"
    ):
        Folder(root, "train")


def test_damaged_files_are_bad_examples(root):
    folder = Folder(root, "train")
    data = (root / "images/0.png").read_bytes()
    (root / "images/0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadExample, match=r"truncated image: .*images/0\.png"):
        folder.image(0, 8)
    (root / "images/2.png").unlink()  # after it was checked
    with pytest.raises(BadExample, match=r"unreadable file: .*2\.png \(No such file"):
        folder.image(1, 8)
    with pytest.raises(BadExample, match="image too large"):
        Folder(root, "train", missing_images="skip", max_side=39).image(1, 8)


def test_damaged_photographs_are_replaced_and_counted(tmp_path):
    entries = []
    for number in range(20):
        save_image(tmp_path / f"{number}.jpg", shade=10 * number)
        entries.append(entry(f"{number}.jpg", captions=["a red square left of the circle"]))
    write(tmp_path, entries)
    data = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(data[: len(data) * 2 // 3])
    folder = Folder(tmp_path, "train")
    captions = EncodedCaptions(folder, TOKENIZER, MAX_LENGTH)
    plan = Plan([PlannedSource(folder, captions)], 10, 0, (12,), 16)
    with Loader(plan, 0, 64) as loader:
        replaced = sum(int(batch["replaced"].sum()) for batch in loader)
    assert replaced == 32  # once an epoch
    assert loader.bad.counts == {"truncated image": 32}


@pytest.mark.pack
def test_the_pack(pack):
    folders = {split: Folder(pack, split) for split in ("train", "val", "test")}
    sizes = {split: folder.num_records for split, folder in folders.items()}
    assert sizes == {"train": 740, "val": 130, "test": 130}
    for folder in folders.values():
        assert not folder.bad_captions
        assert (folder.num_captions(np.arange(130)) == 5).all()
        for record in range(0, 130, 13):
            assert folder.image(record, 64).std() > 5
