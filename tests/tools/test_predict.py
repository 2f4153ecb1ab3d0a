"""The command line of the predictor: what it prints, and what it says of bad input."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from tools import predict
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.predict import Predictor


class Fake:
    """Answers without a model."""

    def answer(self, image, question, top):
        return [("red", 0.75), ("blue", 0.25)][:top]

    def classify(self, images, top):
        return [[("cat", 0.9), ("dog", 0.1)][:top] for _ in images]

    def classify_texts(self, texts, top):
        return [[(f"{text}", 0.9)] for text in texts]

    def score_texts(self, texts):
        return np.array([2.5 for _ in texts], np.float32)

    def rank(self, images, texts):
        return np.array([[0.1, 0.9], [0.2, 0.3]])

    def embed_texts(self, texts):
        return np.ones((len(texts), 4), np.float32)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs a command; gives its exit code, what it printed and what it complained of."""
    loaded = []

    def load(path, which, base, quantize):
        loaded.append(path)
        if path.name == "absent":
            raise ConfigError("init_from", f"{path} is no run", "Give one")
        return Fake()

    monkeypatch.setattr(Predictor, "load", load)
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def run(name, checkpoint="run", **given):
        given["image"] = [str(tmp_path / file) for file in given.get("image", ())]
        code = ExitCode.OK
        loaded.clear()
        with flagsaver.flagsaver(checkpoint=str(tmp_path / checkpoint), **given):
            try:
                predict.main(["predict", name])
            except SystemExit as error:
                code = error.code
        return code, *capsys.readouterr()

    run.loaded = loaded
    return run


def test_answers_are_one_json_object(command):
    code, printed, _ = command("answer", image=["a.png"], text=["what?", "where?"], top=1)
    assert code == ExitCode.OK
    assert json.loads(printed) == {
        "what?": [{"answer": "red", "probability": 0.75}],
        "where?": [{"answer": "red", "probability": 0.75}],
    }


def test_every_image_has_its_classes(command):
    _, printed, _ = command("classify", image=["a.png", "b.png"], top=2)
    rows = [{"class": "cat", "probability": 0.9}, {"class": "dog", "probability": 0.1}]
    assert list(json.loads(printed).values()) == [rows, rows]


def test_texts_are_classified_and_scored_without_an_image(command):
    _, printed, _ = command("classify", text=["fine", "one\tother"])
    assert json.loads(printed) == {
        "fine": [{"class": "fine", "probability": 0.9}],
        "one\tother": [{"class": "('one', 'other')", "probability": 0.9}],
    }
    _, printed, _ = command("score", text=["one\tother"])
    assert json.loads(printed) == {"one\tother": 2.5}


def test_each_text_ranks_the_images(command):
    _, printed, _ = command("rank", image=["a.png", "b.png"], text=["one", "two"])
    names = {
        text: [row["image"][-5:] for row in rows] for text, rows in json.loads(printed).items()
    }
    assert names == {"one": ["b.png", "a.png"], "two": ["a.png", "b.png"]}


def test_vectors_are_written_where_it_is_said(command, tmp_path):
    out = tmp_path / "e.npz"
    _, printed, _ = command("embed", text=["one", "two"], out=str(out))
    assert json.loads(printed) == {"out": str(out), "texts": [2, 4]}
    with np.load(out) as arrays:
        assert arrays["texts"].shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("caption", {}, "caption needs one --image or more"),
        ("caption", {"image": ["a.png"], "text": ["a"]}, "and no --text"),
        ("answer", {"image": ["a.png", "b.png"], "text": ["a"]}, "answer needs one --image, "),
        ("compare", {"image": ["a.png", "b.png", "c.png"], "text": ["a"]}, "two --image"),
        ("classify", {"image": ["a.png"], "text": ["a"]}, "or else --text"),
        ("classify", {}, "or else --text"),
        ("score", {"text": ["a\tb\tc"]}, r"--text='a\tb\tc': give a sentence, or two with a tab"),
        ("score", {"image": ["a.png"], "text": ["a"]}, "and no --image"),
        ("rank", {"image": ["a.png"]}, "one --text or more; given were 1 and 0"),
        ("rank", {"image": ["a.png"], "text": ["a"], "out": "e.npz"}, "no other command"),
        ("embed", {"text": ["a"]}, "--out=FILE.npz"),
        ("embed", {"text": ["a"], "out": "vectors"}, "--out=vectors: end it in .npz"),
        ("embed", {"text": ["a"], "out": "/nowhere/e.npz"}, "the folder /nowhere is not there"),
        ("caption", {"image": ["gone.png"]}, "gone.png: no such file"),
    ],
)
def test_bad_flags_are_found_before_a_checkpoint_is_read(command, name, given, message):
    code, printed, complaint = command(name, **given)
    assert (code, printed) == (ExitCode.BAD_INPUT, "")
    assert message in complaint
    assert not command.loaded


def test_a_bad_checkpoint_is_named_by_its_flag(command):
    code, _, complaint = command("caption", checkpoint="absent", image=["a.png"])
    assert code == ExitCode.BAD_INPUT
    assert complaint.startswith("error: --checkpoint: ")
    assert complaint.endswith("is no run. Give one.\n")
