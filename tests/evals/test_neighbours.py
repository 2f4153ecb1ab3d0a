"""Nearest neighbours by class token, and figures of the features, against plain recomputations."""

import jax
import numpy as np
import pytest

from tests.evals.conftest import announced
from vlp_jax.data.augment import normalize
from vlp_jax.data.sources import build_source
from vlp_jax.evals import build_evaluators
from vlp_jax.evals.neighbours import (
    TEMPERATURE,
    alignment,
    rankme,
    uniformity,
    weighted_votes,
)
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.vit import ViT

EXAMPLES, TRAIN, K = 10, 30, 5
SECTION = {"source": "scenes", "num_examples": EXAMPLES, "num_train": TRAIN, "k": K}
DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def features(context, host_params):
    """Class tokens of both sets, one unpadded batch each, and the labels."""
    [flm] = context.objectives
    tower = jax.jit(ViT(flm.model.config.image).apply)
    found = {}
    for split, count in (("train", TRAIN), ("val", EXAMPLES)):
        source = build_source(context.config, "scenes", split=split, num_records=count)
        images = np.stack([source.image(record, 32) for record in range(count)])
        tokens = tower({"params": host_params["image_tower"]}, normalize(images))
        labels = source.labels(np.arange(count))
        found[split] = np.asarray(tokens[:, 0], np.float64), labels
    return found


@pytest.mark.parametrize("mesh", [None, 1])
def test_figures_are_those_of_a_plain_recomputation(
    with_evals, params, host_params, features, mesh
):
    """On eight devices and on one, with rows of padding in the last batch."""
    fields = {} if mesh is None else {"mesh": make_mesh(devices=jax.devices()[:1])}
    context = with_evals({"neighbours": SECTION}, **fields)
    [evaluator] = build_evaluators(context).values()
    found = announced(evaluator, evaluator.run(params if mesh is None else host_params))
    (train, train_labels), (asked, labels) = features["train"], features["val"]
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    for name, truth in labels.items():
        right, nearest = 0, 0
        for row, feature in enumerate(asked):
            cosine = unit @ (feature / np.linalg.norm(feature))
            order = np.argsort(-cosine)[:K]
            votes = {}
            for index in order:
                label = int(train_labels[name][index])
                votes[label] = votes.get(label, 0.0) + np.exp(cosine[index] / TEMPERATURE)
            right += max(votes, key=votes.get) == truth[row]
            nearest += train_labels[name][order[0]] == truth[row]
        assert found[f"{name}/knn_accuracy"] == pytest.approx(right / EXAMPLES)
        assert found[f"{name}/nearest_accuracy"] == pytest.approx(nearest / EXAMPLES)
    assert found["spread"] == pytest.approx(unit.std(axis=0).mean(), rel=1e-3)
    assert found["uniformity"] == pytest.approx(uniformity(unit), rel=1e-3, abs=1e-4)
    assert found["rankme"] == pytest.approx(rankme(train), rel=1e-2)


def test_votes_are_weighted_by_the_cosine():
    labels = np.array([[2, 1, 1], [0, 3, 3]])
    near = np.array([[0.9, 0.5, 0.5], [0.9, 0.89, 0.89]])
    np.testing.assert_array_equal(weighted_votes(labels, near), [2, 3])


def test_rankme_counts_dimensions():
    spread = np.linalg.qr(DRAW.standard_normal((64, 8)))[0]
    assert rankme(spread) == pytest.approx(8, rel=1e-3)
    assert rankme(spread[:, :1] @ np.ones((1, 8))) == pytest.approx(1, rel=1e-3)


def test_uniformity_of_two_opposite_vectors():
    """Their distance squared is 4."""
    assert uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8.0)


def test_uniformity_is_lower_the_more_even_they_lie():
    even = DRAW.standard_normal((500, 16))
    even /= np.linalg.norm(even, axis=1, keepdims=True)
    one = even + 3.0
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    assert uniformity(even) < uniformity(one) < uniformity(np.tile(even[:1], (9, 1))) + 1e-9
    assert uniformity(np.tile(even[:1], (9, 1))) == pytest.approx(0.0, abs=1e-6)


def test_alignment_is_of_pictures_that_agree_in_every_label():
    units = np.eye(4)[[0, 1, 2, 0]]
    labels = {"shape": np.array([1, 1, 1, 1]), "colour": np.array([0, 0, 5, 0])}
    assert alignment(units, labels) == pytest.approx((2 + 0 + 2) / 3)
    assert alignment(units, {"shape": np.arange(4)}) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"k": 0}, r"evals\.neighbours\.k: 0 neighbours of 30"),
        ({"k": 31}, r"evals\.neighbours\.k: 31 neighbours of 30"),
        ({"split": "train"}, r"evals\.neighbours\.split: the run trains on"),
        ({"source": "other"}, r"evals\.neighbours\.source: 'other' is no source"),
    ],
)
def test_errors_name_the_key(with_evals, section, message):
    with pytest.raises(ConfigError, match=message):
        build_evaluators(with_evals({"neighbours": {**SECTION, **section}}))
