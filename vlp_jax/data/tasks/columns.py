"""Metadata columns of annotation files, kept with the examples so that scores are told by group."""

import json
from collections.abc import Sequence
from typing import Any

from vlp_jax.infra.errors import ConfigError

MAX_VALUES = 500  # of a column; one of identifiers would make a table as long as the data
NO_VALUE = "(none)"


class Columns:
    """Reads the named columns of the entries of a file.

    A value is a text, a number, true or false, all but texts as JSON writes them. An entry without
    the column, or with null or an empty text there, has the value ``(none)``.

    Attributes:
        names: of the columns.
    """

    def __init__(self, names: Sequence[str], key: str):
        """Reads nothing yet.

        Args:
            names: of the columns, in the order of tables; () for none.
            key: config key of the list, for messages.

        Raises:
            ConfigError: ``names`` is no list of different names.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ConfigError(key, f"{names!r} is no list of columns", 'Write it as ("NAME",)')
        if len(set(names)) < len(names):
            raise ConfigError(key, f"{names!r} names a column twice", "Name each once")
        self.names = tuple(names)
        self._key = key
        self._usable: set[str] = set()
        self._kept: dict[tuple[str, ...], tuple[str, ...]] = {}

    def values(self, item: Any, where: str) -> tuple[str, ...]:
        """The entry's value of each column.

        Args:
            item: the entry; what is no object has no value.
            where: names it in messages.

        Raises:
            ConfigError: a value is a list or an object.
        """
        if not self.names or not isinstance(item, dict):
            return (NO_VALUE,) * len(self.names)
        self._usable.update(name for name, value in item.items() if _is_value(value))
        for name in self.names:
            if not _is_value(item.get(name, "")) and item[name] is not None:
                raise ConfigError(
                    self._key,
                    f"{where}: column {name!r} holds a {type(item[name]).__name__}, not a text, a "
                    "number, true or false",
                    self._remedy(name),
                )
        row = tuple(_text(item.get(name)) for name in self.names)
        return self._kept.setdefault(row, row)  # few differ, and there may be a million entries

    def check(self, rows: Sequence[tuple[str, ...]], file: str) -> None:
        """Refuse columns that tell no groups.

        Args:
            rows: the values of the entries.
            file: that they come from, for messages.

        Raises:
            ConfigError: no entry has a column, or nearly each has a value of its own.
        """
        for name, values in zip(self.names, zip(*rows, strict=True), strict=False):
            if name not in self._usable or set(values) == {NO_VALUE}:
                raise ConfigError(self._key, f"{file} has no column {name!r}", self._remedy(name))
            if (count := len(set(values))) > MAX_VALUES:
                raise ConfigError(
                    self._key,
                    f"{file}: column {name!r} has {count:,} values, more than {MAX_VALUES}",
                    "Name a column whose values are shared by many examples",
                )

    def _remedy(self, name: str) -> str:
        others = sorted(self._usable - {name})
        return f"Use some of {', '.join(others)}, or () for no groups" if others else "Set it to ()"


def _is_value(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _text(value: Any) -> str:
    if value is None or value == "":
        return NO_VALUE
    # Lone surrogates stand for bytes that are not UTF-8, which no table can be written with.
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="replace").decode()
