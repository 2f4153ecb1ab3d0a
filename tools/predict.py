"""Use a checkpoint on one's own images and texts; prints one JSON object.

    python -m tools.predict caption --checkpoint=WORKDIR --image=cat.jpg
    python -m tools.predict answer  --checkpoint=WORKDIR --image=cat.jpg --text="what is this?"
    python -m tools.predict compare --checkpoint=WORKDIR --image=a.jpg --image=b.jpg --text="..."
    python -m tools.predict classify --checkpoint=WORKDIR --image=cat.jpg
    python -m tools.predict classify --checkpoint=WORKDIR --text="a fine film"
    python -m tools.predict score   --checkpoint=WORKDIR --text=$'a cat sat\\ta cat ran'
    python -m tools.predict rank    --checkpoint=WORKDIR --image=a.jpg --image=b.jpg --text="a cat"
    python -m tools.predict embed   --checkpoint=WORKDIR --image=a.jpg --text="a cat" --out=e.npz

Two sentences have a tab between them. ``--checkpoint`` is a run's workdir, one of its checkpoints,
or an exported parameter file; where it holds tunables alone, ``--base`` says where their base lies,
if no longer where it was. ``--quantize=int8`` holds the weights of its blocks in eight bits. In
Python: ``vlp_jax.predict.Predictor``.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from vlp_jax.infra.command import bad_input, parse_flags
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.predict import QUANTIZE, Predictor, Text

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir, checkpoint or parameter file")
_WHICH = flags.DEFINE_string("which", "latest", "checkpoint of a workdir: latest, best or a step")
_BASE = flags.DEFINE_string("base", "", "of tunables: where their base lies, if it was moved")
_IMAGES = flags.DEFINE_multi_string("image", [], "image file; repeat for several")
_TEXTS = flags.DEFINE_multi_string("text", [], "text; repeat for several")
_BEAMS = flags.DEFINE_integer("beams", 3, "captions of each image", lower_bound=1)
_TOP = flags.DEFINE_integer("top", 5, "answers or classes shown", lower_bound=1)
_QUANTIZE = flags.DEFINE_enum("quantize", "", QUANTIZE, "how weights of blocks are held")
_OUT = flags.DEFINE_string("out", None, "embed: file for the vectors, .npz")


def caption(predictor: Predictor) -> Any:
    """Captions of each image with log-probabilities."""
    found = predictor.caption(_IMAGES.value, beams=_BEAMS.value)
    return {
        name: [{"caption": text, "log_probability": round(score, 4)} for text, score in captions]
        for name, captions in zip(_IMAGES.value, found, strict=True)
    }


def answer(predictor: Predictor) -> Any:
    """Answers to each question about the image, or classes of each hypothesis."""
    return {
        text: _chances(predictor.answer(_IMAGES.value[0], text, _TOP.value))
        for text in _TEXTS.value
    }


def compare(predictor: Predictor) -> Any:
    """Whether each statement is true of the two images."""
    first, second = _IMAGES.value
    return {text: _chances(predictor.compare(first, second, text)) for text in _TEXTS.value}


def classify(predictor: Predictor) -> Any:
    """Classes of each image, or of each text that is read without one."""
    names = _IMAGES.value or _TEXTS.value
    if _IMAGES.value:
        found = predictor.classify(names, _TOP.value)
    else:
        found = predictor.classify_texts(_sentences(), _TOP.value)
    return {
        name: [{"class": label, "probability": round(chance, 4)} for label, chance in classes]
        for name, classes in zip(names, found, strict=True)
    }


def score(predictor: Predictor) -> Any:
    """The number of each text."""
    found = predictor.score_texts(_sentences())
    return {text: round(float(number), 4) for text, number in zip(_TEXTS.value, found, strict=True)}


def rank(predictor: Predictor) -> Any:
    """Images by how well each text describes them, best first."""
    scores = predictor.rank(_IMAGES.value, _TEXTS.value)
    return {
        text: [
            {"image": _IMAGES.value[i], "score": round(float(scores[i, column]), 4)}
            for i in np.argsort(-scores[:, column], kind="stable")
        ]
        for column, text in enumerate(_TEXTS.value)
    }


def embed(predictor: Predictor) -> Any:
    """Unit vectors of images and texts, in a file."""
    arrays = {}
    if _IMAGES.value:
        arrays["images"] = predictor.embed_images(_IMAGES.value)
    if _TEXTS.value:
        arrays["texts"] = predictor.embed_texts(_TEXTS.value)
    np.savez(_OUT.value, **arrays)  # type: ignore[arg-type]
    return {"out": _OUT.value} | {name: list(array.shape) for name, array in arrays.items()}


COMMANDS: Mapping[str, Callable[[Predictor], Any]] = {
    "caption": caption,
    "answer": answer,
    "compare": compare,
    "classify": classify,
    "score": score,
    "rank": rank,
    "embed": embed,
}


def _check_flags(command: str) -> None:
    """What the flags must hold, before a checkpoint is read."""
    images, texts = len(_IMAGES.value), len(_TEXTS.value)
    complaint = {
        "caption": "" if images and not texts else "one --image or more, and no --text",
        "answer": "" if images == 1 and texts else "one --image, and one --text or more",
        "compare": "" if images == 2 and texts else "two --image, and one --text or more",
        "classify": "" if bool(images) != bool(texts) else "one --image or more, or else --text",
        "score": "" if texts and not images else "one --text or more, and no --image",
        "rank": "" if images and texts else "one --image or more, and one --text or more",
        "embed": "" if images or texts else "one --image or --text or more",
    }[command]
    if complaint:
        raise ValueError(f"{command} needs {complaint}; given were {images} and {texts}")
    if command in ("classify", "score"):
        _sentences()  # for its complaints
    if (_OUT.value is not None) != (command == "embed"):
        raise ValueError("--out=FILE.npz: embed needs it, and no other command")
    if _OUT.value is not None:
        out = pathlib.Path(_OUT.value)
        if out.suffix != ".npz":
            raise ValueError(f"--out={out}: end it in .npz")
        if not out.parent.is_dir():
            raise ValueError(f"--out={out}: the folder {out.parent} is not there; make it")
    for image in _IMAGES.value:
        if not pathlib.Path(image).is_file():
            raise ValueError(f"--image={image}: no such file")


def _sentences() -> list[Text]:
    """Texts as given, or pairs of sentences."""
    given: list[Text] = []
    for text in _TEXTS.value:
        first, *others = text.split("\t")
        if len(others) > 1:
            raise ValueError(f"--text={text!r}: give a sentence, or two with a tab between them")
        given.append((first, others[0]) if others else first)
    return given


def _chances(pairs: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"answer": text, "probability": round(chance, 4)} for text, chance in pairs]


def main(argv: Sequence[str]) -> None:
    """Run the command named on the command line."""
    if len(argv) != 2 or argv[1] not in COMMANDS or _CHECKPOINT.value is None:
        raise app.UsageError(f"write one of {', '.join(COMMANDS)} and --checkpoint=WORKDIR")
    logging.set_verbosity(logging.WARNING)  # libraries log every file they read
    flag_of = {"init_from": "--checkpoint", "init_checkpoint": "--which", "init_base": "--base"}
    with bad_input(flag_of):
        _check_flags(argv[1])
        predictor = Predictor.load(
            pathlib.Path(_CHECKPOINT.value), _WHICH.value, _BASE.value, _QUANTIZE.value
        )
        print(json.dumps(COMMANDS[argv[1]](predictor), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
