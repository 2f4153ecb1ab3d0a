"""Fit what stands in the place of skipped units to what they did, before anything is trained.

    python -m tools.fit_replacements runs/search --out=fitted.safetensors
    python -m vlp_jax.main --config=configs/transfer/vqa.py:scenes,small,adapter \\
        --config.model.tuning.blocks=all --config.skip_from=runs/search \\
        --config.init_from=fitted.safetensors

WORKDIR is a finished search for units (the method das) that started from a base. One chosen unit
after the other, the base is run on --batches of the search's training data, whole and without what
was chosen, and the adapter that stands in the unit's place is fitted to what is missing after it
(``transfer.replacements``). The file holds the base and these adapters; what starts from it must
skip these units. Printed is which share of what is missing each adapter adds.
"""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from tools.finished import set_up_again
from tools.searched import SearchRun, read_search
from vlp_jax.compress.buckets import StepBucket
from vlp_jax.infra.command import argument_parser, bad_input
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.pretrained import Metadata, save_parameters
from vlp_jax.train.gradient_error import probe_batches
from vlp_jax.train.initial import Origin, read_origin
from vlp_jax.train.setup import Setup
from vlp_jax.train.step import Batches
from vlp_jax.transfer.replacements import Fit, Moments, fitted, moments, order_of
from vlp_jax.transfer.units import replacement_path, with_kept

BATCHES = 16


def fit_replacements(
    search: str | pathlib.Path,
    out: str | pathlib.Path,
    batches: int = BATCHES,
    overwrite: bool = False,
    base: str = "",
) -> dict[str, Fit]:
    """Write a base together with the adapters that stand in for what a search has chosen.

    Args:
        search: workdir of the run that has searched.
        out: file to write to.
        batches: of the search's training data, 1 or more.
        overwrite: whether the file may be replaced.
        base: where the base of the search lies, if no longer where it was.

    Returns:
        Unit -> what stands in for it.

    Raises:
        FileExistsError: the file is there already; nothing was written.
        ConfigError, ValueError, OSError: the message names the key or the file.
    """
    out = pathlib.Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already; give another file, or --overwrite")
    if batches < 1:
        raise ValueError(f"--batches={batches} must be 1 or more")
    run = read_search(pathlib.Path(search))
    if not run.config["init_from"]:
        raise ValueError(
            f"{search} started from nothing (config.init_from is empty), so that its units do "
            "nothing yet; search from a pretrained run"
        )
    where, checkpoint = base or run.config["init_from"], str(run.config["init_checkpoint"])
    origin = read_origin(where, checkpoint, run.config["init_base"])
    units = tuple(run.found["skipped"])
    with tempfile.TemporaryDirectory() as scratch:
        setup = set_up_again(_switched(run, origin), checkpoint, pathlib.Path(scratch))
        fits = fit(setup, units, batches)
    arrays = dict(origin.arrays)
    for unit, found in fits.items():
        arrays |= arrays_of(unit, found)
    metadata = Metadata(
        config={**origin.config, "classes": list(origin.classes)},
        tokenizer=origin.tokenizer,
        step=origin.step,
        sources={"base": where, "replacements": f"fitted on {batches} batches of {search}"},
    )
    save_parameters(out, arrays, metadata)
    return fits


def _switched(run: SearchRun, origin: Origin) -> Origin:
    """The base as if the search's run had made it, with what was chosen gated and nothing else."""
    model = run.config["model"]
    tuning = {**model["tuning"], "gated": tuple(run.found["skipped"]), "skip": ()}
    config = {**run.config, "model": {**model, "tuning": tuning}}
    return dataclasses.replace(origin, config=config, classes=())


def fit(setup: Setup, units: tuple[str, ...], batches: int) -> dict[str, Fit]:
    """What stands in the place of units, at the first parameters of a run.

    Args:
        setup: of a run in which these units are gated, and no others.
        units: of the model.
        batches: how many of its first ones, 1 or more.

    Returns:
        Unit -> its fit, in the order in which the model runs them.

    Raises:
        ValueError: nothing stands in the place of a unit.
    """
    program = setup.program
    state, _ = setup.first_state()
    params = by_path(state.params)
    for unit in units:
        if f"{replacement_path(unit)}down/kernel" not in params:
            raise ValueError(
                f"nothing stands in the place of {unit} (model.tuning has neither adapters nor a "
                "replacement), so that there is nothing to fit"
            )

    def loss(kept: float, bucket: StepBucket, params: Any, extras: Any, batches: Batches) -> Any:
        switched = with_kept(params, dict.fromkeys(units, kept))
        return program.loss(switched, extras, batches, bucket, state.rng)

    def of_batch(bucket: StepBucket, *given: Any) -> dict[str, Moments]:
        runs = [functools.partial(loss, kept, bucket, *given) for kept in (1.0, 0.0)]
        return moments(units, *runs)

    extras = state.extras["objectives"]
    [first] = probe_batches(program, setup.plan, 0, 1)
    bucket = program.with_views(first.planned, ())
    order = order_of(units, lambda: loss(1.0, bucket, state.params, extras, first.batches))
    compiled: dict[StepBucket, Any] = {}
    fits: dict[str, Fit] = {}
    for unit in order:
        sums: Moments | None = None
        for probed in probe_batches(program, setup.plan, 0, batches):
            bucket = program.with_views(probed.planned, ())
            if bucket not in compiled:
                compiled[bucket] = jax.jit(functools.partial(of_batch, bucket))
            with jax.set_mesh(program.mesh):
                found = compiled[bucket](nested(params), extras, probed.batches)
                seen = jax.device_get(found[unit])
            seen = jax.tree.map(lambda x: np.asarray(x, np.float64), seen)
            sums = seen if sums is None else jax.tree.map(np.add, sums, seen)
        assert sums is not None
        width = params[f"{replacement_path(unit)}down/kernel"].shape[1]
        fits[unit] = fitted(sums, width)
        for path, array in arrays_of(unit, fits[unit]).items():
            params[path] = jax.device_put(array, params[path].sharding)
    return fits


def arrays_of(unit: str, found: Fit) -> dict[str, np.ndarray]:
    """The parameters of what stands in the place of a unit, but for its norm, by path."""
    at = replacement_path(unit)
    return {
        f"{at}down/kernel": found.down,
        f"{at}down/bias": np.zeros(found.down.shape[1], np.float32),
        f"{at}up/kernel": found.up,
        f"{at}up/bias": found.bias,
    }


def main(arguments: list[str] | None = None) -> None:
    """Fit, and print what of each unit is there again.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argument_parser("tools.fit_replacements", __doc__)
    parser.add_argument("workdir", help="of a finished search")
    parser.add_argument("--out", required=True, help="file to write, .safetensors")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of training data")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--base", default="", help="where the base of the search lies now")
    given = parser.parse_args(arguments)
    flag_of = {"init_from": "--base", "init_base": "--base"}
    with bad_input(flag_of, (ValueError, OSError, RuntimeError)):
        fits = fit_replacements(
            given.workdir, given.out, given.batches, given.overwrite, given.base
        )
    for unit, found in fits.items():
        print(f"{unit}: {100 * found.explained:.1f} % by {found.down.shape[1]} hidden features")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    set_gpu_flags()
    main()
