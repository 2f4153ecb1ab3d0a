"""Retrieval, captioning and task evaluators on easy scenes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import shared_config, towers_config

from tests.evals.conftest import announced
from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import MAX_ANSWERS, batch_spec
from vlp_jax.data.scenes import Scenes
from vlp_jax.data.scenes.source import EVALUATION_RECORDS
from vlp_jax.data.source import BadExample
from vlp_jax.data.sources import SOURCES, build_source
from vlp_jax.evals import build_evaluators
from vlp_jax.evals.attention_maps import attention_rollout
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.scores.captioning import caption_scores
from vlp_jax.evals.task import Task
from vlp_jax.infra.artifacts import load_all
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.classification import known_only
from vlp_jax.transfer.ranking import Ranker

EXAMPLES = 10


class Colours(Scenes):
    """The colour of the largest object, asked in words that do not tell it."""

    extra_fields = ("label",)

    def __init__(self, split="train", level="full", num_records=None, name="colours"):
        super().__init__(split, level=level, num_records=num_records, name=name)
        self.classes = tuple(f"colour {i}" for i in range(8))

    def extras(self, record, size):
        del size
        [colour] = self.labels(np.array([record]))["colour"]
        return {"label": np.int32(colour)}

    def template(self, record):
        return "even" if record % 2 == 0 else "odd"

    def group(self, record):
        return {"parity": "even" if record % 2 == 0 else "odd"}


class Questions(Colours):
    """The same with several annotators' answers."""

    extra_fields = ("answer", "answer_score")

    def extras(self, record, size):
        label = super().extras(record, size)["label"]
        answer = np.full(MAX_ANSWERS, -1, np.int32)
        answer[0] = label
        return {"answer": answer, "answer_score": (answer >= 0).astype(np.float32)}

    def question_id(self, record):
        return 100 + record

    def answers_of(self, record):
        return (self.classes[int(self.extras(record, 8)["answer"][0])],) * 4 + ("maybe",) * 6


@pytest.fixture(scope="module")
def transfer(with_evals, monkeypatch_module, tmp_path_factory):
    """A context with every objective that evaluators need, and its parameters."""
    monkeypatch_module.setitem(SOURCES, "colours", Colours)
    monkeypatch_module.setitem(SOURCES, "questions", Questions)
    base = with_evals({}, workdir=tmp_path_factory.mktemp("run"))
    config = base.config
    with config.unlocked():
        for name in ("colours", "questions"):
            config.data.sources[name] = {"level": "easy", "num_records": 100}
        config.objectives = {
            "flm": {},
            "itc": {"embedding_dim": 16},
            "itm": {},
            "colour": {"type": "entailment", "num_classes": 9},
            "vqa": {"num_classes": 9},
        }
    vocabulary = base.tokenizer.vocabulary
    model = build_model(config.model, vocabulary.size, vocabulary.mask_id, config.data.image_size)
    objectives = build_objectives(config.objectives, model, vocabulary)
    fields = ("label", "answer", "answer_score")
    spec = batch_spec(Bucket(8, 32), 1) | batch_spec(Bucket(8, 32), 1, fields)

    def init(key):
        params = {}
        for objective in objectives:
            params |= objective.init(key, spec)[0]
        return params

    sources = {name: build_source(config, name) for name in config.data.sources}
    context = dataclasses.replace(base, objectives=objectives, sources=sources)
    return context, jax.jit(init)(jax.random.key(1))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def run(transfer, **section):
    context, params = transfer
    with context.config.unlocked():
        context.config.evals = {"subject": section}
    [evaluator] = build_evaluators(context).values()
    return announced(evaluator, evaluator.run(params)), evaluator


def predictions(transfer):
    file = transfer[0].workdir / "predictions" / "subject.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_retrieval_counts_all_captions(transfer):
    metrics, evaluator = run(
        transfer,
        type="retrieval",
        source="scenes",
        num_examples=EXAMPLES,
        matching="itm",
        shortlist=4,
    )
    assert metrics["chance_r1"] == 1 / EXAMPLES
    for prefix in ("", "reranked/"):
        assert metrics[f"{prefix}t2i_r10"] == 1.0  # ten images: the right one is among ten
        assert 0 <= metrics[f"{prefix}i2t_r1"] <= metrics[f"{prefix}i2t_r5"] <= 1
    table = load_all(transfer[0].workdir)["subject"]
    assert "10 images, 50 captions" in table.title
    assert evaluator._ranker.batch_size == 8


