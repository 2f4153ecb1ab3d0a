import itertools
import pickle

import numpy as np
import pytest

from tests.data.fake import TOKENIZER, WORDS, Fake
from vlp_jax.data import packing
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.packing import PackedTexts, best_fit
from vlp_jax.data.plan import Plan
from vlp_jax.data.planned import PlannedSource
from vlp_jax.data.source import Identified
from vlp_jax.data.texts import TextOnly, Texts
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.errors import ConfigError

FRAMING = (TOKENIZER.bos_id, TOKENIZER.eos_id)


class Given(TextOnly):
    """Texts as given."""

    identity = "given"

    def __init__(self, texts, name="given"):
        self.name = name
        self.num_records = len(texts)
        self._texts = texts

    def caption(self, record, index):
        return self._texts[record]


def documents_of(lengths, seed=0):
    """Texts of so many words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def realistic_lengths(count, seed=0):
    """Words of documents: mostly short, some longer than many rows."""
    return np.random.default_rng(seed).lognormal(3.0, 1.0, count).astype(int) + 1


def words_of(text):
    return TOKENIZER.encode([text], 1 << 20)[0][1:-1].tolist()


def rows_of(packed):
    return [packed.ids(row, 0).tolist() for row in range(packed.num_records)]


def pieces_of(row):
    """The documents of a row, which must be framed and follow one another; without the frames."""
    pieces = []
    while row:
        end = row.index(TOKENIZER.eos_id)
        assert row[0] == TOKENIZER.bos_id
        pieces.append(row[1:end])
        row = row[end + 1 :]
    return pieces


def indices(records):
    return np.zeros_like(records)


@pytest.mark.parametrize("window", [1 << 16, 50])
@pytest.mark.parametrize("length", [3, 4, 16, 61])
@pytest.mark.parametrize("shape", ["empty", "single", "equal", "short", "long", "realistic"])
def test_every_word_is_in_one_row_in_its_order(monkeypatch, shape, length, window):
    monkeypatch.setattr(packing, "_WINDOW", window)
    rng = np.random.default_rng(1)
    lengths = {
        "empty": rng.integers(0, 2, 40),  # every other one
        "single": [3],
        "equal": np.full(60, 14),
        "short": rng.integers(1, 6, 120),
        "long": rng.integers(50, 200, 20),
        "realistic": realistic_lengths(120),
    }[shape]
    # Every document ends with words that tell it from all others, as far as so many letters can.
    texts = [
        f"{text} {'red ' * (n % 7)}{'of ' * (n % 5)}above" if text else "..."
        for n, text in enumerate(documents_of(lengths))
    ]
    packed = PackedTexts(Given(texts), TOKENIZER, length)
    rows = rows_of(packed)
    assert max(map(len, rows)) == packed.longest <= length
    wanted = []
    for text in texts:
        words = words_of(text)
        wanted += [words[at : at + length - 2] for at in range(0, len(words), length - 2)]
    found = [piece for row in rows for piece in pieces_of(row)]
    assert sorted(found) == sorted(wanted)
    assert sum(map(len, found)) == sum(len(words_of(text)) for text in texts)
    # Within a row documents keep their order: as numbers of `wanted`, they increase.
    places = {}
    for number, piece in enumerate(wanted):
        places.setdefault(tuple(piece), []).append(number)
    for row in rows:
        last = -1
        for piece in pieces_of(row):
            later = [number for number in places[tuple(piece)] if number > last]
            assert later, "a document comes before one that it follows"
            last = later[0]


def test_order_within_a_row_is_that_of_the_source():
    texts = [f"{WORDS[n % 10]} {WORDS[n // 10]}" for n in range(100)]
    number = {tuple(words_of(text)): n for n, text in enumerate(texts)}
    packed = PackedTexts(Given(texts), TOKENIZER, 22)
    found = [[number[tuple(piece)] for piece in pieces_of(row)] for row in rows_of(packed)]
    assert sorted(itertools.chain(*found)) == list(range(100))
    assert all(row == sorted(row) for row in found)


def test_documents_agree_with_the_ids():
    packed = PackedTexts(Given(documents_of(realistic_lengths(200))), TOKENIZER, 40)
    records = np.random.default_rng(0).permutation(packed.num_records)
    ids, lengths = packed.padded(records, indices(records), 43)
    numbers = packed.documents(records, indices(records), 43)
    assert numbers.dtype == ids.dtype == lengths.dtype == np.int32
    assert numbers.shape == ids.shape == (len(records), 43)
    np.testing.assert_array_equal(lengths, packed.lengths(records, indices(records)))
    for row, own, length, record in zip(ids, numbers, lengths, records, strict=True):
        np.testing.assert_array_equal(row[:length], packed.ids(record, 0))
        assert (row[length:] == TOKENIZER.pad_id).all()
        assert (own[length:] == 0).all()
        pieces = pieces_of(row[:length].tolist())
        expected = np.repeat(np.arange(len(pieces)) + 1, [len(piece) + 2 for piece in pieces])
        np.testing.assert_array_equal(own[:length], expected)
    assert numbers.max() > 2
    for ask in (packed.padded, packed.documents):
        with pytest.raises(ValueError, match="does not fit rows of 20"):
            ask(records, indices(records), 20)


def test_special_tokens_in_a_text_begin_no_document():
    packed = PackedTexts(Given(["red </s> <s> green <pad>"]), TOKENIZER, 30)
    numbers = packed.documents(np.zeros(1, np.int64), np.zeros(1, np.int64), 30)
    assert packed.num_records == numbers.max() == 1


def naive_best_fit(sizes, capacity):
    """Rows of items, by definition."""
    rows = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        fitting = [row for row in rows if sum(sizes[i] for i in row) + sizes[item] <= capacity]
        if fitting:
            max(fitting, key=lambda row: sum(sizes[i] for i in row)).append(item)
        else:
            rows.append([item])
    return rows


@pytest.mark.parametrize("capacity", [1, 7, 30, 100])
@pytest.mark.parametrize("count", [0, 1, 2, 90])
def test_best_fit_is_best_fit(count, capacity):
    sizes = np.random.default_rng(capacity).integers(1, capacity + 1, count)
    row = best_fit(sizes, capacity)
    used = np.bincount(row, sizes)
    assert used.max(initial=0) <= capacity
    naive = naive_best_fit(sizes.tolist(), capacity)
    assert sorted(used) == sorted(sum(sizes[item] for item in some) for some in naive)


def next_fit(sizes, capacity):
    """Rows that are filled one after the other."""
    rows, left = 0, 0
    for size in sizes:
        if size > left:
            rows, left = rows + 1, capacity
        left -= size
    return rows


@pytest.mark.parametrize("length", [64, 128])
def test_little_is_padding(length):
    source = Given(documents_of(realistic_lengths(3000)))
    packed = PackedTexts(source, TOKENIZER, length)
    pieces = [len(piece) + 2 for row in rows_of(packed) for piece in pieces_of(row)]
    assert packed.waste == pytest.approx(1 - sum(pieces) / (packed.num_records * length))
    assert packed.waste < 0.01
    in_turn = np.random.default_rng(0).permutation(pieces)
    greedy_waste = 1 - sum(pieces) / (next_fit(in_turn, length) * length)
    assert packed.waste < greedy_waste / 10
    # One document a row, as captions are: most of it is padding.
    assert 1 - sum(pieces) / (len(pieces) * length) > 0.4


def test_the_first_rows_are_like_the_others():
    packed = PackedTexts(Given(documents_of(realistic_lengths(4000))), TOKENIZER, 64)
    counts = [row.count(TOKENIZER.bos_id) for row in rows_of(packed)]
    half = len(counts) // 2
    assert np.mean(counts[:half]) == pytest.approx(np.mean(counts[half:]), rel=0.1)


def test_windows_cost_little(monkeypatch):
    source = Given(documents_of(realistic_lengths(3000)))
    whole = PackedTexts(source, TOKENIZER, 64)
    monkeypatch.setattr(packing, "_WINDOW", 500)
    parted = PackedTexts(source, TOKENIZER, 64)
    assert whole.num_records <= parted.num_records <= whole.num_records + 6 * 3


def assert_same(one, other):
    assert rows_of(one) == rows_of(other)
    assert one.identity == other.identity


def test_same_in_every_process(monkeypatch):
    source = Given(documents_of(realistic_lengths(300)))
    packed = PackedTexts(source, TOKENIZER, 32)
    assert_same(packed, PackedTexts(source, TOKENIZER, 32))
    assert_same(packed, pickle.loads(pickle.dumps(packed)))
    monkeypatch.setattr(packing, "_CHUNK", 7)
    assert_same(packed, PackedTexts(source, TOKENIZER, 32))


@pytest.mark.slow
def test_workers_pack_the_same(monkeypatch):
    source = Given(documents_of(realistic_lengths(300)))
    packed = PackedTexts(source, TOKENIZER, 32)
    monkeypatch.setattr(packing, "_CHUNK", 50)
    assert_same(packed, PackedTexts(source, TOKENIZER, 32, workers=2))


def test_cache_file(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "rows.npz"
    source = Given(documents_of(realistic_lengths(100)))
    first = PackedTexts(source, TOKENIZER, 32, cache_file=file)
    with monkeypatch.context() as patch:
        patch.setattr(Given, "caption", lambda *_: pytest.fail("packed again"))
        assert_same(first, PackedTexts(source, TOKENIZER, 32, cache_file=file))
    assert [path.name for path in file.parent.iterdir()] == ["rows.npz"]
    file.write_bytes(b"PK\x03\x04torn")
    with pytest.raises(ValueError, match=r"rows\.npz: not a caption cache.*delete it"):
        PackedTexts(source, TOKENIZER, 32, cache_file=file)
    with pytest.raises(ValueError, match=r"rows\.npz: source fake has no identity"):
        PackedTexts(Fake(), TOKENIZER, 32, cache_file=file)


@pytest.mark.parametrize("what", ["identity", "tokenizer", "length", "window"])
def test_a_cache_file_of_something_else_is_written_anew(tmp_path, monkeypatch, what):
    file = tmp_path / "rows.npz"
    texts = documents_of(realistic_lengths(100))
    old = PackedTexts(Given(texts), TOKENIZER, 32, cache_file=file)
    identity = old.identity
    source, tokenizer, length = Given(texts), TOKENIZER, 32
    if what == "identity":
        source = Given(texts[::-1])
        source.identity = "reversed"
    elif what == "tokenizer":
        tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, vocab_size=45)
    elif what == "length":
        length = 20
    else:
        monkeypatch.setattr(packing, "_WINDOW", 10)
    kept = PackedTexts(source, tokenizer, length, cache_file=file)
    assert_same(kept, PackedTexts(source, tokenizer, length))
    assert rows_of(kept) != rows_of(old)
    assert kept.identity != identity


def test_what_a_packed_source_is():
    texts = ["a red square", "the small circle", "green"]
    packed = PackedTexts(Given(texts), TOKENIZER, 40)
    assert isinstance(packed, Identified)
    assert (packed.name, packed.num_records, packed.pictures) == ("given", 1, False)
    assert (packed.extra_fields, packed.classes, packed.word_classes()) == ((), (), {})
    assert (packed.num_truncated, packed.max_length) == (0, 40)
    lines = packed.caption(0, 0).split("\n")
    assert lines == [TOKENIZER.decode(words_of(text)) for text in texts]
    np.testing.assert_array_equal(packed.num_captions(np.zeros(2, np.int64)), [1, 1])
    with pytest.raises(IndexError, match="given: a record has one text"):
        packed.ids(0, 1)
    with pytest.raises(ConfigError, match=r"data\.sources\.given: its records are texts"):
        packed.image(0, 32)
    assert PackedTexts(Fake(), TOKENIZER, 40).identity is None


def test_all_captions_of_records_are_packed():
    source = Fake()
    texts = [source.caption(r, i) for r in range(50) for i in range(1 + r % 3)]
    assert rows_of(PackedTexts(source, TOKENIZER, 30)) == rows_of(
        PackedTexts(Given(texts), TOKENIZER, 30)
    )


def test_histogram_and_unknown_share():
    texts = [*documents_of(realistic_lengths(50)), "red 漢 green 漢"]
    packed = PackedTexts(Given(texts), TOKENIZER, 32)
    rows = rows_of(packed)
    np.testing.assert_array_equal(packed.histogram(), np.bincount([*map(len, rows)], minlength=33))
    words = [token for row in rows for token in row if token not in FRAMING]
    assert packed.unknown_share() == pytest.approx(words.count(TOKENIZER.unk_id) / len(words))
    assert packed.unknown_share() > 0


@pytest.mark.parametrize("length", [2, 0, -1])
def test_rows_must_hold_a_word(length):
    with pytest.raises(ConfigError, match=rf"data\.max_text_length: {length} tokens hold no word"):
        PackedTexts(Given(["red"]), TOKENIZER, length)


@pytest.mark.parametrize("texts", [[], ["..."], ["\u200b", ""]])
def test_texts_without_a_word_are_refused(texts):
    with pytest.raises(ConfigError, match=rf"sources\.given: none of its {len(texts)} texts"):
        PackedTexts(Given(texts), TOKENIZER, 8)


def test_an_unbounded_source_is_refused():
    with pytest.raises(ValueError, match="source fake: an unbounded source's texts have no end"):
        PackedTexts(Fake(None), TOKENIZER, 8)


@pytest.mark.parametrize("edges", [(32,), (8, 16, 32)])
def test_a_plan_reads_every_row_once_an_epoch(edges):
    packed = PackedTexts(Given(documents_of(realistic_lengths(2000))), TOKENIZER, 32)
    batch_size = 8
    plan = Plan([PlannedSource(packed, packed)], batch_size, 0, edges, 32)
    assert plan.examples_per_epoch == packed.num_records
    # Epochs are whole windows only by chance: rows are counted over the windows read.
    count = -(-packed.num_records // (plan.window_batches * batch_size)) * plan.window_batches
    batches = [plan.batch(t) for t in range(count)]
    records = np.concatenate([batch.record for batch in batches])
    times, more = divmod(len(records), packed.num_records)
    seen = np.bincount(records, minlength=packed.num_records)
    assert set(seen) == ({times, times + 1} if more else {times})
    assert np.count_nonzero(seen == times + 1) == more
    for batch in batches[:5]:
        assert not batch.caption.any()
        ids, lengths = packed.padded(batch.record, batch.caption, batch.bucket.text_length)
        np.testing.assert_array_equal(lengths, batch.length)
        assert ids.shape == (batch_size, batch.bucket.text_length)
    assert plan.padding_waste(count) < 0.02


def test_a_set_holds_every_row_once():
    packed = PackedTexts(Given(documents_of(realistic_lengths(300))), TOKENIZER, 32)
    plan = EvalPlan(PlannedSource(packed, packed), packed.num_records, 16, (32,), 32)
    batches = [plan.batch(t) for t in range(plan.num_batches)]
    records = np.concatenate([batch.record[batch.valid] for batch in batches])
    np.testing.assert_array_equal(np.sort(records), np.arange(packed.num_records))


@pytest.mark.pack
@pytest.mark.parametrize(
    ("files", "column"), [("wikitext2_test.txt", ""), ("sst2_train.tsv", "sentence")]
)
def test_real_texts(pack, files, column):
    source = Texts(pack / "text", "train", files, column=column, name="real")
    records = np.arange(source.num_records)
    texts = source.captions(records, indices(records))
    tokenizer = Tokenizer.train(texts, vocab_size=2000)
    packed = PackedTexts(source, tokenizer, 64)
    assert packed.waste < 0.005
    found = [token for row in rows_of(packed) for token in row]
    framing = (tokenizer.bos_id, tokenizer.eos_id)
    wanted = np.concatenate([row[1:-1] for row in tokenizer.encode(texts, 1 << 20)])
    counts = np.bincount(found, minlength=tokenizer.vocab_size)
    counts[list(framing)] = 0
    np.testing.assert_array_equal(counts, np.bincount(wanted, minlength=tokenizer.vocab_size))
    assert packed.unknown_share() == 0
