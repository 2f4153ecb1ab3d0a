import gzip
import itertools
import pickle

import numpy as np
import pytest

from tests.data.fake import TOKENIZER, WORDS, Fake
from tests.data.test_build import config_of
from vlp_jax.data.batch import EXTRA_FIELDS
from vlp_jax.data.cache import ImageCache
from vlp_jax.data.captions import EncodedCaptions
from vlp_jax.data.source import PAIR_SEPARATOR, Paired
from vlp_jax.data.sources import bad_captions, build_source
from vlp_jax.data.tasks import GLUE, shared_images
from vlp_jax.data.tasks.glue import TASKS
from vlp_jax.infra.errors import ConfigError

MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\t{labels}gold_label"
)
STSB_HEADER = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
)


def mnli_lines(name, gold, labels):
    words = "\t".join(["neutral"] * labels)
    return [f"{n}\t31193\t31193n\tgovernment\t( A )\t( B )\t(ROOT A)\t(ROOT B)\t{name} a {n}\t"
            f"{name} b {n}\t{words}\t{label}" for n, label in enumerate(gold)]  # fmt: skip


def two_columns(header, name, labels):
    return [header, *(f"{n}\t{name} a {n}\t{name} b {n}\t{label}"
                      for n, label in enumerate(labels))]  # fmt: skip


def official(task, name):
    """The lines of a train or dev file, ``name``, as published; sentences are ``NAME a N``."""
    match task:
        case "cola":
            return [f"gj04\t{n % 2}\t{'*' if n % 2 else ''}\t{name} a {n}" for n in range(4)]
        case "sst2":
            return ["sentence\tlabel", *(f"{name} a {n} \t{n % 2}" for n in range(4))]
        case "mrpc":
            return [MRPC_HEADER, *(f"{n % 2}\t70{n}\t80{n}\t{name} a {n}\t{name} b {n}"
                                   for n in range(4))]  # fmt: skip
        case "stsb":
            scores = ("0.000", "2.5", "5.000", "3.75")
            return [STSB_HEADER, *(
                f"{n}\tmain-captions\tMSRvid\t2012test\t000{n}\tnone\tnone\t{name} a {n}\t"
                f"{name} b {n}\t{score}" for n, score in enumerate(scores)
            )]  # fmt: skip
        case "qqp":
            header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
            return [header, *(f"{n}\t1{n}\t2{n}\t{name} a {n}\t{name} b {n}\t{n % 2}"
                              for n in range(4))]  # fmt: skip
        case "mnli":
            count = 1 if name == "train" else 5
            labels = "".join(f"label{n + 1}\t" for n in range(count))
            gold = ("contradiction", "neutral", "entailment", "neutral")
            return [MNLI_HEADER.format(labels=labels), *mnli_lines(name, gold, count)]
        case "qnli":
            labels = ("not_entailment", "entailment") * 2
            return two_columns("index\tquestion\tsentence\tlabel", name, labels)
        case "rte":
            labels = ("not_entailment", "entailment") * 2
            return two_columns("index\tsentence1\tsentence2\tlabel", name, labels)
        case "wnli":
            return two_columns("index\tsentence1\tsentence2\tlabel", name, (0, 1, 0, 1))


FOLDERS = dict(zip(
    TASKS, ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"),
    strict=True,
))  # fmt: skip
DEV = {"mnli": "dev_matched"}
SINGLE = ("cola", "sst2")
TARGETS = {
    "stsb": [0.0, 2.5, 5.0, 3.75],
    "mnli": [0, 1, 2, 1],
}