@pytest.mark.parametrize(
    ("section", "programs"),
    [
        (
            {"type": "task", "source": "colours", "objective": "colour", "controls": False},
            lambda evaluator: [evaluator._predict],
        ),
        (
            {"type": "retrieval", "source": "scenes", "matching": "itm", "shortlist": 4},
            lambda evaluator: [evaluator._ranker._images, evaluator._ranker._texts],
        ),
        (
            {"type": "captioning", "source": "scenes", "objective": "flm", "controls": False},
            lambda evaluator: [evaluator._captions],
        ),
    ],
    ids=["task", "retrieval", "captioning"],
)
def test_evaluators_of_two_splits_compile_one_program_and_see_their_own_records(
    transfer, section, programs
):
    whole, params = transfer
    sections = {s: {**section, "split": s, "num_examples": 16} for s in ("val", "test")}

    def evaluated(**wanted):
        context = dataclasses.replace(whole)  # nothing is shared with other contexts
        with context.config.unlocked():
            context.config.evals = wanted
        evaluators = build_evaluators(context)
        return evaluators, {n: dict(e.run(params)) for n, e in evaluators.items()}

    both, together = evaluated(**sections)
    for one, other in zip(*map(programs, both.values()), strict=True):
        assert one is other
        assert one._cache_size() == 1
    apart = {}
    for name, alone in sections.items():
        apart |= evaluated(**{name: alone})[1]
    assert together == apart
    assert apart["val"] != apart["test"]


def test_cached_towers_match_as_pairs_encoded_anew(transfer):
    """Whatever the batch, and whichever pairs share a tower."""
    context, params = transfer
    itc, itm = (next(o for o in context.objectives if o.name == n) for n in ("itc", "itm"))
    source = build_source(context.config, "scenes", split="val", num_records=5)
    pixels = np.stack([source.image(i, 32) for i in range(5)])
    ids, lengths = context.tokenizer.padded([source.caption(i, 0) for i in range(5)], 24)
    ranker = Ranker(itc, itm, context.mesh, batch_size=8)
    images = ranker.encode_images(params, [pixels[:2], pixels[2:]])
    texts = ranker.encode_texts(params, ids, lengths)
    pairs = np.array([[i, j] for i in range(5) for j in range(5)])
    cached = ranker.match(params, images, texts, pairs)
    for (i, j), score in list(zip(pairs, cached, strict=True))[::6]:
        alone = ranker.match(
            params,
            ranker.encode_images(params, [pixels[i : i + 1]]),
            ranker.encode_texts(params, ids[j : j + 1], lengths[j : j + 1]),
            np.array([[0, 0]]),
        )
        np.testing.assert_allclose(alone, score, atol=1e-4)
    # All pairs on the shortlist: the order is that of the matching scores.
    ranked = ranker.rerank(params, images, texts, shortlist=5)
    np.testing.assert_array_equal(ranked.argsort(axis=1), cached.reshape(5, 5).argsort(axis=1))
    short = ranker.rerank(params, images, texts, shortlist=1)
    assert 5 <= (short > 1.5).sum() <= 10


def test_captioning_scores_captions_and_controls(transfer):
    metrics, _ = run(
        transfer,
        type="captioning",
        source="scenes",
        objective="flm",
        num_examples=EXAMPLES,
        max_length=8,
        beams=2,
    )
    assert {"cider", "bleu4", "rouge_l", "shuffled/cider"} <= set(metrics)
    assert all(np.isfinite(list(metrics.values())))
    gallery = load_all(transfer[0].workdir)["subject"]
    assert len(gallery.cards) == EXAMPLES
    written = predictions(transfer)
    given = [row["caption"] for row in written], [row["references"] for row in written]
    assert caption_scores(*given)["cider"] == metrics["cider"]


@pytest.mark.parametrize(("source", "objective"), [("colours", "colour"), ("questions", "vqa")])
def test_task_accuracy_is_that_of_the_guesses(transfer, source, objective):
    metrics, evaluator = run(
        transfer,
        type="task",
        source=source,
        objective=objective,
        num_examples=EXAMPLES,
        min_group=2,
    )
    context, params = transfer
    task = next(o for o in context.objectives if o.name == objective)
    data = build_source(context.config, source, split="val", num_records=EXAMPLES)
    ids, lengths = context.tokenizer.padded([data.caption(i, 0) for i in range(EXAMPLES)], 24)
    pixels = np.stack([data.image(i, 32) for i in range(EXAMPLES)])
    logits = jax.jit(task.logits)
    right = {}
    for kind, shown in (("", pixels), ("_text_only", np.zeros_like(pixels))):
        batch = {"image": shown, "text_ids": ids, "text_length": lengths}
        guesses = np.asarray(logits(params, batch))[:, :8].argmax(axis=1)
        colours = data.labels(np.arange(EXAMPLES))["colour"]
        right[kind] = (guesses == colours).astype(float)
        # Four of ten annotators: min(3 / 3, 1) without one of them, min(4 / 3, 1) without another.
        assert metrics[f"accuracy{kind}"] == pytest.approx(right[kind].mean())
    even = np.arange(EXAMPLES) % 2 == 0
    gap = abs(right[""][even].mean() - right[""][~even].mean())
    assert metrics["worst_gap/parity"] == pytest.approx(100 * gap)
    assert 0 < metrics["accuracy_majority"] < 1
    artefacts = load_all(context.workdir)
    assert [row[0] for row in artefacts["subject_groups"].rows] == [
        "all",
        "text",
        "text",
        "parity",
        "parity",
    ]
    assert isinstance(evaluator, Task)
    written = predictions(transfer)
    assert [row["record"] for row in written] == list(range(EXAMPLES))
    assert [row["score"] for row in written] == pytest.approx(right[""].tolist())
    for row in written:
        assert (row["score"] > 0) == (row["answer"] in row["expected"])
        assert row["text"] == data.caption(row["record"], 0)
        assert row["images"] == list(data.image_key(row["record"]))
        assert row.get("question_id") == (100 + row["record"] if source == "questions" else None)


