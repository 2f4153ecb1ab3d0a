"""The base's own loss without blocks, and with what is fitted in their place, before any tuning.

    python -m docs.results.pcetl_fitted BASE

BASE is one of docs/results/pcetl.py: its workdir, or a parameter file. Free Language Modeling on
2,000 of its pictures, 32 a batch: fitted on six batches, told of the four that follow.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from docs.results import pcetl_ways
from docs.results.pcetl import tell_of_base
from tools.compare.table import markdown_table
from tools.fit_replacements import arrays_of, fit
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.train.gradient_error import probe_batches
from vlp_jax.train.setup import Setup, prepare
from vlp_jax.transfer.methods import set_method
from vlp_jax.transfer.units import with_kept

ROWS, FITTED_ON, TOLD_OF = 32, 6, 4
CHOICES = {
    "image tower, 4 to 7": [f"image_tower/block_{layer:02d}" for layer in (4, 5, 6, 7)],
    "image tower, 0": ["image_tower/block_00"],
    "one draw of `random 4`": [
        *(f"image_tower/block_{layer:02d}" for layer in (0, 3, 6)),
        "text_lower_1",
    ],
    "texts, upper 0 to 3": [f"text_upper_{layer}" for layer in range(4)],
}


def gated(base: str, units: Sequence[str], workdir: pathlib.Path) -> Setup:
    """A run of the base's objective in which these units can be switched."""
    config = pcetl_ways.base().config
    config.init_from = base
    config.total_steps = FITTED_ON + TOLD_OF
    config.data.batch_size, config.data.num_edges = ROWS, 1
    for section in config.data.sources.values():
        section.num_records = 2_000
    set_method(config, "adapter")
    config.model.tuning.blocks, config.model.tuning.gated = "all", tuple(units)
    return prepare(config, workdir)


def loss(setup: Setup, params: Any, extras: Any) -> float:
    """Of the batches that follow those of the fit, a mean."""
    program, found, compiled = setup.program, [], {}
    for one in probe_batches(program, setup.plan, FITTED_ON, TOLD_OF):
        if (bucket := one.planned) not in compiled:
            compiled[bucket] = jax.jit(
                lambda p, e, b, bucket=bucket: program.loss(p, e, b, bucket, jax.random.key(1))[0]
            )
        with jax.set_mesh(program.mesh):
            found.append(float(compiled[bucket](params, extras, one.batches)))
    return float(np.mean(found))


def table(base: str, scratch: str) -> str:
    """A row for each choice."""
    rows: list[list[str]] = []
    for name, units in CHOICES.items():
        setup = gated(base, units, pathlib.Path(scratch) / str(len(rows)))
        state, _ = setup.first_state()
        extras = state.extras["objectives"]
        whole, without = (with_kept(state.params, dict.fromkeys(units, on)) for on in (1.0, 0.0))
        leaves = by_path(without)
        for unit, found in fit(setup, tuple(units), FITTED_ON).items():
            for path, array in arrays_of(unit, found).items():
                leaves[path] = jax.device_put(array, leaves[path].sharding)
        told = (loss(setup, params, extras) for params in (whole, without, nested(leaves)))
        rows.append([name, *(f"{value:.3f}" for value in told)])
    return markdown_table(["left out", "whole", "without", "fitted"], rows)


if __name__ == "__main__":
    tell_of_base("docs.results.pcetl_fitted", __doc__, table)
