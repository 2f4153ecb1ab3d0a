"""Train by a config: ``python -m vlp_jax.main --config=configs/demo.py --workdir=runs/demo``."""

import contextlib
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.manifest import CheckpointMismatchError, DamagedCheckpointError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.loop import RunStopped, train
from vlp_jax.train.setup import prepare

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the run's configuration", lock_config=True
)
# What ml_collections raises for a key that the config lacks or a value of the wrong type.
_FLAG_ERRORS = (AttributeError, KeyError, TypeError, ValueError)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; an existing run is resumed", required=True
)
flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
    """Train, and exit with a code that says how it ended (``infra.preemption.ExitCode``)."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; config keys are --config.KEY=VALUE")
    if not flags.FLAGS["verbosity"].present:
        # Libraries log every file they write; what a user must know is printed, or a warning.
        logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    with contextlib.ExitStack() as stack:
        if config.debug:
            jax.config.update("jax_debug_nans", True)
            stack.enter_context(jax.disable_jit())
        try:
            setup = prepare(config, pathlib.Path(_WORKDIR.value))
        except (ValueError, OSError) as error:
            logging.debug("traceback of the error below", exc_info=True)
            sys.exit(_fail(ExitCode.BAD_INPUT, error))
        try:
            code = train(setup)
        except RunStopped as error:
            code = _fail(error.code, error)
        except (ConfigError, CheckpointMismatchError) as error:
            code = _fail(ExitCode.BAD_INPUT, error)
        except DamagedCheckpointError as error:
            code = _fail(ExitCode.DAMAGED_CHECKPOINTS, error)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; a config key that does not exist is bad input and not a crash."""
    try:
        return app.parse_flags_with_usage(argv)
    except _FLAG_ERRORS as error:
        remedy = "vlp_jax/train/config.py lists the keys; sections of names have those of the file"
        print(f"error: bad flag: {error} ({remedy})", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)


def _fail(code: ExitCode, error: Exception) -> ExitCode:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=_parse)
