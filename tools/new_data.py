"""Other data in the place of those of a run: what a flag says of its sources, and its batches.

Batches of the run's own data and of the new ones have the same sizes, and share no record.
"""

import dataclasses
import inspect
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tools.compare.configs import parse_value
from vlp_jax.data.build import build_plan
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.named import batch_sources
from vlp_jax.data.plan import MIN_WINDOW_BATCHES
from vlp_jax.data.source import Source
from vlp_jax.data.sources import SOURCES
from vlp_jax.evals.fixed_set import check_clean
from vlp_jax.infra.errors import unknown_key
from vlp_jax.train.setup import Setup

MIN_ROWS = 4  # of a batch: means of fewer are far from normal
Overrides = Mapping[str, Mapping[str, Any]]  # of sections of sources, by name


@dataclasses.dataclass(frozen=True)
class Batches:
    """Which batches are compared on.

    Attributes:
        rows: of every named batch.
        window: batches among which a plan mixes records.
        first: number of the first one of the reference.
        unread: whether the search has read none of the reference's records.
    """

    rows: Mapping[str, int]
    window: int
    first: int
    unread: bool


def overrides_of(data: str, config: ConfigDict) -> Overrides:
    """What ``--data`` says of the sections of sources.

    Args:
        data: the flag's value.
        config: of the run.

    Raises:
        ValueError: it names a folder that is not there, or no key and value; or a value is of the
            wrong type; or it does not say which of several sources.
        ConfigError: a key that the source does not take.
    """
    sources = config.data.sources
    if "=" not in data or pathlib.Path(data).is_dir():
        if not pathlib.Path(data).is_dir():
            raise ValueError(f"--data={data}: no such folder, and not KEY=VALUE either")
        data = f"root={data}"
    found: dict[str, dict[str, Any]] = {}
    for part in data.split(","):
        key, equals, text = part.partition("=")
        if not equals or not key:
            raise ValueError(f"--data={data}: {part!r} is not KEY=VALUE")
        name, dot, key = key.rpartition(".")
        if not dot and len(sources) > 1:
            raise ValueError(
                f"--data={data}: the run has the sources {', '.join(sorted(sources))}; write "
                f"NAME.{key}={text}"
            )
        name = name if dot else next(iter(sources))
        if name not in sources:
            raise ValueError(f"--data={data}: no source {name!r}; use {', '.join(sorted(sources))}")
        found.setdefault(name, {})[key] = _value(sources[name], name, key, text)
    return found


def _value(section: ConfigDict, name: str, key: str, text: str) -> Any:
    """A value of a source's section out of a flag."""
    parameters = inspect.signature(SOURCES[section.get("type", name)]).parameters
    known = [parameter for parameter in parameters if parameter not in ("name", "key")]
    if key not in known:
        raise unknown_key(f"data.sources.{name}.{key}", known)
    default = section.get(key, parameters[key].default)
    if default is inspect.Parameter.empty or isinstance(default, str):
        return text  # never anything else, though it look like a number
    value = parse_value(text)
    kind = int if default is None else type(default)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"--data: {key}={text} is not of the type {kind.__name__}")
    return value


def check_kin(name: str, trained: Source, new: Source) -> None:
    """Refuse data of which labels mean something else, or which the run has trained on."""
    if trained.classes != new.classes:
        raise ValueError(
            f"--data: its {len(new.classes)} classes are not the {len(trained.classes)} that the "
            f"run has learned of data.sources.{name}; give data with the same classes"
        )
    check_clean(f"data.sources.{name}", trained, new)


def batches_of(
    config: ConfigDict,
    reference: Mapping[str, Source],
    new: Mapping[str, Source],
    count: int,
    used: int,
    sizes: Mapping[str, int],
) -> Batches:
    """The largest batches, up to those of the run, of which so many share no record.

    A plan mixes the records of a window of batches, so that windows have to share none.

    Args:
        config: of the run.
        reference: sources of the data that the choice was made on.
        new: the same of the new data.
        count: batches.
        used: batches of ``sizes`` that the search has read, the first ones.
        sizes: rows of every named batch of the run.

    Raises:
        ValueError: there are too few records.
    """
    window = max(MIN_WINDOW_BATCHES, count)
    there = {
        name: [_examples(config, names, sources) for sources in (reference, new)]
        for name, names in batch_sources(config).items()
    }
    largest = max(sizes.values())
    fitting = []
    for size in range(largest, 0, -1):
        rows = {name: max(1, each * size // largest) for name, each in sizes.items()}
        if all(window * rows[n] <= min(there[n]) for n in rows):
            fitting.append(rows)
    fitting = [r for r in fitting if all(r[n] >= min(MIN_ROWS, each) for n, each in sizes.items())]
    if not fitting:
        least = window * MIN_ROWS
        raise ValueError(
            f"--batches={count} that share no record need {least} records or more; the reference "
            f"has {min(a for a, _ in there.values()):.0f} and the new data "
            f"{min(b for _, b in there.values()):.0f}. Give more data"
            + (f", or fewer batches ({MIN_WINDOW_BATCHES})" if count > MIN_WINDOW_BATCHES else "")
        )
    for rows in fitting:
        start = max(math.ceil(used * sizes[n] / (window * rows[n])) for n in rows)
        if all((start + 1) * window * rows[n] <= there[n][0] for n in rows):
            return Batches(rows, window, start * window, True)
    return Batches(fitting[0], window, 0, False)


def _examples(config: ConfigDict, names: Sequence[str], sources: Mapping[str, Source]) -> float:
    """Rows of a batch's mixture before a record comes again; infinite where none does."""
    weights = {name: config.data.sources[name].get("weight", 1.0) for name in names}
    total, found = sum(weights.values()), math.inf
    for name in names:
        records = sources[name].num_records
        if records is not None and weights[name]:
            found = min(found, records * total / weights[name])
    return found


def plan_of_batches(
    config: ConfigDict,
    sources: Mapping[str, Source],
    setup: Setup,
    batches: Batches,
    edge: int | None = None,
) -> JointPlan:
    """Batches of so many rows, all padded to one length.

    Args:
        config: of the run, with the sections of these sources.
        sources: by name.
        setup: of the run.
        batches: their sizes.
        edge: tokens that texts are padded to; None: as many as these data need.
    """
    own = ConfigDict(config.to_dict())
    own.data.num_edges = 1
    own.data.text_edges = () if edge is None else (edge,)
    own.data.window_batches = batches.window
    with own.unlocked():
        for name, rows in batches.rows.items():
            section = own.data.batches.get(name, ConfigDict())
            section = {**section, "batch_size": rows, "num_edges": 1}
            own.data.batches[name] = {**section, "text_edges": own.data.text_edges}
    return build_plan(own, sources, setup.tokenizer)
