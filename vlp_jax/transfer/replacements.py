"""What stands in the place of a skipped unit, fitted to what the unit did, without training.

    for unit in order_of(units, whole):
        seen = moments([unit], whole, without)[unit]   # of one batch; add up those of several
        fit = fitted(seen, width)                      # of ``models.tuning.Adapter``; put it in

A unit adds something to every token that enters it. The best linear map of the token, normed as the
replacement norms it, to what is missing is a ridge regression, of which a bottleneck holds the
directions that explain most (reduced-rank regression). Every direction takes two hidden features,
one for its positive and one for its negative part, for z = relu(z) - relu(-z).

What is missing is what the whole network has after the unit, less what enters it in the network
that does without: units are fitted one after the other, in the order in which they run, and each
makes good what those before it have left. Fitted to the whole network alone, the upper blocks of an
image tower end up worse than with nothing in their place (docs/results/pcetl.md).

That a block can be replaced in closed form before any training is the idea of TOAST (fact sheet of
PCETL, section 8); the form is our own. What a unit makes of other tokens than its own is lost.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.models.block import Block
from vlp_jax.models.similarity import watched

_RIDGE = 1e-4  # of the mean variance of a normed feature, which is 1 or less
_SCALE = 0.02  # standard deviation of the weights on the way in, as of a fresh adapter


class Moments(NamedTuple):
    """Sums over tokens: of x [D], one that enters, normed, and of y [D], what is to be added to it.

    Attributes:
        tokens: float [], how many.
        x: float [D].
        y: float [D].
        xx: float [D, D], of x x'.
        xy: float [D, D], of x y'.
        yy: float [], of y'y.
    """

    tokens: Any
    x: Any
    y: Any
    xx: Any
    xy: Any
    yy: Any


@dataclasses.dataclass(frozen=True)
class Fit:
    """A linear map through a bottleneck, as a ReLU between two layers computes it.

    Attributes:
        down: float32 [D, W], on the way in; there is no bias.
        up: float32 [W, D].
        bias: float32 [D], added on the way out.
        explained: share of what is to be added that it adds, of squares over all tokens.
    """

    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray
    explained: float


def order_of(units: Collection[str], whole: Callable[[], Any]) -> list[str]:
    """Units in the order in which a model runs them, without those that it does not run.

    Args:
        units: that the model has.
        whole: applies the model to a batch; it is traced, and nothing is computed.
    """
    met: list[str] = []
    jax.eval_shape(lambda: watched(units, whole, lambda unit, *_: met.append(unit)))
    return list(dict.fromkeys(met))


def moments(
    units: Collection[str], whole: Callable[[], Any], without: Callable[[], Any]
) -> dict[str, Moments]:
    """What enters units in a network that does without them, and what is missing after them.

    Padding counts as any token does. What is met several times is added up.

    Args:
        units: that the model runs.
        whole: applies the model to a batch, without dropout, with the units there.
        without: the same, with what stands in their place; both meet the same tokens in the same
            order.

    Returns:
        Unit -> float32 sums.
    """
    after: dict[str, list[jax.Array]] = {unit: [] for unit in units}
    found: dict[str, Moments] = {}

    def leaving(unit: str, _: jax.Array, tokens: jax.Array, block: Block) -> None:
        after[unit].append(tokens)

    def entering(unit: str, tokens: jax.Array, _: jax.Array, block: Block) -> None:
        here = _moments(tokens, after[unit].pop(0), block.config.norm_eps)
        found[unit] = jax.tree.map(jnp.add, found[unit], here) if unit in found else here

    watched(units, whole, leaving)
    watched(units, without, entering)
    return found


def _moments(before: jax.Array, after: jax.Array, eps: float) -> Moments:
    x, y = (tokens.astype(jnp.float32).reshape(-1, tokens.shape[-1]) for tokens in (before, after))
    y = y - x
    x = jax.nn.standardize(x, axis=-1, epsilon=eps)
    exact = jax.lax.Precision.HIGHEST
    xx, xy = (jnp.matmul(x.T, other, precision=exact) for other in (x, y))
    count = jnp.float32(len(x))
    return Moments(count, x.sum(axis=0), y.sum(axis=0), xx, xy, jnp.sum(y * y))


def fitted(seen: Moments, width: int) -> Fit:
    """The bottleneck that adds most of what is missing.

    Args:
        seen: of the unit, over more tokens than features.
        width: W, hidden features, 2 or more. Those that hold no direction (the last of an odd
            number, and all beyond 2 D) start as a fresh adapter's, with zeros on the way out.

    Raises:
        ValueError: it cannot hold a direction, or what was seen is not finite.
    """
    if width < 2:
        raise ValueError(f"{width} hidden features hold no direction; use 2 or more")
    count, x, y, xx, xy, yy = (np.asarray(sums, np.float64) for sums in seen)
    if not all(np.isfinite(sums).all() for sums in (xx, xy, yy)):
        raise ValueError("what is missing after it is not finite; look at the base and its data")
    mean_x, mean_y = x / count, y / count
    spread = xx / count - np.outer(mean_x, mean_x)
    both = xy / count - np.outer(mean_x, mean_y)
    ridge = _RIDGE * np.trace(spread) / len(spread)
    whole = np.linalg.solve(spread + ridge * np.eye(len(spread)), both)  # [D, D]
    # Directions of what is predicted, by how much of it they carry.
    _, directions = np.linalg.eigh(whole.T @ spread @ whole)
    rank = min(width // 2, len(whole))
    out = directions[:, ::-1][:, :rank]  # [D, R]
    into = whole @ out
    # As large on the way in as in a fresh adapter, so that an optimizer meets the same scales.
    length = np.linalg.norm(into, axis=0)
    scale = np.where(length > 0, _SCALE * np.sqrt(len(into)) / np.maximum(length, 1e-30), 0.0)
    back = np.where(scale > 0, 1.0 / np.maximum(scale, 1e-30), 0.0)
    draw = np.random.default_rng(0)
    down = _SCALE * draw.standard_normal((len(whole), width))
    up = np.zeros((width, len(whole)))
    down[:, :rank], down[:, rank : 2 * rank] = into * scale, -into * scale
    up[:rank], up[rank : 2 * rank] = (out * back).T, -(out * back).T
    held = into @ out.T
    bias = mean_y - mean_x @ held
    # Mean square of y - (x held + bias), whose mean is 0.
    around = yy / count - mean_y @ mean_y
    left = around - 2 * np.sum(held * both) + np.sum(held * (spread @ held))
    explained = 1.0 - float(left / (yy / count)) if yy > 0 else 1.0
    return Fit(down.astype(np.float32), up.astype(np.float32), bias.astype(np.float32), explained)
