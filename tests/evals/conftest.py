"""A tiny run on easy scenes, shared by the tests of the evaluators; compiles are what they cost."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import batch_spec
from vlp_jax.data.build import build_tokenizer
from vlp_jax.data.sources import build_source
from vlp_jax.evals import EvalContext, Evaluator
from vlp_jax.evals.base import has_figure
from vlp_jax.infra.mesh import make_mesh, replicated
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives import build_objectives
from vlp_jax.train.config import default_config

EXAMPLES = 10  # with batches of 8, the last batch holds 2 rows and 6 that do not count
RATES = (0.0, 0.5)


def announced(evaluator: Evaluator, figures: Iterable[tuple[str, float]]) -> dict[str, float]:
    """What an evaluator gives, all of which it must have named beforehand."""
    given = dict(figures)
    assert all(has_figure(evaluator, name) for name in given)
    return given


def config() -> ConfigDict:
    c = default_config("tiny")
    c.model.dtype = "float32"
    for part in (c.model.image, c.model.text):
        part.update(width=32, heads=2, mlp_width=64)
    c.model.image.depth = 1
    c.model.text.update(lower_depth=1, upper_depth=1)
    c.data.batch_size = 8
    c.data.max_text_length = 24
    c.tokenizer.vocab_size = 160  # small enough to cut words into pieces
    with c.unlocked():
        c.data.sources.scenes = {"level": "easy", "num_records": 100}
        c.objectives.flm = {"weight": 1.0}
    return c


@pytest.fixture(scope="session")
def context():
    c = config()
    tokenizer = build_tokenizer(c, [build_source(c, "scenes")])
    model = build_model(c.model, tokenizer.vocab_size, tokenizer.mask_id, c.data.image_size)
    objectives = build_objectives(c.objectives, model, tokenizer.vocabulary)
    sources = {"scenes": build_source(c, "scenes")}
    return EvalContext(c, objectives, tokenizer, make_mesh(), sources, (12, 16, 20), None)


@pytest.fixture(scope="session")
def with_evals(context):
    """The context with another ``config.evals`` (and other fields, such as the mesh)."""

    def change(evals, **fields):
        c = ConfigDict(context.config)
        with c.unlocked():
            c.evals = evals
        return dataclasses.replace(context, config=c, **fields)

    return change


@pytest.fixture(scope="session")
def host_params(context):
    """Random weights, far from zero, over the token frequencies: some guesses are right, and they
    depend on the image."""
    [flm] = context.objectives
    params, _ = jax.jit(lambda key: flm.init(key, batch_spec(Bucket(8, 32), 1)))(jax.random.key(1))
    params = jax.device_get(params)
    source = build_source(context.config, "scenes")
    rows = context.tokenizer.encode([source.caption(record, 0) for record in range(100)], 24)
    head = params["vocabulary_head"]
    counts = np.bincount(np.concatenate(rows), minlength=len(head["decoder_bias"]))
    head["decoder_bias"] = np.log(counts + 0.5).astype(np.float32)
    head["decoder_kernel"] = 6.0 * head["decoder_kernel"]
    params["image_projection"]["kernel"] = 20.0 * params["image_projection"]["kernel"]
    return params


@pytest.fixture(scope="session")
def params(context, host_params):
    return jax.device_put(host_params, replicated(context.mesh))


@pytest.fixture(scope="session")
def scores(context, host_params):
    """Scores of the plain objective on one device and one unpadded batch: float64 arrays.

    Keys are (rate, shuffled); each holds ``nll`` and ``correct`` [EXAMPLES, N - 1]. N is that of
    the evaluators' bucket, for the corruption drawn depends on it.
    """
    [flm] = context.objectives
    source = build_source(context.config, "scenes", split="val", num_records=EXAMPLES)
    ids = context.tokenizer.encode([source.caption(r, 0) for r in range(EXAMPLES)], 24)
    tokens = min(edge for edge in context.edges if edge >= max(map(len, ids)))
    images = np.stack([source.image(record, 32) for record in range(EXAMPLES)])
    batch = {
        "image": images,
        "text_ids": np.stack([np.pad(row, (0, tokens - len(row))) for row in ids]),
        "text_length": np.asarray([len(row) for row in ids], np.int32),
        "position": np.arange(EXAMPLES, dtype=np.int32),
        "valid": np.ones(EXAMPLES, np.bool_),
    }
    # Rolled by one within the batches of 8 and 2.
    others = images[[7, 0, 1, 2, 3, 4, 5, 6, 9, 8]]
    score = jax.jit(flm.reconstruction_scores)
    result = {}
    for rate in RATES:
        for shuffled in (False, True):
            inputs = batch | {"image": others} if shuffled else batch
            out = score(host_params, inputs, jax.random.key(0), jnp.float32(rate))
            result[rate, shuffled] = {
                "nll": np.asarray(out.nll, np.float64),
                "correct": np.asarray(out.correct, np.float64),
            }
    return result
