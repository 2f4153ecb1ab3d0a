"""Cut the least important heads and channels out of a finished run, to fine-tune what is left.

    python -m tools.prune_weights --checkpoint=runs/vqa --out=pruned.safetensors \\
        --heads=0.25 --mlp=0.25
    python -m vlp_jax.main --config=configs/transfer/vqa.py --config.init_from=pruned.safetensors \\
        --workdir=runs/pruned

Importance is measured on the run's own training batches by its own objectives, as |w dL/dw| summed
over a head or channel and averaged over --batches; with --batches=0 it is the L2 norm of the
weights, and no data are read. Every block of --blocks loses the same share of its heads (which keep
their width) and of its channels (by whole eights). The moving average is cut where the run keeps
one: it is what its evaluators saw.

The file is a parameter file as of ``tools.export_weights``, whose config has ``model.tuning.prune``
set: whatever starts from it with ``adopt_model`` has the smaller geometry; ``tools.predict`` and
``tools.evaluate_quantized`` use it as it is. It is whole, also where the checkpoint holds tunables
alone. A run that is cut already may be cut further; shares are those of the whole model.
"""

import copy
import functools
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tools.finished import set_up_again
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.command import argument_parser, bad_input
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.encoder import EncoderConfig
from vlp_jax.models.pretrained import Metadata, save_parameters
from vlp_jax.models.sizes import build_model
from vlp_jax.models.tuning_config import block_config, pruned_blocks, tuning_config
from vlp_jax.train.gradient_error import probe_batches
from vlp_jax.train.initial import Origin, read_origin
from vlp_jax.train.setup import Setup, plain
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import GradientFunction
from vlp_jax.transfer.structured import importance, prune

BATCHES = 16


def prune_weights(
    checkpoint: str | pathlib.Path,
    out: str | pathlib.Path,
    heads: float,
    mlp: float,
    batches: int = BATCHES,
    blocks: str = "",
    which: str = "latest",
    overwrite: bool = False,
    base: str = "",
) -> EncoderConfig:
    """Write the parameters of a smaller model.

    Args:
        checkpoint: workdir of a run, one checkpoint of it, or a parameter file exported of one.
        out: file to write to.
        heads: share of the heads that goes, of the whole model.
        mlp: share of the channels that goes.
        batches: of the run's training data that importance is measured on; 0: by magnitude.
        blocks: ``fusion``, ``all``, or a regular expression of their paths; empty: those that the
            run has pruned, or else tuned (``config.model.tuning.blocks``).
        which: checkpoint of a workdir: ``latest``, ``best`` or a step.
        overwrite: whether the file may be replaced.
        base: of tunables: where their base lies, if no longer where it was.

    Returns:
        The geometry of the smaller model.

    Raises:
        FileExistsError: the file is there already; nothing was written.
        ConfigError, ValueError, RuntimeError, OSError: the message names the key or the file.
    """
    out = pathlib.Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already; give another file, or --overwrite")
    if batches < 0:
        raise ValueError(f"--batches={batches} must be 0 or more")
    origin = read_origin(checkpoint, which, base)
    if not origin.tokenizer:
        raise ConfigError("init_from", f"{checkpoint} holds no tokenizer", "Use a run's checkpoint")
    config = copy.deepcopy(origin.config)
    untuned = plain(tuning_config())
    tuning = {**untuned, **config["model"].get("tuning", {})}
    tuning["prune"] = {"heads": heads, "mlp": mlp, "blocks": blocks or pruned_blocks(tuning)}
    config["model"]["tuning"] = tuning
    smaller = _geometry(config, origin)  # what cannot be cut is told before anything is measured
    params = origin.params()
    found = _measured(origin, which, batches) if batches else importance(params)
    pruned = prune(params, smaller, found)
    metadata = Metadata(
        config={**config, "classes": list(origin.classes)},
        tokenizer=origin.tokenizer,
        step=origin.step,
        metrics={},  # those of the run are of the whole model
        sources={"run": config["name"], "pruned": _how(batches)},
    )
    save_parameters(out, {path: np.asarray(x) for path, x in by_path(pruned).items()}, metadata)
    return smaller


