"""How far the pooler of NLVR2's head saturates in the first updates, by the rate of heads.

    python -m docs.results.pcetl_pooler BASE

BASE is one of docs/results/pcetl.py: its workdir, or a parameter file. Adapters and heads are
tuned for 50 updates of 16 of 4,000 pairs, the first five of which are warm-up, with the upper half
of the image tower skipped; of the batch after these, what enters the pooler's tanh is told.
"""

import contextlib
import io
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from docs.results.pcetl import tell_of_base
from docs.results.pcetl_ways import task_config
from tools.compare.table import markdown_table
from vlp_jax.objectives.classification import NLVR2
from vlp_jax.train.gradient_error import probe_batches
from vlp_jax.train.initial import read_origin
from vlp_jax.train.loop import train
from vlp_jax.train.setup import Setup, prepare

UPDATES, ROWS, PAIRS = 50, 16, 4_000
SKIPPED = tuple(f"image_tower/block_{layer:02d}" for layer in (4, 5, 6, 7))
# Rate of adapters; of heads, as a multiple.
CASES = ((1e-3, 5.0), (3e-4, 5.0), (1e-3, 1.0), (3e-4, 1.0))
SATURATED = 3.0  # where the slope of tanh is 1 %


def run(base: str, rate: float, factor: float, workdir: pathlib.Path) -> Setup:
    """A run of NLVR2 without the skipped units, as far as it is set up."""
    config = task_config("nlvr2", "adapter", 0, rate)
    config.init_from = base
    config.model.tuning.skip = SKIPPED
    config.optim.groups.heads.rate_factor = factor
    config.total_steps, config.data.batch_size = UPDATES, ROWS
    config.data.sources.pairs.update(num_records=PAIRS, cache=False)
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.evals = {}
    return prepare(config, workdir)


def pooled(setup: Setup) -> Callable[[Any], np.ndarray]:
    """From parameters to what enters the tanh on the batch after the updates: float32 [rows, D]."""
    [objective] = setup.program.objectives
    assert isinstance(objective, NLVR2)
    [probe] = probe_batches(setup.program, setup.plan, UPDATES, 1)

    @jax.jit
    def seen(params: Any, batch: Any) -> jax.Array:
        found: list[jax.Array] = []

        def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            made = call(*args, **kwargs)
            if context.module.name == "pooler":
                found.append(made)
            return made

        with nn.intercept_methods(watch):
            objective.logits(params, batch)
        return jnp.asarray(found[0], jnp.float32)

    def of(params: Any) -> np.ndarray:
        with jax.set_mesh(setup.program.mesh):
            return np.asarray(seen(params, probe.batches[objective.batch_name]))

    return of


def table(base: str, scratch: str) -> str:
    """A row for the fresh head, which is the same in all cases, and for each case."""
    rows: list[list[str]] = []
    for rate, factor in CASES:
        workdir = pathlib.Path(scratch) / f"{rate:g}-{factor:g}"
        setup = run(base, rate, factor, workdir)
        entering = pooled(setup)
        if not rows:
            rows.append(["fresh", "fresh", *_told(entering(setup.first_state()[0].params))])
        with contextlib.redirect_stdout(io.StringIO()):
            train(setup)
        told = _told(entering(read_origin(workdir).params()))
        rows.append([f"{rate:g}", f"{factor:g}", *told])
    return markdown_table(["rate", "heads", "root mean square", "saturated"], rows)


def _told(entering: np.ndarray) -> list[str]:
    saturated = np.mean(np.abs(entering) > SATURATED)
    return [f"{np.sqrt(np.mean(entering**2)):.1f}", f"{saturated:.0%}"]


if __name__ == "__main__":
    tell_of_base("docs.results.pcetl_pooler", __doc__, table)