def write(file, lines, end="\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes("".join(line + end for line in lines).encode("utf-8", "surrogateescape"))


def write_task(root, task, end="\n"):
    for name in ("train", DEV.get(task, "dev")):
        write(root / FOLDERS[task] / f"{name}.tsv", official(task, name), end)


def texts(source):
    return [source.caption(record, 0) for record in range(source.num_records)]


def sst2(root, sentences, labels=None):
    labels = labels or ["1"] * len(sentences)
    lines = [f"{s}\t{label}" for s, label in zip(sentences, labels, strict=True)]
    write(root / "SST-2/train.tsv", ["sentence\tlabel", *lines])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_as_published(tmp_path, task, end):
    write_task(tmp_path, task, end)
    splits = [("train", "train", 0.0), ("test", DEV.get(task, "dev"), 10.0)]
    for root in (tmp_path, tmp_path / FOLDERS[task]):
        for split, name, percent in splits:
            source = GLUE(root, split, task, held_out_percent=percent)
            single = task in SINGLE
            assert source.task == task
            assert source.pairs is not single
            assert isinstance(source, Paired)
            assert texts(source) == [
                f"{name} a {n}" + ("" if single else f"{PAIR_SEPARATOR}{name} b {n}")
                for n in range(4)
            ]
            assert not source.bad_captions
            [field] = source.extra_fields
            assert field == ("target" if task == "stsb" else "label")
            extras = [source.extras(record, 8)[field] for record in range(4)]
            assert extras == TARGETS.get(task, [0, 1, 0, 1])
            assert {(value.shape, value.dtype) for value in extras} == {
                ((), np.dtype(EXTRA_FIELDS[field].dtype))
            }
            assert len(source.classes) == {"stsb": 0}.get(task, 3 if "mnli" in task else 2)


def test_the_file_of_microsoft_with_glue_s_list_of_dev_pairs(tmp_path):
    lines = official("mrpc", "msr")
    write(tmp_path / "MRPC/msr_paraphrase_train.txt", ["\ufeff" + lines[0], *lines[1:]], "\r\n")
    with pytest.raises(FileNotFoundError, match=r"dev_ids\.tsv: not found; it says which pairs"):
        GLUE(tmp_path, "train", "mrpc")
    write(tmp_path / "MRPC/dev_ids.tsv", ["700\t800", "703\t803", "703\t801"])
    test = GLUE(tmp_path, "test", "mrpc")
    train = GLUE(tmp_path, "train", "mrpc", held_out_percent=0.0)
    assert texts(test) == [f"msr a {n}{PAIR_SEPARATOR}msr b {n}" for n in (0, 3)]
    assert texts(train) == [f"msr a {n}{PAIR_SEPARATOR}msr b {n}" for n in (1, 2)]
    assert [int(train.extras(n, 8)["label"]) for n in (0, 1)] == [1, 0]
    write(tmp_path / "MRPC/dev_ids.tsv", ["1\t2"])
    with pytest.raises(ValueError, match=r"train\.txt: has none of the pairs that dev_ids\.tsv"):
        GLUE(tmp_path, "train", "mrpc")


def test_nothing_is_quoted(tmp_path):
    header = "index\tquestion\tsentence\tlabel"
    lines = [header, '0\t"What" is\tit is "that\tentailment', '1\t"\t"b" c"\tnot_entailment',
             "2\tone\u2028line\x85\ttwo\x0bparts\tentailment"]  # fmt: skip
    write(tmp_path / "QNLI/dev.tsv", lines)
    source = GLUE(tmp_path, "test", "qnli")
    pairs = [text.split(PAIR_SEPARATOR) for text in texts(source)]
    assert pairs == [['"What" is', 'it is "that'], ['"', '"b" c"'], ["one\u2028line", "two parts"]]


def test_a_separator_in_a_file_is_no_separator(tmp_path):
    sst2(tmp_path, [f"one{PAIR_SEPARATOR}two"])
    assert texts(GLUE(tmp_path, "train", "sst2", held_out_percent=0.0)) == ["one two"]


def test_train_and_val_are_disjoint_and_stable(tmp_path):
    premises = [f"premise {n}" for n in range(400)]
    pairs = [(p, f"{p}, hypothesis {n}") for p in premises for n in range(3)]
    lines = [f"{n}\t{a}\t{b}\tentailment" for n, (a, b) in enumerate(pairs)]
    file = tmp_path / "RTE/train.tsv"
    write(file, ["index\tsentence1\tsentence2\tlabel", *lines])
    train, val = (texts(GLUE(tmp_path, split, "rte")) for split in ("train", "val"))
    assert sorted(train + val) == sorted(PAIR_SEPARATOR.join(pair) for pair in pairs)
    assert 0.05 < len(val) / len(pairs) < 0.15
    # A premise and all of its hypotheses are on one side.
    firsts = [{text.split(PAIR_SEPARATOR)[0] for text in part} for part in (train, val)]
    assert firsts[0].isdisjoint(firsts[1])
    # Other lines of the file, and their order, change no line's side.
    write(file, ["index\tsentence1\tsentence2\tlabel", *lines[::-2]])
    assert set(texts(GLUE(tmp_path, "val", "rte"))) == set(val).intersection(
        PAIR_SEPARATOR.join(pair) for pair in pairs[::-2]
    )
    # A larger share holds the smaller one.
    more = texts(GLUE(tmp_path, "val", "rte", held_out_percent=30.0))
    assert set(more) > set(texts(GLUE(tmp_path, "val", "rte")))
    # The same for ever: figures of two versions are compared.
    assert [p for p in premises[:30] if p in firsts[1]] == ["premise 12", "premise 16"]


def test_damaged_lines_are_counted_by_kind(tmp_path):
    sst2(
        tmp_path,
        ["good", "a tab\tin it", "no label", " . ", "bad \udce9 byte", "also good", ""],
        ["1", "0", "x", "0", "1", "0", "1"],
    )
    with (tmp_path / "SST-2/train.tsv").open("a") as file:
        file.write("\n\nno column")
    source = GLUE(tmp_path, "train", "sst2", held_out_percent=0.0)
    assert texts(source) == ["good", "also good"]
    assert source.bad_captions == {
        "wrong number of columns": 2,
        "unknown label": 1,
        "empty sentence": 2,
        "sentence is not valid UTF-8": 1,
    }
    assert bad_captions({"glue": source}) == {"glue": source.bad_captions}
    lines = official("stsb", "train")
    scores = ("5.1", "nan", "high", "4")
    broken = [
        line.rpartition("\t")[0] + f"\t{score}"
        for line, score in zip(lines[1:], scores, strict=True)
    ]
    write(tmp_path / "STS-B/train.tsv", [lines[0], *broken])
    source = GLUE(tmp_path, "train", "stsb", held_out_percent=0.0)
    assert source.bad_captions == {"unknown score": 3}
    assert source.extras(0, 8)["target"] == 4.0
    sst2(tmp_path, ["one"], ["positive"])
    with pytest.raises(ValueError, match=r"no usable example.*\{'unknown label': 1\}; fetch it"):
        GLUE(tmp_path, "train", "sst2")


def test_files_that_are_not_there(tmp_path):
    key = "data.sources.glue.root"
    with pytest.raises(FileNotFoundError, match=r"glue\.root=.*absent: no such folder; .*RTE"):
        GLUE(tmp_path / "absent", "train", "rte", key=key)
    with pytest.raises(FileNotFoundError, match=r"root=.*: looked for .*, \S+RTE/train\.tsv; unp"):
        GLUE(tmp_path, "train", "rte", key=key)
    write(tmp_path / "RTE/train.tsv", official("rte", "train"))
    with pytest.raises(FileNotFoundError, match=r"looked for .*RTE/dev\.tsv; unpack"):
        GLUE(tmp_path, "test", "rte")
    write(tmp_path / "MNLI/dev_matched.tsv", official("mnli", "dev_matched"))
    with pytest.raises(FileNotFoundError, match=r"looked for .*MNLI/dev_mismatched\.tsv"):
        GLUE(tmp_path, "test_mismatched", "mnli")
    write(tmp_path / "MNLI/dev_mismatched.tsv", official("mnli", "dev_mismatched"))
    assert texts(GLUE(tmp_path, "test_mismatched", "mnli"))[0].startswith("dev_mismatched a 0")
    assert texts(GLUE(tmp_path, "test", "mnli"))[0].startswith("dev_matched a 0")
    with pytest.raises(
        ConfigError, match=r"'test_mismatched' is no split\. Use one of train, val, test"
    ):
        GLUE(tmp_path, "test_mismatched", "rte")


@pytest.mark.parametrize("task", TASKS)
def test_official_test_files_cannot_be_scored(tmp_path, task):
    names = ("sentence",) if task in SINGLE else {
        "mrpc": ("#1 ID", "#2 ID", "#1 String", "#2 String"), "qqp": ("question1", "question2"),
        "qnli": ("question", "sentence"),
    }.get(task, ("sentence1", "sentence2"))  # fmt: skip
    lines = ["\t".join(("index", *names)), "\t".join(["0", *names])]
    file = tmp_path / FOLDERS[task] / DEV.get(task, "dev").replace("dev", "test")
    file = file.with_suffix(".tsv")
    write(file, lines)
    secret = "the labels of the official test files are secret"
    with pytest.raises(FileNotFoundError, match=rf"{file.name} cannot take its place: {secret}"):
        GLUE(tmp_path, "test", task)
    with pytest.raises(ValueError, match=rf"{file.name}: has no column '\S+' .*; {secret}"):
        GLUE(file, "train", task)
    write(file.with_name(f"{DEV.get(task, 'dev')}.tsv"), lines)  # renamed
    with pytest.raises(ValueError, match=rf"dev\S*\.tsv: has no column '\S+' .*; {secret}"):
        GLUE(tmp_path, "test", task)


def test_files_of_another_task_or_format(tmp_path):
    file = tmp_path / "train.tsv"
    write(file, official("rte", "train"))
    problem = r"no column 'question' \(it has index, sentence1, .*\); .*set data\.task"
    with pytest.raises(ValueError, match=problem):
        GLUE(tmp_path, "train", "qnli")
    with pytest.raises(ValueError, match=r"no usable example.*'unknown label': 4.*no files of 'w"):
        GLUE(tmp_path, "train", "wnli")
    file.write_bytes(gzip.compress(b"a"))
    with pytest.raises(ValueError, match=r"train\.tsv: is compressed"):
        GLUE(tmp_path, "train", "rte")
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"train\.tsv: is empty"):
        GLUE(tmp_path, "train", "rte")
    write(file, official("rte", "train"))
    with pytest.raises(ValueError, match=r"'val' has no usable .*held_out_percent=0\.0"):
        GLUE(tmp_path, "val", "rte", held_out_percent=0.0)


