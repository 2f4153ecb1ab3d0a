"""The command line: bad input ends a program with one line that says what to do, and no traceback.

    def main(argv):
        with bad_input():
            ...

    if __name__ == "__main__":
        app.run(main, flags_parser=parse_flags)

Other outcomes have codes of their own: ``infra.preemption.ExitCode``, by ``fail``.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from absl import flags, logging

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode

# What ml_collections raises for a key that the config lacks or a value of the wrong type.
_KEY_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


def argument_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for a tool without a config, whose help is the docstring of its module.

    Args:
        module: as it is run, such as ``tools.pareto``.
        doc: its ``__doc__``.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; one that cannot be, or a config key that does not exist, is bad input.

    Args:
        argv: the command line.

    Returns:
        What is left of it for ``main``.
    """
    try:
        left = flags.FLAGS(argv)
        if "config" in flags.FLAGS:  # one whose file could not be loaded complains when it is read
            getattr(flags.FLAGS["config"].value, "lock", None)
        return left
    except flags.Error as error:
        sys.exit(fail(ExitCode.BAD_INPUT, _flag_fault(error)))
    except OSError as error:
        sys.exit(fail(ExitCode.BAD_INPUT, "--config: " + " ".join(str(error).split())))
    except _KEY_ERRORS as error:
        remedy = "vlp_jax/train/config.py lists the keys; sections of names have those of the file"
        sys.exit(fail(ExitCode.BAD_INPUT, f"bad flag: {_key_fault(error, argv)} ({remedy})"))


def _flag_fault(error: flags.Error) -> str:
    """What is wrong with a flag."""
    # An argument that the config's file refuses comes wrapped in its traceback, see ml_collections.
    wrapped = error.__context__ and error.__context__.__context__
    if isinstance(wrapped, ValueError) and "whilst parsing config file" in str(error):
        return f"bad flag: {wrapped}"
    return f"bad flag: {error} (--helpshort lists the flags)"


def _key_fault(error: Exception, argv: Sequence[str]) -> str:
    """The flag whose key the config lacks, as far as ml_collections lets it be known."""
    text = " ".join(str(error.args[0] if error.args else error).split()).strip('"')
    missing = re.match(r"'(\w+)'(.*)", text)
    if missing is None:
        return text
    name, hint = missing.groups()
    flags_given = (arg.partition("=")[0] for arg in argv)
    suspects = [flag for flag in flags_given if name in flag.split(".")] or ["--config"]
    return f"{' or '.join(suspects)}: no key {name!r}{hint and '.'}{hint}"


@contextlib.contextmanager
def bad_input(
    flag_of: Mapping[str, str] | None = None,
    errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> Iterator[None]:
    """Ends the program with ``ExitCode.BAD_INPUT`` and one line if what is within raises.

    Args:
        flag_of: key of the config -> what the program's user gave in its place, a flag or an
            argument; its errors name that.
        errors: that bad input raises.
    """
    try:
        yield
    except errors as error:
        logging.debug("traceback of the error below", exc_info=True)
        told: object = error
        if isinstance(error, ConfigError) and flag_of and error.key in flag_of:
            told = f"{flag_of[error.key]}: {error.problem}. {error.remedy}."
        sys.exit(fail(ExitCode.BAD_INPUT, told))


def check_length(flag: str, tokens: int, positions: int) -> None:
    """Refuse texts that are longer than the position table of the model.

    Args:
        flag: that gave the length.
        tokens: of the longest text.
        positions: ``model.text.max_positions``.

    Raises:
        ValueError: they are; the message names the flag.
    """
    if tokens > positions:
        raise ValueError(
            f"--{flag}={tokens}: more tokens than config.model.text.max_positions={positions}; "
            "lower the one or raise the other"
        )


def fail(code: ExitCode, error: object) -> ExitCode:
    """Say what went wrong; gives the code back."""
    print(f"error: {error}", file=sys.stderr)
    return code