def test_scores_of_a_real_set_by_a_column_of_its_file(transfer, tmp_path):
    context, params = transfer
    draw = np.random.default_rng(0)
    entries = []
    for number in range(16):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(
            tmp_path / f"{number}.png"
        )
        kind = {"kind": "colour" if number % 3 else "shape"}
        answer = f"answer {number % 2}"
        split = "train" if number < 4 else "val"
        about = {"image": f"{number}.png", "question": f"a red circle {number} ?", "split": split}
        entries.append({**about, **kind, "answers": [answer]})
    (tmp_path / "vqa.json").write_text(json.dumps(entries))
    with context.config.unlocked():
        context.config.data.sources.asked = {
            "type": "vqa",
            "root": str(tmp_path),
            "groups": ("kind",),
        }
    sources = {**context.sources, "asked": build_source(context.config, "asked")}
    context = dataclasses.replace(context, sources=sources)
    section = {"type": "task", "source": "asked", "objective": "vqa", "min_group": 2}
    metrics, evaluator = run((context, params), num_examples=0, controls=False, **section)
    records, labels, classes = evaluator._predictions(params)
    right = evaluator._scores(records, labels, classes[""])
    assert 0 < right.sum() < 12
    shape = np.array([entries[4 + record]["kind"] == "shape" for record in records])
    means = {"shape": right[shape].mean(), "colour": right[~shape].mean()}
    gap = abs(means["shape"] - means["colour"])
    assert metrics["worst_gap/kind"] == pytest.approx(100 * gap)
    rows = load_all(context.workdir)["subject_groups"].rows
    assert [(*row[:3], pytest.approx(row[3])) for row in rows] == [
        ("all", "", 12, right.mean()),
        ("kind", "colour", 8, means["colour"]),
        ("kind", "shape", 4, means["shape"]),
    ]


def test_no_number_of_examples_means_all_of_a_split(transfer):
    context, _ = transfer
    with context.config.unlocked():
        context.config.data.sources.endless = {"type": "scenes", "level": "easy"}
    sources = {**context.sources, "endless": build_source(context.config, "endless")}
    context = dataclasses.replace(context, sources=sources)
    sets = {n: FixedSet(context, "subject", "colours", "train", n) for n in (0, 70)}
    assert {n: found.plan.num_rows for n, found in sets.items()} == {0: 100, 70: 70}
    # A made split of no stated size has one that is its own.
    whole = FixedSet(context, "subject", "endless", "val", 0, batch_size=16)
    assert whole.plan.num_rows == EVALUATION_RECORDS
    assert whole.plan.batch_size == 16
    for make, problem in (
        (lambda: FixedSet(context, "subject", "endless", "train", 0), "which is unbounded"),
        (lambda: FixedSet(context, "subject", "colours", "val", -1), "-1 examples are no set"),
        (lambda: FixedSet.one_batch(context, "subject", "colours", "val", 0), "shown at once"),
    ):
        with pytest.raises(ConfigError, match=problem) as error:
            make()
        assert error.value.key == "evals.subject.num_examples"


def test_a_picture_in_two_splits_is_refused(transfer, monkeypatch):
    monkeypatch.setattr(Scenes, "world", "one for all splits")
    with pytest.raises(ValueError, match=r"evals\.subject\.split: 10 pictures are in the training"):
        run(transfer, type="task", source="colours", objective="colour", num_examples=EXAMPLES)


