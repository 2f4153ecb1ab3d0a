import collections
import csv
import gzip
import itertools
import os
import pickle

import numpy as np
import pytest

from vlp_jax.data.source import Identified, ManyCaptions
from vlp_jax.data.texts import Texts
from vlp_jax.infra.errors import ConfigError

SPLITS = ("train", "val", "test")
KEY = "data.sources.books.root"
WORDS = ("red", "green", "blue", "square", "circle", "left", "über", "the", "“above”", "small")


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, rng.integers(1, 9)))} {n}" for n in range(count)]


def texts_of(*arguments, **kwargs):
    source = Texts(*arguments, **{"name": "books", "key": KEY, **kwargs})
    return all_of(source)


def all_of(source):
    records = np.arange(source.num_records)
    return source.captions(records, np.zeros_like(records))


def everything(root, **kwargs):
    return texts_of(root, "train", val_percent=0.0, test_percent=0.0, **kwargs)


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.fixture
def root(tmp_path):
    """Three files of lines, one of them in a folder below."""
    lines = sentences(300)
    for number, name in enumerate(("b.txt", "a.txt", "more/c.txt")):
        write(tmp_path / name, "\n".join(lines[100 * number : 100 * number + 100]) + "\n")
    return tmp_path


def test_lines_come_in_the_order_of_the_files_names(root):
    lines = sentences(300)
    assert everything(root) == lines[100:200] + lines[:100]
    assert everything(root, files="**/*.txt") == lines[100:200] + lines[:100] + lines[200:]
    assert everything(root, files=("b.*", "more/*", "b.txt")) == lines[:100] + lines[200:]
    assert everything(root / "b.txt") == lines[:100]


def test_what_a_source_of_texts_is(root):
    source = Texts(root, "train", name="books", key=KEY)
    assert isinstance(source, ManyCaptions)
    assert isinstance(source, Identified)
    assert source.pictures is False
    assert (source.extra_fields, source.classes, source.word_classes()) == ((), (), {})
    records = np.random.default_rng(0).permutation(source.num_records)
    assert source.num_captions(records).dtype == np.int64
    assert set(source.num_captions(records)) == {1}
    shuffled = source.captions(records, np.zeros_like(records))
    assert shuffled == [source.caption(record, 0) for record in records.tolist()]
    assert source.captions(records[:0], records[:0]) == []
    with pytest.raises(IndexError, match="books: a record has one text, number 0; asked for 1"):
        source.caption(0, 1)
    for ask in (lambda: source.image(0, 32), lambda: source.image_key(0)):
        with pytest.raises(ConfigError, match=r"data\.sources\.books: its records are texts"):
            ask()
    copy = pickle.loads(pickle.dumps(source))
    assert all_of(copy) == all_of(source)
    assert copy.identity == source.identity


def test_memory_holds_no_text(root):
    write(root / "long.txt", "\n".join(f"{n} {'word ' * 2000}" for n in range(100)))
    assert len(pickle.dumps(Texts(root, "train", "long.txt"))) < 5000


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_marks_are_no_text(tmp_path, end, last, bom):
    lines = ["", "  one two ", "", " \t", "three", "four. "]
    write(tmp_path / "x.txt", bom + (end.join(lines) + end * last).encode())
    assert everything(tmp_path) == ["one two", "three", "four."]
    got = everything(tmp_path, unit="documents")
    assert got == ["one two", f"three{end}four."]


