"""The one attention function, against NumPy in float64 and against plain automatic gradients."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.models.attention import attention, padded_length
from vlp_jax.models.dropout import dropout_noise

HEADS, FEATURES = 2, 8


def operands(*batch: int, queries: int = 5, keys: int = 7) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(0)
    sizes = (queries, keys, keys)
    return tuple(draw.normal(size=(*batch, n, HEADS, FEATURES)).astype(np.float32) for n in sizes)


def reference(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
    """Row by row in float64: softmax over the keys that are seen, zeros where there are none."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for index in np.ndindex(*query.shape[:-1]):
        *batch, q, h = index
        seen = np.ones(key.shape[-3], bool)
        if mask is not None:
            seen = np.broadcast_to(mask, (*query.shape[:-2], key.shape[-3]))[(*batch, q)]
        if not seen.any():
            continue
        keys, values = key[tuple(batch)][seen, h], value[tuple(batch)][seen, h]
        scores = keys @ query[index] / np.sqrt(FEATURES)
        weights = np.exp(scores - scores.max())
        out[index] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("batch", [(3,), (2, 2)], ids=["plain", "streams"])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_float64_reference(batch: tuple[int, ...], masked: bool) -> None:
    query, key, value = operands(*batch)
    mask = np.random.default_rng(1).random((*batch, 5, 7)) < 0.5 if masked else None
    if mask is not None:
        mask[0, ..., 0, :] = False  # one query with nothing to see
    out = attention(query, key, value, mask)
    np.testing.assert_allclose(out, reference(query, key, value, mask), atol=1e-6)


def test_mask_broadcasts_over_the_batch() -> None:
    query, key, value = operands(3)
    mask = np.tril(np.ones((1, 5, 7), bool))
    out = attention(query, key, value, mask)
    np.testing.assert_allclose(out, reference(query, key, value, mask), atol=1e-6)


def test_blind_query_gives_zeros_and_finite_gradients() -> None:
    query, key, value = operands(2)
    mask = np.ones((2, 5, 7), bool)
    mask[0, 3] = False
    mask[1] = False

    def total(*args: jax.Array) -> jax.Array:
        return (attention(*args, mask) ** 2).sum()

    out = np.asarray(attention(query, key, value, mask))
    assert not out[0, 3].any()
    assert not out[1].any()
    assert out[0, 2].any()
    gradients = jax.grad(total, argnums=(0, 1, 2))(query, key, value)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient[1]).any()  # nothing was seen, nothing flows


def test_hidden_keys_have_no_influence() -> None:
    query, key, value = operands(2)
    mask = np.ones((2, 5, 7), bool)
    mask[..., 4] = False
    changed = [x.copy() for x in (key, value)]
    for x in changed:
        x[:, 4] = 1e4
    np.testing.assert_array_equal(
        attention(query, key, value, mask), attention(query, *changed, mask)
    )


def test_gradients_match_automatic_ones() -> None:
    query, key, value = operands(2)
    mask = jnp.asarray(np.random.default_rng(2).random((2, 5, 7)) < 0.7).at[..., 0].set(True)
    cotangent = np.random.default_rng(3).normal(size=query.shape).astype(np.float32)

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(FEATURES)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return (cotangent * jnp.einsum("bhqk,bkhd->bqhd", weights, value)).sum()

    def ours(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return (cotangent * attention(query, key, value, mask)).sum()

    expected = jax.grad(plain, argnums=(0, 1, 2))(query, key, value)
    actual = jax.grad(ours, argnums=(0, 1, 2))(query, key, value)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_keeps_its_dtype_and_is_near() -> None:
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in operands(2))
    out = attention(query, key, value)
    assert out.dtype == jnp.bfloat16
    exact = reference(*(np.asarray(x, np.float32) for x in (query, key, value)), None)
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.03)


def test_dropout_acts_on_weights() -> None:
    query, key, value = operands(4)
    noise = dropout_noise(jax.random.key(0))
    ones = np.ones_like(value)
    kept = attention(query, key, ones, dropout_rate=0.5, dropout_noise=noise, site="a")
    # Without dropout the weights of every query sum to one; with it they do on average only.
    np.testing.assert_allclose(attention(query, key, ones), 1.0, atol=1e-6)
    assert np.asarray(kept)[..., 0].std() > 0.1
    with pytest.raises(ValueError, match="dropout_noise"):
        attention(query, key, value, dropout_rate=0.5)


def test_padding_keys_have_no_influence() -> None:
    query, key, value = operands(2)
    expected = attention(query, key[:, :5], value[:, :5])
    np.testing.assert_array_equal(attention(query, key, value, tokens=5), expected)


