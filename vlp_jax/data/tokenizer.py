"""Tokenizer: trained on the corpus at hand, or loaded from BERT, RoBERTa or Hugging Face files.

    tokenizer = Tokenizer.train(captions, vocab_size=4096)            # deterministic
    tokenizer = Tokenizer.load("bert-base-uncased/")                  # vocab.txt
    tokenizer.encode(["A red square."], max_length=16)                # [int32 [n]]: <s> ... </s>

All the work is done by the ``tokenizers`` library. This module fixes what the library leaves
open: one name for the special tokens, one form of caption text, no special tokens out of
caption text (a caption that contains ``</s>`` is spelt, not obeyed), and a training whose result
is the same bytes in every process.
"""

import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vlp_jax.data.vocabulary import Vocabulary

FILE_NAME = "tokenizer.json"

# Role -> its names in the wild, ours first.
_SPECIALS = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<s>", "[CLS]"),
    "eos": ("</s>", "[SEP]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
_OURS = tuple(names[0] for names in _SPECIALS.values())
_PREFIX = "##"  # WordPiece's mark of a piece inside a word
_SPACE = "Ġ"  # a space, in the alphabet of byte-level BPE


def normalise_caption(text: str) -> str:
    """Collapses whitespace and drops the full stops at the end; returns "" if nothing is left.

    Half of all captions end in a full stop and half do not, at their annotator's whim: as a
    token it would only teach the model whose caption it reads.
    """
    return " ".join(text.split()).rstrip(" .")


class Tokenizer:
    """Text to token ids and back; a thin wrapper over ``tokenizers.Tokenizer``.

    Attributes:
        vocab_size: number of token ids; every id is below it.
        pad_id: id that fills up a row; also ``bos_id``, ``eos_id``, ``unk_id`` and ``mask_id``
            (for BERT vocabularies [PAD], [CLS], [SEP], [UNK] and [MASK]).
    """

    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    mask_id: int

    def __init__(self, library_tokenizer: tokenizers.Tokenizer, origin: str = "tokenizer"):
        """Wraps a tokenizer of the library; ``origin`` names it in error messages.

        Raises:
            ValueError: a special token is missing.
        """
        self._tokenizer = library_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for role, names in _SPECIALS.items():
            found = [name for name in names if name in vocabulary]
            if not found:
                raise ValueError(
                    f"tokenizer.path={origin}: the vocabulary has no {role} token (looked for "
                    f"{' or '.join(names)}); add one, or train a tokenizer on the corpus"
                )
            setattr(self, f"{role}_id", vocabulary[found[0]])
        specials = {
            vocabulary[name] for names in _SPECIALS.values() for name in names if name in vocabulary
        }
        self._tokenizer.add_special_tokens(
            [self._tokenizer.id_to_token(i) for i in sorted(specials)]
        )
        self._tokenizer.encode_special_tokens = True  # in caption text they are plain text
        self.vocab_size = max(vocabulary.values()) + 1

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, kind: str = "wordpiece"
    ) -> "Tokenizer":
        """Trains on captions; the same corpus gives the same tokenizer in every process.

        Args:
            captions: the corpus.
            vocab_size: most tokens to have, special tokens included; fewer on a small corpus.
            kind: ``wordpiece`` (lower-cased, accents dropped, as in BERT uncased) or ``bpe``
                (byte-level with case kept, as in RoBERTa).

        Raises:
            ValueError: the kind is unknown, the corpus empty, or the vocabulary too small to hold
                the corpus's letters.
        """
        corpus = [text for text in map(normalise_caption, captions) if text]
        if not corpus:
            raise ValueError("cannot train a tokenizer: the corpus holds no captions")
        if kind == "wordpiece":
            library_tokenizer = _train_wordpiece(corpus, vocab_size)
        elif kind == "bpe":
            library_tokenizer = _train_bpe(corpus, vocab_size)
        else:
            raise ValueError(f"tokenizer.kind={kind!r}: must be 'wordpiece' or 'bpe'")
        tokenizer = cls(library_tokenizer, origin="trained")
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size}: too small, the letters of the corpus and the "
                f"special tokens already take {tokenizer.vocab_size}"
            )
        return tokenizer

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads ``tokenizer.json`` (ours or Hugging Face's), ``vocab.txt`` or ``vocab.json``.

        Args:
            path: one of these files, or a folder that holds one (tried in this order). RoBERTa's
                ``vocab.json`` needs ``merges.txt`` beside it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file is damaged or lacks a special token.
        """
        path = pathlib.Path(path)
        candidates = [path]
        if path.is_dir():
            candidates = [path / name for name in (FILE_NAME, "vocab.txt", "vocab.json")]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"tokenizer.path={path}: looked for {', '.join(map(str, candidates))}; point it at "
                "a tokenizer.json, a BERT vocab.txt or a RoBERTa vocab.json (with merges.txt)"
            )
        if file.suffix == ".txt":
            return cls(_read_bert(file), origin=str(file))
        if file.name.endswith("vocab.json"):
            return cls(_read_roberta(file), origin=str(file))
        return cls.from_json(_read_text(file), origin=str(file))

    @classmethod
    def from_json(cls, text: str, origin: str = "tokenizer.json") -> "Tokenizer":
        """Inverse of ``to_json``; ``origin`` names the text in error messages.

        Raises:
            ValueError: the text is not a tokenizer.
        """
        try:
            library_tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for every fault
            raise ValueError(
                f"tokenizer.path={origin}: not a tokenizer file ({error}); save it again, or train "
                "a tokenizer on the corpus"
            ) from error
        return cls(library_tokenizer, origin)

    def to_json(self) -> str:
        """The whole tokenizer as text, the same text in every process; to be kept with weights."""
        return self._tokenizer.to_str()

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes ``to_json`` to a file, or to ``tokenizer.json`` in a folder; returns the file."""
        path = pathlib.Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.to_json(), encoding="utf-8")
        return file

    def encode(self, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """Texts to ids ``<s> ... </s>``, cut to ``max_length`` with ``</s>`` kept.

        Args:
            texts: n captions; each is put through ``normalise_caption``.
            max_length: most tokens of a row, special tokens included; at least 3.

        Returns:
            n arrays int32 [length], 2 <= length <= max_length.

        Raises:
            ValueError: ``max_length`` leaves no room for a word.
        """
        _check_max_length(max_length)
        encodings = self._tokenizer.encode_batch_fast(
            [normalise_caption(text) for text in texts], add_special_tokens=False
        )
        return [self._framed(encoding.ids, max_length) for encoding in encodings]

    def padded(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts as one array, as wide as the longest, rounded up to a multiple of 4 if that fits.

        Args:
            texts: n captions, at least one.
            max_length: as in ``encode``.

        Returns:
            Ids int32 [n, N] and lengths int32 [n].
        """
        return self.padded_rows(self.encode(texts, max_length), max_length)

    def padded_rows(
        self, rows: Sequence[np.ndarray], max_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of rows int32 [length] what ``padded`` makes of texts."""
        lengths = np.array([len(row) for row in rows], np.int32)
        # A model has no position beyond the longest text that it may be given.
        width = min(-(-int(lengths.max()) // 4) * 4, max_length)
        ids = np.full((len(rows), width), self.pad_id, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids, lengths

    def encode_with_words(self, text: str, max_length: int) -> tuple[np.ndarray, list[str | None]]:
        """Like ``encode`` for one text, and the word that each token is a piece of.

        Returns:
            ids int32 [length] and, for each, the whole word it belongs to in lower case, letters
            only; None for special tokens and for tokens without letters (figures, commas).
        """
        _check_max_length(max_length)
        text = normalise_caption(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans: dict[int | None, tuple[int, int]] = {}
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            first, last = spans.get(word, (start, end))
            spans[word] = min(first, start), max(last, end)
        letters = {
            word: "".join(filter(str.isalpha, text[start:end].lower())) or None
            for word, (start, end) in spans.items()
        }
        ids = self._framed(encoding.ids, max_length)
        words = [letters[word] for word in encoding.word_ids[: len(ids) - 2]]
        return ids, [None, *words, None]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids to text, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The name of each token, special tokens included.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        names = []
        for i in ids:
            name = self._tokenizer.id_to_token(int(i))
            if name is None:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
            names.append(name)
        return names

    @property
    def vocabulary(self) -> Vocabulary:
        """What models and objectives need to know of it."""
        names = self.tokens(range(self.vocab_size))
        if isinstance(self._tokenizer.model, models.WordPiece):
            continues = [name.startswith(_PREFIX) for name in names]
        else:  # byte-level: the first piece of a word carries the space before it
            specials = {getattr(self, f"{role}_id") for role in _SPECIALS}
            continues = [
                not name.startswith(_SPACE) and i not in specials for i, name in enumerate(names)
            ]
        return Vocabulary(self.vocab_size, self.mask_id, np.array(continues))

    def _framed(self, ids: list[int], max_length: int) -> np.ndarray:
        return np.asarray([self.bos_id, *ids[: max_length - 2], self.eos_id], np.int32)

    def __reduce__(self) -> tuple:
        return Tokenizer.from_json, (self.to_json(),)


def _check_max_length(max_length: int) -> None:
    if max_length < 3:
        raise ValueError(
            f"data.max_text_length={max_length}: must be at least 3 (<s>, one token, </s>)"
        )


def _train_wordpiece(corpus: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    normalizer, pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    # The trainer numbers "##x" in the order of a randomly seeded hash map, and its ties are
    # decided by number. Named beforehand, in sorted order, they are the same in every process.
    letters = sorted(
        {
            letter
            for text in corpus
            for letter in normalizer.normalize_str(text)
            if not letter.isspace()
        }
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[*_OURS, *(_PREFIX + letter for letter in letters)],
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    return _wordpiece(learner.get_vocab(), "<unk>", lowercase=True)


def _wordpiece(vocabulary: dict[str, int], unk: str, lowercase: bool) -> tokenizers.Tokenizer:
    """A BERT tokenizer, without the post-processor: ``encode`` frames the rows itself."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    return tokenizer


def _train_bpe(corpus: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(_OURS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """A RoBERTa tokenizer, without the post-processor: ``encode`` frames the rows itself."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"tokenizer.path={file}: not UTF-8 at byte {error.start}; fetch the file again"
        ) from error


def _read_bert(file: pathlib.Path) -> tokenizers.Tokenizer:
    tokens = _read_text(file).splitlines()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # vocab.txt does not say whether it is cased; an uncased one has capitals in [CLS] only.
    cased = any(token != token.lower() for token in tokens if not token.startswith("["))
    return _wordpiece(vocabulary, "[UNK]", lowercase=not cased)


def _read_roberta(file: pathlib.Path) -> tokenizers.Tokenizer:
    merges_file = file.with_name(file.name.replace("vocab.json", "merges.txt"))
    if not merges_file.is_file():
        raise FileNotFoundError(
            f"tokenizer.path={file}: {merges_file} not found; a RoBERTa vocabulary needs both files"
        )
    try:
        vocabulary = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"tokenizer.path={file}: not JSON ({error}); fetch the file again"
        ) from error
    lines = _read_text(merges_file).splitlines()
    merges = []
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#version"):
            left, separator, right = line.partition(" ")
            if not separator or " " in right:
                raise ValueError(
                    f"tokenizer.path={merges_file}:{number}: not two tokens; fetch the file again"
                )
            merges.append((left, right))
    return _byte_level(models.BPE(vocabulary, merges))
