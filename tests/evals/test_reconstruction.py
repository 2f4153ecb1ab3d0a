import dataclasses

import jax
import numpy as np
import pytest

from tests.evals.conftest import EXAMPLES, RATES, announced
from vlp_jax.data.scenes import Scenes
from vlp_jax.data.source import BadExample
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.evals import build_evaluators
from vlp_jax.evals import fixed_set as module
from vlp_jax.evals.fixed_set import donors
from vlp_jax.evals.reconstruction import all_captions, unigram_entropy
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh, replicated
from vlp_jax.objectives.flm import FLM

SECTION = {"source": "scenes", "num_examples": EXAMPLES, "rates": RATES, "every_steps": 5}


def build(context):
    [evaluator] = build_evaluators(context).values()
    return evaluator


class Counted(FLM):
    """Counts how often its scores are traced."""

    traces = 0

    def reconstruction_scores(self, *args):
        Counted.traces += 1
        return super().reconstruction_scores(*args)


@pytest.fixture(scope="module")
def metrics(context, with_evals, params):
    """Of two runs on 8 devices, without implicit transfers."""
    [flm] = context.objectives
    fields = {f.name: getattr(flm, f.name) for f in dataclasses.fields(flm)}
    evaluator = build(with_evals({"reconstruction": SECTION}, objectives=(Counted(**fields),)))
    with jax.transfer_guard("disallow"):
        first = announced(evaluator, evaluator.run(params))
        second = dict(evaluator.run(params))
    assert first == second
    return first


def test_metrics_equal_plain_recomputation(context, metrics, scores):
    source = build_source(context.config, "scenes", split="val", num_records=EXAMPLES)
    classes = np.full(scores[0.0, False]["nll"].shape, "", dtype=object)
    for record in range(EXAMPLES):
        _, words = context.tokenizer.encode_with_words(source.caption(record, 0), 24)
        for token, word in enumerate(words[1:-1]):  # neither <s> nor </s>
            classes[record, token] = source.word_classes().get(word, "other")
    counted = classes != ""
    expected = {}
    for rate, label in zip(RATES, ("base", "0.5"), strict=True):
        for shuffled, suffix in ((False, ""), (True, "_shuffled")):
            found = scores[rate, shuffled]
            expected[f"{label}/loss{suffix}"] = found["nll"][counted].mean()
            expected[f"{label}/accuracy{suffix}"] = found["correct"][counted].mean()
    gain = 100 * (scores[0.0, False]["correct"] - scores[0.0, True]["correct"])
    expected["grounding_gap"] = gain[counted].mean()
    for name in set(source.word_classes().values()) & set(classes[counted]):
        expected[f"grounding_gap/{name}"] = gain[classes == name].mean()
    expected["unigram_entropy"] = metrics["unigram_entropy"]
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-7)
    # The numbers above would not mean much if nothing were ever right or the image did nothing.
    assert 0.05 < metrics["base/accuracy"] < 0.95
    assert abs(metrics["base/loss"] - metrics["base/loss_shuffled"]) > 0.01
    assert any(value for name, value in metrics.items() if name.startswith("grounding_gap"))


def test_one_program_for_all_rates_images_batches_and_runs(metrics):
    assert metrics
    assert Counted.traces == 1


def test_one_device_equals_eight(with_evals, host_params, metrics):
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluator = build(with_evals({"reconstruction": SECTION}, mesh=mesh))
    found = dict(evaluator.run(jax.device_put(host_params, replicated(mesh))))
    assert found == pytest.approx(metrics, rel=1e-4, abs=1e-7)


