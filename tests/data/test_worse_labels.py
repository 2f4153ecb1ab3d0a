"""Labels that are worse on purpose: how many, which, and what stays as it is."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.data.fake import TOKENIZER, FakePairs
from tests.data.test_build import config_of
from vlp_jax.data.build import build_plan, build_tokenizer
from vlp_jax.data.cache import ImageCache, original, uncached
from vlp_jax.data.scenes import ScenesEntailment, ScenesLabels, ScenesNLVR2, ScenesVQA
from vlp_jax.data.source import (
    Answered,
    BadExample,
    Generated,
    Grouped,
    Labelled,
    ManyRows,
    Questioned,
    Templated,
)
from vlp_jax.data.sources import build_source
from vlp_jax.data.tasks import GLUE, VQA, ImageLabels
from vlp_jax.data.tasks.splits import shared_images
from vlp_jax.data.worse_labels import WorseLabels, with_worse_labels
from vlp_jax.infra.errors import ConfigError

PATH = "data.sources.scenes"
KINDS = (ScenesVQA, ScenesNLVR2, ScenesEntailment, ScenesLabels)
COUNT = 400
NAMES = {
    ScenesVQA: "scenes_vqa",
    ScenesNLVR2: "scenes_nlvr2",
    ScenesEntailment: "scenes_entailment",
    ScenesLabels: "scenes_labels",
}


def easy(kind, num_records=COUNT, split="train"):
    return kind(split, level="easy", num_records=num_records)


def worse(source, **changes):
    return with_worse_labels(source, PATH, **changes)


def targets(source, records=None):
    """Fields of records but for pictures, one by one."""
    records = range(source.num_records) if records is None else records
    rows = [source.extras(record, 16) for record in records]
    names = [name for name in source.extra_fields if name != "second_image"]
    return {name: np.stack([row[name] for row in rows]) for name in names}


def classes(source):
    """The one class of each record of scenes."""
    found = source.targets(np.arange(source.num_records))
    return found["label"] if "label" in found else found["answer"][:, 0]


def same(some, others):
    assert some.keys() == others.keys()
    for name, values in some.items():
        assert values.dtype == others[name].dtype
        np.testing.assert_array_equal(values, others[name])


@pytest.mark.parametrize("kind", KINDS)
def test_many_targets_are_those_of_each_record(kind):
    source = easy(kind, 12)
    same(source.targets(np.arange(12)), targets(source))
    cache = ImageCache(source, 16)
    same(cache.targets(np.array([3, 11, 3])), targets(source, [3, 11, 3]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_that_is_noisy(kind):
    source, share = easy(kind, 2000), 0.3
    noisy = worse(source, label_noise=share)
    right, wrong = classes(source), classes(noisy)
    error = np.sqrt(share * (1 - share) / len(right))
    assert abs((right != wrong).mean() - share) < 4 * error
    assert wrong.min() >= 0
    assert wrong.max() < len(source.classes)
    more = classes(worse(source, label_noise=0.6))
    changed = right != wrong
    np.testing.assert_array_equal(more[changed], wrong[changed])


@pytest.mark.parametrize("kind", KINDS)
def test_no_noisy_label_is_right(kind):
    source = easy(kind)
    noisy = worse(source, label_noise=1.0)
    assert not (classes(source) == classes(noisy)).any()
    if kind is ScenesVQA:
        found = targets(noisy, range(5))
        assert (found["answer"][:, 1:] == -1).all()
        np.testing.assert_array_equal(found["answer_score"], [[1.0] + [0.0] * 9] * 5)


def test_the_other_class_is_drawn_uniformly():
    source = easy(ScenesEntailment, 6000)
    right, wrong = classes(source), classes(worse(source, label_noise=1.0))
    for label in range(3):
        shares = np.bincount(wrong[right == label], minlength=3) / (right == label).sum()
        error = np.sqrt(0.25 / (right == label).sum())
        for other in {0, 1, 2} - {label}:
            assert abs(shares[other] - 0.5) < 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_everywhere(kind):
    changes = {"label_noise": 0.4, "imbalance": 3.0}
    source = worse(easy(kind, 60), **changes)
    again = worse(easy(kind, 60), **changes)
    copy = pickle.loads(pickle.dumps(source))
    cached = worse(ImageCache(easy(kind, 60), 16), **changes)
    records = np.arange(source.num_records)
    expected = targets(source)
    for other in (again, copy, cached, uncached(cached), pickle.loads(pickle.dumps(cached))):
        np.testing.assert_array_equal(other.kept, source.kept)
        same(targets(other), expected)
        same(other.targets(records), expected)
        assert other.identity == source.identity
    assert isinstance(uncached(cached).source, kind)
    assert uncached(source) is source
    assert original(cached).identity == easy(kind).identity


def test_the_same_in_another_process():
    script = (
        "import numpy as np\n"
        "from vlp_jax.data.scenes import ScenesEntailment\n"
        "from vlp_jax.data.worse_labels import with_worse_labels\n"
        "source = ScenesEntailment('train', level='easy', num_records=60)\n"
        "source = with_worse_labels(source, 'it', label_noise=0.5, imbalance=2.0)\n"
        "labels = source.targets(np.arange(source.num_records))['label']\n"
        "print(source.kept.tolist(), labels.tolist())\n"
    )
    command = [sys.executable, "-c", script]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    source = worse(easy(ScenesEntailment, 60), label_noise=0.5, imbalance=2.0)
    assert told.stdout.strip() == f"{source.kept.tolist()} {classes(source).tolist()}"


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_those_of_each_record(kind):
    cached = worse(ImageCache(easy(kind, 40), 16), label_noise=0.5, imbalance=2.0)
    assert isinstance(cached, ManyRows)
    assert not isinstance(uncached(cached), ManyRows)
    records = np.array([5, 0, cached.num_records - 1, 5])
    assert not cached.damaged(records, with_extras=True).any()
    rows = cached.rows(records, 16, ("image", *kind.extra_fields))
    for row, record in enumerate(records.tolist()):
        expected = {"image": cached.image(record, 16), **cached.extras(record, 16)}
        same({name: values[row] for name, values in rows.items()}, expected)
    rows["image"][:] = 0  # theirs to write to
    assert cached.image(5, 16).any()


def test_fields_that_are_read_alone():
    cached = worse(ImageCache(easy(ScenesVQA, 40), 16), label_noise=0.5)
    records = np.arange(40)
    both = cached.rows(records, 16, ("answer", "answer_score"))
    for name, values in both.items():
        same(cached.rows(records, 16, (name,)), {name: values})


def test_damaged_records_stay_damaged():
    source = FakePairs(10, damaged=(1,), second_damaged=(4,))
    cached = worse(ImageCache(source, 4), label_noise=1.0)
    records = np.array([4, 1, 0])
    assert cached.damaged(records, with_extras=False).tolist() == [False, True, False]
    assert cached.damaged(records, with_extras=True).tolist() == [True, True, False]
    with pytest.raises(BadExample, match="torn second picture: record 4"):
        cached.extras(4, 4)
    assert int(cached.extras(3, 4)["label"]) == 0
    with pytest.raises(ValueError, match=r"data\.sources\.fake: 1 records are damaged"):
        worse(ImageCache(source, 4), imbalance=2.0)
    with pytest.raises(ConfigError, match="cannot list its labels") as error:
        worse(source, imbalance=2.0)
    assert error.value.key == f"{PATH}.imbalance"


class ListedPairs(FakePairs):
    """Pairs whose labels are known without their pictures."""

    def targets(self, records):
        return {"label": (np.asarray(records) % 2).astype(np.int32)}


def test_a_cache_keeps_the_same_records_though_some_are_damaged():
    source = ListedPairs(200, second_damaged=range(1, 200, 4))
    cached = ImageCache(source, 4)
    same(cached.targets(np.arange(200)), source.targets(np.arange(200)))
    tails = [worse(some, imbalance=5.0) for some in (source, cached)]
    np.testing.assert_array_equal(tails[0].kept, tails[1].kept)
    assert tails[1].num_records < 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_tail(kind):
    source, ratio = easy(kind, 3000), 10.0
    tail = worse(source, imbalance=ratio)
    right = classes(source)
    assert tail.num_records == len(tail.kept) < 3000
    assert (np.diff(tail.kept) > 0).all()
    np.testing.assert_array_equal(classes(tail), right[tail.kept])
    had = np.bincount(right, minlength=len(source.classes))
    has = np.bincount(classes(tail), minlength=len(source.classes))
    occurring = np.flatnonzero(had)
    expected = ratio ** (-np.arange(len(occurring)) / (len(occurring) - 1))
    shares = has[occurring] / had[occurring]
    assert shares.max() == 1.0  # the first class keeps all
    # Small classes lie anywhere: each large one is near a share of the tail of its own.
    errors = np.sqrt(np.maximum(expected * (1 - expected), 1e-3)[:, None] / had[occurring])
    near = np.abs(shares - expected[:, None]) < 4 * errors
    assert near.any(axis=0).all()
    if len(occurring) <= 3:
        assert has.min() / had[has.argmin()] == pytest.approx(1 / ratio, rel=0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_belongs_together_stays_together(kind):
    source = easy(kind, 60)
    tail = worse(source, imbalance=4.0, label_noise=0.3)
    noisy = worse(source, label_noise=0.3)
    records = np.arange(tail.num_records)
    indices = np.zeros_like(records)
    own = tail.kept[records]
    assert tail.captions(records, indices) == source.captions(own, indices)
    np.testing.assert_array_equal(tail.num_captions(records), source.num_captions(own))
    same(targets(tail), targets(noisy, own))
    for record in (0, 7, tail.num_records - 1):
        there = int(own[record])
        assert tail.caption(record, 0) == source.caption(there, 0)
        assert tail.image_key(record) == source.image_key(there)
        np.testing.assert_array_equal(tail.image(record, 16), source.image(there, 16))
        told = {Templated: "template", Grouped: "group", Answered: "answers_of"}
        for protocol, name in told.items():
            assert isinstance(tail, protocol) == isinstance(source, protocol)
            if isinstance(source, protocol):
                assert getattr(tail, name)(record) == getattr(source, name)(there)
    assert isinstance(tail, Labelled) == isinstance(source, Labelled)
    if isinstance(source, Labelled):  # what probes read stays right
        same(tail.labels(records), source.labels(own))
    assert not isinstance(tail, Questioned)
    assert isinstance(tail, Generated)
    assert tail.world == source.world
    assert tail.word_classes() == source.word_classes()
    assert shared_images(tail, easy(kind, 60, "val")) == []
    assert len(shared_images(tail, source)) == len(tail.kept) * (1 + (kind is ScenesNLVR2))
    for record in (-1, tail.num_records):
        with pytest.raises(IndexError, match=f"of {tail.num_records}"):
            tail.image(record, 16)


def test_an_unbounded_source_may_be_noisy():
    source = worse(ScenesEntailment("train", level="easy"), label_noise=1.0)
    assert source.num_records is None
    right = int(source.source.extras(2**40, 16)["label"])
    assert int(source.extras(2**40, 16)["label"]) != right


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_worsens_its_own_split_alone(kind):
    section = {"type": NAMES[kind], "level": "easy", "num_records": 60}
    config = config_of(**section, label_noise=0.5, imbalance=3.0)
    plain = config_of(**section)
    own = build_source(config, "scenes")
    assert isinstance(own, WorseLabels)
    expected = worse(build_source(plain, "scenes"), label_noise=0.5, imbalance=3.0)
    same(targets(own), targets(expected))
    assert isinstance(build_source(config, "scenes", "train", 5), WorseLabels)
    for split in ("val", "test"):
        other = build_source(config, "scenes", split, 20)
        assert type(other) is kind
        same(targets(other), targets(build_source(plain, "scenes", split, 20)))
    config.data.sources.scenes.update(label_noise=0.0, imbalance=1)
    assert type(build_source(config, "scenes")) is kind


@pytest.mark.parametrize("kept", ["in files", "in memory"])
def test_pictures_are_shared_and_labels_are_not(tmp_path, monkeypatch, kept):
    section = {"type": "scenes_vqa", "level": "easy", "num_records": 60, "cache": True}
    folder = tmp_path if kept == "in files" else ""

    def built(**changes):
        config = config_of(folder, **section, **changes)
        source = build_source(config, "scenes")
        tokenizer = build_tokenizer(config, [source])
        return source, build_plan(config, {"scenes": source}, tokenizer)

    right, _ = built()
    if folder:
        before = {file.name for file in tmp_path.iterdir()}
        monkeypatch.setattr(ScenesVQA, "image", lambda *_: pytest.fail("drawn again"))
    noisy, _ = built(label_noise=0.5)
    if folder:  # captions and tokenizer as well
        assert {file.name for file in tmp_path.iterdir()} == before
    tail, plan = built(label_noise=0.5, imbalance=4.0)
    again, _ = built()
    same(targets(again), targets(right))
    same(targets(tail), targets(noisy, tail.kept))
    assert (targets(noisy)["answer"] != targets(right)["answer"]).any()
    [planned] = plan.members["pairs"].sources
    captions = planned.captions
    assert planned.source is captions.source is tail
    for record in (0, tail.num_records - 1):
        text = right.caption(int(tail.kept[record]), 0)
        [expected] = captions.tokenizer.encode([text], 48)
        np.testing.assert_array_equal(captions.ids(record, 0), expected)
    if folder:
        added = {file.name for file in tmp_path.iterdir()} - before
        assert len(added) == 2  # captions and tokenizer of the records that are left
        monkeypatch.setattr(ScenesVQA, "examples", lambda *_: pytest.fail("made again"))
        built(label_noise=0.5, imbalance=4.0)
        built()


def write_images(root, rows):
    for number, row in enumerate(rows):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(root / row["image"])


def test_image_labels(tmp_path):
    names = ("ant", "bee", "cow")
    rows = [
        {"image": f"{n}.png", "name": names[n % 3], "split": "val" if n >= 90 else "train"}
        for n in range(93)
    ]
    write_images(tmp_path, rows)
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    source = ImageLabels(tmp_path, "train", name="images")
    tail = worse(source, imbalance=5.0)
    counts = np.sort(np.bincount(classes(tail)))[::-1]
    assert counts[0] == 30
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert 1 <= counts[-1] <= 12
    for record in range(tail.num_records):
        there = int(tail.kept[record])
        assert tail.image(record, 16)[0, 0, 0] == there
        assert tail.caption(record, 0) == names[there % 3]
        assert int(tail.extras(record, 16)["label"]) == there % 3
    noisy = worse(source, label_noise=1.0)
    assert not (classes(noisy) == classes(source)).any()
    np.testing.assert_array_equal(noisy.labels(np.arange(90))["class"], classes(source))
    assert noisy.identity is None


def write_questions(root, answers):
    rows = [
        {"image": f"{n}.png", "question": f"what {n}?", "answers": some, "split": "train"}
        for n, some in enumerate(answers)
    ]
    write_images(root, rows)
    (root / "vqa.json").write_text(json.dumps(rows))


def test_questions_with_several_answers(tmp_path):
    answers = [["red"] * 6 + ["blue"] * 4, ["green"] * 10, ["never"] * 10] + [["blue"] * 10] * 20
    write_questions(tmp_path, answers)
    source = VQA(tmp_path, "train", num_answers=3, min_coverage=0.5, name="vqa")
    assert len(source.classes) == 3
    right = source.targets(np.arange(23))
    same(right, targets(source))
    noisy = worse(source, label_noise=1.0)
    wrong = targets(noisy)
    assert (wrong["answer"][:, 1:] == -1).all()
    assert (wrong["answer"][:, 0] >= 0).all()
    for accepted, drawn in zip(right["answer"], wrong["answer"][:, 0], strict=True):
        assert drawn not in accepted
    assert noisy.answers_of(0) == source.answers_of(0)
    assert noisy.question_id(4) == 4
    tail = worse(source, imbalance=1000.0)
    unanswered = np.flatnonzero((right["answer"] < 0).all(axis=1))
    assert np.isin(unanswered, tail.kept).all()


def test_questions_that_accept_every_answer(tmp_path):
    write_questions(tmp_path, [["yes"] * 6 + ["no"] * 4, ["no"] * 10])
    source = VQA(tmp_path, "train", num_answers=2, name="vqa")
    with pytest.raises(ConfigError, match="all of the 2 answers are accepted for 1 q") as error:
        worse(source, label_noise=0.1)
    assert error.value.key == f"{PATH}.label_noise"


def test_texts_with_labels_and_with_scores(tmp_path):
    lines = [f"{label}\tsentence {n} of {label}" for n, label in enumerate([0, 1] * 50)]
    (tmp_path / "train.tsv").write_text("label\tsentence\n" + "\n".join(lines), encoding="utf-8")
    source = GLUE(tmp_path, "train", "sst2")
    tail = worse(source, imbalance=4.0, label_noise=1.0)
    assert tail.pictures is False
    assert tail.pairs is False
    for record in range(tail.num_records):
        label = int(tail.caption(record, 0).rpartition(" ")[2])
        assert int(tail.extras(record, 0)["label"]) == 1 - label
    rows = "\n".join(f"a {n}\tb\t1.5" for n in range(30))
    (tmp_path / "train.tsv").write_text(f"sentence1\tsentence2\tscore\n{rows}")
    with pytest.raises(ConfigError, match="has no labels"):
        worse(GLUE(tmp_path, "train", "stsb"), label_noise=0.1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"label_noise": 1.5}, "out of range"),
        ({"label_noise": -0.1}, "out of range"),
        ({"label_noise": "much"}, "out of range"),
        ({"imbalance": 0.5}, "out of range"),
        ({"imbalance": float("inf")}, "out of range"),
        ({"imbalance": float("nan")}, "out of range"),
        ({"imbalance": True}, "out of range"),
        ({"imbalance": 2.0, "num_records": None}, "unbounded"),
        ({"imbalance": 2.0, "type": "scenes"}, "has no labels"),
        ({"label_noise": 0.2, "type": "scenes"}, "has no labels"),
        ({"imbalance": 2.0, "num_records": 1}, "no two classes occur"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, fault):
    section = {"type": "scenes_entailment", "level": "easy", "num_records": 30, **changes}
    if section["num_records"] is None:
        del section["num_records"]
    config = config_of()
    config.data.sources.scenes = ConfigDict(section, convert_dict=True)
    [key] = {"label_noise", "imbalance"} & changes.keys()
    with pytest.raises(ConfigError, match=fault) as error:
        build_source(config, "scenes")
    assert error.value.key == f"{PATH}.{key}"


def test_a_plan_reads_the_records_that_are_left():
    config = config_of(type="scenes_nlvr2", level="easy", num_records=120, imbalance=20.0)
    source = build_source(config, "scenes")
    plan = build_plan(config, {"scenes": source}, TOKENIZER).members["pairs"]
    batches = [plan.batch(t) for t in range(32)]
    read = np.unique(np.concatenate([batch.record for batch in batches]))
    np.testing.assert_array_equal(read, np.arange(source.num_records))
