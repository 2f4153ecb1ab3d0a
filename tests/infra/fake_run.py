"""A realistic workdir to make a report of, with texts that try to break out of the page."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vlp_jax.infra import metrics
from vlp_jax.infra.artifacts import Card, Curve, Gallery, Picture, Row, Span, Table

STEPS = 300
HOSTILE = "<script>alert(1)</script>"
LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
COLOURS = ("red", "green", "blue", "orange", "purple", "teal", "brown", "gold")
SHAPES = ("circle", "square", "triangle", "star", "circle", "square", "triangle", "star")
CLASSES = {"colour": 0.86, "shape": 0.54, "size": 0.33, "relation": 0.21, "function": 0.018}


def write_fake_run(workdir: Path) -> None:
    """Fills ``workdir`` with what a run of 300 steps leaves."""
    workdir.mkdir(parents=True, exist_ok=True)
    _write_metrics(workdir)
    _write_json(workdir / "config.json", _config())
    _write_json(workdir / "run.json", _facts())
    root = workdir / "artifacts"
    _gallery().save(root / "cloze")
    _table().save(root / "reconstruction" / "vocabulary")
    _curve().save(root / "calibration")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def _write_metrics(workdir: Path) -> None:
    rng = np.random.default_rng(0)
    writer = metrics.JsonlWriter(workdir / metrics.METRICS_FILE)
    writer.write(0, {f"compile/seconds/text{edge}": 21 + edge / 2 for edge in (12, 16, 24)})
    for step in range(1, STEPS + 1):
        learned = 1 - math.exp(-step / 70)
        noise = rng.normal(0, 0.06, 6)
        rate = min(step / 30, 0.5 + 0.5 * math.cos(step / 300 * math.pi))
        parts = {
            "reconstruction": 8.9 - 6.6 * learned + noise[0],
            "forward": 8.9 - 5.7 * learned + noise[1],
            "reverse": 8.9 - 5.5 * learned + noise[2],
        }
        values = {
            "train/loss": parts["reconstruction"] + 0.5 * (parts["forward"] + parts["reverse"])
        }
        values |= {f"train/flm/{name}_loss": value for name, value in parts.items()}
        values |= {
            "train/flm/reconstruction_accuracy": 0.61 * learned + abs(noise[3]) / 4,
            "train/flm/forward_accuracy": 0.47 * learned + abs(noise[4]) / 4,
            "train/learning_rate": 3e-4 * rate,
            "train/grad_norm": 1.4 + 18 * math.exp(-step / 12) + abs(noise[5]) * 4,
            "train/skipped": 0.0,
            "speed/samples_per_second": 4120 + 900 * noise[0],
            "speed/mfu": 0.431 + noise[0] / 10,
            "speed/input_wait_fraction": abs(noise[1]) / 8,
            "memory/peak_bytes": 61.3e9,
        }
        if step == 140:
            values["train/grad_norm"] = math.inf
        writer.write(step, values)
        if step % 60 == 0:
            writer.write(step, _evaluation(learned))
    writer.close()


def _evaluation(learned: float) -> dict[str, float]:
    values = {"reconstruction/grounding_gap": 38.2 * learned}
    for name, gap in CLASSES.items():
        values[f"reconstruction/grounding_gap/{name}"] = 100 * (gap * learned - 0.03)
    values["reconstruction/unigram_entropy"] = 4.71
    for rate, hard in (("base", 0.0), ("0.15", -0.1), ("0.3", 0.1), ("0.5", 0.25)):
        for suffix, worse in (("", 0.0), ("_shuffled", 1.0)):
            loss = 8.9 - (6.6 - 2.1 * worse - 2 * hard) * learned
            values[f"reconstruction/{rate}/loss{suffix}"] = loss
            accuracy = (0.63 - 0.32 * worse - 0.4 * hard) * learned
            values[f"reconstruction/{rate}/accuracy{suffix}"] = accuracy
    return values


def _config() -> dict[str, object]:
    return {
        "name": "demo",
        "seed": 0,
        "note": HOSTILE,
        "data": {"source": "scenes", "root": f"/a/{LONG_WORD}", "batch_size": 512, "shuffle": True},
        "model": {
            "size": "tiny",
            "image": {"width": 128, "depth": 4, "patch_size": 8, "stem": "convolutional"},
            "text": {"width": 128, "depth": [2, 2], "heads": 4, "dropout": 0.1},
        },
        "objective": {"flm": {"corruption_rate": 0.3, "weights": [1.0, 0.5, 0.5]}},
        "optim": {"peak": 3e-4, "warmup_percent": 10, "decay": "cosine", "clip": 1.0},
        "evals": {"reconstruction": {"every_steps": 60, "rates": [0.15, 0.3, 0.5]}, "cloze": {}},
        "log": {"every_steps": 1, "tensorboard": True, "wandb": ""},
    }


def _facts() -> dict[str, object]:
    rows = [
        ("image/patch_embedding", "6 × 6 × 3 × 128", 13_952, 0.011),
        ("image/blocks", "4 ×", 793_088, 0.598),
        ("text/embedding", "1,024 × 128", 131_072, 0.099),
        ("text/blocks", "4 ×", 386_432, 0.292),
    ]
    return {
        "name": "flm demo on scenes",
        "status": "finished",
        "step": STEPS,
        "total_steps": STEPS,
        "start": "2026-09-01T12:03:10+00:00",
        "end": "2026-09-01T12:07:51+00:00",
        "device": "NVIDIA H200",
        "device_count": 2,
        "command": ["python", "-m", "vlp_jax.main", "--config=configs/demo.py", "--workdir=a b"],
        "versions": {"vlp_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.1", "python": "3.11.7"},
        "parameters": [
            dict(zip(("name", "shape", "parameters", "share"), row, strict=True)) for row in rows
        ],
        "tokenizer_size": 1024,
        "bucket_edges": [12, 16, 24],
        "bad_examples": {"truncated JPEG": 3, "empty caption": 1},
    }


def _gallery() -> Gallery:
    return Gallery(
        "Hidden words",
        tuple(map(_card, range(8))),
        note="Words in colour were hidden; green was predicted right, red wrong.",
        step=STEPS,
    )


def _card(index: int) -> Card:
    pixels = scene(index)
    ys, xs = np.mgrid[0:64, 0:64]
    heat = np.exp(-((xs - 20 - 3 * index) ** 2 + (ys - 30) ** 2) / 220)
    overlay = (pixels * (0.25 + 0.75 * heat[..., None])).astype(np.uint8)
    colour, shape = COLOURS[index], SHAPES[index]
    wrong = index % 3 == 1
    spans = (
        Span("a large "),
        Span(colour, "wrong" if wrong else "right", "predicted: red 81.2 %"),
        Span(f" {shape} above a "),
        Span("striped" if index else LONG_WORD, "hidden"),
        Span(" thing" if index else f" {HOSTILE}"),
    )
    rows: tuple[Row, ...] = (
        (colour, "red" if wrong else colour, 0.812 - index / 11, "blue 10%, the 4%"),
        ("striped", "striped" if index else LONG_WORD, 0.31, "dotted 30%, outlined 9%"),
        ("thing", "the", 0.02, "a 1%, an 1%"),
    )
    images = (
        Picture.from_array(pixels, "image"),
        Picture.from_array(overlay, f"attention of “{colour}”"),
    )
    columns = ("hidden", "prediction", "probability", "next guesses")
    return Card(images, f"val/{index:05d}", spans, columns, rows)


def scene(index: int) -> np.ndarray:
    """A small picture, uint8 [64, 64, 3]."""
    image = Image.new("RGB", (256, 256), (236, 231, 222))
    draw = ImageDraw.Draw(image)
    x, y = 30 + 12 * index, 60
    box = (x, y, x + 110, y + 110)
    if SHAPES[index] == "circle":
        draw.ellipse(box, fill=COLOURS[index])
    elif SHAPES[index] == "square":
        draw.rectangle(box, fill=COLOURS[index])
    else:
        draw.regular_polygon((x + 55, y + 55, 64), 3, fill=COLOURS[index])
    draw.rectangle((130, 180, 220, 230), outline="black", width=6)
    return np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS))


def _table() -> Table:
    rows = [
        (word, kind, 120 * index + 35, 0.9 - index / 9, 0.41 + index)
        for index, (word, kind) in enumerate(
            [("red", "colour"), ("circle", "shape"), ("above", "relation"), (LONG_WORD, HOSTILE)]
        )
    ]
    columns = ("word", "class", "occurrences", "accuracy", "loss")
    return Table("Words by class", columns, tuple(rows), "Validation set.", "accuracy", STEPS)


def _curve() -> Curve:
    points = tuple((x / 10, (x / 10) ** 1.2) for x in range(11))
    series = {"right image": points, "perfect": ((0.0, 0.0), (1.0, 1.0))}
    return Curve("Calibration", "probability", "accuracy", series, step=STEPS)
