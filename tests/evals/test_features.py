"""Evaluators of a frozen tower read and encode their sets once."""

import jax
import numpy as np
import pytest

from vlp_jax.data.augment import normalize
from vlp_jax.evals import build_evaluators
from vlp_jax.evals.features import LabelledSets, tower_config
from vlp_jax.infra.errors import ConfigError
from vlp_jax.objectives.tower import image_features, tower_tokens

SECTION = {"source": "scenes", "num_examples": 10, "num_train": 30}


def test_sets_are_embedded_once_for_all_evaluators_and_anew_for_other_parameters(
    with_evals, params, monkeypatch
):
    embed, calls = LabelledSets._embed, []

    def counted(self, *arguments):
        calls.append(self)
        return embed(self, *arguments)

    monkeypatch.setattr(LabelledSets, "_embed", counted)
    evals = {
        "neighbours": {**SECTION, "k": 3},
        "few_shot": {**SECTION, "shots": 1, "queries": 1, "episodes": 5},
        "larger": {"type": "few_shot", **SECTION, "num_train": 40, "episodes": 5},
    }
    evaluators = build_evaluators(with_evals(evals))
    first = dict(evaluators["neighbours"].run(params))
    dict(evaluators["few_shot"].run(params))
    assert len(calls) == 2  # the training pictures and those held out
    dict(evaluators["larger"].run(params))
    assert len(calls) == 4  # other sets
    other = jax.tree.map(lambda leaf: leaf + 0.1, params)
    assert dict(evaluators["neighbours"].run(other)) != first
    assert dict(evaluators["neighbours"].run(params)) == first
    assert len(calls) == 8


def test_what_is_read_is_the_class_token_or_the_mean_of_the_patches(with_evals, params):
    context = with_evals({})
    config = tower_config(context)
    shape = (2, config.image_size, config.image_size, 3)
    image = jax.random.randint(jax.random.key(0), shape, 0, 256).astype("uint8")
    tokens = np.asarray(tower_tokens(config, params, normalize(image)), np.float32)
    expected = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(axis=1)}
    for pool, values in expected.items():
        np.testing.assert_allclose(
            image_features(config, params, image, pool), values, rtol=1e-5, atol=1e-6
        )


def test_evaluators_that_read_differently_share_no_features(with_evals, params):
    evals = {
        "neighbours": {**SECTION, "k": 3},
        "pooled": {"type": "neighbours", **SECTION, "k": 3, "pool": "mean"},
    }
    evaluators = build_evaluators(with_evals(evals))
    found = {name: dict(evaluator.run(params)) for name, evaluator in evaluators.items()}
    assert found["neighbours"]["rankme"] != found["pooled"]["rankme"]
    with pytest.raises(ConfigError, match=r"evals\.few_shot\.pool: 'max'\. Use one of class, mean"):
        build_evaluators(with_evals({"few_shot": {**SECTION, "pool": "max"}}))
