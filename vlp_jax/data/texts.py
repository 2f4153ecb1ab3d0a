"""Texts without pictures: the lines, documents or table rows of files.

    Texts("/data/books", split="train")                                   # *.txt, a text a line
    Texts("/data/wiki.txt", split="val", unit="documents")                # blank lines between
    Texts("/data/sst2", split="train", files="*.tsv", column="sentence")  # a text a row

Every file is read once, to find where its texts begin and end; after that a text is read from its
file when it is asked for, so that memory holds two numbers a text and no text. Splits are made by a
hash of each text, which is in the same one whatever files come or go, and so are its duplicates; or
by the names of files.
"""

import array
import collections
import difflib
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from vlp_jax.data.files import text_fault
from vlp_jax.data.hashed_splits import SPLITS, check_shares, split_of
from vlp_jax.data.source import CaptionsOnly
from vlp_jax.data.text_files import TABLES, TextFile, file_state
from vlp_jax.data.tokenizer import normalise_caption
from vlp_jax.infra.errors import ConfigError

UNITS = ("lines", "documents")


class TextOnly(CaptionsOnly):
    """What a source inherits whose records are one text each and nothing else.

    Attributes:
        name: names the source in messages and metrics.
        pictures: False: ``image`` raises.
    """

    pictures = False
    name: str

    def num_captions(self, records: np.ndarray) -> np.ndarray:
        """One for each record: int64 [n] -> int64 [n]."""
        return np.ones(len(records), np.int64)

    def image(self, record: int, size: int) -> NoReturn:
        """None.

        Raises:
            ConfigError: always.
        """
        del record, size
        raise self._no_pictures()

    def image_key(self, record: int) -> NoReturn:
        """None.

        Raises:
            ConfigError: always.
        """
        del record
        raise self._no_pictures()

    def word_classes(self) -> Mapping[str, str]:
        """Empty: nobody classed the words."""
        return {}

    def _check_index(self, index: int) -> None:
        if index != 0:
            raise IndexError(f"{self.name}: a record has one text, number 0; asked for {index}")

    def _no_pictures(self) -> ConfigError:
        return ConfigError(
            f"data.sources.{self.name}",
            "its records are texts, and a picture of one was asked for",
            "Give what reads pictures a source that has them",
        )


