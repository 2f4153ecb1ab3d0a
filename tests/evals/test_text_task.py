"""Runs of GLUE on little files from end to end, and the official figures of their answers."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import IMAGE_SIZE, one_device

from configs.transfer import glue
from tests.evals.conftest import announced
from vlp_jax.data.source import BadExample
from vlp_jax.data.tasks import GLUE
from vlp_jax.evals import EvalContext, build_evaluators
from vlp_jax.evals.scores.glue import glue_score, glue_scores
from vlp_jax.infra.artifacts import load_all
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.models.sizes import model_config
from vlp_jax.predict import Predictor
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare

DEV = 11  # with batches of 8, the last one holds 3 rows and 5 that do not count
FILES = {
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1\t2\t{a}\t{b}"),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", "{n}\t{a}\t{b}\t{score}"),
}
THINGS = ("red fox", "old boat", "tall tree", "grey cat")


def lines(task, count, seed):
    """Two sentences of which the second is the first again, or about something else."""
    draw = np.random.default_rng(seed)
    _, header, form = FILES[task]
    yield header
    for n in range(count):
        one, other = draw.choice(len(THINGS), 2, replace=False)
        same = int(draw.random() < 0.7)
        score = f"{4 * same + draw.random():.3f}"
        a, b = (f"{THINGS[i]} number {n} is here" for i in (one, one if same else other))
        yield form.format(n=n, label=same, score=score, a=a, b=b)


def write_files(root, task):
    folder = root / FILES[task][0]
    folder.mkdir()
    for name, count, seed in (("train", 100, 0), ("dev", DEV, 1)):
        text = "\n".join(lines(task, count, seed))
        (folder / f"{name}.tsv").write_text(f"{text}\n")


def run_config(task, root):
    """The shipped config at a size that a test can compile."""
    config = glue.get_config(f"{task},shared_tiny")
    config.model.dtype = "float32"
    config.model.image.update(width=32, heads=2, mlp_width=64, depth=1, patch_size=8)
    config.model.reconstructor.depth = 1
    config.data.root = str(root)
    config.data.update(batch_size=8, image_size=IMAGE_SIZE, text_edges=(24,), threads=1, prefetch=1)
    config.data.max_text_length = 24
    config.total_epochs, config.total_steps = None, 4
    config.schedule.peak = 1e-2
    config.checkpoint.every_percent, config.checkpoint.every_steps = None, 2
    config.log.tensorboard = False
    config.log.every_steps = 1
    config.compile_cache = "off"
    with config.unlocked():
        for section in config.evals.values():
            if "every_percent" in section:
                section.every_percent = 50.0
        for section in config.objectives.values():
            section.readout = "bidirectional"
    return config


@pytest.fixture(scope="module", params=FILES)
def finished(request, tmp_path_factory):
    """A run that is over: its task and what it was made of."""
    root = tmp_path_factory.mktemp(request.param)
    write_files(root, request.param)
    setup = prepare(run_config(request.param, root), root / "run")
    assert train(setup) == ExitCode.OK
    return request.param, setup


def predictions(workdir, name):
    file = workdir / "predictions" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def indexed(task, rows):
    """Answers and what was expected, as the official metrics take them."""
    classes = {"not_equivalent": 0, "equivalent": 1}
    columns = ([row[key] for row in rows] for key in ("answer", "expected"))
    return tuple(
        np.array(column if task == "stsb" else [classes[name] for name in column])
        for column in columns
    )


def context_of(setup, **fields):
    context = EvalContext(
        setup.config,
        setup.program.objectives,
        setup.tokenizer,
        setup.mesh,
        setup.sources,
        setup.plan.edges,
        None,
    )
    return dataclasses.replace(context, **fields)


def evaluate(setup, params=None, **fields):
    """The figures of the test split."""
    params = setup.program.init().params if params is None else params
    evaluator = build_evaluators(context_of(setup, **fields))["test"]
    return announced(evaluator, evaluator.run(params))


def test_figures_are_the_official_ones_of_the_answers(finished):
    task, setup = finished
    rows = predictions(setup.workdir, "test")
    assert [row["record"] for row in rows] == list(range(DEV))
    answers, expected = indexed(task, rows)
    figures = {
        key.removeprefix("test/"): value
        for record in read_metrics(setup.workdir)
        for key, value in record.items()
        if key.startswith("test/")
    }
    own = glue_scores(task, answers, expected)
    assert {name: figures[name] for name in own} == pytest.approx(own)
    assert figures["score"] == pytest.approx(glue_score(task, answers, expected))
    if task == "mrpc":
        train = setup.sources["sentences"]
        labels = [int(train.extras(r, 8)["label"]) for r in range(train.num_records)]
        [(most, _)] = collections.Counter(labels).most_common(1)
        same = np.full(DEV, most)
        assert figures["majority"] == pytest.approx(glue_score(task, same, expected))
    assert set(setup.evaluators["test"].figures) >= {*own, "score"}


def test_what_is_written_of_every_answer(finished):
    task, setup = finished
    source = GLUE(setup.config.data.root, "test", task)
    for row in predictions(setup.workdir, "test"):
        first, second = row["text"].split(" / ")
        assert source.caption(row["record"], 0) == f"{first}\x1f{second}"
        target = source.extras(row["record"], 8)[source.extra_fields[0]]
        if task == "stsb":
            assert row["expected"] == float(target)
            assert row["error"] == row["answer"] - row["expected"]
        else:
            assert row["expected"] == source.classes[int(target)]
            assert row["score"] == float(row["answer"] == row["expected"])
    table = load_all(setup.workdir)["test"]
    assert f"{task}, {DEV} texts" in table.title
    assert sum(row[1] for row in table.rows) == DEV


def test_a_checkpoint_answers_texts_that_are_given(finished):
    task, setup = finished
    rows = predictions(setup.workdir, "test")
    texts = [tuple(row["text"].split(" / ")) for row in rows]
    predictor = Predictor.load(setup.workdir, "best")
    if task == "stsb":
        expected = [row["answer"] for row in rows]
        np.testing.assert_allclose(predictor.score_texts(texts), expected, rtol=1e-4)
        with pytest.raises(ValueError, match=r"and this needs text_classification"):
            predictor.classify_texts(texts)
    else:
        found = predictor.classify_texts(texts, top=2)
        assert [classes[0][0] for classes in found] == [row["answer"] for row in rows]
        assert sum(chance for _, chance in found[0]) == pytest.approx(1.0)
        with pytest.raises(ValueError, match=r"and this needs text_regression"):
            predictor.score_texts(texts)


@pytest.mark.parametrize("finished", ["mrpc"], indirect=True)
def test_texts_that_do_not_fit_a_checkpoint_are_refused(finished):
    predictor = Predictor.load(finished[1].workdir)
    for texts, message in [
        (["one sentence"], r"'one sentence': .* trained on mrpc; give two sentences"),
        ([("one", "two", "three")], r"give two sentences, \(first, second\)"),
        ([["one", "two"]], r"give two sentences"),
        ([("one", " . ")], r"' \. ': empty text; give one or more words"),
        ("one sentence", r"texts: give a list"),
        ([], r"texts: the list is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor.classify_texts(texts)


def test_one_device_gives_the_figures_of_eight(finished, tmp_path):
    _, setup = finished
    params = setup.program.init().params
    one = {"mesh": one_device(), "workdir": tmp_path}
    apart = jax.device_put(jax.device_get(params), jax.devices()[0])
    assert evaluate(setup, apart, **one) == pytest.approx(evaluate(setup, params), abs=1e-5)
    assert len(predictions(tmp_path, "test")) == DEV


def test_a_damaged_row_counts_in_nothing(finished, tmp_path, monkeypatch):
    task, setup = finished
    whole = GLUE.extras

    def extras(self, record, size):
        if record == 3 and self.num_records == DEV:
            raise BadExample("torn line", f"record {record}")
        return whole(self, record, size)

    monkeypatch.setattr(GLUE, "extras", extras)
    figures = evaluate(setup, workdir=tmp_path)
    rows = predictions(tmp_path, "test")
    assert [row["record"] for row in rows] == [r for r in range(DEV) if r != 3]
    assert figures["score"] == pytest.approx(glue_score(task, *indexed(task, rows)))


def with_evals(setup, **section):
    config = setup.config.copy_and_resolve_references()
    with config.unlocked():
        config.evals = {"subject": {"source": "sentences", "split": "test", **section}}
    return context_of(setup, config=config)


@pytest.mark.parametrize("finished", ["mrpc"], indirect=True)
@pytest.mark.parametrize(
    "section",
    [
        {"type": "task", "objective": "text_classification"},
        {"type": "compressed", "buckets": ("p8@16k2",)},
    ],
)
def test_evaluators_that_show_pictures_refuse_texts(finished, section):
    _, setup = finished
    message = r"evals\.subject\.source: data\.sources\.sentences has no pictures"
    with pytest.raises(ConfigError, match=message) as error:
        build_evaluators(with_evals(setup, **section))
    assert error.value.key == "evals.subject.source"


@pytest.mark.parametrize("finished", ["mrpc"], indirect=True)
def test_a_source_needs_what_the_objective_reads(finished):
    _, setup = finished
    context = with_evals(setup, type="text_task", objective="text_classification")
    with context.config.unlocked():
        context.config.data.sources.sentences.task = "stsb"
        context.config.data.sources.sentences.root = str(setup.workdir)
    (setup.workdir / "dev.tsv").write_text("\n".join(lines("stsb", 4, 0)) + "\n")
    message = r"evals\.subject\.source: data\.sources\.sentences gives no label"
    with pytest.raises(ConfigError, match=message):
        build_evaluators(context)
    context = with_evals(setup, type="text_task", objective="absent")
    with pytest.raises(ConfigError, match=r"'absent' is no objective of type TextAlone"):
        build_evaluators(context)


def test_mnli_is_scored_on_both_of_its_sets(tmp_path):
    files = {
        "train": ["neutral"] * 60 + ["entailment"] * 40,
        "dev_matched": ["neutral"] * 5,
        "dev_mismatched": ["entailment"] * 7,
    }
    (tmp_path / "MNLI").mkdir()
    for name, kinds in files.items():
        rows = [f"{name} {n}\tboat {n}\t{kind}" for n, kind in enumerate(kinds)]
        text = "\n".join(["sentence1\tsentence2\tgold_label", *rows])
        (tmp_path / "MNLI" / f"{name}.tsv").write_text(text + "\n")
    setup = prepare(run_config("mnli", tmp_path), tmp_path / "run")
    params = setup.program.init().params
    evaluators = build_evaluators(context_of(setup))
    found = {
        name: announced(evaluators[name], evaluators[name].run(params))
        for name in ("test", "mismatched")
    }
    assert {name: figures["majority"] for name, figures in found.items()} == {
        "test": 1.0,
        "mismatched": 0.0,
    }


def change_to_two_stacks(config):
    config.model = model_config("tiny")


def change_to_more_classes(config):
    config.objectives.text_classification.num_classes = 2
    config.data.sources.sentences.update(task="mnli", root=config.data.root)


def change_to_scores(config):
    config.objectives = {"text_regression": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_to_two_stacks, r"model\.type: 'two_stacks', but objectives\.text_classification"),
        (change_to_more_classes, r"num_classes: 2 classes, but data\.sources\.sentences has 3"),
        (change_to_scores, r"data\.sources\.sentences gives no target"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(tmp_path, change, message):
    write_files(tmp_path, "mrpc")
    mnli = ["sentence1\tsentence2\tgold_label"]
    kinds = ("neutral", "entailment", "contradiction")
    mnli += [f"fox {n}\tboat {n}\t{kinds[n % 3]}" for n in range(100)]
    (tmp_path / "MNLI").mkdir()
    for name in ("train", "dev_matched"):
        (tmp_path / "MNLI" / f"{name}.tsv").write_text("\n".join(mnli) + "\n")
    config = run_config("mrpc", tmp_path)
    with config.unlocked():
        change(config)
        if "text_regression" in config.objectives:
            for section in config.evals.values():
                section.objective = "text_regression"
    with pytest.raises(ConfigError, match=message):
        prepare(config, tmp_path / "run")
