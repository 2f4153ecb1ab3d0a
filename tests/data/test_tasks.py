import gzip
import importlib
import inspect
import json
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

import vlp_jax.data.tasks.columns as columns_module
from tests.data.fake import MAX_LENGTH, TOKENIZER
from vlp_jax.data.batch import EXTRA_FIELDS, MAX_ANSWERS
from vlp_jax.data.cache import ImageCache
from vlp_jax.data.captions import EncodedCaptions
from vlp_jax.data.folder import Folder
from vlp_jax.data.scenes import Scenes, ScenesVQA
from vlp_jax.data.source import BadExample, Grouped
from vlp_jax.data.sources import build_source
from vlp_jax.data.tasks import NLVR2, VQA, VisualEntailment, shared_images
from vlp_jax.data.tasks.answers import accuracy
from vlp_jax.infra.errors import ConfigError


def save_image(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(path)


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == ".jsonl" or file.name in ("train.json", "dev.json", "test1.json"):
        file.write_text("".join(json.dumps(item) + "\n" for item in content))
    else:
        file.write_text(json.dumps(content))


def is_held_out(image):
    return zlib.crc32(str(image).encode()) % 20 == 0


HELD_OUT = next(image for image in range(1, 1000) if is_held_out(image))
KEPT = [image for image in range(1, 10) if not is_held_out(image)][:3]


def write_vqa(root, part, images, answers):
    """Published files of one part: a question about each image, ten annotators each."""
    questions, annotations = [], []
    for image, given in zip(images, answers, strict=True):
        number = image * 1000
        about = {"image_id": image, "question_id": number}
        questions.append({**about, "question": f"what is {image}?"})
        texts = [{"answer": text, "answer_id": n, "answer_confidence": "yes"}
                 for n, text in enumerate(given, 1)]  # fmt: skip
        annotations.append({
            **about, "answers": texts, "multiple_choice_answer": given[0],
            "answer_type": "number" if image % 2 else "other", "question_type": "what is",
        })  # fmt: skip
        save_image(root / part / f"COCO_{part}_{image:012d}.jpg", shade=image % 256)
    # In another order: annotations go by the number of the question.
    write(root / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
    write(root / f"v2_mscoco_{part}_annotations.json", {"annotations": annotations[::-1]})


@pytest.fixture
def vqa_root(tmp_path):
    answers = [
        ["cat"] * 9 + ["the dog"],
        ["Cat."] * 2 + ["dog"] * 7 + ["kitten"],
        ["dog"] * 8 + ["two"] * 2,
    ]
    write_vqa(tmp_path, "train2014", [*KEPT, HELD_OUT], [*answers, ["bird"] * 10])
    write_vqa(tmp_path, "val2014", [5001, 5002], [["cat"] * 10, ["fish"] * 8 + ["cat"] * 2])
    return tmp_path


def test_vqa_as_published(vqa_root):
    splits = {split: VQA(vqa_root, split) for split in ("train", "val", "test")}
    train = splits["train"]
    assert [source.num_records for source in splits.values()] == [3, 1, 2]
    # Majority answers of train: dog twice, cat once; "bird" is the held-out picture's.
    assert {source.classes for source in splits.values()} == {("dog", "cat")}
    assert train.caption(1, 0) == f"what is {KEPT[1]}?"
    assert train.question_id(1) == KEPT[1] * 1000
    assert train.answers_of(1) == ("Cat.", "Cat.", *["dog"] * 7, "kitten")
    extras = train.extras(1, 16)
    np.testing.assert_array_equal(extras["answer"], [0, 1] + [-1] * 8)
    np.testing.assert_allclose(extras["answer_score"], [1, 0.6] + [0] * 8, rtol=1e-6)
    np.testing.assert_allclose(train.extras(0, 16)["answer_score"][:2], [1, 0.3], rtol=1e-6)
    assert (splits["val"].extras(0, 16)["answer"] == -1).all()
    assert splits["val"].question_id(0) == HELD_OUT * 1000
    assert splits["test"].image(1, 16).mean() == pytest.approx(5002 % 256, abs=2)
    assert shared_images(train, train)
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert shared_images(splits[a], splits[b]) == []


def test_the_answer_list_never_sees_other_splits(vqa_root):
    before = VQA(vqa_root, "test").classes
    write_vqa(vqa_root, "val2014", [5001, 5002], [["horse"] * 10, ["horse"] * 10])
    assert VQA(vqa_root, "test").classes == before


def test_a_given_answer_list_is_used_as_it_is(vqa_root):
    write(vqa_root / "answers.json", ["Cat", "the dog", "fish"])
    test = VQA(vqa_root, "test", answers="answers.json")
    assert test.classes == ("Cat", "the dog", "fish")
    np.testing.assert_array_equal(test.extras(1, 16)["answer"][:3], [2, 0, -1])
    write(vqa_root / "answers.json", ["cat", "fish"])
    VQA(vqa_root, "train", answers="answers.json", min_coverage=0.6)
    with pytest.raises(ConfigError, match=r"answer list that misses answers.* 66\.7% of 3 .*'dog'"):
        VQA(vqa_root, "train", answers="answers.json", key="data.sources.vqa.root")
    write(vqa_root / "answers.json", {"cat": 0})
    with pytest.raises(ConfigError, match="is not a list of texts") as error:
        VQA(vqa_root, "train", answers="answers.json", key="data.sources.vqa.root")
    assert error.value.key == "data.sources.vqa.answers"


def test_a_short_answer_list_is_refused(vqa_root):
    write_vqa(vqa_root, "train2014", KEPT, [["cat"] * 10, ["dog"] * 10, ["dog"] * 10])
    assert VQA(vqa_root, "train", num_answers=1, min_coverage=0.6).classes == ("dog",)
    with pytest.raises(
        ConfigError, match=r"answer list that misses answers: its 1 .*'cat'"
    ) as error:
        VQA(vqa_root, "train", num_answers=1, key="data.sources.vqa.root")
    assert error.value.key == "data.sources.vqa.num_answers"
    with pytest.raises(ConfigError, match="Use 1 or more"):
        VQA(vqa_root, "train", num_answers=0)


def test_other_files_in_the_published_format(vqa_root):
    for kind in ("OpenEnded_mscoco_{}_questions", "mscoco_{}_annotations"):
        for part in ("train2014", "val2014"):
            name = kind.format(part)
            (vqa_root / f"v2_{name}.json").rename(vqa_root / f"ok_{name}.json")
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        VQA(vqa_root, "test")
    names = ("ok_OpenEnded_mscoco_{split}_questions.json", "ok_mscoco_{split}_annotations.json")
    assert VQA(vqa_root, "test", *names).num_records == 2
    with pytest.raises(
        ValueError,
        match=r"not a list of examples; name .* in ok_OpenEnded_mscoco_\{split\}_questions\.json$",
    ):
        VQA(vqa_root, "test", "ok_OpenEnded_mscoco_val2014_questions.json")


def test_questions_without_answers_are_an_error(vqa_root):
    file = vqa_root / "v2_mscoco_val2014_annotations.json"
    annotations = json.loads(file.read_text())["annotations"]
    write(file, {"annotations": annotations[1:]})
    with pytest.raises(ValueError, match=r"val2014_annotations\.json: no annotation of question 5"):
        VQA(vqa_root, "test")
    annotations[0]["answers"] = []
    write(file, {"annotations": annotations})
    with pytest.raises(ValueError, match=r"annotation 0: 'answers' must be 1 to 10 texts"):
        VQA(vqa_root, "test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_pairs_that_do_not_fit_are_refused(vqa_root, split):
    part = {"train": "train2014", "test": "val2014"}[split]
    asked = vqa_root / f"v2_OpenEnded_mscoco_{part}_questions.json"
    answered = vqa_root / f"v2_mscoco_{part}_annotations.json"
    questions = json.loads(asked.read_text())["questions"]
    annotations = json.loads(answered.read_text())["annotations"]
    number, image = questions[0]["question_id"], questions[0]["image_id"]

    write(asked, {"questions": [*questions, questions[0]]})
    problem = (
        rf"{part}_questions\.json: question {len(questions)}: question {number} is listed twice"
    )
    with pytest.raises(ValueError, match=problem):
        VQA(vqa_root, split)
    write(asked, {"questions": questions})

    write(answered, {"annotations": [annotations[-1], *annotations]})
    problem = (
        rf"{part}_annotations\.json: annotation {len(annotations)}: question {number} has two "
        "annotations"
    )
    with pytest.raises(ValueError, match=problem):
        VQA(vqa_root, split)

    write(answered, {"annotations": [*annotations[:-1], {**annotations[-1], "image_id": 7}]})
    problem = (
        rf"{part}_questions\.json: question 0: question {number} is about image_id {image}, its "
        rf"annotation in .*{part}_annotations\.json about 7"
    )
    with pytest.raises(ValueError, match=problem):
        VQA(vqa_root, split)

    del annotations[-1]["image_id"]  # files in the published format may lack it
    write(answered, {"annotations": annotations})
    assert VQA(vqa_root, split).question_id(0) == number


def test_annotations_without_a_question_are_counted_once(vqa_root, caplog):
    asked = vqa_root / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions = json.loads(asked.read_text())["questions"]
    VQA(vqa_root, "train")
    assert not caplog.records
    write(asked, {"questions": questions[:2]})
    assert VQA(vqa_root, "train").num_records == 2
    [record] = caplog.records
    assert "train2014_annotations.json: 2 of 4 annotations have no question" in record.getMessage()


def test_questions_of_another_type_are_told(vqa_root, tmp_path):
    asked = vqa_root / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions = json.loads(asked.read_text())["questions"]
    for change, problem in (
        ({"question_id": "7"}, "field 'question_id' is text, not a whole number"),
        ({"image_id": None}, "field 'image_id' is null, not a whole number"),
        ({"image_id": 1.5}, "field 'image_id' is a decimal number, not a whole number"),
    ):
        write(asked, {"questions": [{**questions[0], **change}]})
        with pytest.raises(ValueError, match=rf"train2014_questions\.json: question 0: {problem}"):
            VQA(vqa_root, "train")
    del questions[0]["question"]
    write(asked, {"questions": questions})
    with pytest.raises(ValueError, match=r"question 0: needs a field 'question' \(text\)"):
        VQA(vqa_root, "train")


def test_answers_of_few_annotators_can_be_right(tmp_path):
    given = [["cat"] * n for n in (1, 2, 3, 4)] + [["cat", "cat", "dog"], ["cat", "dog"]]
    write(tmp_path / "vqa.json", [
        vqa_entry(tmp_path / f"{n}.png", answers=answers) for n, answers in enumerate(given)
    ])  # fmt: skip
    train = VQA(tmp_path, "train")
    scores = [train.extras(record, 16)["answer_score"][0] for record in range(len(given))]
    assert scores == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 2])
    assert scores == pytest.approx([accuracy(row.count("cat"), len(row)) for row in given])


def vqa_entry(image, split="train", answers=("cat",)):
    save_image(image)
    return {"image": image.name, "question": "what?", "answers": list(answers), "split": split}


def test_a_list_of_questions(tmp_path):
    write(tmp_path / "vqa.json", [
        vqa_entry(tmp_path / "a.png"),
        vqa_entry(tmp_path / "b.png", "val", ["cat"] * 9 + ["dog"]),
    ])  # fmt: skip
    val = VQA(tmp_path, "val")
    assert val.classes == ("cat",)
    assert val.question_id(0) == 1
    assert val.extras(0, 16)["answer_score"][0] == 1
    with pytest.raises(
        ValueError, match=r"vqa\.json: split 'test' is empty; present: train, val; put .*"
    ):
        VQA(tmp_path, "test")
    with pytest.raises(ValueError, match=r"another split by data\.sources\.daquar\.split .*evals"):
        VQA(tmp_path, "test", name="daquar")
    write(tmp_path / "vqa.json", [vqa_entry(tmp_path / "b.png", "val")])
    with pytest.raises(ValueError, match="split 'train' is empty; answer lists"):
        VQA(tmp_path, "val")


def nlvr2_line(number, label, sentence="one dog", split="dev", **more):
    return {"identifier": f"{split}-{number}", "sentence": sentence, "label": label, **more}


@pytest.fixture
def nlvr2_root(tmp_path):
    write(tmp_path / "data/dev.json", [
        nlvr2_line("850-0-0", "True"),
        nlvr2_line("850-1-0", "False"),
        nlvr2_line("850-1-1", "True", "two dogs"),
    ])  # fmt: skip
    for pair in (0, 1):
        for side in (0, 1):
            save_image(tmp_path / f"dev/dev-850-{pair}-img{side}.png", 100 * pair + 50 * side)
    write(tmp_path / "data/train.json", [nlvr2_line("3-2-1", "True", split="train", directory=7)])
    for side in (0, 1):
        save_image(tmp_path / f"images/train/7/train-3-2-img{side}.png")
    return tmp_path


def test_nlvr2_as_published(nlvr2_root):
    val = NLVR2(nlvr2_root, "val")
    assert val.num_records == 3
    assert [val.caption(r, 0) for r in range(3)] == ["one dog", "one dog", "two dogs"]
    assert [int(val.extras(r, 8)["label"]) for r in range(3)] == [1, 0, 1]
    assert (val.image(2, 8) == 100).all()
    assert (val.extras(2, 8)["second_image"] == 150).all()
    assert val.image_key(1) == val.image_key(2) != val.image_key(0)
    assert [key[-18:] for key in val.image_key(0)] == ["dev-850-0-img0.png", "dev-850-0-img1.png"]
    train = NLVR2(nlvr2_root, "train")
    assert train.image_key(0)[1] == str(nlvr2_root / "images/train/7/train-3-2-img1.png")
    assert shared_images(train, val) == []
    assert len(shared_images(val, val)) == 4


def test_damaged_nlvr2(nlvr2_root):
    file = nlvr2_root / "data/dev.json"
    write(file, [nlvr2_line("850-0-0", "True"), nlvr2_line("1-2-3", "True", split="train")])
    with pytest.raises(ValueError, match=r"dev\.json:2: identifier 'train-1-2-3' is not of split"):
        NLVR2(nlvr2_root, "val")
    write(file, [nlvr2_line("850-0-0", "yes")])
    with pytest.raises(ValueError, match=r"dev\.json:1: label 'yes' must be 'True' or 'False'"):
        NLVR2(nlvr2_root, "val")
    write(file, b'{"identifier": "dev-1-1-1"}\n\n{"identifier": \n')
    with pytest.raises(ValueError, match=r"dev\.json:3:16: not JSON"):
        NLVR2(nlvr2_root, "val")
    with pytest.raises(ValueError, match=r"unknown split 'dev'; published are train, val, test"):
        NLVR2(nlvr2_root, "dev")
    with pytest.raises(
        ValueError, match=r"not a list of examples; name .* with \{split\}.* as in \{split\}\.json"
    ):
        NLVR2(nlvr2_root, "val", annotations="data/train.json")
    write(file, b"")
    with pytest.raises(ValueError, match=r"dev\.json: is empty"):
        NLVR2(nlvr2_root, "val")
    write(file, b"\xef\xbb\xbf" + json.dumps(nlvr2_line("850-0-0", "True")).encode())
    assert NLVR2(nlvr2_root, "val").num_records == 1


def test_a_list_of_pairs(tmp_path):
    item = {"images": ["a.png", "b.png"], "sentence": "one", "label": False, "split": "test"}
    for name in item["images"]:
        save_image(tmp_path / name)
    write(tmp_path / "nlvr.json", [item])
    assert NLVR2(tmp_path, "test").extras(0, 8)["label"] == 0
    write(tmp_path / "nlvr.json", [item, {**item, "images": ["a.png"]}])
    with pytest.raises(ValueError, match=r"nlvr\.json: entry 1: 'images' must be two paths"):
        NLVR2(tmp_path, "test")
    write(tmp_path / "nlvr.json", [{**item, "images": ["a.png", "../b.png"]}])
    with pytest.raises(ValueError, match=r"'\.\./b\.png' is not a path inside the folder"):
        NLVR2(tmp_path, "test")


def snli_ve_line(image, label, sentence="A dog runs.", **more):
    return {"Flickr30K_ID": image, "sentence1": "A premise.", "sentence2": sentence,
            "gold_label": label, "pairID": f"{image}.jpg#0r1e", **more}  # fmt: skip


@pytest.fixture
def snli_ve_root(tmp_path):
    for image in ("111", "222"):
        save_image(tmp_path / f"flickr30k-images/{image}.jpg")
    lines = [
        snli_ve_line("111", "entailment"),
        snli_ve_line("111", "-"),
        snli_ve_line("222", "contradiction", "A cat sleeps."),
        snli_ve_line("222", "neutral", " "),
    ]
    write(tmp_path / "snli_ve_dev.jsonl", lines)
    return tmp_path


def test_snli_ve_as_published(snli_ve_root):
    val = VisualEntailment(snli_ve_root, "val")
    assert val.num_records == 2
    assert [val.caption(r, 0) for r in range(2)] == ["A dog runs.", "A cat sleeps."]
    assert [val.classes[val.extras(r, 8)["label"]] for r in range(2)] == [
        "entailment",
        "contradiction",
    ]
    assert val.bad_captions == {"no gold label": 1, "empty sentence": 1}
    with pytest.raises(FileNotFoundError, match=r"looked for .*ve\.json, .*snli_ve_test\.jsonl"):
        VisualEntailment(snli_ve_root, "test")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        VisualEntailment(snli_ve_root, "dev")


def test_snli_ve_with_the_other_name_of_its_folder(snli_ve_root):
    (snli_ve_root / "flickr30k-images").rename(snli_ve_root / "flickr30k_images")
    [path] = VisualEntailment(snli_ve_root, "val").image_key(0)
    assert path == str((snli_ve_root / "flickr30k_images/111.jpg").resolve())


@pytest.mark.parametrize("image", ["222", "222.jpg"])
def test_snli_ve_of_the_first_release(snli_ve_root, image):
    line = snli_ve_line(image, "neutral")
    line["Flikr30kID"] = line.pop("Flickr30K_ID")
    write(snli_ve_root / "snli_ve_dev.jsonl", [line])
    [path] = VisualEntailment(snli_ve_root, "val").image_key(0)
    assert path == str((snli_ve_root / "flickr30k-images/222.jpg").resolve())


def test_damaged_snli_ve(snli_ve_root):
    file = snli_ve_root / "snli_ve_dev.jsonl"
    write(file, [snli_ve_line("111", "maybe")])
    with pytest.raises(ValueError, match=r"dev\.jsonl:1: label 'maybe' must be one of contradict"):
        VisualEntailment(snli_ve_root, "val")
    write(file, [snli_ve_line("../111", "neutral")])
    with pytest.raises(ValueError, match="is not a path inside the folder"):
        VisualEntailment(snli_ve_root, "val")
    write(file, [{"sentence2": "A dog."}])
    with pytest.raises(ValueError, match=r"dev\.jsonl:1: needs a field 'Flickr30K_ID' \(text\)$"):
        VisualEntailment(snli_ve_root, "val")
    write(file, [snli_ve_line("111", "-")])
    with pytest.raises(ValueError, match=r"no usable example.*'no gold label': 1"):
        VisualEntailment(snli_ve_root, "val")


def test_absent_images_are_an_error_or_skipped(vqa_root, nlvr2_root, snli_ve_root):
    # The three fixtures share a folder, as users' data sets may.
    gone = vqa_root / f"train2014/COCO_train2014_{KEPT[1]:012d}.jpg"
    gone.unlink()
    (nlvr2_root / "dev/dev-850-1-img1.png").unlink()
    (snli_ve_root / "flickr30k-images/222.jpg").unlink()
    for source, split, file, counts in (
        (VQA, "train", r"v2_\S+train2014_questions", (1, 3, 2)),
        (NLVR2, "val", "dev", (1, 4, 1)),
        (VisualEntailment, "val", "snli_ve_dev", (1, 2, 1)),
    ):
        missing, total, left = counts
        problem = rf'{file}\.jsonl?: {missing} of {total} images are missing.*missing_images="skip"'
        with pytest.raises(FileNotFoundError, match=problem):
            source(vqa_root, split)
        skipping = source(vqa_root, split, missing_images="skip")
        assert skipping.num_missing == missing
        assert skipping.num_records == left
        with pytest.raises(ValueError, match="missing_images='maybe'"):
            source(vqa_root, split, missing_images="maybe")
    skipping = VQA(vqa_root, "train", missing_images="skip")
    assert [skipping.caption(r, 0) for r in range(2)] == [
        f"what is {KEPT[0]}?",
        f"what is {KEPT[2]}?",
    ]


@pytest.mark.parametrize(
    ("source", "file"), [(VQA, "vqa.json"), (NLVR2, "nlvr.json"), (VisualEntailment, "ve.json")]
)
def test_damaged_lists_name_file_and_place(tmp_path, source, file):
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*absent: no such folder; .*" + file):
        source(tmp_path / "absent", "train")
    write(tmp_path / file, b'[\n{"image": "a", }]')
    with pytest.raises(ValueError, match=rf"{file}:2:\d+: not JSON"):
        source(tmp_path, "train")
    write(tmp_path / file, ["images/0.png"])
    with pytest.raises(ValueError, match=rf"{file}: entry 0: needs a field"):
        source(tmp_path, "train")
    write(tmp_path / file, {"questions": []})
    with pytest.raises(ValueError, match=rf"{file}: not a list of examples; write it as \["):
        source(tmp_path, "train")
    write(tmp_path / "train2014.json", b'"a text"')
    with pytest.raises(ValueError, match=r"train2014\.json: not a list of examples; write it as"):
        source(tmp_path, "train", "train2014.json")
    for content, problem in (
        (b"", "is empty"),
        (gzip.compress(b"[]", mtime=0), "is compressed"),
        ("[]".encode("utf-16"), "is UTF-16 text"),
        (b"\xef\xbb\xbf[]", "split 'train' is empty; present: none; put .* into the file$"),
    ):
        write(tmp_path / file, content)
        with pytest.raises(ValueError, match=rf"{file}: {problem}"):
            source(tmp_path, "train")


def test_damaged_pictures_are_bad_examples(nlvr2_root):
    val = NLVR2(nlvr2_root, "val")
    file = nlvr2_root / "dev/dev-850-0-img1.png"
    file.write_bytes(file.read_bytes()[:60])
    val.image(0, 8)
    with pytest.raises(BadExample, match=r"image: .*dev-850-0-img1\.png"):
        val.extras(0, 8)
    file.unlink()  # after it was checked
    with pytest.raises(BadExample, match="unreadable file"):
        val.extras(0, 8)


def test_an_unbounded_source_cannot_be_checked(nlvr2_root):
    with pytest.raises(ValueError, match=r"data\.sources\.scenes\.num_records must be set"):
        shared_images(Scenes(), NLVR2(nlvr2_root, "val"))


def test_worlds_share_no_picture_and_are_not_listed(monkeypatch):
    train, val = Scenes("train", num_records=4), Scenes("val", num_records=4)
    questions = ScenesVQA("train", level="full", num_records=2)
    assert shared_images(train, questions) == [f"{train.identity}/{n}" for n in (0, 1)]
    cached = ImageCache(val, 16)
    monkeypatch.setattr(Scenes, "image_key", None)
    assert shared_images(train, val) == shared_images(train, cached) == []
    with pytest.raises(TypeError):
        shared_images(val, cached)


def test_pictures_shared_with_a_folder_of_captions(nlvr2_root):
    image = "dev/dev-850-1-img0.png"
    write(nlvr2_root / "captions.json", [{"image": image, "split": "train", "captions": ["dog"]}])
    shared = shared_images(Folder(nlvr2_root, "train"), NLVR2(nlvr2_root, "val"))
    assert shared == [str(nlvr2_root / image)]


def test_vqa_groups_are_columns_of_questions_and_annotations(vqa_root):
    columns = ("answer_type", "question_type", "image_id")
    for split, images in (("train", KEPT), ("test", [5001, 5002])):
        source = VQA(vqa_root, split, groups=columns)
        assert isinstance(source, Grouped)
        assert [source.group(record) for record in range(len(images))] == [
            {
                "answer_type": "number" if image % 2 else "other",
                "question_type": "what is",
                "image_id": str(image),
            }
            for image in images
        ]
    assert VQA(vqa_root, "test").group(0) == {}
    skipping = vqa_root / f"train2014/COCO_train2014_{KEPT[0]:012d}.jpg"
    skipping.unlink()
    source = VQA(vqa_root, "train", groups=("image_id",), missing_images="skip")
    assert source.group(0) == {"image_id": str(KEPT[1])}


def test_groups_of_published_lines(nlvr2_root, snli_ve_root):
    file = nlvr2_root / "data/dev.json"
    write(file, [nlvr2_line("850-0-0", "True", synset="dog", writer=7, note=None),
                 nlvr2_line("850-1-0", "False", synset="cat", writer=7, note="")])  # fmt: skip
    val = NLVR2(nlvr2_root, "val", groups=("synset", "writer", "label"))
    assert [val.group(record) for record in (0, 1)] == [
        {"synset": "dog", "writer": "7", "label": "True"},
        {"synset": "cat", "writer": "7", "label": "False"},
    ]
    with pytest.raises(ConfigError, match=r"dev\.json, split 'val', has no column 'note'"):
        NLVR2(nlvr2_root, "val", groups=("note",))
    # Two of four lines are left out: what is left keeps its own.
    val = VisualEntailment(snli_ve_root, "val", groups=("gold_label",))
    assert [val.group(r)["gold_label"] for r in range(2)] == ["entailment", "contradiction"]


def test_groups_of_a_list_that_has_a_column_in_part(tmp_path):
    write(tmp_path / "vqa.json", [
        vqa_entry(tmp_path / "a.png") | {"source": "coco", "tags": ["x"], "indoor": True},
        vqa_entry(tmp_path / "b.png") | {"source": None},
        vqa_entry(tmp_path / "c.png", "val") | {"page": 1},
        vqa_entry(tmp_path / "d.png") | {"source": "\udce9"},
    ])  # fmt: skip
    train = VQA(tmp_path, "train", groups=("source", "indoor"))
    assert [train.group(record) for record in range(3)] == [
        {"source": "coco", "indoor": "true"},
        {"source": "(none)", "indoor": "(none)"},
        {"source": "?", "indoor": "(none)"},
    ]
    copy = pickle.loads(pickle.dumps(train))
    assert copy.group(1) == train.group(1)
    key = "data.sources.vqa.root"
    for columns, problem in {
        ("kind",): r"vqa\.json, split 'train', has no column 'kind'\. Use some of image, indoor, ",
        ("page",): r"split 'train', has no column 'page'",
        ("source", "tags"): r"entry 0: column 'tags' holds a list, not a text",
        "source": r"'source' is no list of columns\. Write it as",
        ("source", "source"): "names a column twice",
    }.items():
        with pytest.raises(ConfigError, match=problem) as error:
            VQA(tmp_path, "train", groups=columns, key=key)
        assert error.value.key == "data.sources.vqa.groups"


def test_a_column_of_identifiers_is_no_group(tmp_path, monkeypatch):
    monkeypatch.setattr(columns_module, "MAX_VALUES", 2)
    entries = [vqa_entry(tmp_path / "a.png") | {"id": number} for number in range(3)]
    write(tmp_path / "vqa.json", entries[:2])
    VQA(tmp_path, "train", groups=("id",))
    write(tmp_path / "vqa.json", entries)
    with pytest.raises(ConfigError, match=r"column 'id' has 3 values, more than 2"):
        VQA(tmp_path, "train", groups=("id",))


def check_contract(source):
    """What loaders and plans rely on."""
    assert np.array_equal(source.num_captions(np.asarray([0, 0, 1])), [1, 1, 1])
    with pytest.raises(IndexError, match="one text, number 0"):
        source.caption(0, 1)
    sizes = {"B": 1, "H": 16, "W": 16, "3": 3, "10": MAX_ANSWERS}
    extras = source.extras(0, 16)
    assert set(extras) == set(source.extra_fields)
    for name, value in extras.items():
        declared = EXTRA_FIELDS[name]
        assert value.dtype == declared.dtype
        assert value.shape == tuple(sizes[axis] for axis in declared.shape[1:])
    assert source.image(0, 16).shape == (16, 16, 3)
    assert EncodedCaptions(source, TOKENIZER, MAX_LENGTH).longest > 3
    copy = pickle.loads(pickle.dumps(source))
    assert copy.image_key(0) == source.image_key(0)
    assert all(np.array_equal(copy.extras(0, 16)[name], extras[name]) for name in extras)
    parameters = inspect.signature(type(source)).parameters
    assert {"root", "split", "groups", "name", "key", "missing_images"} <= set(parameters)


def test_the_contract(vqa_root, nlvr2_root, snli_ve_root):
    for source in (VQA(vqa_root, "train"), NLVR2(nlvr2_root, "val"),
                   VisualEntailment(snli_ve_root, "val")):  # fmt: skip
        check_contract(source)


@pytest.mark.pack
@pytest.mark.parametrize(
    ("source", "options", "sizes"),
    [
        (VQA, {}, (1231, 268, 389)),
        (VQA, {"questions": "easy_vqa.json"}, (2282, 288, 588)),
        (NLVR2, {}, (400, 80, 80)),
        (VisualEntailment, {}, (3502, 379, 410)),
    ],
)
def test_the_pack(pack, source, options, sizes):
    splits = [source(pack, split, **options) for split in ("train", "val", "test")]
    assert tuple(split.num_records for split in splits) == sizes
    for number, split in enumerate(splits):
        assert not split.bad_captions
        assert split.classes == splits[0].classes
        check_contract(split)
        for other in splits[number + 1 :]:
            assert shared_images(split, other) == []


@pytest.mark.pack
@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("vqa", {"source": {"vqav2", "daquar"}}),
        ("nlvr2", {"label": {"true", "false"}}),
        ("entailment", {"label": set(VisualEntailment.classes)}),
    ],
)
def test_groups_of_the_pack(pack, task, values):
    config = importlib.import_module(f"configs.transfer.{task}").get_config("pack")
    config.data.root = str(pack)
    [name] = config.data.sources
    for split in ("train", "val", "test"):
        source = build_source(config, name, split)
        found = [source.group(record) for record in range(source.num_records)]
        assert {key: {row[key] for row in found} for key in found[0]} == values
    with config.unlocked():
        config.data.sources[name].groups = ("colour",)
    with pytest.raises(ConfigError, match=r"\.json, split 'train', has no column 'colour'.*split"):
        build_source(config, name)


@pytest.mark.pack
def test_answers_of_the_pack(pack):
    assert set(VQA(pack, "val", "easy_vqa.json").classes) >= {"yes", "no", "red", "circle"}
    train = VQA(pack, "train")
    for record in range(train.num_records):
        extras = train.extras(record, 8)
        assert (extras["answer"] >= 0).sum() == (extras["answer_score"] > 0).sum()
        if len(train.answers_of(record)) == 1:  # DAQUAR
            assert extras["answer_score"].tolist() == [1.0] + [0.0] * 9
    val = VQA(pack, "val")
    known = [val.extras(record, 8)["answer"][0] >= 0 for record in range(val.num_records)]
    assert np.mean(known) > 0.8