def test_unigram_entropy_is_of_the_training_captions(context, metrics):
    source = build_source(context.config, "scenes")
    assert source.num_records == 100
    texts = list(all_captions(source))
    assert texts == [source.caption(r, i) for r in range(100) for i in range(5)]
    ids = np.concatenate([row[1:-1] for row in context.tokenizer.encode(texts, 24)])
    _, counts = np.unique(ids, return_counts=True)
    shares = counts / counts.sum()
    assert metrics["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_unigram_entropy_of_known_shares():
    tokenizer = Tokenizer.train(["red green blue"] * 3, vocab_size=100)
    # Special tokens, of which there are more than of any word, do not count.
    captions = ["red red", "red red green", "green blue blue"]
    expected = 0.5 * np.log(2) + 2 * 0.25 * np.log(4)
    assert unigram_entropy(captions, tokenizer, 8) == pytest.approx(expected)


def test_an_unbounded_training_source_has_no_entropy(context, with_evals):
    changed = with_evals({"reconstruction": SECTION})
    with changed.config.unlocked():
        changed.config.data.sources.scenes = {"level": "easy"}
    unbounded = {"scenes": build_source(changed.config, "scenes")}
    changed = dataclasses.replace(changed, sources=unbounded)
    assert build(changed)._unigram_entropy is None


def first_donors(keys, valid):
    return [next(donors(keys, valid, row), None) for row in np.flatnonzero(valid)]


def test_shuffled_rows_never_keep_their_image_nor_get_one_of_padding():
    rng = np.random.default_rng(0)
    for valid_rows in range(2, 9):
        valid = np.zeros(8, np.bool_)
        valid[rng.permutation(8)[:valid_rows]] = True
        found = first_donors([(str(row),) for row in range(8)], valid)
        assert sorted(found) == sorted(np.flatnonzero(valid))
        assert (found != np.flatnonzero(valid)).all()


def test_texts_of_one_picture_are_not_shown_it_as_anothers():
    keys = [("a",), ("a",), ("a",), ("b", "c"), ("c",), ("a",)]
    assert first_donors(keys, np.ones(6, np.bool_)) == [4, 4, 4, 2, 2, 4]
    assert first_donors([("a",), ("a",), ("b",)], np.array([True, True, False])) == [None, None]


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_shuffled_pictures_do_not_depend_on_the_number_of_hosts(with_evals, monkeypatch, hosts):
    render = Scenes.image

    def image(self, record, size):
        if record in (3, 5):
            raise BadExample("torn picture", f"record {record}")
        return render(self, record, size)

    monkeypatch.setattr(Scenes, "image", image)
    whole = list(build(with_evals({"reconstruction": SECTION})).host_batches())
    size = len(whole[0]["valid"])
    for host in range(hosts):
        evaluator = build(with_evals({"reconstruction": SECTION}))
        mine = slice(host * size // hosts, (host + 1) * size // hosts)
        evaluator._set.rows = mine
        for batch, part in zip(whole, evaluator._set.host_batches(), strict=True):
            np.testing.assert_array_equal(part["image_shuffled"], batch["image_shuffled"][mine])


def test_a_batch_of_one_picture_gets_that_of_another_batch(with_evals, monkeypatch):
    monkeypatch.setattr(Scenes, "image_key", lambda self, record: ("one" if record < 8 else "two",))
    first, last = build(with_evals({"reconstruction": SECTION})).host_batches()
    for batch, other in ((first, last), (last, first)):
        for row in np.flatnonzero(batch["valid"]):
            np.testing.assert_array_equal(batch["image_shuffled"][row], other["image"][0])
    monkeypatch.setattr(Scenes, "image_key", lambda self, record: ("one",))
    with pytest.raises(ValueError, match="only one picture of the evaluation set"):
        list(build(with_evals({"reconstruction": SECTION})).host_batches())


def test_damaged_pictures_do_not_count_and_stand_in_for_no_other(with_evals, monkeypatch, caplog):
    render = Scenes.image

    def image(self, record, size):
        if record in (3, 8):  # 8 and 9 are alone in the last batch
            raise BadExample("torn picture", f"record {record}")
        return render(self, record, size)

    monkeypatch.setattr(Scenes, "image", image)
    evaluator = build(with_evals({"reconstruction": SECTION}))
    first, last = evaluator.host_batches()
    assert (
        "evals.reconstruction: 2 of 10 examples could not be read, and count in no" in caplog.text
    )
    assert first["valid"].tolist() == [True] * 3 + [False] + [True] * 4
    assert last["valid"].tolist() == [False, True] + [False] * 6
    for batch in (first, last):
        assert (batch["token_class"][~batch["valid"]] == -1).all()
        assert (batch["token_class"][batch["valid"], 1] >= 0).all()
        assert batch["image_shuffled"][batch["valid"]].any(axis=(1, 2, 3)).all()  # none is black
    np.testing.assert_array_equal(first["image_shuffled"][4], first["image"][2])
    np.testing.assert_array_equal(last["image_shuffled"][1], first["image"][0])


def test_a_set_too_large_to_keep_is_read_anew(with_evals, monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    evaluator = build(with_evals({"reconstruction": SECTION}))
    first, second = list(evaluator.host_batches()), list(evaluator.host_batches())
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first[0]["image"] is not second[0]["image"]


def test_the_set_has_one_bucket_even_beyond_the_edges_of_training(with_evals):
    lengths = {}
    for edges in ((12, 16, 20), (4,)):
        evaluator = build(with_evals({"reconstruction": SECTION}, edges=edges))
        batches = list(evaluator.host_batches())
        [lengths[edges]] = {batch["text_ids"].shape[1] for batch in batches}
        longest = max(batch["text_length"].max() for batch in batches)
    assert lengths[12, 16, 20] == min(edge for edge in (12, 16, 20) if edge >= longest)
    assert lengths[4,] == 24


@pytest.mark.parametrize(
    ("evals", "key"),
    [
        ({"reconstructoin": SECTION}, "evals.reconstructoin"),
        ({"reconstruction": {**SECTION, "rate": 0.1}}, "evals.reconstruction.rate"),
        ({"reconstruction": {"num_examples": 4}}, "evals.reconstruction.source"),
        ({"reconstruction": {**SECTION, "source": "coco"}}, "evals.reconstruction.source"),
        ({"r": {**SECTION, "type": "reconstruction", "train_source": "x"}}, "evals.r.train_source"),
        ({"reconstruction": {**SECTION, "objective": "itc"}}, "evals.reconstruction.objective"),
        ({"reconstruction": {**SECTION, "rates": (0.1, 1.5)}}, "evals.reconstruction.rates"),
        ({"reconstruction": {**SECTION, "rates": ()}}, "evals.reconstruction.rates"),
        ({"reconstruction": {**SECTION, "batch_size": 9}}, "evals.reconstruction.batch_size"),
        ({"reconstruction": {**SECTION, "num_examples": -1}}, "evals.reconstruction.num_examples"),
        ({"cloze": {"source": "scenes", "rate": 2.0}}, "evals.cloze.rate"),
        ({"cloze": {"source": "scenes", "split": "valid"}}, "data.sources.scenes.split"),
    ],
)
def test_bad_configs_name_their_key(with_evals, evals, key):
    with pytest.raises(ValueError, match=rf"\b{key}\b") as caught:
        build_evaluators(with_evals(evals))
    if isinstance(caught.value, ConfigError):
        assert caught.value.key == key


def test_a_misspelt_key_is_told_the_right_one(with_evals):
    with pytest.raises(ConfigError, match="Perhaps you mean 'num_examples'"):
        build_evaluators(with_evals({"cloze": {"source": "scenes", "num_example": 3}}))
