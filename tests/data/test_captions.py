import itertools
import pickle

import numpy as np
import pytest

from tests.data.fake import MAX_LENGTH, TOKENIZER, Fake
from vlp_jax.data import captions as captions_lib
from vlp_jax.data.captions import EncodedCaptions, captions_file
from vlp_jax.data.text_edges import batch_maxima, fit_edges
from vlp_jax.data.tokenizer import Tokenizer


def all_pairs(source, records=40):
    counts = source.num_captions(np.arange(records))
    return (
        np.repeat(np.arange(records), counts),
        np.concatenate([np.arange(count) for count in counts]),
    )


@pytest.mark.parametrize("store", [True, False])
def test_lengths_and_ids_are_the_tokenizer_s(store):
    source = Fake()
    encoded = EncodedCaptions(source, TOKENIZER, MAX_LENGTH, store=store)
    records, indices = all_pairs(source)
    lengths = encoded.lengths(records, indices)
    assert lengths.dtype == np.int32
    for record, index, length in zip(records, indices, lengths, strict=True):
        ids = encoded.ids(record, index)
        assert ids.dtype == np.int32
        assert len(ids) == length
        (expected,) = TOKENIZER.encode([source.caption(record, index)], MAX_LENGTH)
        np.testing.assert_array_equal(ids, expected)


def test_chunks_do_not_matter(monkeypatch):
    whole = EncodedCaptions(Fake(), TOKENIZER, MAX_LENGTH)
    monkeypatch.setattr(captions_lib, "_CHUNK", 7)
    chunked = EncodedCaptions(Fake(), TOKENIZER, MAX_LENGTH)
    records, indices = all_pairs(Fake())
    np.testing.assert_array_equal(
        whole.lengths(records, indices), chunked.lengths(records, indices)
    )
    np.testing.assert_array_equal(whole.ids(49, 1), chunked.ids(49, 1))


def test_truncated_captions_are_cut_and_counted():
    source, short = Fake(), 8
    encoded = EncodedCaptions(source, TOKENIZER, short)
    lengths = [
        len(TOKENIZER.encode([source.caption(int(r), int(i))], 99)[0])
        for r, i in zip(*all_pairs(source, 50), strict=True)
    ]
    assert encoded.num_truncated == sum(length > short for length in lengths) > 0
    assert encoded.longest == short
    record, index = next(
        pair for pair in zip(*all_pairs(source), strict=True)
        if len(TOKENIZER.encode([source.caption(*map(int, pair))], 99)[0]) > short
    )  # fmt: skip
    (expected,) = TOKENIZER.encode([source.caption(record, index)], short)
    np.testing.assert_array_equal(encoded.ids(record, index), expected)


def test_an_unbounded_source_is_encoded_on_demand():
    source = Fake(num_records=None)
    encoded = EncodedCaptions(source, TOKENIZER, MAX_LENGTH)
    stored = EncodedCaptions(Fake(64), TOKENIZER, MAX_LENGTH)
    records, indices = all_pairs(source, 64)
    np.testing.assert_array_equal(
        encoded.lengths(records, indices), stored.lengths(records, indices)
    )
    np.testing.assert_array_equal(encoded.histogram(64), stored.histogram())
    assert encoded.longest == MAX_LENGTH
    for far in range(10):  # far more windows than are kept
        encoded.lengths(records + 1000 * far, indices)
    np.testing.assert_array_equal(encoded.ids(3, 0), stored.ids(3, 0))


def test_histogram_counts_every_caption():
    encoded = EncodedCaptions(Fake(), TOKENIZER, MAX_LENGTH)
    lengths = encoded.lengths(*all_pairs(Fake(), 50))
    np.testing.assert_array_equal(
        encoded.histogram(), np.bincount(lengths, minlength=MAX_LENGTH + 1)
    )


@pytest.mark.parametrize("num_records", [50, None])
def test_pickled_copies_are_equal(num_records):
    encoded = EncodedCaptions(Fake(num_records), TOKENIZER, MAX_LENGTH)
    copy = pickle.loads(pickle.dumps(encoded))
    records, indices = all_pairs(Fake())
    np.testing.assert_array_equal(encoded.lengths(records, indices), copy.lengths(records, indices))


@pytest.mark.parametrize("store", [True, False])
def test_padded_rows_are_those_of_the_captions(store):
    source = Fake()
    encoded = EncodedCaptions(source, TOKENIZER, MAX_LENGTH, store=store)
    records, indices = all_pairs(source, 50)  # the last caption of all among them
    order = np.random.default_rng(0).permutation(len(records))
    records, indices = records[order], indices[order]
    ids, lengths = encoded.padded(records, indices, MAX_LENGTH + 3)
    assert ids.shape == (len(records), MAX_LENGTH + 3)
    assert ids.dtype == lengths.dtype == np.int32
    np.testing.assert_array_equal(lengths, encoded.lengths(records, indices))
    for row, record, index, length in zip(ids, records, indices, lengths, strict=True):
        np.testing.assert_array_equal(row[:length], encoded.ids(record, index))
        assert (row[length:] == TOKENIZER.pad_id).all()
    with pytest.raises(ValueError, match=f"a caption of {lengths.max()} tokens does not fit"):
        encoded.padded(records, indices, lengths.max() - 1)


class Kept(Fake):
    """A source whose captions a file can keep."""

    identity = "kept"