@pytest.mark.parametrize("seed", range(4))
def test_documents_are_what_blank_lines_part(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lines = [line * int(rng.random() < 0.6) for line in sentences(60, seed)]
    write(tmp_path / "x.txt", "\n".join(lines))
    expected = [part.strip("\n") for part in "\n".join(lines).split("\n\n")]
    assert everything(tmp_path, unit="documents") == [part for part in expected if part]


def test_columns_of_tables(tmp_path):
    texts = ['he said "no"', "commas, too", '5" pipe', "über"]
    write(tmp_path / "x.tsv", "label\tsentence\r\n" + "".join(f"1\t{t}\r\n" for t in texts))
    write(tmp_path / "y.tsv", "sentence\tlabel\n" + "".join(f"{t}\t1\n" for t in texts[::-1]))
    assert everything(tmp_path, files="*.tsv", column="sentence") == texts + texts[::-1]
    texts += ["two\nlines", "three\r\n\r\nlines", "last"]
    with (tmp_path / "z.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("n", "text"), *enumerate(texts)])
    assert everything(tmp_path, files="*.csv", column="text") == texts
    assert everything(tmp_path / "z.csv", column="n") == [str(n) for n in range(len(texts))]


def test_what_cannot_be_used_is_counted(tmp_path):
    write(tmp_path / "x.txt", b"good one\n...\n\nb\xffd\nno\nnu\0l\nfine too\n")
    source = Texts(tmp_path, "train", min_chars=3, val_percent=0.0, test_percent=0.0)
    assert all_of(source) == ["good one", "fine too"]
    assert source.bad_captions == {
        "empty text": 1,
        "text is not valid UTF-8": 1,
        "text is too short": 1,
        "text holds null bytes": 1,
    }
    write(tmp_path / "x.tsv", "id\ttext\n1\n2\tgood\n\n3\t\n")
    source = Texts(tmp_path / "x.tsv", "train", column="text", val_percent=0, test_percent=0)
    assert all_of(source) == ["good"]
    assert source.bad_captions == {"row without the column": 1, "empty text": 1}


def test_bad_texts_are_counted_in_one_split(tmp_path):
    lines = [f"text {n} ".encode() + b"\xff" * (n % 3 == 0) for n in range(300)]
    write(tmp_path / "x.txt", b"\n".join(lines))
    sources = [Texts(tmp_path, split, val_percent=30, test_percent=30) for split in SPLITS]
    assert sum(s.bad_captions.total() for s in sources) == 100
    assert all(s.bad_captions.total() > 5 for s in sources)
    assert sum(s.num_records for s in sources) == 200


def splits(root, **kwargs):
    return {split: texts_of(root, split, **kwargs) for split in SPLITS}


def test_splits_part_the_texts(tmp_path):
    lines = sentences(5000)
    write(tmp_path / "a.txt", "\n".join(lines))
    found = splits(tmp_path, val_percent=5.0, test_percent=10.0)
    assert collections.Counter(itertools.chain(*found.values())) == collections.Counter(lines)
    kept = set(found["train"])
    assert found["train"] == [line for line in lines if line in kept]
    assert 0.04 < len(found["val"]) / 5000 < 0.06
    assert 0.085 < len(found["test"]) / 5000 < 0.115
    # A larger val takes from train alone.
    larger = splits(tmp_path, val_percent=20.0, test_percent=10.0)
    assert larger["test"] == found["test"]
    assert set(larger["val"]) > set(found["val"])


def test_another_file_moves_no_text_to_another_split(root):
    shares = {"val_percent": 20.0, "test_percent": 20.0}
    before = splits(root, **shares)
    write(root / "_first.txt", "\n".join(sentences(100, seed=9)))
    after = splits(root, **shares)
    for split in SPLITS:
        assert set(before[split]) < set(after[split])


def test_duplicates_are_in_one_split(tmp_path):
    lines = sentences(200)
    write(tmp_path / "a.txt", "\n".join(lines))
    write(tmp_path / "b.txt", "\n".join(f"  {line.replace(' ', '  ')} ." for line in lines[::-1]))
    for found in splits(tmp_path, val_percent=30.0, test_percent=30.0).values():
        plain = [" ".join(text.split()).rstrip(" .") for text in found]
        assert len(plain) >= 60
        assert set(collections.Counter(plain).values()) == {2}


def test_splits_by_files(root):
    lines = sentences(300)
    names = {"files": "**/*.txt", "val_files": ("a.txt",), "test_files": "more/*.txt"}
    assert splits(root, **names) == {
        "train": lines[:100],
        "val": lines[100:200],
        "test": lines[200:],
    }
    assert texts_of(root, "train", val_files="a.txt") == lines[:100]
    assert texts_of(root, "val", files="b.txt", val_files="a.txt") == lines[100:200]


def test_identity_tells_texts_apart(root):
    def identity(split="train", **kwargs):
        return Texts(root, split, **kwargs).identity

    first = identity()
    assert identity() == first
    assert len({first, identity("val", val_percent=20.0), identity(files="a.txt")}) == 3
    state = (root / "a.txt").stat()
    changed = (root / "a.txt").read_bytes().replace(b"red", b"rod")
    write(root / "a.txt", changed)  # of the same length, and of the same time
    os.utime(root / "a.txt", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert identity() != first


def test_a_file_that_changes_meanwhile_is_refused(root):
    source = Texts(root, "train")
    write(root / "a.txt", "something else\n")
    with pytest.raises(ValueError, match=r"a\.txt: has changed since .*start the run again"):
        source.caption(0, 0)


def test_the_folder_and_its_files_must_be_there(root):
    with pytest.raises(ConfigError, match=r"config\.data\.sources\.books\.root: .*none does not"):
        texts_of(root / "none", "train")
    with pytest.raises(
        ConfigError, match=r"books\.files: no file in .* matches '\*\.md'.* a\.txt, b"
    ):
        texts_of(root, "train", "*.md")
    (root / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"matches '\*\.txt'.*it has no files of its own"):
        texts_of(root / "empty", "train")


@pytest.mark.parametrize("files", [(), "", ("a.txt", ""), (3,)])
def test_files_must_be_patterns(root, files):
    with pytest.raises(ConfigError, match=r"books\.files: .* is no pattern"):
        texts_of(root, "train", files)


@pytest.mark.parametrize("files", ["/etc/*.txt", "../*.txt"])
def test_files_must_be_in_the_folder(root, files):
    with pytest.raises(ConfigError, match=r"books\.files: .* leads out of the folder"):
        texts_of(root, "train", files)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"...\n.\n", gzip.compress(b"a text\n" * 50, mtime=0), "über".encode("utf-16")],
)
def test_files_without_a_text_are_refused(tmp_path, content):
    write(tmp_path / "x.txt", content)
    with pytest.raises(
        ConfigError, match=r"books\.root: there is no usable text in .*x\.txt.*UTF-8"
    ):
        everything(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, r"books\.split: 'validation'\. Use one of train, val, test"),
        ({"unit": "words"}, r"books\.unit: 'words'\. Use one of lines, documents"),
        ({"min_chars": 0}, r"books\.min_chars: 0 is below 1"),
        ({"val_percent": -1.0}, r"books\.val_percent: -1\.0"),
        ({"test_percent": 100.0}, r"books\.test_percent: 100\.0"),
        ({"test_percent": float("nan")}, r"books\.test_percent: nan"),
        ({"val_percent": 60.0, "test_percent": 40.0}, r"books\.val_percent: 60.*nothing to train"),
        ({"column": "x"}, r"books\.column: 'x', but .*a\.txt has no columns.*\.tsv or \.csv"),
        ({"column": "x", "unit": "documents"}, r"books\.unit: 'documents', but each row"),
        ({"val_files": "a.txt", "split": "test"}, r"books\.test_files: not given, and splits"),
        ({"val_files": "d.txt"}, r"books\.val_files: no file in .* matches 'd\.txt'"),
        ({"val_files": "*.txt"}, r"books\.files: each of the 2 files is in val_files or test_f"),
        ({"val_files": "a.*", "test_files": "*.txt"}, r"books\.val_files: .*a\.txt is in test_f"),
    ],
)
def test_arguments_that_cannot_be_used(root, arguments, message):
    with pytest.raises(ConfigError, match=message):
        texts_of(root, **{"split": "train", **arguments})


