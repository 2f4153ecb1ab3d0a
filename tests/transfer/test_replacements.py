"""Adapters in the place of blocks, fitted to what the blocks did."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.models.block import Block
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.tuning import Adapter
from vlp_jax.transfer.replacements import Moments, fitted, moments, order_of

WIDTH = 16
EPS = 1e-5


class Tower(nn.Module):
    """Two blocks."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x):
        for layer in range(2):
            x = Block(self.config, name=f"block_{layer:02d}")(x)
        return x


def of_tokens(x: np.ndarray, y: np.ndarray) -> Moments:
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt(x.var(axis=1, keepdims=True) + EPS)
    return Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y * y).sum())


def adapted(fit, x):
    """What an adapter of a block makes of tokens once it has these weights."""
    adapter = Adapter(fit.down.shape[1], x.shape[-1], jnp.float32, EPS)
    params = adapter.init(jax.random.key(0), x)["params"]
    params["down"] = {"kernel": fit.down, "bias": np.zeros(fit.down.shape[1], np.float32)}
    params["up"] = {"kernel": fit.up, "bias": fit.bias}
    return np.asarray(adapter.apply({"params": params}, x))


def explained(y: np.ndarray, instead: np.ndarray) -> float:
    return 1.0 - float(((y - instead) ** 2).sum() / (y**2).sum())


def planted(rank: int, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and what a linear map of few directions and a constant adds to them normed."""
    draw = np.random.default_rng(rank)
    x = draw.normal(size=(count, WIDTH)) * np.linspace(0.5, 2.0, WIDTH)
    normed = x - x.mean(axis=1, keepdims=True)
    normed = normed / np.sqrt(normed.var(axis=1, keepdims=True) + EPS)
    linear = draw.normal(size=(WIDTH, rank)) @ draw.normal(size=(rank, WIDTH))
    return x, normed @ linear + draw.normal(size=WIDTH)


def test_what_is_linear_is_there_again_by_two_features_a_direction() -> None:
    x, y = planted(rank=3)
    fit = fitted(of_tokens(x, y), 6)
    np.testing.assert_allclose(adapted(fit, x.astype(np.float32)), y, atol=0.02)
    assert fit.explained == pytest.approx(1.0, abs=1e-4)
    odd = fitted(of_tokens(x, y), 7)  # the last feature is trained from what a fresh adapter has
    np.testing.assert_allclose(adapted(odd, x.astype(np.float32)), y, atol=0.02)
    assert odd.down[:, 6].any()
    assert not odd.up[6].any()
    assert fit.down.std() == pytest.approx(0.02, rel=0.2)  # as large as a fresh adapter's


def test_of_too_many_directions_those_stay_that_explain_most() -> None:
    """Against the best linear map of that rank, found by singular values of what is predicted."""
    x, y = planted(rank=6)
    fits = [fitted(of_tokens(x, y), 2 * rank) for rank in range(1, 7)]
    told = [explained(y, adapted(fit, x.astype(np.float32))) for fit in fits]
    assert [fit.explained for fit in fits] == pytest.approx(told, abs=1e-3)
    assert told == sorted(told)
    _, values, _ = np.linalg.svd(y - y.mean(axis=0))
    best = 1.0 - np.array([(values[rank:] ** 2).sum() for rank in range(1, 7)]) / (y**2).sum()
    np.testing.assert_allclose(told, best, atol=2e-3)


def test_blocks_are_watched_and_their_adapters_explain_what_is_told() -> None:
    tower = Tower(BlockConfig(width=WIDTH, heads=2, mlp_width=32, norm_eps=EPS))
    x = jax.random.normal(jax.random.key(1), (6, 40, WIDTH))
    params = tower.init(jax.random.key(0), x)
    unit = "block_01"

    @jax.jit
    def seen(x):
        return moments([unit], *[lambda: tower.apply(params, x)] * 2)

    halves = [seen(x[:3]), seen(x[3:])]
    both = jax.tree.map(lambda a, b: np.asarray(a, float) + np.asarray(b, float), *halves)[unit]
    assert both.tokens == 240
    first = Block(tower.config, name="block_00")
    second = Block(tower.config, name="block_01")
    entered = first.apply({"params": params["params"]["block_00"]}, x)
    left = second.apply({"params": params["params"]["block_01"]}, entered)
    y = np.asarray(left - entered).reshape(-1, WIDTH)
    fit = fitted(both, WIDTH)
    instead = adapted(fit, np.asarray(entered)).reshape(-1, WIDTH)
    assert fit.explained == pytest.approx(explained(y, instead), abs=1e-3)
    assert 0.3 < fit.explained < 1.0
    units = ["block_01", "block_00/mlp", "block_00/attention"]
    in_order = order_of(units, lambda: tower.apply(params, x))
    assert in_order == ["block_00/attention", "block_00/mlp", "block_01"]
    assert order_of(["block_07", "block_01"], lambda: tower.apply(params, x)) == ["block_01"]


class Twice(nn.Module):
    """A block that is met twice, of other tokens each time."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x):
        block = Block(self.config, name="block_00")
        return block(block(x))


def test_what_is_missing_is_told_by_the_network_without_whenever_a_unit_is_met() -> None:
    module = Twice(BlockConfig(width=WIDTH, heads=2, mlp_width=32, norm_eps=EPS))
    x = jax.random.normal(jax.random.key(1), (4, 40, WIDTH))
    other = x * jax.random.uniform(jax.random.key(2), x.shape)
    params = module.init(jax.random.key(0), x)
    runs = [lambda tokens=tokens: module.apply(params, tokens) for tokens in (x, other)]
    seen = moments(["block_00"], *runs)["block_00"]

    def passed(tokens):  # what enters the block and what leaves it, both times
        block = Block(module.config, name="block_00")
        first = block.apply({"params": params["params"]["block_00"]}, tokens)
        return [tokens, first, block.apply({"params": params["params"]["block_00"]}, first)]

    whole, without = passed(x), passed(other)
    pairs = [(without[0], whole[1]), (without[1], whole[2])]
    entering = np.concatenate([np.asarray(a, np.float64).reshape(-1, WIDTH) for a, _ in pairs])
    missing = [np.asarray(b - a, np.float64).reshape(-1, WIDTH) for a, b in pairs]
    told = of_tokens(entering, np.concatenate(missing))
    for name in Moments._fields:
        np.testing.assert_allclose(
            getattr(seen, name), getattr(told, name), rtol=1e-3, atol=2e-2, err_msg=name
        )


def test_what_cannot_be_fitted_is_said() -> None:
    seen = of_tokens(*planted(rank=2))
    with pytest.raises(ValueError, match="1 hidden features hold no direction"):
        fitted(seen, 1)
    with pytest.raises(ValueError, match="not finite"):
        fitted(seen._replace(yy=np.nan), 4)
