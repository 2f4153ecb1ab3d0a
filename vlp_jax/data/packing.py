"""Texts packed into rows of one length, so that hardly a token of a batch is padding.

    packed = PackedTexts(texts, tokenizer, length=128)
    packed.padded(rows, np.zeros_like(rows), 128)      # int32 [n, 128] and int32 [n]
    packed.documents(rows, np.zeros_like(rows), 128)   # int32 [n, 128]: 1 1 1 2 2 2 2 3 3 0 0
    Plan([PlannedSource(packed, packed)], ...)         # a record is a row

The lengths of texts without pictures differ more than those of captions. A batch that is padded to
its longest is mostly padding, and one that is cut to a length loses what is beyond. Here every row
holds as many whole documents as fit, each ``<s> words </s>``; one that is longer than a row is cut
into several, and no word is lost.
"""

import hashlib
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vlp_jax.data.captions import (
    count_up,
    every_caption,
    id_dtype,
    kept_arrays,
    known_identity,
    padded_rows,
)
from vlp_jax.data.making import in_order
from vlp_jax.data.source import Identified, Source
from vlp_jax.data.texts import TextOnly
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.errors import ConfigError

MIN_LENGTH = 3  # <s>, one token, </s>

_VERSION = 1  # part of the digest of kept rows: raise it when the same texts are packed otherwise
_CHUNK = 1024  # records whose texts one worker encodes at a time
# Records whose texts are packed together. More would hardly fill rows better, for of so many only
# the last few rows have room left, and would take the more memory while they are packed.
_WINDOW = 1 << 16