def _geometry(config: Mapping[str, Any], origin: Origin) -> EncoderConfig:
    vocabulary = Tokenizer.from_json(origin.tokenizer, origin.where).vocabulary
    size, mask_id = vocabulary.size, vocabulary.mask_id
    model = ConfigDict(config["model"])
    return build_model(model, size, mask_id, config["data"]["image_size"]).config


def _measured(origin: Origin, which: str, batches: int) -> dict[str, np.ndarray]:
    """Importance, a mean over batches of the run."""
    with tempfile.TemporaryDirectory() as scratch:
        setup = set_up_again(origin, which, pathlib.Path(scratch))
        return measure(setup, batches)


def measure(setup: Setup, batches: int) -> dict[str, np.ndarray]:
    """Importance at the first parameters of a run, a mean over its first batches.

    Args:
        setup: of the run, with nothing frozen.
        batches: how many, 1 or more.

    Returns:
        As ``importance``.
    """
    program = setup.program
    state, _ = setup.first_state()

    def of_batch(
        gradient: GradientFunction, state: TrainState, step: jax.Array, *rest: Any
    ) -> dict[str, jax.Array]:
        slopes, _ = gradient(state.replace(step=step), *rest)
        return importance(state.params, slopes)

    compiled: dict[Any, Any] = {}
    sums: dict[str, jax.Array] = {}
    for probed in probe_batches(program, setup.plan, 0, batches):
        key = program.with_views(probed.planned, ())
        if key not in compiled:
            compiled[key] = jax.jit(functools.partial(of_batch, program.gradient(key)))
        with jax.set_mesh(program.mesh):
            moment, step = program.moment(probed.step), jnp.int32(probed.step)
            found = compiled[key](state, step, probed.batches, moment)
        sums = {name: sums[name] + scores for name, scores in found.items()} if sums else found
    return {name: np.asarray(scores) / batches for name, scores in jax.device_get(sums).items()}


def _how(batches: int) -> str:
    return f"by gradients of {batches} batches" if batches else "by magnitude"


def _summary(config: EncoderConfig) -> str:
    """What blocks have left: of those that are cut, one line for each kind."""
    tuning = config.text.tuning
    assert tuning.prune is not None
    lines = dict.fromkeys(
        f"{tuning.heads_at(block, stack.heads)} of {stack.heads} heads, "
        f"{tuning.channels_at(block, stack.mlp_width)} of {stack.mlp_width} channels"
        for block in tuning.prune.blocks
        for stack in [block_config(config, block)]
    )
    return f"{len(tuning.prune.blocks)} blocks with {'; or '.join(lines)}"


def main(arguments: list[str] | None = None) -> None:
    """Prune, and print what is left and where it is.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argument_parser("tools.prune_weights", __doc__)
    parser.add_argument("--checkpoint", required=True, help="workdir, checkpoint, parameter file")
    parser.add_argument("--out", required=True, help="file to write, .safetensors")
    parser.add_argument("--heads", type=float, default=0.0, help="share of heads that goes")
    parser.add_argument("--mlp", type=float, default=0.0, help="share of channels that goes")
    parser.add_argument("--batches", type=int, default=BATCHES, help="0: by magnitude")
    parser.add_argument("--blocks", default="", help="fusion, all, or a pattern of paths")
    parser.add_argument("--which", default="latest", help="of a workdir: latest, best or a step")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--base", default="", help="of tunables: where their base lies now")
    given = parser.parse_args(arguments)
    flag_of = {
        "init_from": "--checkpoint",
        "init_checkpoint": "--which",
        "init_base": "--base",
        "model.tuning.prune": "--heads, --mlp",
        **{f"model.tuning.prune.{key}": f"--{key}" for key in ("heads", "mlp", "blocks")},
    }
    with bad_input(flag_of, (ValueError, OSError, RuntimeError)):
        smaller = prune_weights(
            given.checkpoint,
            given.out,
            given.heads,
            given.mlp,
            given.batches,
            given.blocks,
            given.which,
            given.overwrite,
            given.base,
        )
    print(f"wrote {given.out}: {_summary(smaller)}, {_how(given.batches)}")


if __name__ == "__main__":
    set_gpu_flags()
    main()