def test_splits_by_files_need_a_folder(root):
    with pytest.raises(
        ConfigError, match=r"books\.test_files: 'b\.txt' is to be found in .*a\.txt"
    ):
        texts_of(root / "a.txt", "train", test_files="b.txt")


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_left_with_nothing(tmp_path, split):
    write(tmp_path / "x.txt", "one text\n")
    shares = dict.fromkeys(("val_percent", "test_percent"), 0.0)
    if split == "train":
        shares["val_percent"] = 99.9999
    with pytest.raises(ConfigError, match=rf"books\.split: split '{split}' of 1 texts is empty"):
        texts_of(tmp_path, split, **shares)


def test_unknown_columns(tmp_path):
    file = write(tmp_path / "x.tsv", "sentence\tlabel\na\t1\n")
    with pytest.raises(ConfigError, match=r"books\.column: .*no column 'sentense'.*'sentence'"):
        texts_of(file, "train", column="sentense")
    with pytest.raises(ConfigError, match=r"no column 'question'\. There are sentence, label"):
        texts_of(file, "train", column="question")
    with pytest.raises(ConfigError, match=r"books\.column: not given, .*: sentence, label"):
        texts_of(file, "train")
    write(tmp_path / "x.csv", "")
    with pytest.raises(ConfigError, match=r"books\.column: not given, .*the file is empty"):
        texts_of(tmp_path / "x.csv", "train")


def test_torn_csv_is_refused_with_its_line(tmp_path):
    file = write(tmp_path / "x.csv", 'text\ngood\n"two\nlines"\n"open\nand on\n')
    with pytest.raises(ValueError, match=r"x\.csv:5: not a row of CSV .*mend its quotes"):
        everything(file, column="text")


@pytest.mark.pack
def test_real_texts(pack):
    lines = everything(pack / "text" / "wikitext2_test.txt")
    documents = everything(pack / "text", files="wiki*.txt", unit="documents")
    assert 1000 < len(documents) < len(lines) < 4358
    assert " ".join(" ".join(documents).split()) == " ".join(" ".join(lines).split())
    names = {"files": "sst2_train.tsv", "val_files": "sst2_validation.tsv", "column": "sentence"}
    train = texts_of(pack / "text", "train", **names)
    assert len(train) == 20_000
    assert train[0] == "you should be able to find better entertainment ."
    assert len(texts_of(pack / "text", "val", **names)) == 872