class PackedTexts(TextOnly):
    """The texts of a source as rows of token ids: a ``Source`` of rows, and their encoded texts.

    It stands in for ``EncodedCaptions`` wherever these are read by record and caption; a record is
    a row, and its caption is number 0. Picklable: loader workers receive a copy.

    Attributes:
        name: of the source of the texts.
        source: of the texts.
        tokenizer: the tokenizer.
        max_length: most tokens of a row.
        longest: tokens of the longest row.
        num_records: rows.
        num_truncated: 0: what does not fit a row goes to others.
    """

    num_truncated = 0

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        length: int,
        *,
        cache_file: str | os.PathLike[str] | None = None,
        workers: int = 0,
    ):
        """Tokenises and packs the texts, or reads the rows from ``cache_file``.

        Args:
            source: finite; every caption of a record is a document.
            tokenizer: what encodes them.
            length: most tokens of a row, special tokens included.
            cache_file: an ``.npz`` written when absent or made from other texts, by another
                tokenizer or of another length, and read otherwise. Of several processes that miss
                it one writes it while the others wait.
            workers: processes that encode texts; 0 encodes them in this one.

        Raises:
            ConfigError: the length leaves no room for a word, or no text holds one.
            ValueError: the source is unbounded, or has no identity and yet a cache file; or the
                file is damaged.
        """
        if length < MIN_LENGTH:
            raise ConfigError(
                "data.max_text_length",
                f"{length} tokens hold no word of {source.name}",
                f"Use {MIN_LENGTH} or more (<s>, one token, </s>)",
            )
        if source.num_records is None:
            raise ValueError(f"source {source.name}: an unbounded source's texts have no end")
        self.name = source.name
        self.source = source
        self.tokenizer = tokenizer
        self.max_length = length
        stored = kept_arrays(
            None if cache_file is None else pathlib.Path(cache_file),
            lambda file: self._digest(known_identity(source, file)),
            lambda: self._pack_all(workers),
        )
        self._start, self._flat = stored["start"], stored["flat"]
        self.num_records: int = len(self._start) - 1
        self.longest = int(np.diff(self._start).max())

    @property
    def identity(self) -> str | None:
        """All that the rows depend on; None where the source of the texts cannot tell."""
        identity = self.source.identity if isinstance(self.source, Identified) else None
        return None if identity is None else f"packed-{self._digest(identity)}"

    @property
    def waste(self) -> float:
        """Share of the tokens that are padding in rows that are all padded to ``max_length``."""
        return 1.0 - len(self._flat) / (self.num_records * self.max_length)

    def lengths(self, records: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Tokens of rows, special tokens included: int64 [n], zeros [n] -> int32 [n]."""
        del indices
        return (self._start[records + 1] - self._start[records]).astype(np.int32)

    def ids(self, record: int, index: int) -> np.ndarray:
        """Token ids ``<s> ... </s> <s> ... </s>`` of a row: int32 [length]; ``index`` is 0."""
        self._check_index(index)
        return self._flat[self._start[record] : self._start[record + 1]].astype(np.int32)

    def padded(
        self, records: np.ndarray, indices: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Many rows as one array.

        Args:
            records: int64 [n].
            indices: zeros [n].
            width: tokens of a padded row.

        Returns:
            Ids int32 [n, width] and lengths int32 [n].

        Raises:
            ValueError: a row is longer.
        """
        del indices
        return padded_rows(self._flat, self._start, records, width, self.tokenizer.pad_id)

    def documents(self, records: np.ndarray, indices: np.ndarray, width: int) -> np.ndarray:
        """The number of the document that each token of ``padded`` belongs to.

        Returns:
            int32 [n, width], counted from 1 in every row; 0 at padding.

        Raises:
            ValueError: a row is longer.
        """
        ids, lengths = self.padded(records, indices, width)
        # No word is <s>: the tokenizer spells what looks like a special token.
        numbers = np.cumsum(ids == self.tokenizer.bos_id, axis=1, dtype=np.int32)
        numbers[np.arange(width) >= lengths[:, None]] = 0
        return numbers

    def caption(self, record: int, index: int) -> str:
        """The documents of a row as the tokenizer reads them back, a line each; ``index`` is 0."""
        ids = self.ids(record, index)
        ends = np.flatnonzero(ids == self.tokenizer.eos_id) + 1
        return "\n".join(map(self.tokenizer.decode, np.split(ids, ends[:-1])))

    def histogram(self) -> np.ndarray:
        """How many rows have each length: int64 [max_length + 1]."""
        return np.bincount(np.diff(self._start), minlength=self.max_length + 1).astype(np.int64)

    def unknown_share(self) -> float:
        """Share of the tokens of words that are <unk>: words or signs never seen in training."""
        framing = 2 * np.count_nonzero(self._flat == self.tokenizer.bos_id)
        unknown = np.count_nonzero(self._flat == self.tokenizer.unk_id)
        return unknown / (len(self._flat) - framing)

    def word_classes(self) -> Mapping[str, str]:
        """Those of the source of the texts."""
        return self.source.word_classes()

    def _pack_all(self, workers: int) -> dict[str, np.ndarray]:
        """Every row; what is kept in a file."""
        assert self.source.num_records is not None
        total = self.source.num_records
        windows = [range(at, min(at + _WINDOW, total)) for at in range(0, total, _WINDOW)]
        # A worker is given texts and not the source, of which all would be sent with every chunk.
        chunks = (
            (self.tokenizer, every_caption(self.source, np.asarray(chunk)))
            for window in windows
            for chunk in _chunks(window)
        )
        parts = in_order(_encode_words, chunks, workers)
        packed = [
            _pack_window(
                list(itertools.islice(parts, len(list(_chunks(window))))),
                self.tokenizer,
                self.max_length,
            )
            for window in windows
        ]
        lengths = np.concatenate([np.empty(0, np.int64), *(rows.lengths for rows in packed)])
        if not len(lengths):
            raise ConfigError(
                f"data.sources.{self.name}",
                f"none of its {total} texts holds a word",
                "Point it at files of text",
            )
        return {
            "start": np.concatenate([[0], np.cumsum(lengths)]),
            "flat": np.concatenate([rows.flat for rows in packed]),
        }

    def _digest(self, identity: str) -> str:
        """Of everything that the rows depend on."""
        made_of = (_VERSION, _WINDOW, self.max_length, self.source.num_records, identity)
        text = "\n".join((*map(str, made_of), self.tokenizer.to_json()))
        return hashlib.sha256(text.encode()).hexdigest()


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Items to rows: the largest first, each into the fullest row that still holds it.

    Needs at most 11/9 of the fewest rows possible and four more, whatever the sizes (Johnson et al.
    1974); of texts, where small ones are many, hardly more than their tokens ask for. The row is
    found by the lowest bit of a number: an item takes as long however many rows are open.

    Args:
        sizes: int64 [n], each at least 1 and at most ``capacity``.
        capacity: of a row.

    Returns:
        The row of each item, int64 [n]. Rows are numbered in an order drawn with a fixed seed: in
        that of their making the first would hold nothing but the longest texts, and an evaluation
        that reads so many rows would tell of these.
    """
    order = np.argsort(-sizes, kind="stable")
    with_left: list[list[int]] = [[] for _ in range(capacity)]  # rows, by the room they have left
    lefts = 0  # bit r is set where a row has room for r
    row_of = np.empty(len(sizes), np.int64)
    num_rows = 0
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if fitting := lefts >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_left[room].pop()
            if not with_left[room]:
                lefts ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        row_of[item] = row
        with_left[room - size].append(row)
        lefts |= 1 << (room - size)
    return np.random.default_rng(0).permutation(num_rows)[row_of]


class _Words(NamedTuple):
    """Ids of the words of some documents: how many each has, int64 [n], and all in a row."""

    lengths: np.ndarray
    flat: np.ndarray


class _Rows(NamedTuple):
    """Packed rows: their lengths, int64 [n], and their ids one after the other."""

    lengths: np.ndarray
    flat: np.ndarray


def _chunks(window: range) -> Iterator[range]:
    return (window[at : at + _CHUNK] for at in range(0, len(window), _CHUNK))


def _encode_words(tokenizer: Tokenizer, texts: list[str]) -> _Words:
    """The words of each text, all of them and without <s> and </s>."""
    rows = [row[1:-1] for row in tokenizer.encode(texts, sys.maxsize)]
    return _Words(
        np.fromiter(map(len, rows), np.int64, len(rows)),
        np.concatenate([np.empty(0, np.int32), *rows]).astype(id_dtype(tokenizer)),
    )


def _pack_window(parts: list[_Words], tokenizer: Tokenizer, length: int) -> _Rows:
    """Rows of documents, which are in the order of the source within each row."""
    words = np.concatenate([part.flat for part in parts])
    sizes = _cut(np.concatenate([part.lengths for part in parts]), length - 2)
    starts = np.cumsum(sizes) - sizes
    row = best_fit(sizes + 2, length)
    order = np.argsort(row, kind="stable")
    row, sizes, starts = row[order], sizes[order], starts[order]

    last = np.cumsum(sizes + 2) - 1  # place of each </s>
    first = last - sizes - 1
    flat = np.empty(len(words) + 2 * len(sizes), words.dtype)
    is_word = np.ones(len(flat), np.bool_)
    is_word[first] = is_word[last] = False
    flat[first], flat[last] = tokenizer.bos_id, tokenizer.eos_id
    flat[is_word] = words[np.repeat(starts, sizes) + count_up(sizes)]
    return _Rows(np.bincount(row, sizes + 2).astype(np.int64), flat)


def _cut(lengths: np.ndarray, most: int) -> np.ndarray:
    """Documents of so many words to pieces of at most ``most``; int64 both.

    All but a document's last piece are as long as may be, for those need no room in other rows.
    """
    pieces = -(-lengths // most)
    sizes = np.full(pieces.sum(), most)
    has_words = pieces > 0
    sizes[np.cumsum(pieces)[has_words] - 1] = (lengths - (pieces - 1) * most)[has_words]
    return sizes
