"""The parameters of a run as safetensors, with a model card: to keep, to start from, to publish.

    python -m tools.export_weights runs/demo --out=exported/
    python -m vlp_jax.main --config=... --config.init_from=exported/model.safetensors

writes ``model.safetensors`` (names are paths in the parameter tree; config, tokenizer, step and
metrics in its metadata), ``tokenizer.json`` and the card ``README.md``. The moving average is taken
where the run keeps one: it is what its evaluators saw. The score on a test split is one of the best
checkpoint and comes with ``--checkpoint=best``.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlp_jax.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.command import argument_parser, bad_input
from vlp_jax.infra.files import write_text
from vlp_jax.infra.manifest import read_manifest
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.infra.units import format_bytes
from vlp_jax.models.pretrained import WEIGHTS_FILE, Metadata, is_parameter_file, save_parameters
from vlp_jax.models.sizes import parameter_table
from vlp_jax.train.initial import CHECKPOINT_FOLDER, Origin, read_origin

CARD_FILE = "README.md"

_OBJECTIVES = {  # by type
    "flm": "Free Language Modeling",
    "mlm": "masked language modeling",
    "ar": "autoregressive language modeling",
    "prefix_lm": "prefix language modeling",
    "itc": "image-text contrast",
    "itm": "image-text matching",
    "vqa": "visual question answering",
    "nlvr2": "statements about two pictures",
    "entailment": "visual entailment",
}


def export_weights(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    checkpoint: str = "latest",
    overwrite: bool = False,
    base: str = "",
    tunables: bool = False,
) -> pathlib.Path:
    """Write parameters, tokenizer and model card of a run.

    Args:
        workdir: of the run, or one checkpoint of it.
        out: folder to write to; made if absent.
        checkpoint: of a workdir: ``latest``, ``best`` or a step.
        overwrite: whether files of these names may be replaced.
        base: of tunables: where their base lies, if no longer where it was.
        tunables: write these alone, with the name of their base.

    Returns:
        The file of the parameters.

    Raises:
        FileExistsError: a file is there already; nothing was written.
        ValueError: ``workdir`` is a parameter file already, or ``tunables`` are asked of a whole
            checkpoint.
        ConfigError, ValueError, RuntimeError, OSError: no such checkpoint, or a damaged one, or
            damaged metrics of the run.
    """
    workdir, out = pathlib.Path(workdir), pathlib.Path(out)
    taken = [name for name in (WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE) if (out / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(
            f"{out} already has {', '.join(taken)}; give another folder, or --overwrite"
        )
    if is_parameter_file(workdir):
        raise ValueError(f"{workdir} is a parameter file already; name the run it was made of")
    origin = read_origin(workdir, checkpoint, base)
    if tunables:
        origin = _tunables(origin)
    run = workdir.parent.parent if workdir.parent.name == CHECKPOINT_FOLDER else workdir
    metrics = _metrics(workdir, origin.step) | _metrics_of_best(run, origin)
    metadata = Metadata(
        config={**origin.config, "classes": list(origin.classes)},
        tokenizer=origin.tokenizer,
        step=origin.step,
        metrics=metrics,
        sources={"run": origin.config["name"]},
        base={} if origin.base is None or not tunables else origin.base.to_json(),
    )
    facts_file = run / RUN_FILE
    facts = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    card = model_card(origin, metrics, facts, tunables)
    save_parameters(out / WEIGHTS_FILE, origin.arrays, metadata)
    write_text(out / TOKENIZER_FILE, origin.tokenizer)
    write_text(out / CARD_FILE, card)
    return out / WEIGHTS_FILE


def _tunables(origin: Origin) -> Origin:
    """The same without what its base has."""
    if origin.base is None:
        raise ValueError(
            f"--tunables: {origin.where} holds all of its parameters, and names no base; leave it "
            "out, or train with config.checkpoint.tunables_only=True"
        )
    own = {path: array for path, array in origin.arrays.items() if path not in origin.base.arrays}
    return dataclasses.replace(origin, arrays=own)


def model_card(
    origin: Origin,
    metrics: Mapping[str, float],
    facts: Mapping[str, Any],
    tunables: bool = False,
) -> str:
    """What one must know of the weights, in Markdown with the front matter of model hubs.

    Args:
        origin: the parameters and their company.
        metrics: evaluated for these very parameters.
        facts: ``run.json`` of the run; may be empty.
        tunables: whether they are these alone.
    """
    config = origin.config
    tokens = Tokenizer.from_json(origin.tokenizer, origin.where).vocab_size
    trained: dict[str, Any] = {
        "updates": origin.step,
        "batch size": config["data"]["batch_size"],
        "objectives": ", ".join(
            f"`{name}`: {_objective(name, section)}"
            for name, section in config["objectives"].items()
        ),
        "initial parameters": _initial(config),
        "image size": f"{config['data']['image_size']} pixels",
        "vocabulary": f"{tokens} tokens",
        "parameters": "moving average" if config["optim"]["ema_decay"] else "of the last update",
    }
    trained |= {key: facts[key] for key in ("device", "start", "command") if key in facts}
    data = [
        (f"`{name}`", ", ".join(f"{key}={value}" for key, value in section.items() if value))
        for name, section in config["data"]["sources"].items()
    ]
    sizes = [(f"`{name}`", f"{count:,}") for name, count in parameter_table(origin.params())]
    trained_for = dict.fromkeys(_objective(*item) for item in config["objectives"].items())
    scores = [(f"`{name}`", f"{value:.4g}") for name, value in sorted(metrics.items())]
    sections = [
        "---\nlibrary_name: vlp_jax\ntags:\n- vision-language\n- jax\n---",
        f"# {config['name']}",
        f"A vision-language model trained with `vlp_jax` for {', '.join(trained_for)}; "
        f"initial parameters: {_initial(config)}.",
        "## Training",
        _table(("", ""), trained.items()),
        "## Data",
        _table(("source", "settings"), data),
        "## Evaluation",
        _table(("metric", "value"), scores)
        if scores
        else "No evaluation was run at this checkpoint.",
        *_notes_on_best(origin, metrics),
        "## Parameters",
        *(_note_on_base(origin) if tunables else ()),
        _table(("module", "count"), sizes),
        "## Use",
        "```python\n"
        "from vlp_jax.models.pretrained import load_metadata, load_parameters\n\n"
        f'parameters = load_parameters("{WEIGHTS_FILE}")  # path in the parameter tree -> array\n'
        f'metadata = load_metadata("{WEIGHTS_FILE}")  # config, tokenizer, step, metrics\n'
        "```",
        f"A run starts from it by `--config.init_from={WEIGHTS_FILE}`; `{TOKENIZER_FILE}` is the "
        "tokenizer it was trained with.",
        "## Limits",
        "The model knows what its data shows, with the biases of that data, and the metrics above "
        "are those of splits of that same data. No licence is stated: add the one that the data "
        "and the initial weights allow before you publish this file.",
    ]
    return "\n\n".join(sections) + "\n"


def _metrics(workdir: pathlib.Path, step: int | None) -> dict[str, float]:
    """The metrics saved with a checkpoint."""
    folder = workdir / CHECKPOINT_FOLDER / str(step)
    root = folder if folder.is_dir() else workdir
    return read_manifest(root).metrics


def _metrics_of_best(run: pathlib.Path, origin: Origin) -> dict[str, float]:
    """What evaluators with ``on="best"`` wrote of this very checkpoint, at the end of the run."""
    found: dict[str, float] = {}
    names = _on_best(origin)
    for record in read_metrics(run):
        for name in names:
            if record.get(f"{name}/step") == origin.step:
                figures = {k: v for k, v in record.items() if k.startswith(f"{name}/")}
                del figures[f"{name}/step"]
                found |= figures
    return found


def _on_best(origin: Origin) -> list[str]:
    """The evaluators that judge the best checkpoint."""
    sections = origin.config.get("evals", {}).items()
    return sorted(name for name, section in sections if section.get("on") == "best")


def _notes_on_best(origin: Origin, metrics: Mapping[str, float]) -> list[str]:
    """Which figures judge the checkpoint that others have chosen, or that they are lacking."""
    evaluators = {
        name: any(key.startswith(f"{name}/") for key in metrics) for name in _on_best(origin)
    }
    chosen_by = origin.config["checkpoint"]["best_metric"]
    notes = []
    if there := [f"`{name}/`" for name, found in evaluators.items() if found]:
        notes.append(
            f"The figures under {', '.join(there)} were measured once, at the end of the run, on "
            f"this checkpoint (update {origin.step}), which `{chosen_by}` had chosen."
        )
    if lacking := [f"`{name}/`" for name, found in evaluators.items() if not found]:
        notes.append(
            f"There are no figures under {', '.join(lacking)} for update {origin.step}: they "
            f"are measured at the end of the run, on the checkpoint that `{chosen_by}` chooses."
        )
    return notes


def _note_on_base(origin: Origin) -> list[str]:
    """That the rest lies elsewhere."""
    if origin.base is None:
        return []
    return [
        f"These are tunables alone. The other {len(origin.base.arrays)} parameters are those of "
        f"`{origin.base}`, with the SHA-256 `{origin.base.sha256}` over paths, shapes, dtypes and "
        "bytes; `--config.init_from` and `python -m tools.predict` look for them there, or where "
        "`--config.init_base` and `--base` say, and use no others."
    ]


def _objective(name: str, section: Mapping[str, Any]) -> str:
    kind = section.get("type", name)
    return _OBJECTIVES.get(kind, kind)


def _initial(config: Mapping[str, Any]) -> str:
    """Where the first parameters came from."""
    if not config["init_from"]:
        return "random"
    checkpoint = config["init_checkpoint"]
    return f"`{config['init_from']}`" + (f" ({checkpoint})" if checkpoint != "latest" else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def main(arguments: list[str] | None = None) -> None:
    """Export, and print where to.

    Args:
        arguments: the command line without the program; that of the process by default.
    """
    parser = argument_parser("tools.export_weights", __doc__)
    parser.add_argument("workdir", help="folder that was given to the trainer, or a checkpoint")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--base", default="", help="of tunables: where their base lies now")
    parser.add_argument("--tunables", action="store_true", help="write these alone")
    given = parser.parse_args(arguments)
    flag_of = {"init_from": "workdir", "init_checkpoint": "--checkpoint", "init_base": "--base"}
    with bad_input(flag_of, (ValueError, OSError, RuntimeError)):
        file = export_weights(
            given.workdir,
            given.out,
            given.checkpoint,
            given.overwrite,
            given.base,
            given.tunables,
        )
    size = format_bytes(file.stat().st_size)
    print(f"wrote {file} ({size}), {TOKENIZER_FILE} and {CARD_FILE}")


if __name__ == "__main__":
    main()
