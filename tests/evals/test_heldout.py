"""The held-out loss is the objective's own, however the sets are cut."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.evals.conftest import announced
from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import batch_spec
from vlp_jax.data.sources import build_source
from vlp_jax.evals import build_evaluators
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh, replicated
from vlp_jax.objectives import build_objectives

EXAMPLES = 10  # with batches of 8, the last batch holds 2 rows and 6 that do not count
DRAWS = 3
SECTION = {"source": "scenes", "num_examples": EXAMPLES, "num_draws": DRAWS, "every_steps": 5}
OBJECTIVES = {
    "flm": {"corruption_rate": {"kind": "range", "low": 0.1, "high": 0.5}},
    "mlm": {"rate": 0.4},
    "ar": {},
}
TOKENS = 24  # one length for both sets: one compile


def evaluate(context, params):
    """Figures of two runs, which agree bit for bit."""
    [evaluator] = build_evaluators(context).values()
    with jax.transfer_guard("disallow"):
        first = announced(evaluator, evaluator.run(params))
        assert dict(evaluator.run(params)) == first
    return first


@pytest.fixture(scope="module")
def with_objective(context, with_evals):
    """The context of a run with one objective, and other fields of it."""

    def change(name, section=SECTION, **fields):
        [flm] = context.objectives
        c = with_evals({"heldout": section}, edges=(TOKENS,), **fields)
        with c.config.unlocked():
            c.config.objectives = {name: OBJECTIVES[name]}
        vocabulary = context.tokenizer.vocabulary
        objectives = build_objectives(c.config.objectives, flm.model, vocabulary)
        return dataclasses.replace(c, objectives=objectives)

    return change


def plain_losses(context, params):
    """The objective's loss on one unpadded batch and one device, a draw at a time."""
    [objective] = context.objectives
    source = build_source(context.config, "scenes", split="val", num_records=EXAMPLES)
    ids, lengths = context.tokenizer.padded([source.caption(r, 0) for r in range(EXAMPLES)], TOKENS)
    batch = {
        "image": np.stack([source.image(record, 32) for record in range(EXAMPLES)]),
        "text_ids": np.pad(ids, ((0, 0), (0, TOKENS - ids.shape[1]))),
        "text_length": lengths,
        "position": np.arange(EXAMPLES, dtype=np.int32),
        "valid": np.ones(EXAMPLES, np.bool_),
    }
    bucket = Bucket(TOKENS, 32)
    init = jax.jit(lambda key: objective.init(key, batch_spec(bucket, 1)))
    _, extras = init(jax.random.key(0))
    loss = jax.jit(lambda key: objective.loss(params, extras, batch, key, bucket, train=False).loss)
    return [loss(key) for key in jax.random.split(jax.random.key(0), DRAWS)]


@pytest.fixture(scope="module")
def found(with_objective, params):
    """Figures on eight devices, by objective."""
    return {name: evaluate(with_objective(name), params) for name in OBJECTIVES}


@pytest.mark.parametrize("name", ["flm", "ar"])
def test_the_loss_is_that_of_the_objective(with_objective, host_params, found, name):
    figures = found[name]
    means = plain_losses(with_objective(name), host_params)
    expected = sum(mean.sum for mean in means) / sum(mean.weight for mean in means)
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert figures["gap_loss"] == figures["loss"] - figures["loss_train"] != 0  # other records
    assert (len({float(mean.sum) for mean in means}) == 1) == (name == "ar")  # other draws


def test_devices_and_batches_do_not_show(with_objective, host_params, found):
    mesh = make_mesh(devices=jax.devices()[:1])
    context = with_objective("mlm", {**SECTION, "batch_size": 3}, mesh=mesh)
    figures = evaluate(context, jax.device_put(host_params, replicated(mesh)))
    assert figures == pytest.approx(found["mlm"], rel=1e-5, abs=1e-5)


def test_a_model_that_knows_its_training_set_has_a_gap(with_objective, host_params):
    """The bias of the vocabulary head, fitted to the training captions, is all it takes."""
    context = with_objective("ar", {**SECTION, "num_draws": 1})
    source = context.sources["scenes"]
    captions = [source.caption(record, 0) for record in range(EXAMPLES)]
    rows = context.tokenizer.encode(captions, TOKENS)
    bias = host_params["vocabulary_head"]["decoder_bias"]
    counts = np.bincount(np.concatenate([row[1:] for row in rows]), minlength=len(bias))
    head = {
        **host_params["vocabulary_head"],
        "decoder_kernel": np.zeros_like(host_params["vocabulary_head"]["decoder_kernel"]),
        "decoder_bias": np.log(counts + 1e-3).astype(np.float32),
    }
    fitted = {**host_params, "vocabulary_head": head}
    found = evaluate(context, jax.device_put(fitted, replicated(context.mesh)))
    assert found["gap_loss"] > 0.1
    shares = counts / counts.sum()
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert found["loss_train"] == pytest.approx(entropy, abs=0.01)


@pytest.mark.parametrize(
    ("section", "key", "problem"),
    [
        ({"num_draws": 0}, "num_draws", "0 draws"),
        ({"split": "train"}, "split", "the run trains on 'train'"),
        ({"objective": "mlm"}, "objective", "'mlm' is no objective of this run"),
        ({"num_examples": -1}, "num_examples", "-1 examples"),
    ],
)
def test_errors_name_the_key(with_evals, section, key, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        build_evaluators(with_evals({"heldout": {**SECTION, **section}}))
    assert caught.value.key == f"evals.heldout.{key}"


def test_several_objectives_need_a_name(context, with_evals):
    two = tuple(dataclasses.replace(context.objectives[0], name=name) for name in ("a", "b"))
    changed = with_evals({"heldout": SECTION}, objectives=two)
    with pytest.raises(
        ConfigError, match=r"objective: the run has several\. Use one of \['a', 'b'"
    ):
        build_evaluators(changed)