def test_a_file_alone_has_no_test_split(tmp_path):
    write_task(tmp_path, "sst2")
    file = tmp_path / "SST-2/train.tsv"
    assert len(texts(GLUE(file, "train", "sst2", held_out_percent=0.0))) == 4
    with pytest.raises(ConfigError, match=r"none of them 'test'\. Name the folder that holds dev"):
        GLUE(file, "test", "sst2")


def test_bad_arguments(tmp_path):
    for arguments, key, problem in (
        (("train", "SST-2"), "task", "'SST-2' is no task of GLUE. Perhaps you mean 'sst2'"),
        (("train", "squad"), "task", r"no task of GLUE\. Use one of cola, mnli, "),
        (("dev", "sst2"), "split", "'dev' is no split. Use one of train, val, test"),
    ):
        with pytest.raises(ConfigError, match=problem) as error:
            GLUE(tmp_path, *arguments, key="data.sources.a.root")
        assert error.value.key == f"data.sources.a.{key}"
    for percent in (-1.0, 100.0, float("nan")):
        with pytest.raises(ConfigError, match=r"data\.held_out_percent: "):
            GLUE(tmp_path, "train", "sst2", held_out_percent=percent)


def test_there_are_no_pictures(tmp_path):
    write_task(tmp_path, "rte")
    source = GLUE(tmp_path, "test", "rte")
    assert not source.pictures
    for read in (
        lambda: source.image(0, 8), lambda: source.image_key(0),
        lambda: ImageCache(source, 8), lambda: shared_images(source, source),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"data\.sources\.glue: GLUE is text and has no pict"):
            read()