def test_the_majority_does_without_damaged_training_examples(transfer, monkeypatch):
    whole, _ = run(transfer, type="task", source="colours", objective="colour", num_examples=8)
    extras = Colours.extras

    def damaged(self, record, size):
        if self.split == "train" and record < 5:
            raise BadExample("torn picture", f"record {record}")
        return extras(self, record, size)

    monkeypatch.setattr(Colours, "extras", damaged)
    metrics, _ = run(transfer, type="task", source="colours", objective="colour", num_examples=8)
    assert metrics.keys() == whole.keys()
    assert metrics["accuracy"] == whole["accuracy"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"type": "retrieval", "objective": "flm"},
            r"'flm' is no objective of type ITC",
        ),
        ({"type": "captioning", "objective": "itc"}, r"'itc' is no objective .* forward stream"),
        ({"type": "task", "objective": "flm"}, r"'flm' is no objective of type Classifier "),
        ({"type": "captioning", "objective": "flm", "beams": 0}, r"evals\.subject: beams=0"),
        (
            {"type": "captioning", "objective": "flm", "max_length": 1000},
            r"evals\.subject\.max_length: 1000 tokens, but the model has",
        ),
        ({"type": "retrieval", "max_captions": 0}, r"evals\.subject\.max_captions: 0"),
        ({"type": "retrieval", "shortlist": 0}, r"evals\.subject\.shortlist: 0"),
    ],
)
def test_errors_name_the_key(transfer, section, message):
    with pytest.raises(ValueError, match=message):
        run(transfer, source="scenes", num_examples=EXAMPLES, **section)


KINDS = {"shared": shared_config, "three_towers": towers_config}


@pytest.mark.parametrize("readout", ["query", "bidirectional", "forward"])
@pytest.mark.parametrize("kind", ["two_stacks", *KINDS])
def test_occlusion_is_the_fall_when_a_cell_is_covered(transfer, kind, readout):
    context, params = transfer
    task = next(o for o in context.objectives if o.name == "colour")
    changed = dataclasses.replace(task, readout=readout)
    if kind in KINDS:
        vocabulary = context.tokenizer.vocabulary
        section = KINDS[kind]()
        model = build_model(section.get("model", section), vocabulary.size, vocabulary.mask_id, 32)
        changed = dataclasses.replace(changed, model=model)
        spec = batch_spec(Bucket(8, 32), 1) | batch_spec(Bucket(8, 32), 1, ("label",))
        params = jax.jit(lambda key: changed.init(key, spec)[0])(jax.random.key(1))
    context = dataclasses.replace(context, objectives=(changed,))
    section = {"type": "explain", "source": "colours", "objective": "colour", "cells": 4}
    metrics, evaluator = run((context, params), num_examples=8, **section)
    batch, found = evaluator.explanations(params)
    assert found.occlusion.shape == (8, 4, 4)
    shares = found.rollout.sum(axis=(1, 2))
    if kind == "two_stacks":
        np.testing.assert_allclose(shares, 1, atol=0.2)  # and the class token
    else:
        assert ((shares > 0.2) & (shares < 1)).all()  # and the text itself
    covered = batch["image"].copy()
    covered[:, 8:16, 24:32] = 128
    given = {k: batch[k] for k in ("text_ids", "text_length")}
    logits = jax.jit(changed.logits)
    before, after = (
        jax.nn.log_softmax(known_only(logits(params, {**given, "image": image}), 8))
        for image in (batch["image"], covered)
    )
    rows = np.arange(8)
    fall = np.asarray(before - after)[rows, found.answer]
    np.testing.assert_allclose(found.occlusion[:, 1, 3], fall, atol=1e-4)
    assert -1 <= metrics["agreement"] <= 1


def test_the_probability_of_an_answer_is_that_of_its_own_output(transfer):
    """VQA trains each answer by itself: the same figure as the predictor's, not a share of all."""
    context, params = transfer
    section = {"type": "explain", "source": "questions", "objective": "vqa", "cells": 2}
    _, evaluator = run(transfer, num_examples=8, **section)
    batch, found = evaluator.explanations(params)
    task = next(o for o in context.objectives if o.name == "vqa")
    given = {k: batch[k] for k in ("image", "text_ids", "text_length")}
    expected = jax.nn.sigmoid(jax.jit(task.logits)(params, given)).max(axis=1)
    np.testing.assert_allclose(found.probability, expected, rtol=1e-4)


def test_rollout_multiplies_the_layers():
    draw = np.random.default_rng(0)
    layers = [jax.nn.softmax(draw.standard_normal((2, 5, 5)).astype(np.float32)) for _ in range(3)]
    expected = np.eye(5)[None]
    for layer in layers:
        expected = (0.5 * np.asarray(layer) + 0.5 * np.eye(5)) @ expected
    rollout = attention_rollout(layers)
    np.testing.assert_allclose(rollout, expected, atol=1e-6)
    np.testing.assert_allclose(rollout.sum(axis=-1), 1, rtol=1e-5)
