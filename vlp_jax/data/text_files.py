"""Files of texts: where each line, document or table row begins and ends, and what it says."""

import contextlib
import csv
import dataclasses
import os
from collections.abc import Iterator
from typing import BinaryIO

TABLES = (".tsv", ".csv")  # endings of files whose texts are in a column
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of texts, of which two numbers find each again.

    Attributes:
        path: of the file.
        state: what tells it from the same file with other content.
        kind: ``lines``, ``documents``, ``.tsv`` or ``.csv``.
        column: number of a table's column that holds the texts.
    """

    path: str
    state: tuple[int, int]
    kind: str
    column: int = 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, to read bytes of.

        Raises:
            ValueError: it has changed.
        """
        with open(self.path, "rb") as stream:
            if file_state(stream) != self.state:
                raise ValueError(
                    f"{self.path}: has changed since this run found its texts; start the run again"
                )
            yield stream

    def header(self) -> tuple[str, ...]:
        """The names in the first row of a table; () if there is none."""
        with self.opened() as stream:
            first = next(self._blocks(stream), None)
        return () if first is None else tuple(name.strip() for name in self._cells(first[1]))

    def texts(self) -> Iterator[tuple[int, int, str | None]]:
        """First byte, byte after the last, and what ``text`` makes of them, of each text."""
        with self.opened() as stream:
            blocks = self._blocks(stream)
            if self.kind in TABLES:
                next(blocks, None)
            for start, data in blocks:
                yield start, start + len(data), self.text(data)

    def text(self, data: bytes) -> str | None:
        """The text in these bytes; None: a row without the column.

        Bytes that are not UTF-8 come out as lone surrogates, which ``text_fault`` finds.
        """
        if self.kind not in TABLES:
            return _decoded(data).strip()
        cells = self._cells(data)
        return cells[self.column].strip() if self.column < len(cells) else None

    def _cells(self, data: bytes) -> list[str]:
        if self.kind == ".csv":
            return next(csv.reader([_decoded(data)], strict=True), [])
        return _decoded(data).rstrip("\r\n").split("\t")

    def _blocks(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """First byte and bytes of each line, document or row; blank ones are passed over."""
        if stream.read(len(_BOM)) != _BOM:
            stream.seek(0)
        start = stream.tell()
        pieces: Iterator[bytes] = iter(stream)
        if self.kind == "documents":
            pieces = _documents(stream)
        elif self.kind == ".csv":
            pieces = _csv_rows(stream, self.path)
        for data in pieces:
            if not data.isspace():
                yield start, data
            start += len(data)


def _documents(stream: BinaryIO) -> Iterator[bytes]:
    """Runs of lines that are not blank, and every blank line by itself."""
    lines: list[bytes] = []
    for line in stream:
        if not line.isspace():
            lines.append(line)
            continue
        if lines:
            yield b"".join(lines)
            lines.clear()
        yield line
    if lines:
        yield b"".join(lines)


def _csv_rows(stream: BinaryIO, path: str) -> Iterator[bytes]:
    """Rows, which are several lines where quotes hold line ends."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        for line in stream:
            taken.append(line)
            yield _decoded(line)

    reader = csv.reader(lines(), strict=True)
    first_line = 1
    try:
        for _ in reader:  # which takes no line more than the row has
            yield b"".join(taken)
            taken.clear()
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{first_line}: not a row of CSV ({error}); mend its quotes, or write the file "
            "as .tsv, where quotes mean nothing"
        ) from error


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def file_state(stream: BinaryIO) -> tuple[int, int]:
    """Size of an open file and time of its last change."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns
