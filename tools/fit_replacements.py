"""Fit what stands in the place of skipped units to what they did, without training.

    python -m tools.fit_replacements runs/search --out=fitted.safetensors
    python -m vlp_jax.main --config=configs/transfer/vqa.py:scenes,small,adapter \\
        --config.model.tuning.blocks=all --config.skip_from=runs/search \\
        --config.init_from=fitted.safetensors

WORKDIR is a finished search for units (the method das) that started from a base. One chosen unit
after the other, the base is run on --batches of the search's training data, whole and without what
was chosen, and the adapter that stands in the unit's place is fitted to what is missing after it
(``transfer.replacements``). The file holds the base and these adapters; what starts from it must
skip these units, with replacements as wide as the search's. Printed is which share of what is
missing each adapter adds. What is tuned afterwards gains nothing by the fit (docs/results/pcetl.md,
"In closed form"): it is for what is used as it is.

Searches with the objective ``itm`` are refused: it draws its negatives by the parameters, so that
the network without units would read other pairs than the whole one.
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
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.pretrained import Metadata, save_parameters
from vlp_jax.objectives.contrastive import ITM
from vlp_jax.train.gradient_error import probe_batches
from vlp_jax.train.initial import CHECKPOINT_FOLDER, Origin, read_origin
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
        Unit -> what stands in for it; without those that the search's objectives do not run.

    Raises:
        FileExistsError: the file is there already; nothing was written.
        ConfigError, ValueError, OSError: the message names the key or the file.
    """
    out = pathlib.Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already; give another file, or --overwrite")
    if batches < 1:
        raise ValueError(f"--batches={batches} must be 1 or more")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out={out}: name a file .safetensors")
    run = read_search(pathlib.Path(search))
    start, base_of_start = run.config["init_from"], base or run.config["init_base"]
    if not start:
        raise ValueError(
            f"{search} started from nothing (config.init_from is empty), so that its units do "
            "nothing yet; search from a pretrained run"
        )
    read_origin(search, base=base_of_start)  # refuses another base than the search had
    if base and not pathlib.Path(start).exists():  # the base is what has moved
        start, base_of_start = base, ""
    holds_several = (pathlib.Path(start) / CHECKPOINT_FOLDER).is_dir()
    checkpoint = str(run.config["init_checkpoint"]) if holds_several else "latest"
    origin = read_origin(start, checkpoint, base_of_start)
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
        sources={"base": start, "replacements": f"fitted on {batches} batches of {search}"},
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
        ConfigError: an objective reads other pairs as the parameters change.
        ValueError: nothing stands in the place of a unit, or it is too narrow.
    """
    program = setup.program
    for objective in program.objectives:
        if isinstance(objective, ITM):
            raise ConfigError(
                f"objectives.{objective.name}",
                "its negatives are drawn by the parameters, so that a network without units reads "
                "other pairs than the whole one",
                "Fit by a search of another task, or tune without the fit",
            )
    state, _ = setup.first_state()
    params = by_path(state.params)
    widths = {}
    for unit in units:
        kernel = params.get(f"{replacement_path(unit)}down/kernel")
        widths[unit] = 0 if kernel is None else kernel.shape[1]
        if widths[unit] < 2:
            raise ValueError(
                f"in the place of {unit} stand {widths[unit]} hidden features, and 2 are the least "
                "that can be fitted; search with adapters, or model.tuning.replacement above 1"
            )

    def loss(kept: float, bucket: StepBucket, params: Any, extras: Any, batches: Batches) -> Any:
        switched = with_kept(params, dict.fromkeys(units, kept))
        return program.loss(switched, extras, batches, bucket, state.rng)

    def of_batch(bucket: StepBucket, *given: Any) -> dict[str, Moments]:
        runs = [functools.partial(loss, kept, bucket, *given) for kept in (1.0, 0.0)]
        return moments(units, *runs)

    extras = state.extras["objectives"]
    # Every unit meets the same batches: they are read once, and stay on the devices.
    held = [
        (program.with_views(probed.planned, ()), probed.batches)
        for probed in probe_batches(program, setup.plan, 0, batches)
    ]
    order = order_of(units, lambda: loss(1.0, held[0][0], state.params, extras, held[0][1]))
    compiled: dict[StepBucket, Any] = {}
    fits: dict[str, Fit] = {}
    for unit in order:
        sums: Moments | None = None
        for bucket, batch in held:
            if bucket not in compiled:
                compiled[bucket] = jax.jit(functools.partial(of_batch, bucket))
            with jax.set_mesh(program.mesh):
                found = compiled[bucket](nested(params), extras, batch)
                seen = jax.device_get(found[unit])
            seen = jax.tree.map(lambda x: np.asarray(x, np.float64), seen)
            sums = seen if sums is None else jax.tree.map(np.add, sums, seen)
        assert sums is not None
        try:
            fits[unit] = fitted(sums, widths[unit])
        except ValueError as error:
            raise ValueError(f"{unit}: {error}") from error
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
    flag_of = {"init_base": "--base", "init_from": "--base (config.init_from of the search)"}
    with bad_input(flag_of, (ValueError, OSError, RuntimeError)):
        fits = fit_replacements(
            given.workdir, given.out, given.batches, given.overwrite, given.base
        )
    for unit, found in fits.items():
        print(f"{unit}: {100 * found.explained:.1f} % by {found.down.shape[1]} hidden features")
    chosen = read_search(pathlib.Path(given.workdir)).found["skipped"]
    if idle := [unit for unit in chosen if unit not in fits]:
        print(f"not run by the search's objectives, and not fitted: {', '.join(idle)}")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    set_gpu_flags()
    main()
