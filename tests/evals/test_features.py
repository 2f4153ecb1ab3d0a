"""Evaluators of a frozen tower read and encode their sets once."""

import jax

from vlp_jax.evals import build_evaluators
from vlp_jax.evals.features import LabelledSets

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
