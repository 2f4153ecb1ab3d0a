"""Train by a config: ``python -m vlp_jax.main --config=configs/demo.py --workdir=runs/demo``."""

import contextlib
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from vlp_jax.infra.command import bad_input, fail, parse_flags
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.manifest import CheckpointMismatchError, DamagedCheckpointError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.loop import RunStopped, train
from vlp_jax.train.setup import prepare

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the run's configuration", lock_config=True
)
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
        with bad_input():
            setup = prepare(config, pathlib.Path(_WORKDIR.value))
        try:
            code = train(setup)
        except RunStopped as error:
            code = fail(error.code, error)
        except (ConfigError, CheckpointMismatchError) as error:
            code = fail(ExitCode.BAD_INPUT, error)
        except DamagedCheckpointError as error:
            code = fail(ExitCode.DAMAGED_CHECKPOINTS, error)
    sys.exit(code)


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
