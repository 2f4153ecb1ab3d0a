"""The error of a bad configuration: it names the key, the problem and the remedy."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A value of the config that cannot work, found before any device time is spent.

    The message reads ``config.KEY: problem. Remedy.``

    Attributes:
        key: dotted name of the config key, without the leading ``config.``.
        problem: what is wrong, with the values involved; no full stop at the end.
        remedy: what the user can do about it; no full stop at the end.
    """

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        super().__init__(f"config.{key}: {problem}. {remedy}.")
        self.key = key
        self.problem = problem
        self.remedy = remedy


def instead_of(name: str, known: Collection[str]) -> str:
    """What to use in place of an unknown name: the known one nearest to it, or else any of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Perhaps you mean {close[0]!r}" if close else f"Use one of {', '.join(sorted(known))}"


def unknown_key(path: str, known: Sequence[str]) -> ConfigError:
    """The error for a key that nobody reads.

    Args:
        path: dotted name of the key.
        known: the last parts of the names that would be read in its place.
    """
    return ConfigError(path, "unknown key", instead_of(path.rpartition(".")[2], known))


def section_arguments(
    section: Mapping[str, Any], path: str, known: Collection[str], reserved: Collection[str]
) -> dict[str, Any]:
    """The entries of a config section as keyword arguments of what it builds.

    Args:
        section: for example ``config.data.sources.photographs``.
        path: its dotted name.
        known: names of the arguments.
        reserved: keys of the section that are read elsewhere; left out.

    Raises:
        ConfigError: a key is neither known nor reserved.
    """
    arguments = {key: value for key, value in section.items() if key not in reserved}
    for key in arguments:
        if key not in known:
            raise unknown_key(f"{path}.{key}", [*known, *reserved])
    return arguments
