"""The section made of ``run.json``, and how its values and those of the config are written."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from vlp_jax.infra import artifacts, units
from vlp_jax.infra.report.views import Section, TableView, table_view
from vlp_jax.infra.report.words import as_title

# Keys of run.json with a place of their own on the page.
PLACED_FACTS = frozenset(
    {"name", "status", "step", "total_steps", "start", "end", "device", "device_count"}
    | {"device_kind", "command", "versions", "compile_seconds"}
)

INLINE_FACTS = 6  # a dict of at most as many scalars is told in one line


def facts_section(run: Mapping[str, Any]) -> Section:
    """What run.json tells beyond what has its place elsewhere."""
    others = {key: value for key, value in run.items() if key not in PLACED_FACTS}
    facts, tables = [], []
    for key, value in others.items():
        if isinstance(value, dict) and len(value) > INLINE_FACTS:
            rows = [(str(item), _plain(number)) for item, number in value.items()]
            tables.append(table_view(as_title(key), ("", "value"), rows))
        elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            tables.append(_fact_table(key, value))
        elif value not in ("", None, [], {}):
            facts.append((as_title(key), _fact(key, value)))
    notes = () if facts or tables else ("No facts about the run were recorded.",)
    return Section("run", "Model and data", notes=notes, tables=tuple(tables), facts=tuple(facts))


def as_pairs(value: Any) -> tuple[tuple[str, str], ...]:
    """The items of a dict, as texts; none of anything else."""
    if not isinstance(value, dict):
        return ()
    return tuple((str(key), str(_plain(item))) for key, item in value.items())


def command_line(run: Mapping[str, Any]) -> str:
    """The command that started the run, ready to paste; empty where it is not known."""
    command = run.get("command") or ""
    if isinstance(command, list):
        return shlex.join(map(str, command))
    return str(command)


def flat_config(config: Mapping[str, Any], prefix: str = "") -> tuple[tuple[str, str], ...]:
    """Dotted keys and their values as JSON, in the order of the file."""
    pairs: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            pairs += flat_config(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return tuple(pairs)


def _fact_table(key: str, rows: Sequence[Any]) -> TableView:
    """A list of dicts, or of lists of which the first may be a header, as a table."""
    if all(isinstance(row, dict) for row in rows):
        columns = tuple(dict.fromkeys(str(name) for row in rows for name in row))
        cells = tuple(tuple(_plain(row.get(name, "–")) for name in columns) for row in rows)
        return table_view(as_title(key), columns, cells)
    lists = [row if isinstance(row, list) else [row] for row in rows]
    width = max(map(len, lists))
    padded = [tuple(_plain(cell) for cell in row) + ("",) * (width - len(row)) for row in lists]
    if all(isinstance(cell, str) for cell in padded[0]):
        return table_view(as_title(key), tuple(map(str, padded[0])), tuple(padded[1:]))
    return table_view(as_title(key), ("",) * width, tuple(padded))


def _plain(value: Any) -> artifacts.Cell:
    """``value`` as a table cell; what is no scalar as JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False)


def _fact(key: str, value: Any) -> str:
    cell = _plain(value)
    return cell if isinstance(cell, str) else units.format_value(key, cell)
