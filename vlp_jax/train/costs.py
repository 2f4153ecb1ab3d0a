"""What a run's way of tuning costs: parameters, FLOPs, memory, time and disk.

All of it comes from the model and the run: parameters from the tree, FLOPs from the formula of the
objectives (``models.flops``) on the model with and without ``config.model.tuning``, memory from the
compiled updates, time from the logged metrics, disk from the last checkpoint. Tables of several
runs: ``python -m tools.tuning_costs``.
"""

import re
import statistics
from typing import Any

import jax

from vlp_jax.compress.buckets import StepBucket
from vlp_jax.infra.checkpoint import Checkpoints
from vlp_jax.infra.compilation import CompiledSteps
from vlp_jax.infra.hardware import memory, program_bytes
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.train.setup import Setup
from vlp_jax.train.step import StepFunction
from vlp_jax.transfer.methods import ALWAYS

COSTS = "costs"  # key of run.json
UPDATE_SECONDS = "speed/update_seconds"  # logged, see ``train.clock``


def end_facts(
    setup: Setup, checkpoints: Checkpoints, steps: CompiledSteps[StepBucket, StepFunction]
) -> dict[str, Any]:
    """What the report says of a run that ends, beside its metrics.

    Args:
        setup: of the run.
        checkpoints: of the run, the last of which is written.
        steps: compiled updates, or functions in debug mode.

    Returns:
        ``checkpoint``, what that one consists of, and ``costs``, the only row of a table:

        - ``trained_parameters``, and ``without_heads_parameters``, those that not every method
          trains (``transfer.methods.ALWAYS``: heads, poolers, vectors of types);
        - ``forward_flops`` of an example, and ``extra_flops``, as many more than without tuning
          (less where it skips or prunes), in multiply-accumulates ``extra_macs``, and as
          ``extra_share``;
        - ``update_bytes`` of the largest compiled update on one device, None where it is not
          known, and
          ``device_peak_bytes``, of the process, None where the backend does not count;
        - ``update_seconds``, the median of what was logged; None before the first;
        - ``checkpoint_bytes`` on disk, and ``base_bytes`` that it has left out.
    """
    newest = checkpoints.size()
    parameters = {p: leaf.size for p, leaf in by_path(setup.program.state_spec.params).items()}
    trained = {path: n for path, n in parameters.items() if path not in setup.program.frozen}
    apart = sum(n for path, n in trained.items() if not re.search(ALWAYS, path))
    forward, plain = forward_flops(setup)
    compiled = (one for one in steps.programs if isinstance(one, jax.stages.Compiled))
    taken = [size for size in map(program_bytes, compiled) if size is not None]
    used = memory()
    base = setup.tunables.base
    costs = {
        "trained_parameters": sum(trained.values()),
        "without_heads_parameters": apart,
        "forward_flops": forward,
        "extra_flops": forward - plain,
        "extra_macs": (forward - plain) / 2,
        "extra_share": (forward - plain) / plain,
        "update_bytes": max(taken, default=None),
        "device_peak_bytes": used.peak if used.source == "device" else None,
        "update_seconds": _update_seconds(setup),
        "checkpoint_bytes": newest,
        "base_bytes": 0 if base is None else base.size,
    }
    return {"checkpoint": setup.tunables.told(newest), COSTS: [costs]}


def forward_flops(setup: Setup) -> tuple[float, float]:
    """Forward FLOPs of an example with whole images and texts of mean length.

    Returns:
        Those of the run, and those of the same model without ``config.model.tuning``.
    """
    program = setup.program
    plain = program.objectives_with(tuning_config())
    lengths = setup.budget.text_lengths
    return program.forward_flops(lengths), program.forward_flops(lengths, objectives=plain)


def _update_seconds(setup: Setup) -> float | None:
    """The median over what was logged, without the first, in which the run warms up."""
    logged = [r[UPDATE_SECONDS] for r in read_metrics(setup.workdir) if UPDATE_SECONDS in r]
    return statistics.median(logged[1:] or logged) if logged else None