def test_sequences_are_padded_for_cudnn_alone() -> None:
    bf16 = jnp.dtype("bfloat16")
    assert padded_length(197, bf16, "cudnn") == 198
    assert padded_length(196, bf16, "cudnn") == 196
    assert padded_length(197, bf16, "xla") == 197
    assert padded_length(197, jnp.dtype("float32")) == 197


def test_cudnn_leaves_masks_to_xla() -> None:
    query, key, value = operands(1)
    mask = np.tri(5, 7, dtype=bool)[None]
    np.testing.assert_array_equal(
        attention(query, key, value, mask, implementation="cudnn"),
        attention(query, key, value, mask, implementation="xla"),
    )


def by_both(implementation: str, *operands: jax.Array, **arguments: Any) -> Iterator[list[Any]]:
    """Values of the real rows and gradients, float32, by XLA and by another implementation."""
    rows = arguments.get("tokens")

    def total(name: str, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(*args, **arguments, implementation=name)[..., :rows, :, :]
        return (out.astype(jnp.float32) ** 2).sum(), out

    for name in ("xla", implementation):
        (_, out), gradients = jax.value_and_grad(
            lambda *x, name=name: total(name, *x), argnums=(0, 1, 2), has_aux=True
        )(*operands)
        yield [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.parametrize(
    ("capability", "keys", "dtype", "case", "expected"),
    [
        (9, 50, "bfloat16", "plain", "pallas"),
        (9, 50, "float16", "masked", "pallas"),
        (9, 50, "bfloat16", "dropout", "xla"),
        (9, 64, "bfloat16", "plain", "cudnn"),
        (9, 64, "bfloat16", "masked", "xla"),
        (9, 197, "bfloat16", "dropout", "xla"),
        (9, 197, "float32", "plain", "xla"),
        (7, 50, "bfloat16", "plain", "xla"),
        (7, 197, "float16", "plain", "xla"),
        (0, 50, "bfloat16", "plain", "xla"),
    ],
)
def test_auto_takes_what_was_measured_fastest_and_is_there(
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    keys: int,
    dtype: str,
    case: str,
    expected: str,
) -> None:
    """A capability of 7 is a V100's or a T4's, 0 no GPU's."""
    module, taken = "vlp_jax.models.attention", []
    monkeypatch.setattr(f"{module}._capability", lambda: capability)
    for kernel in ("xla", "cudnn", "pallas"):
        monkeypatch.setattr(f"{module}._{kernel}_attention", lambda *_, k=kernel: taken.append(k))
    draw = jnp.zeros((2, keys, 4, 64), dtype)
    options: dict[str, Any] = {}
    if case == "masked":
        options["mask"] = jnp.ones((1, keys, keys), bool)
    if case == "dropout":
        options |= {"dropout_rate": 0.1, "dropout_noise": dropout_noise(jax.random.key(0))}
    attention(draw, draw, draw, **options)
    assert taken == [expected]


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "tokens"), [(82, 82), (197, 197), (198, 197)])
def test_cudnn_matches_xla(length: int, tokens: int) -> None:
    """Odd lengths too: they are padded for cuDNN, and the padding must not be seen."""
    draw = jax.random.normal(jax.random.key(0), (3, 4, length, 12, 64), jnp.bfloat16)
    (xla, *of_xla), (cudnn, *of_cudnn) = by_both("cudnn", *draw, tokens=tokens)
    np.testing.assert_allclose(cudnn, xla, atol=0.02)
    for a, b in zip(of_cudnn, of_xla, strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "features"),
    [(50, 50, 64), (20, 37, 64), (33, 17, 32), (8, 8, 64), (1, 3, 128)],
)
def test_the_short_kernel_matches_xla(queries: int, keys: int, features: int, masked: bool) -> None:
    """One of the queries sees nothing under the mask."""
    key = jax.random.key(0)
    draw = (
        jax.random.normal(jax.random.fold_in(key, i), (64, n, 12, features), jnp.bfloat16)
        for i, n in enumerate((queries, keys, keys))
    )
    mask = jax.random.bernoulli(key, 0.5, (64, queries, keys)).at[0, 0].set(False)
    (xla, *of_xla), (ours, *of_ours) = by_both("pallas", *draw, mask=mask if masked else None)
    np.testing.assert_allclose(ours, xla, atol=0.03, rtol=2**-7)  # a step of bfloat16
    for a, b in zip(of_ours, of_xla, strict=True):
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)