def test_the_contract(tmp_path):
    write_task(tmp_path, "stsb")
    source = GLUE(tmp_path, "test", "stsb")
    assert np.array_equal(source.num_captions(np.asarray([0, 0, 1])), [1, 1, 1])
    with pytest.raises(IndexError, match="one text, number 0"):
        source.caption(0, 1)
    copy = pickle.loads(pickle.dumps(source))
    assert texts(copy) == texts(source)
    assert copy.extras(1, 8) == source.extras(1, 8)


def test_from_a_config(tmp_path):
    write_task(tmp_path, "mnli")
    config = config_of()
    config.data.sources.glue = {"root": str(tmp_path), "task": "mnli"}
    assert texts(build_source(config, "glue", "test"))[0].startswith("dev_matched a 0")
    config.data.sources.glue.task = "mnlli"
    with pytest.raises(ConfigError, match=r"data\.sources\.glue\.task: .* mean 'mnli'"):
        build_source(config, "glue")
    del config.data.sources.glue.task
    with pytest.raises(ConfigError, match=r"data\.sources\.glue\.task: missing"):
        build_source(config, "glue")


class Pairs(Fake):
    """Pairs of any two lengths from 1 to 12 words, and one sentence alone."""

    pairs = True
    LENGTHS = tuple(itertools.product(range(1, 13), repeat=2))

    def __init__(self):
        super().__init__(num_records=len(self.LENGTHS) + 1, captions_at_most=1)

    def sentences(self, record):
        lengths = self.LENGTHS[record] if record < len(self.LENGTHS) else (15,)
        return [" ".join(WORDS[(record + side + n) % len(WORDS)] for n in range(length))
                for side, length in enumerate(lengths)]  # fmt: skip

    def caption(self, record, index):
        return PAIR_SEPARATOR.join(self.sentences(record))


