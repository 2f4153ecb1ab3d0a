"""Encoded captions: token ids and lengths of a source's captions.

    captions = EncodedCaptions(source, tokenizer, max_length=40)
    captions.lengths(records, indices)        # int32 [n], what the plan sorts by
    captions.ids(record, index)               # int32 [length]
    captions.padded(records, indices, 16)     # int32 [n, 16] and int32 [n], rows of a batch

The captions of a finite source are tokenised once into flat arrays, which a file can keep. Those
of an unbounded source are tokenised as they are planned, a window at a time, and the latest
windows are kept.

Captions of two sentences (``source.Paired``) become ``<s> first </s> second </s>``.
"""

import collections
import hashlib
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlp_jax.data.cache import uncached
from vlp_jax.data.making import found_or_made, in_order
from vlp_jax.data.source import PAIR_SEPARATOR, Identified, ManyCaptions, Paired, Source
from vlp_jax.data.tokenizer import Tokenizer

_CHUNK = 512  # records whose captions one worker encodes at a time
_CALLS_KEPT = 4  # of `lengths`, whose ids an unbounded source keeps; the plan makes one a window


class EncodedCaptions:
    """The captions of a source as token ids.

    Picklable, like its source: loader workers receive a copy.

    Attributes:
        source: the source.
        tokenizer: the tokenizer.
        max_length: longest row in tokens, ``<s>`` and ``</s>`` included; longer captions are cut.
        longest: no row is longer: the longest stored one, or ``max_length`` where the captions of
            an unbounded source are not known beforehand.
        num_truncated: captions that were cut, of those tokenised so far (all, if stored).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        store: bool | None = None,
        cache_file: str | os.PathLike[str] | None = None,
        workers: int = 0,
    ):
        """Tokenises the captions of a finite source, or reads them from ``cache_file``.

        Args:
            source: where captions come from.
            tokenizer: what encodes them.
            max_length: longest row in tokens, special tokens included.
            store: whether to tokenise all captions now; by default if the source is finite. A
                source of which only a few records will be read does better without.
            cache_file: an ``.npz`` written when absent or made from other captions or another
                tokenizer, and read otherwise. Stored captions of a source with an ``identity``
                only. Of several processes that miss it one writes it while the others wait.
            workers: processes that encode captions to be stored; 0 encodes them in this one.

        Raises:
            ValueError: ``store`` is asked of an unbounded source, a cache file of one that does
                not store or has no identity, or ``max_length`` leaves no room for a word.
        """
        if store is None:
            store = source.num_records is not None
        if store and source.num_records is None:
            raise ValueError(f"source {source.name}: an unbounded source's captions have no end")
        if cache_file is not None and not store:
            raise ValueError(f"{cache_file}: only stored captions can be cached in a file")
        self.source = source
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.longest = max_length
        self.num_truncated = 0
        self._stored = store
        self._recent: collections.deque[dict[tuple[int, int], np.ndarray]] = collections.deque(
            maxlen=_CALLS_KEPT
        )
        self._lock = threading.Lock()
        if store:
            self._store(None if cache_file is None else pathlib.Path(cache_file), workers)

    def lengths(self, records: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Row lengths, special tokens included: int64 [n], int [n] -> int32 [n]."""
        if self._stored:
            rows = self._first_row[records] + indices
            return (self._start[rows + 1] - self._start[rows]).astype(np.int32)
        keys = list(zip(records.tolist(), indices.tolist(), strict=True))
        ids = self._encode_on_demand(keys)
        return np.fromiter((len(ids[key]) for key in keys), np.int32, len(keys))

    def ids(self, record: int, index: int) -> np.ndarray:
        """Token ids ``<s> ... </s>`` of one caption: int32 [length]."""
        if self._stored:
            row = self._first_row[record] + index
            return self._flat[self._start[row] : self._start[row + 1]].astype(np.int32)
        key = (int(record), int(index))
        with self._lock:
            for recent in reversed(self._recent):
                if key in recent:
                    return recent[key]
        return self._encode_on_demand([key])[key]

    def padded(
        self, records: np.ndarray, indices: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Many captions as one array.

        Args:
            records: int64 [n].
            indices: int [n], the caption of each record.
            width: tokens of a padded row.

        Returns:
            Ids int32 [n, width] and lengths int32 [n].

        Raises:
            ValueError: a caption is longer.
        """
        if self._stored:
            row = self._first_row[records] + indices
            return padded_rows(self._flat, self._start, row, width, self.tokenizer.pad_id)
        rows = [self.ids(*key) for key in zip(records.tolist(), indices.tolist(), strict=True)]
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        _check_fit(lengths, width)
        ids = np.full((len(rows), width), self.tokenizer.pad_id, np.int32)
        for padded, tokens in zip(ids, rows, strict=True):
            padded[: len(tokens)] = tokens
        return ids, lengths

    def histogram(self, sample: int = 4096) -> np.ndarray:
        """How many captions have each length: int64 [max_length + 1].

        Args:
            sample: records to look at, with all their captions, where captions are not stored;
                stored captions are all counted.
        """
        if self._stored:
            lengths = np.diff(self._start)
        else:
            records = np.arange(min(sample, self.source.num_records or sample))
            counts = self.source.num_captions(records)
            lengths = self.lengths(np.repeat(records, counts), count_up(counts))
        return np.bincount(lengths, minlength=self.max_length + 1).astype(np.int64)

    def unknown_share(self, sample: int = 1024) -> float:
        """Share of the tokens of words that are <unk>: words or signs never seen in training.

        Args:
            sample: records to look at, with all their captions, where captions are not stored;
                stored captions are all counted.
        """
        if self._stored:
            tokens, rows = self._flat, len(self._start) - 1
        else:
            records = np.arange(min(sample, self.source.num_records or sample))
            counts = self.source.num_captions(records)
            keys = np.repeat(records, counts).tolist(), count_up(counts).tolist()
            encoded = self._encode_on_demand(list(zip(*keys, strict=True)))
            tokens, rows = np.concatenate(list(encoded.values())), len(encoded)
        words = tokens.size - rows - int((tokens == self.tokenizer.eos_id).sum())
        return float((tokens == self.tokenizer.unk_id).sum() / max(words, 1))

    def _encode_on_demand(self, keys: list[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
        unique = list(dict.fromkeys(keys))
        records, indices = np.asarray(unique, np.int64).T
        texts = _texts(self.source, records, indices)
        rows, num_truncated = token_rows(
            self.tokenizer, texts, self.max_length, _has_pairs(self.source)
        )
        encoded = dict(zip(unique, rows, strict=True))
        with self._lock:
            self.num_truncated += num_truncated
            if len(encoded) > 1:
                self._recent.append(encoded)
        return encoded

    def _store(self, cache_file: pathlib.Path | None, workers: int) -> None:
        assert self.source.num_records is not None
        records = np.arange(self.source.num_records)
        self._first_row = np.concatenate([[0], np.cumsum(self.source.num_captions(records))])
        stored = kept_arrays(cache_file, self._digest, lambda: self._encode_all(workers))
        self._start, self._flat = stored["start"], stored["flat"]
        self.num_truncated = int(stored["num_truncated"])
        self.longest = int(np.diff(self._start).max(initial=0))

    def _encode_all(self, workers: int) -> dict[str, np.ndarray]:
        """Every caption, in the order of records; what is kept in a file."""
        num_records = len(self._first_row) - 1
        # Workers need none of the pictures that a cache holds.
        source = uncached(self.source) if workers else self.source
        chunks = (
            (source, self.tokenizer, self.max_length, start, min(start + _CHUNK, num_records))
            for start in range(0, num_records, _CHUNK)
        )
        parts = list(in_order(_encode_chunk, chunks, workers))
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
        flat = np.concatenate([np.empty(0, np.uint16), *(part.flat for part in parts)])
        return {
            "start": np.concatenate([[0], np.cumsum(lengths)]),
            "flat": flat,
            "num_truncated": np.asarray(sum(part.num_truncated for part in parts)),
        }

    def _digest(self, cache_file: pathlib.Path) -> str:
        """Of everything the stored arrays depend on."""
        identity = known_identity(self.source, cache_file)
        digest = hashlib.sha256(f"{self.max_length}\n{self.tokenizer.to_json()}\n".encode())
        digest.update(identity.encode() + b"\n" + self._first_row.tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("_lock", "_recent")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
        self._recent = collections.deque(maxlen=_CALLS_KEPT)


def captions_file(pictures: pathlib.Path, tokenizer: Tokenizer, max_length: int) -> pathlib.Path:
    """Where captions are kept beside a file of pictures, each tokenizer's in a file of its own."""
    digest = hashlib.sha256(f"{max_length}\n{tokenizer.to_json()}".encode()).hexdigest()
    return pictures.with_name(f"{pictures.stem}.captions-{digest[:12]}.npz")


def every_caption(source: Source, records: np.ndarray) -> list[str]:
    """The captions of each of the records, int64 [n], one record's after another's."""
    counts = source.num_captions(records)
    return _texts(source, np.repeat(records, counts), count_up(counts))


def count_up(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)


def id_dtype(tokenizer: Tokenizer) -> type[np.generic]:
    """What ids are stored as."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def padded_rows(
    flat: np.ndarray, start: np.ndarray, rows: np.ndarray, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Stored rows as one array.

    Args:
        flat: ids of all rows, one row after the other.
        start: where each row begins, int64, and at last where the last one ends.
        rows: int64 [n].
        width: tokens of a padded row.
        pad_id: what rows are filled up with.

    Returns:
        Ids int32 [n, width] and lengths int32 [n].

    Raises:
        ValueError: a row is longer.
    """
    first = start[rows]
    lengths = (start[rows + 1] - first).astype(np.int32)
    _check_fit(lengths, width)
    # Where the last rows are padded, the place is beyond the end and does not matter.
    ids = np.take(flat, first[:, None] + np.arange(width), mode="clip").astype(np.int32)
    ids[np.arange(width) >= lengths[:, None]] = pad_id
    return ids, lengths


def kept_arrays(
    file: pathlib.Path | None,
    digest: Callable[[pathlib.Path], str],
    make: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Arrays by name: read from a file if it holds them, or else made, and kept in it.

    Args:
        file: an ``.npz``; None keeps nothing.
        digest: file -> a text that differs for other arrays; called only if there is a file.
        make: makes the arrays.

    Raises:
        ValueError: the file is damaged.
    """
    if file is None:
        return make()
    own = digest(file)
    return found_or_made(
        file, lambda: _read_cache(file, own), lambda: _write_cache(file, own, make())
    )


def known_identity(source: Source, cache_file: pathlib.Path) -> str:
    """What a file of a source's captions is recognised by.

    Raises:
        ValueError: the source cannot tell.
    """
    identity = source.identity if isinstance(source, Identified) else None
    if identity is None:
        raise ValueError(
            f"{cache_file}: source {source.name} has no identity by which the file could "
            "be recognised; keep its captions in memory"
        )
    return identity


class _Encoded(NamedTuple):
    """Captions of some records: lengths int64 [n], their ids one after the other, and cuts."""

    lengths: np.ndarray
    flat: np.ndarray
    num_truncated: int


def _encode_chunk(
    source: Source, tokenizer: Tokenizer, max_length: int, start: int, stop: int
) -> _Encoded:
    """All captions of the records from ``start`` to ``stop``."""
    texts = every_caption(source, np.arange(start, stop))
    rows, num_truncated = token_rows(tokenizer, texts, max_length, _has_pairs(source))
    return _Encoded(
        np.fromiter(map(len, rows), np.int64, len(rows)),
        np.concatenate(rows).astype(id_dtype(tokenizer)),
        num_truncated,
    )


def token_rows(
    tokenizer: Tokenizer, texts: list[str], max_length: int, pairs: bool
) -> tuple[list[np.ndarray], int]:
    """Texts as rows ``<s> ... </s>``.

    Args:
        tokenizer: of the words.
        texts: n.
        max_length: most tokens of a row.
        pairs: a text may be two sentences with ``PAIR_SEPARATOR`` between.

    Returns:
        n arrays int32 [length], and how many texts were cut.

    Raises:
        ValueError: ``max_length`` leaves no room for a word, of each sentence.
    """
    if pairs:
        return _encode_pairs(tokenizer, texts, max_length)
    # One token more than fits tells a caption that is cut from one that just fits.
    rows = tokenizer.encode(texts, max_length + 1)
    cut = [index for index, row in enumerate(rows) if len(row) > max_length]
    for index in cut:
        rows[index] = np.append(rows[index][: max_length - 1], np.int32(tokenizer.eos_id))
    return rows, len(cut)


def _encode_pairs(
    tokenizer: Tokenizer, texts: list[str], max_length: int
) -> tuple[list[np.ndarray], int]:
    """Rows ``<s> first </s> second </s>`` of texts of two sentences, or of one, as ``Tokenizer``'s.

    Args:
        tokenizer: of the words.
        texts: n, of one sentence, or of two with ``PAIR_SEPARATOR`` between.
        max_length: most tokens of a row; the longer sentence loses its end until both fit.

    Returns:
        n arrays int32 [length], and how many texts were cut.

    Raises:
        ValueError: ``max_length`` leaves no room for a word of each sentence.
    """
    if max_length < 5:
        raise ValueError(
            f"data.max_text_length={max_length}: must be at least 5 for pairs of sentences (<s>, "
            "one token, </s>, one token, </s>)"
        )
    parts = [text.split(PAIR_SEPARATOR, 1) for text in texts]
    # One token more than fits beside the fewest special tokens, as above.
    encoded = iter(tokenizer.encode([part for two in parts for part in two], max_length + 1))
    rows, num_truncated = [], 0
    for two in parts:
        sentences = [next(encoded)[1:-1] for _ in two]
        lengths = [len(sentence) for sentence in sentences]
        room = max_length - 1 - len(lengths)
        row = [tokenizer.bos_id]
        for sentence, length in zip(sentences, _kept_lengths(lengths, room), strict=True):
            row += [*sentence[:length].tolist(), tokenizer.eos_id]
        rows.append(np.asarray(row, np.int32))
        num_truncated += sum(lengths) > room
    return rows, num_truncated


def _kept_lengths(lengths: list[int], room: int) -> list[int]:
    """What is left of one or two sentences, if the end of the longer is taken until they fit.

    Of two as long as each other the second loses a token, as in BERT.
    """
    first, *others = lengths
    second = [min(other, max(room - first, room // 2)) for other in others]
    return [min(first, room - sum(second)), *second]


def _has_pairs(source: Source) -> bool:
    read = uncached(source)
    return isinstance(read, Paired) and read.pairs


def _texts(source: Source, records: np.ndarray, indices: np.ndarray) -> list[str]:
    """The caption of each record and index, int64 [n] both."""
    if isinstance(source, ManyCaptions):
        return source.captions(records, indices)
    return [
        source.caption(record, index)
        for record, index in zip(records.tolist(), indices.tolist(), strict=True)
    ]


def _check_fit(lengths: np.ndarray, width: int) -> None:
    if lengths.max(initial=0) > width:
        raise ValueError(f"a caption of {lengths.max()} tokens does not fit rows of {width}")


def _read_cache(file: pathlib.Path, digest: str) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None if it is absent or of other captions."""
    if not file.is_file():
        return None
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a caption cache ({error}); delete it") from error
    return found if str(found.get("digest")) == digest else None


def _write_cache(
    file: pathlib.Path, digest: str, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Writes the arrays and returns them."""
    partial = file.with_name(f"{file.name}.partial")  # only one process makes it at a time
    with partial.open("wb") as stream:
        np.savez(stream, allow_pickle=False, digest=np.asarray(digest), **arrays)
    os.replace(partial, file)  # another process sees the whole file or none
    return arrays