def test_cache_file(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "captions.npz"
    first = EncodedCaptions(Kept(), TOKENIZER, 8, cache_file=file)
    with monkeypatch.context() as patch:
        patch.setattr(Kept, "caption", lambda *_: pytest.fail("written again"))
        again = EncodedCaptions(Kept(), TOKENIZER, 8, cache_file=file)
    records, indices = all_pairs(Kept())
    np.testing.assert_array_equal(first.lengths(records, indices), again.lengths(records, indices))
    np.testing.assert_array_equal(first.ids(7, 1), again.ids(7, 1))
    assert first.num_truncated == again.num_truncated > 0
    other = EncodedCaptions(Kept(60), TOKENIZER, 8, cache_file=file)  # of more captions
    assert len(other.ids(59, 0)) > 2
    assert [path.name for path in file.parent.iterdir()] == ["captions.npz"]
    file.write_bytes(b"PK\x03\x04torn")
    with pytest.raises(ValueError, match=r"captions\.npz: not a caption cache.*delete it"):
        EncodedCaptions(Kept(), TOKENIZER, 8, cache_file=file)
    with pytest.raises(ValueError, match=r"captions\.npz: source fake has no identity"):
        EncodedCaptions(Fake(), TOKENIZER, 8, cache_file=file)


@pytest.mark.parametrize("what", ["identity", "tokenizer", "max_length"])
def test_a_cache_file_of_something_else_is_written_anew(tmp_path, what):
    file = tmp_path / "captions.npz"
    EncodedCaptions(Kept(), TOKENIZER, 8, cache_file=file)
    source, tokenizer, max_length = Kept(), TOKENIZER, 8
    if what == "identity":
        source.identity = "other"
        source.caption = lambda record, index: "blue"
    elif what == "tokenizer":
        tokenizer = Tokenizer.train(["a b c d e f g h"], vocab_size=200)
    else:
        max_length = 5
    kept = EncodedCaptions(source, tokenizer, max_length, cache_file=file)
    fresh = EncodedCaptions(source, tokenizer, max_length)
    pairs = all_pairs(source)
    for got, want in zip(kept.padded(*pairs, 8), fresh.padded(*pairs, 8), strict=True):
        np.testing.assert_array_equal(got, want)


def test_tokenizers_and_lengths_have_files_of_their_own(tmp_path):
    other = Tokenizer.train(["a b c d e f g h"], vocab_size=200)
    files = {
        captions_file(tmp_path / "train.npy", tokenizer, max_length)
        for tokenizer in (TOKENIZER, other)
        for max_length in (8, 9)
    }
    assert len(files) == 4
    assert {file.parent for file in files} == {tmp_path}
    assert all(file.name.startswith("train.captions-") for file in files)


@pytest.mark.slow
def test_workers_encode_the_same(monkeypatch):
    monkeypatch.setattr(captions_lib, "_CHUNK", 7)
    alone = EncodedCaptions(Fake(), TOKENIZER, 8)
    many = EncodedCaptions(Fake(), TOKENIZER, 8, workers=2)
    pairs = all_pairs(Fake(), 50)
    for got, want in zip(many.padded(*pairs, 8), alone.padded(*pairs, 8), strict=True):
        np.testing.assert_array_equal(got, want)
    assert many.num_truncated == alone.num_truncated > 0


def test_an_unbounded_source_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="no end"):
        EncodedCaptions(Fake(None), TOKENIZER, 8, store=True)
    with pytest.raises(ValueError, match="only stored captions"):
        EncodedCaptions(Kept(None), TOKENIZER, 8, cache_file=tmp_path / "x.npz")


def padded_tokens(histogram, edges):
    lengths = np.flatnonzero(histogram)
    return int((histogram[lengths] * np.asarray(edges)[np.searchsorted(edges, lengths)]).sum())


@pytest.mark.parametrize("multiple_of", [1, 3, 4])
@pytest.mark.parametrize("num_edges", [1, 2, 4])
def test_edges_are_optimal(num_edges, multiple_of):
    rng = np.random.default_rng(num_edges)
    histogram = rng.integers(0, 50, 18) * rng.integers(0, 2, 18)
    edges = fit_edges(histogram, num_edges, multiple_of)
    last = -(-int(np.flatnonzero(histogram)[-1]) // multiple_of) * multiple_of
    assert edges[-1] == last
    assert all(edge % multiple_of == 0 for edge in edges)
    lower = range(multiple_of, last, multiple_of)
    best = min(
        padded_tokens(histogram, (*some, last))
        for count in range(num_edges)
        for some in itertools.combinations(lower, count)
    )
    assert padded_tokens(histogram, edges) == best


def test_edges_reach_the_longest_and_are_no_more_than_help():
    histogram = np.bincount([5, 5, 9])
    assert fit_edges(histogram, 6, 1) == (5, 9)
    assert fit_edges(histogram, 6, 4, longest=30) == (8, 12, 32)
    with pytest.raises(ValueError, match="histogram is empty"):
        fit_edges(np.zeros(9, np.int64))
    with pytest.raises(ValueError, match=r"data\.num_edges=0"):
        fit_edges(histogram, 0)


def test_batch_maxima_are_those_of_sorted_windows():
    rng = np.random.default_rng(0)
    histogram = np.bincount(rng.integers(3, 30, 500), minlength=32)
    counts = batch_maxima(histogram, batch_size=64, window_batches=32, windows=32)
    assert counts.sum() == 32 * 32
    shares = histogram / histogram.sum()
    drawn = np.sort(rng.choice(32, size=(32, 32 * 64), p=shares), axis=1)
    expected = np.bincount(drawn[:, 63::64].ravel(), minlength=32)
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() < 0.02 * counts.sum()