def bert_pair(sentences, room):
    """Ids of each sentence, the longer losing tokens one at a time."""
    ids = [[*row[1:-1]] for row in TOKENIZER.encode(sentences, 99)]
    while sum(map(len, ids)) > room:
        ids[0 if len(ids) == 1 or len(ids[0]) > len(ids[1]) else 1].pop()
    return ids


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("max_length", [30, 12, 11, 5])
def test_pairs_are_encoded_one_by_one_and_the_longer_is_cut(max_length, store):
    source = Pairs()
    encoded = EncodedCaptions(source, TOKENIZER, max_length, store=store)
    records = np.arange(source.num_records)
    encoded.lengths(records, np.zeros_like(records))
    num_truncated = 0
    for record in range(source.num_records):
        sentences = source.sentences(record)
        expected = [TOKENIZER.bos_id]
        for ids in bert_pair(sentences, max_length - 1 - len(sentences)):
            expected += [*ids, TOKENIZER.eos_id]
        ids = encoded.ids(record, 0)
        np.testing.assert_array_equal(ids, expected)
        assert ids.dtype == np.int32
        whole = TOKENIZER.encode(sentences, 99)
        num_truncated += sum(map(len, whole)) - len(whole) + 1 > max_length
    assert encoded.num_truncated == num_truncated
    assert (num_truncated == 0) == (max_length == 30)


def test_no_room_for_a_pair():
    with pytest.raises(ValueError, match=r"data\.max_text_length=4: must be at least 5 for pairs"):
        EncodedCaptions(Pairs(), TOKENIZER, 4)


@pytest.mark.parametrize("pairs", [None, False])
def test_only_a_source_that_says_so_has_pairs(pairs):
    class Plain(Fake):
        def caption(self, record, index):
            return super().caption(record, index).replace(" ", PAIR_SEPARATOR)

    source = Plain()
    if pairs is not None:
        source.pairs = pairs
    for max_length in (8, 30):
        got = EncodedCaptions(source, TOKENIZER, max_length)
        want = EncodedCaptions(Fake(), TOKENIZER, max_length)
        np.testing.assert_array_equal(got._flat, want._flat)
        assert got.num_truncated == want.num_truncated


def test_captions_of_one_sentence_are_as_without_pairs():
    paired = Fake()
    paired.pairs = True
    for max_length in (8, 30):
        got = EncodedCaptions(paired, TOKENIZER, max_length)
        want = EncodedCaptions(Fake(), TOKENIZER, max_length)
        np.testing.assert_array_equal(got._flat, want._flat)
        assert got.num_truncated == want.num_truncated


def test_pairs_in_a_cache_and_their_unknown_words():
    cached = EncodedCaptions(ImageCache(Pairs(), 8), TOKENIZER, 30)
    np.testing.assert_array_equal(
        cached.ids(5, 0), EncodedCaptions(Pairs(), TOKENIZER, 30).ids(5, 0)
    )

    class Unknown(Pairs):
        def sentences(self, record):
            return ["red !", "? blue"]

    for store in (True, False):
        assert EncodedCaptions(Unknown(), TOKENIZER, 30, store=store).unknown_share() == 0.5


@pytest.mark.pack
def test_the_pack(pack):
    splits = {split: GLUE(pack / "text", split, "sst2") for split in ("train", "val", "test")}
    train, val = (set(texts(splits[split])) for split in ("train", "val"))
    assert splits["train"].num_records + splits["val"].num_records == 20_000
    assert splits["test"].num_records == 872
    assert 1800 < splits["val"].num_records < 2200
    assert train.isdisjoint(val)
    assert not any(source.bad_captions for source in splits.values())
    assert np.mean(splits["test"]._targets) == pytest.approx(444 / 872)
    whole = GLUE(pack / "text/sst2_train.tsv", "train", "sst2", held_out_percent=0.0)
    assert set(texts(whole)) == train | val
