"""What a config says of its named batches: which sources feed each, of what size each is.

    config.data.sources.books = {"type": "text", "root": "corpus", "batch": "text"}
    config.data.batches.text = {"batch_size": 128}
    config.objectives.mlm = {"batch": "text"}

Sources and objectives that name no batch have the one called ``pairs``. An update reads one batch
of each name.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from vlp_jax.data.batch import PAIRS
from vlp_jax.infra.errors import ConfigError, section_arguments


@dataclasses.dataclass(frozen=True)
class BatchSection:
    """Sizes of a named batch.

    Attributes:
        key: of the config, where its size is said.
        batch_size: rows of a global batch.
        text_edges: text lengths that it is padded to; none: they are fitted.
        num_edges: how many are fitted, at most.
        max_text_length: most tokens of a text; of packed texts, of a row.
        length_key: of the config, where that is said.
        weight: factor of the losses of the objectives that read it.
    """

    key: str
    batch_size: int
    text_edges: tuple[int, ...]
    num_edges: int
    max_text_length: int
    length_key: str
    weight: float


def batch_section(config: ConfigDict, name: str) -> BatchSection:
    """What ``data.batches.NAME`` says of a batch; what it leaves out, ``data`` itself says.

    Raises:
        ConfigError: a key is unknown, or no number above 0.
    """
    data, path = config.data, f"data.batches.{name}"
    keys = ("batch_size", "text_edges", "num_edges", "max_text_length", "weight")
    own = section_arguments(data.batches.get(name, ConfigDict()), path, keys, ())
    for key in ("batch_size", "num_edges", "max_text_length"):
        if key in own and (not isinstance(own[key], int) or own[key] < 1):
            raise ConfigError(f"{path}.{key}", f"{own[key]!r} is out of range", "Use 1 or more")
    edges, weight = own.get("text_edges", data.text_edges), own.get("weight", 1.0)
    if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
        raise ConfigError(f"{path}.weight", f"{weight!r} is no weight", "Use 0 or more")
    return BatchSection(
        f"{path}.batch_size" if "batch_size" in own else "data.batch_size",
        own.get("batch_size", data.batch_size),
        tuple(edges),
        own.get("num_edges", data.num_edges),
        own.get("max_text_length", data.max_text_length),
        f"{path}.max_text_length" if "max_text_length" in own else "data.max_text_length",
        float(weight),
    )


def batch_sources(config: ConfigDict) -> dict[str, tuple[str, ...]]:
    """Name of a batch -> names of the sources that feed it, both sorted.

    Raises:
        ConfigError: ``data.batches`` has a section that no source feeds.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(config.data.sources):
        found.setdefault(config.data.sources[name].get("batch", PAIRS), []).append(name)
    for name in config.data.batches:
        if found and name not in found:
            raise ConfigError(
                f"data.batches.{name}",
                "no source feeds this batch",
                f"Give data.sources.NAME.batch={name!r}, or remove the section; there are "
                f"{sorted(found)}",
            )
    return {name: tuple(found[name]) for name in sorted(found)}
