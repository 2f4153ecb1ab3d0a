"""Leak tests: what a query must not see changes nothing, bit for bit; what it may see does."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SIZE, TOKENS, VOCAB, make_batch, tiny_model

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import HostBatch, batch_spec
from vlp_jax.objectives.base import example_keys
from vlp_jax.objectives.flm import FLM, hidden_spans

RATES = (0.0, 0.15, 0.5, 1.0)
LENGTHS = [12, 12, 9, 5, 3, 2]
BATCH = make_batch(LENGTHS)
KEY = jax.random.key(7)


@pytest.fixture(scope="module", params=["pre", "post"])
def flm(request: pytest.FixtureRequest) -> FLM:
    return FLM(tiny_model(**{"text.norm": request.param}))


@pytest.fixture(scope="module")
def params(flm: FLM) -> Any:
    return jax.jit(lambda key: flm.init(key, batch_spec(Bucket(TOKENS, IMAGE_SIZE), 2))[0])(
        jax.random.key(0)
    )


@pytest.fixture(scope="module")
def features(flm: FLM, params: Any) -> Any:
    """(batch, rate) -> what the decoder multiplies for the queries 1 .. N-1: [B, N-1, D]."""

    def forward(model: Any, batch: HostBatch, rate: jax.Array) -> jax.Array:
        queries, _ = flm._encode(model, batch, KEY, rate, None)
        return model.predict_vocabulary(queries)[0]

    jitted = jax.jit(lambda b, rate: nn.apply(forward, flm.model)({"params": params}, b, rate))
    return lambda batch, rate: np.asarray(jitted(batch, jnp.float32(rate)))


def spans(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """First and last hidden position of the queries 1 .. N-1, as ``features`` draws them."""
    keys = example_keys(KEY, jnp.asarray(BATCH["position"]))
    first, last = hidden_spans(keys, jnp.array(LENGTHS), TOKENS, rate)
    return np.asarray(first)[:, 1:], np.asarray(last)[:, 1:]


def real_queries() -> np.ndarray:
    """Which of the queries 1 .. N-1 ask for a real token: bool [B, N-1]."""
    return np.arange(1, TOKENS)[None] < np.array(LENGTHS)[:, None]


@pytest.mark.parametrize("rate", RATES)
def test_queries_see_all_but_their_span(features: Any, rate: float) -> None:
    """Changing token i changes query q if, and only if, i lies outside the span hidden from q."""
    plain = features(BATCH, rate)
    first, last = spans(rate)
    query = np.arange(1, TOKENS)[None]
    assert (((first <= query) & (query <= last)) | ~real_queries()).all()  # its own token too
    for token in range(TOKENS):
        ids = BATCH["text_ids"].copy()
        ids[:, token] = (ids[:, token] + 11) % VOCAB
        same = (features({**BATCH, "text_ids": ids}, rate) == plain).all(axis=-1)
        hidden = (first <= token) & (token <= last)
        beyond = token >= np.array(LENGTHS)[:, None]
        np.testing.assert_array_equal(same[real_queries()], (hidden | beyond)[real_queries()])


def test_full_rate_hides_all_text_but_not_the_image(features: Any) -> None:
    plain = features(BATCH, 1.0)
    ids = BATCH["text_ids"].copy()
    ids[:, 1:] = np.random.default_rng(1).integers(4, VOCAB, ids[:, 1:].shape)
    real = real_queries()
    np.testing.assert_array_equal(features({**BATCH, "text_ids": ids}, 1.0)[real], plain[real])
    changed = features({**BATCH, "image": 255 - BATCH["image"]}, 1.0)
    assert (np.abs(changed - plain).max(axis=-1) > 1e-5)[real].all()


@pytest.mark.parametrize("rate", RATES)
def test_rows_are_independent(features: Any, rate: float) -> None:
    """What other rows show, and what stands in the padding, changes nothing."""
    plain = features(BATCH, rate)
    other = make_batch(LENGTHS, seed=5)
    for row, length in enumerate(LENGTHS):
        mixed = {name: other[name].copy() for name in other}
        for name in ("image", "text_ids"):
            mixed[name][row] = BATCH[name][row]
        mixed["text_ids"][row, length:] = 17
        np.testing.assert_array_equal(
            features(mixed, rate)[row, : length - 1], plain[row, : length - 1]
        )


def test_a_wider_bucket_changes_nothing(features: Any) -> None:
    """At the base rate nothing is drawn, so that only padding tells two buckets apart."""
    wide = {**BATCH, "text_ids": np.pad(BATCH["text_ids"], ((0, 0), (0, 4)), constant_values=1)}
    real = real_queries()
    np.testing.assert_allclose(
        features(wide, 0.0)[:, : TOKENS - 1][real], features(BATCH, 0.0)[real], atol=1e-5
    )