class Texts(TextOnly):
    """The texts of some files: a ``Source`` of one split.

    Blank lines are no texts. Texts that are empty but for full stops, too short or not valid UTF-8
    are left out and counted.

    Attributes:
        num_records: texts of the split.
        bad_captions: texts of the split that were left out, by kind.
        identity: differs for other texts, or the same in another order.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        files: str | Sequence[str] = "*.txt",
        *,
        val_files: str | Sequence[str] = "",
        test_files: str | Sequence[str] = "",
        unit: str = "lines",
        column: str = "",
        min_chars: int = 1,
        val_percent: float = 1.0,
        test_percent: float = 1.0,
        name: str = "texts",
        key: str = "data.root",
    ):
        """Reads the files once and keeps where the texts of the split are.

        Args:
            root: a folder, or one file.
            split: ``train``, ``val`` or ``test``.
            files: pattern (or patterns) of the files in the folder, as ``*.txt`` or
                ``**/*.txt``; they are read in the order of their names.
            val_files: patterns of the files of split ``val``. Where these or ``test_files`` are
                given, all other files are of ``train``, the percentages do not matter, and
                nobody looks for texts that are in two splits.
            test_files: patterns of the files of split ``test``.
            unit: ``lines``, or ``documents`` which end at a blank line.
            column: of ``.tsv`` and ``.csv`` files, the one that holds the texts, as their first
                row names it; each row is a text. Quotes mean something in ``.csv`` files only.
            min_chars: shorter texts are left out.
            val_percent: share of the texts that is split ``val``.
            test_percent: share of the texts that is split ``test``.
            name: of the source.
            key: config key of ``root``, for messages.

        Raises:
            ConfigError: an argument cannot be used, there is no such file or column, or no text.
            ValueError: a ``.csv`` file is damaged.
        """
        self.name = name
        self.bad_captions: collections.Counter[str] = collections.Counter()
        self._section = key.rpartition(".")[0]
        self._check_choice("split", split, SPLITS)
        self._check_choice("unit", unit, UNITS)
        if min_chars < 1:
            raise self._error("min_chars", f"{min_chars} is below 1", "Use 1 to keep every text")
        if column and unit != "lines":
            raise self._error(
                "unit", f"{unit!r}, but each row of column {column!r} is a text", "Leave it out"
            )
        by_files = bool(_patterns(val_files) or _patterns(test_files))
        held_out = {"val": val_percent, "test": test_percent}
        if not by_files:
            check_shares(held_out, self._section)
        folder = pathlib.Path(root)
        if not folder.exists():
            raise ConfigError(
                key,
                f"{folder} does not exist",
                "Point it at a file of texts or at a folder of them",
            )
        if by_files:
            patterns = {"train": files, "val": val_files, "test": test_files}
            paths = self._files_of_split(folder, patterns, split)
        else:
            paths = [folder] if folder.is_file() else self._matching(folder, "files", files)
        self._files = [self._file(path, unit, column) for path in paths]

        seen, own = self._scan(split, None if by_files else held_out, min_chars)
        if seen and not own:
            raise self._error(
                "split",
                f"split {split!r} of {seen} texts is empty "
                f"(val_percent={val_percent}, test_percent={test_percent})",
                "Lower the percentages"
                if split == "train"
                else f"Raise its percentage, give {split}_files, or remove what is evaluated on it",
            )
        if not self.num_records:
            read = f"{paths[0]}" if len(paths) == 1 else f"{len(paths)} files from {paths[0]} on"
            left_out = f"; left out: {dict(self.bad_captions)}" if own else ""
            raise ConfigError(
                key,
                f"there is no usable text in {read}{left_out}",
                "Point it at UTF-8 files that hold some, not compressed",
            )

    def caption(self, record: int, index: int) -> str:
        """The text of a record, as written but for the space around it; ``index`` is 0."""
        self._check_index(index)
        return self.captions(np.asarray([record]), np.zeros(1, np.int64))[0]

    def captions(self, records: np.ndarray, indices: np.ndarray) -> list[str]:
        """The texts of many records: int64 [n], and zeros [n].

        Raises:
            ValueError: a file is not what it was when its texts were found.
        """
        self._check_index(int(indices.max(initial=0)))
        starts, ends = self._start[records].tolist(), self._end[records].tolist()
        of_file = np.searchsorted(self._first, records, side="right") - 1
        texts = [""] * len(records)
        for number in np.unique(of_file).tolist():
            file = self._files[number]
            with file.opened() as stream:
                for place in np.flatnonzero(of_file == number).tolist():
                    stream.seek(starts[place])
                    text = file.text(stream.read(ends[place] - starts[place]))
                    assert text is not None, "a text without its column was left out"
                    texts[place] = text
        return texts

    def _scan(
        self, split: str, held_out: Mapping[str, float] | None, min_chars: int
    ) -> tuple[int, int]:
        """Finds the texts of the split; returns how many texts there are, and how many of it.

        Args:
            split: whose texts are kept.
            held_out: percent of the texts in each split but ``train``; None if all are of one.
            min_chars: shorter texts are left out.
        """
        starts, ends, first = array.array("q"), array.array("q"), array.array("q", [0])
        seen = own = 0
        digest = hashlib.sha256()
        for file in self._files:
            for start, end, text in file.texts():
                seen += 1
                if held_out is not None and _split_of(text or "", held_out) != split:
                    continue
                own += 1
                if (fault := _fault(text, min_chars)) is not None:
                    self.bad_captions[fault] += 1
                    continue
                assert text is not None, "a missing text is a fault"
                starts.append(start)
                ends.append(end)
                digest.update(text.encode() + b"\0")
            first.append(len(starts))
        self._start, self._end, self._first = map(np.asarray, (starts, ends, first))
        self.num_records: int = len(starts)
        self.identity = f"texts-{digest.hexdigest()}"
        return seen, own

    def _error(self, argument: str, problem: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self._section}.{argument}", problem, remedy)

    def _check_choice(self, argument: str, value: str, choices: Sequence[str]) -> None:
        if value not in choices:
            raise self._error(argument, f"{value!r}", f"Use one of {', '.join(choices)}")

    def _files_of_split(
        self, folder: pathlib.Path, patterns: Mapping[str, str | Sequence[str]], split: str
    ) -> list[pathlib.Path]:
        """The files of a split where splits are made by files."""
        if folder.is_file():
            argument = "val_files" if _patterns(patterns["val"]) else "test_files"
            raise self._error(
                argument,
                f"{patterns[argument.removesuffix('_files')]!r} is to be found in {folder}, "
                "which is a file",
                "Set root to the folder, and files to the name of the file",
            )
        if not _patterns(patterns[split]):
            raise self._error(
                f"{split}_files",
                "not given, and splits are made by files since another's are",
                f"Name the files of split {split!r}",
            )
        held_out = {
            other: set(self._matching(folder, f"{other}_files", patterns[other]))
            for other in ("val", "test")
            if _patterns(patterns[other])
        }
        if twice := sorted(held_out.get("val", set()) & held_out.get("test", set())):
            raise self._error(
                "val_files", f"{twice[0]} is in test_files too", "Keep each file in one of them"
            )
        if split != "train":
            return self._matching(folder, f"{split}_files", patterns[split])
        found = self._matching(folder, "files", patterns["train"])
        kept = [path for path in found if not any(path in paths for paths in held_out.values())]
        if not kept:
            raise self._error(
                "files",
                f"each of the {len(found)} files is in val_files or test_files",
                "Name files to train on",
            )
        return kept

    def _matching(
        self, folder: pathlib.Path, argument: str, patterns: str | Sequence[str]
    ) -> list[pathlib.Path]:
        """The files in a folder that match one of the patterns, by name."""
        given = _patterns(patterns)
        if not given or not all(isinstance(pattern, str) and pattern for pattern in given):
            raise self._error(argument, f"{patterns!r} is no pattern", 'Write it as "*.txt"')
        for pattern in given:
            if os.path.isabs(pattern) or ".." in pathlib.PurePath(pattern).parts:
                raise self._error(
                    argument, f"{pattern!r} leads out of the folder", f"Name files in {folder}"
                )
        found = {path for pattern in given for path in folder.glob(pattern) if path.is_file()}
        if not found:
            names = sorted(path.name for path in folder.iterdir() if path.is_file())
            there = f"has {', '.join(names[:5])}{', ...' if names[5:] else ''}"
            raise self._error(
                argument,
                f"no file in {folder} matches {' or '.join(map(repr, given))}",
                f"Name some that are there: it {there if names else 'has no files of its own'}",
            )
        return sorted(found, key=lambda path: path.relative_to(folder).as_posix())

    def _file(self, path: pathlib.Path, unit: str, column: str) -> TextFile:
        is_table = path.suffix.lower() in TABLES
        with path.open("rb") as stream:
            state = file_state(stream)
            names = TextFile(str(path), state, path.suffix.lower()).header() if is_table else ()
        if not is_table and not column:
            return TextFile(str(path), state, unit)
        if column in names:
            return TextFile(str(path), state, path.suffix.lower(), names.index(column))
        if not is_table:
            problem, remedy = f"{column!r}, but {path} has no columns", "Set it to ''"
            remedy += f", or name files ending in {' or '.join(TABLES)}"
        elif not column:
            problem = f"not given, and {path} is a table"
            remedy = f"Name the column of the texts: {', '.join(names) or 'the file is empty'}"
        else:
            close = difflib.get_close_matches(column, names, n=1)
            problem = f"{path} has no column {column!r}"
            remedy = f"Perhaps you mean {close[0]!r}" if close else f"There are {', '.join(names)}"
        raise self._error("column", problem, remedy)


def _patterns(files: str | Sequence[str]) -> tuple[str, ...]:
    return ((files,) if files else ()) if isinstance(files, str) else tuple(files)


def _fault(text: str | None, min_chars: int) -> str | None:
    """Why a text cannot be used, None if it can."""
    if text is None:
        return "row without the column"
    if "\0" in text:
        return "text holds null bytes"  # UTF-16, or no text at all
    if (fault := text_fault(text, "text")) is not None:
        return fault
    return "text is too short" if len(text) < min_chars else None


def _split_of(text: str, held_out: Mapping[str, float]) -> str:
    """The split of a text, by what is left of it for the tokenizer: duplicates are in one."""
    return split_of(normalise_caption(text).encode("utf-8", "surrogateescape"), held_out)
