"""Examples that compression hurts most, which a run encodes whole whatever its schedule says.

    config.compression.guard_file = "runs/pilot/predictions/compressed.jsonl"
    config.compression.guard_percent = 1.0

The evaluator ``compressed`` ranks the records of a source by what they lose. The plan puts those at
the top of its ranking into batches of their own, filled up with others, and these are encoded
whole: a batch has one size, so that an example cannot keep more tokens than its neighbours. What a
run was begun with is kept in its workdir.
"""

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from vlp_jax.data.source import Source
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text

Guarded = Mapping[str, np.ndarray]  # name of a source -> records, int64 and increasing

_FILE, _PERCENT = "compression.guard_file", "compression.guard_percent"


def read_guarded(config: ConfigDict, sources: Mapping[str, Source]) -> Guarded:
    """The records that the ranking of a config puts at its top.

    Args:
        config: of the run; ``compression.guard_file`` was written by the evaluator ``compressed``.
        sources: training sources by name.

    Raises:
        ConfigError: the file is none, or is of other data; or the percentage guards none.
        OSError: it cannot be read.
    """
    section = config.compression
    file, percent = pathlib.Path(section.guard_file), section.guard_percent
    if not 0.0 < percent <= 100.0:
        raise ConfigError(_PERCENT, f"{percent}", "Use a share above 0 and at most 100")
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        ranked = sorted((row["rank"], row["source"], row["split"], row["record"]) for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            _FILE,
            f"{file} is no ranking of the evaluator 'compressed' ({error!r})",
            "Give predictions/NAME.jsonl of a run that has it among its evaluators",
        ) from error
    if not ranked:
        raise ConfigError(_FILE, f"{file} ranks nothing", "Give one that does")
    found: dict[tuple[str, str], list[int]] = {}
    for _, name, split, record in ranked[: math.ceil(len(ranked) * percent / 100)]:
        found.setdefault((name, split), []).append(record)
    for (name, split), records in found.items():
        _check(file, name, split, config, sources)
        size = sources[name].num_records
        if size is None or not 0 <= min(records) <= max(records) < size:
            raise ConfigError(
                _FILE,
                f"{file} names record {max(records)} of {name!r}, which has {size}",
                "Give the ranking of this data",
            )
    return {name: np.unique(np.array(records)) for (name, _), records in found.items()}


def keep_guarded(file: pathlib.Path, guarded: Guarded) -> None:
    """Write what ``kept_guarded`` reads."""
    write_text(file, json.dumps({k: v.tolist() for k, v in sorted(guarded.items())}) + "\n")


def kept_guarded(file: pathlib.Path) -> Guarded:
    """What a run was begun with."""
    held = json.loads(file.read_text())
    return {name: np.asarray(records, np.int64) for name, records in held.items()}


def _check(
    file: pathlib.Path, name: str, split: str, config: ConfigDict, sources: Mapping[str, Source]
) -> None:
    """Raise a ConfigError where a ranking of this split is none of the run's training data."""
    if name not in sources:
        raise ConfigError(
            _FILE,
            f"{file} ranks the source {name!r}, which this run does not train on",
            f"There are {sorted(sources)}",
        )
    own = config.data.sources[name].get("split", "train")
    if split != own:
        raise ConfigError(
            _FILE,
            f"{file} ranks {split!r} of {name!r}, and this run trains on {own!r}",
            f"Run the evaluator with split={own!r}",
        )
    if sources[name].num_records is None:
        raise ConfigError(
            _FILE,
            f"the source {name!r} has no end, so that no record is seen twice",
            f"Give data.sources.{name}.num_records",
        )
