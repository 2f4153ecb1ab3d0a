"""Score a finished run as it is and with the weights of its blocks in eight bits.

    python -m tools.evaluate_quantized runs/vqa --checkpoint=best

Evaluators of the run that judge its best checkpoint (``on="best"``: those of test splits) are run
on both, or those of --evals. Prints every figure of both with the difference, the largest of these,
and what both take in memory: all parameters, and the kernels of blocks alone, scales included. What
is in eight bits is told in ``vlp_jax.transfer.quantize``. A parameter file that
``tools.prune_weights`` or ``tools.export_weights`` has made of a run may stand in the place of the
workdir. The run is left as it is; --out writes the figures as JSON.
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich
from absl import logging
from rich.table import Table

from tools.finished import set_up_again
from vlp_jax.infra.command import argument_parser, bad_input
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.train.initial import Origin, read_origin
from vlp_jax.transfer.quantize import quantized, size_in_bytes


class Compared(NamedTuple):
    """A run with float weights and with those in eight bits.

    Attributes:
        figures: name -> of float weights, of those in eight bits.
        parameters: bytes of all parameters, of both.
        kernels: bytes of the kernels that are in eight bits, of both, with scales.
    """

    figures: dict[str, tuple[float, float]]
    parameters: tuple[int, int]
    kernels: tuple[int, int]

    @property
    def largest(self) -> str:
        """The figure that differs most."""
        return max(self.figures, key=lambda name: abs(self.difference(name)))

    def difference(self, name: str) -> float:
        """Of a figure: with weights in eight bits less that with float ones."""
        of_float, of_int8 = self.figures[name]
        return of_int8 - of_float


def evaluate_quantized(
    workdir: str | pathlib.Path,
    checkpoint: str = "latest",
    evaluators: Sequence[str] = (),
    base: str = "",
) -> Compared:
    """Score a run twice.

    Args:
        workdir: of the run, one of its checkpoints, or a parameter file made of one.
        checkpoint: of a workdir: ``latest``, ``best`` or a step.
        evaluators: of the run, by name; none: those with ``on="best"``.
        base: of tunables: where their base lies, if no longer where it was.

    Raises:
        ConfigError, ValueError, OSError: the message names the key or the file.
    """
    origin = read_origin(workdir, checkpoint, base)
    names = list(evaluators) or _of_test(origin)
    with tempfile.TemporaryDirectory() as scratch:
        setup = set_up_again(origin, checkpoint, pathlib.Path(scratch), names)
        state, _ = setup.first_state()
        params = setup.program.served(state)
        small = jax.jit(quantized)(params)
        found = [
            {
                f"{name}/{figure}": float(value)
                for name, evaluator in setup.evaluators.items()
                for figure, value in evaluator.run(tree, origin.step or 0)
            }
            for tree in (params, small)
        ]
    kept, eight = size_in_bytes(params), size_in_bytes(small)
    in_eight = sum(leaf.size for leaf in jax.tree.leaves(small) if leaf.dtype.itemsize == 1)
    # What the trees differ in is these kernels.
    return Compared(
        {name: (value, found[1][name]) for name, value in found[0].items()},
        (kept, eight),
        (4 * in_eight, 4 * in_eight - (kept - eight)),
    )


def _of_test(origin: Origin) -> list[str]:
    sections: Mapping[str, Any] = origin.config.get("evals", {})
    names = [name for name, section in sections.items() if section.get("on") == "best"]
    if not names:
        raise ConfigError(
            "evals",
            f'{origin.where} has no evaluator with on="best"',
            f"Name some of {', '.join(sections) or 'none: there are none'}",
        )
    return names


def table_of(compared: Compared) -> Table:
    """Figures and bytes for the terminal."""
    table = Table("figure")
    for name in ("float32", "int8", "difference"):
        table.add_column(name, justify="right")
    for name, (of_float, of_int8) in compared.figures.items():
        difference = compared.difference(name)
        table.add_row(name, f"{of_float:.4g}", f"{of_int8:.4g}", f"{difference:+.2g}")
    sizes = {"all parameters": compared.parameters, "kernels of blocks": compared.kernels}
    for name, (of_float, of_int8) in sizes.items():
        table.add_row(
            f"{name}, bytes", f"{of_float:,}", f"{of_int8:,}", f"{of_int8 / of_float:.3f} x"
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Score, and print both.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argument_parser("tools.evaluate_quantized", __doc__)
    parser.add_argument("workdir", help="of the run, a checkpoint of it, or a parameter file")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    parser.add_argument("--evals", default="", help="names of evaluators, with commas between them")
    parser.add_argument("--base", default="", help="of tunables: where their base lies now")
    parser.add_argument("--out", help="file for the figures, .json")
    given = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    flag_of = {
        "init_from": "workdir",
        "init_checkpoint": "--checkpoint",
        "init_base": "--base",
        "evals": "--evals",
    }
    with bad_input(flag_of, (ValueError, OSError, RuntimeError)):
        names = [name for name in given.evals.split(",") if name]
        compared = evaluate_quantized(given.workdir, given.checkpoint, names, given.base)
        if given.out:
            write_text(pathlib.Path(given.out), json.dumps(compared._asdict(), indent=2) + "\n")
    rich.print(table_of(compared))
    name = compared.largest
    print(f"largest difference: {compared.difference(name):+.4g}, of {name}")


if __name__ == "__main__":
    set_gpu_flags()
    main()
