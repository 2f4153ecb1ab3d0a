"""Public checkpoints into a parameter file that a run can start from.

    python -m tools.import_weights --config=configs/flm_base.py \
        --vision=clip-vit-base-patch32/ --text=roberta-base/ --tokenizer=roberta-base/ \
        --out=init.safetensors
    python -m vlp_jax.main --config=configs/flm_base.py --config.init_from=init.safetensors

``--vision`` is an image tower of CLIP, ViT (augreg) or MAE, ``--text`` is RoBERTa or BERT; either
is a .safetensors or .npz file in its public naming, or a folder as Hugging Face stores a model (in
one file, or in several with their index), whose settings are then checked as well. Position tables
are resized to the config. A table says of every tensor whether it was used, resized, new or unused;
nothing is written unless all fits.
"""

import pathlib
from collections.abc import Iterable, Sequence

import jax
import rich.console
import rich.table
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vlp_jax.data.augment import PIXEL_MEAN, PIXEL_STD
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.command import bad_input, parse_flags
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import (
    PIXELS,
    Converted,
    Metadata,
    Pixels,
    Report,
    Row,
    convert_image,
    convert_text,
    read_weights,
    save_parameters,
)
from vlp_jax.models.sizes import build_model
from vlp_jax.models.vision_language import two_stacks
from vlp_jax.train.program import Program
from vlp_jax.train.schedule import Budget
from vlp_jax.train.setup import plain

_COLOURS = {"used": "green", "resized": "cyan", "new": "yellow", "unused": "dim"}
_FILE_WIDTH = 200  # columns where the output is no terminal


def import_weights(
    config: ConfigDict,
    out: str | pathlib.Path,
    *,
    vision: str | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
    pixels: str = "auto",
    mlm_head: bool = False,
) -> Report:
    """Read, convert, check, and write a parameter file.

    Args:
        config: of the run that is to start from it.
        out: the file to write, ``.safetensors``.
        vision: file or folder of an image tower.
        text: file or folder of a text encoder.
        tokenizer: that of ``text``, see ``Tokenizer.load``; by default ``config.tokenizer.path``.
        pixels: how the image tower's pixels were normalised, a key of ``PIXELS``; ``auto``: what
            its settings or its family say.
        mlm_head: whether the MLM head of the text encoder goes to the vocabulary head.

    Returns:
        What became of every tensor of the files and of every parameter of the run.

    Raises:
        ConfigError, ValueError, OSError: something does not fit; nothing was written.
    """
    if not (vision or text):
        raise ValueError("nothing to import: give --vision, --text or both")
    library = _tokenizer(config, tokenizer) if text else None
    vocabulary = (
        library.vocabulary if library else Vocabulary.of_words(config.tokenizer.vocab_size, 0)
    )
    model = build_model(config.model, vocabulary.size, vocabulary.mask_id, config.data.image_size)
    parts: dict[str, Converted] = {}
    if vision:
        trained = None if pixels == "auto" else PIXELS[pixels]
        fed = Pixels(PIXEL_MEAN, PIXEL_STD)
        parts["image"] = convert_image(read_weights(vision), model.config, fed, trained)
    if text and library:
        special_ids = {role: getattr(library, f"{role}_id") for role in ("bos", "pad", "eos")}
        config_of_text = two_stacks(model, "an imported text encoder").config
        parts["text"] = convert_text(read_weights(text), config_of_text, special_ids, mlm_head)
    shapes = _shapes(config, vocabulary)
    fitted = [part.fit(shapes) for part in parts.values()]
    metadata = Metadata(
        # The objectives of the config did not make these parameters.
        config={
            "model": plain(config.model),
            "data": {"image_size": config.data.image_size},
        },
        tokenizer=library.to_json() if library else "",
        sources={name: f"{part.family}: {part.weights.file.name}" for name, part in parts.items()},
    )
    save_parameters(out, {path: a for arrays, _ in fitted for path, a in arrays.items()}, metadata)
    return _joined(report for _, report in fitted)


def report_table(report: Report) -> rich.table.Table:
    """Every tensor and what became of it, for the terminal."""
    table = rich.table.Table("status")
    for column in ("parameter", "shape", "made of", "note"):
        table.add_column(column, overflow="fold")  # names are given whole
    for row in report.rows:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        status = f"[{_COLOURS[row.status]}]{row.status}[/]"
        table.add_row(status, row.parameter, shape, "\n".join(row.sources), row.note)
    return table


def _tokenizer(config: ConfigDict, path: str | None) -> Tokenizer:
    path = path or config.tokenizer.path
    if not path:
        raise ConfigError(
            "tokenizer.path",
            "token embeddings mean nothing without their tokenizer",
            "Give --tokenizer=FOLDER with the files that came with --text",
        )
    return Tokenizer.load(path)


def _shapes(config: ConfigDict, vocabulary: Vocabulary) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the run, by path."""
    mesh = make_mesh(devices=jax.devices()[:1])
    budget = Budget(config.data.batch_size, None, total_steps=1)
    params = Program(config, vocabulary, mesh, budget).state_spec.params
    return {path: tuple(leaf.shape) for path, leaf in by_path(params).items()}


def _joined(reports: Iterable[Report]) -> Report:
    """One report of several files: a parameter is new if it is in none of them."""
    of_parameter: dict[str, Row] = {}
    unused: list[Row] = []
    notes: list[str] = []
    for report in reports:
        for row in report.rows:
            if row.status == "unused":
                unused.append(row)
            elif row.status != "new" or row.parameter not in of_parameter:
                of_parameter[row.parameter] = row
        notes += report.notes
    return Report((*of_parameter.values(), *unused), tuple(notes))


def main(argv: Sequence[str]) -> None:
    """Import, and print the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    with bad_input():
        report = import_weights(
            values.config,
            values.out,
            vision=values.vision,
            text=values.text,
            tokenizer=values.tokenizer,
            pixels=values.pixels,
            mlm_head=values.mlm_head,
        )
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_FILE_WIDTH)
    console.print(report_table(report))
    for note in report.notes:
        print(f"note: {note}")
    print(f"{report.summary()}; wrote {values.out}")


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "the run that is to start from the weights")
    flags.DEFINE_string("vision", None, "image tower: .safetensors, .npz or a folder")
    flags.DEFINE_string("text", None, "text encoder: .safetensors or a folder")
    flags.DEFINE_string("tokenizer", None, "tokenizer of --text: its folder or file")
    flags.DEFINE_enum("pixels", "auto", ["auto", *PIXELS], "how --vision normalised its pixels")
    flags.DEFINE_boolean("mlm_head", False, "also import the MLM head")
    flags.DEFINE_string("out", None, "parameter file to write")
    flags.mark_flags_as_required(["config", "out"])


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
