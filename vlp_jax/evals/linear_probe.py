"""A linear classifier on a frozen tower, for every label of a source.

    config.evals.linear_probe = {"source": "scenes", "split": "test"}

Multinomial logistic regression by L-BFGS from zero. The strength of its penalty is chosen on the
last fifth of the training pictures, over seven powers of ten and then between them by halving; the
classifier is then fitted to all of them and judged once on the split (fact sheet of language-guided
sampling, section 4). Two penalties, which are not interchangeable:

    squared   sum of the losses + |W|^2 / (2 C), as scikit-learn's
    norm      mean of the losses + |W| / C, of the unsquared norm

Biases are not penalised.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.features import LabelledSets
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.pooling import Pool
from vlp_jax.objectives.base import Params

PENALTIES = ("squared", "norm")
EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # of C, at first
_FINE, _DECADES = 29, 2.0  # values within so many decades of the best, searched by halving
_CHOSEN_ON = 5  # one in so many training pictures chooses the penalty
_TINY = 1e-12


class Classifier(NamedTuple):
    """A linear map to logits.

    Attributes:
        kernel: float32 [D, K].
        bias: float32 [K].
    """

    kernel: jax.Array
    bias: jax.Array


class LinearProbe:
    """Accuracy of a linear classifier for every label of a source.

    Metrics: ``<label>/accuracy``, ``<label>/train_accuracy`` and ``<label>/log10_c``, the strength
    that was chosen.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str = "val",
        num_examples: int = 2_000,
        num_train: int = 10_000,
        penalty: str = "squared",
        max_iterations: int = 1_000,
        labels: Sequence[str] = (),
        batch_size: int = 0,
        pool: Pool = "class",
    ):
        """Plans both sets; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``.
            source: key in ``config.data.sources``; one that labels its records.
            split: of that source, another than it is trained on.
            num_examples: the first records of it, fewer where it has fewer; 0: all.
            num_train: the first records of the training split, whose labels are known.
            penalty: ``squared`` or ``norm``.
            max_iterations: of L-BFGS, in each fit.
            labels: those to be told; empty: all of the source.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            pool: what is read of the tower: ``class`` token, or ``mean`` of the patches.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        if penalty not in PENALTIES:
            raise ConfigError(
                f"evals.{name}.penalty", f"{penalty!r} is no penalty", f"Use one of {PENALTIES}"
            )
        if max_iterations < 1:
            raise ConfigError(
                f"evals.{name}.max_iterations", f"{max_iterations} fit nothing", "Use 1 or more"
            )
        self._sets = LabelledSets.of(
            context, name, source, split, num_examples, num_train, batch_size, pool
        )
        if self._sets.num_train < _CHOSEN_ON:
            raise ConfigError(
                f"evals.{name}.num_train",
                f"of {self._sets.num_train} pictures no fifth can choose the penalty",
                f"Use {_CHOSEN_ON} or more",
            )
        unknown = sorted(set(labels) - set(self._sets.names))
        if unknown:
            raise ConfigError(
                f"evals.{name}.labels",
                f"{source!r} has no label {unknown[0]!r}",
                f"Use some of {sorted(self._sets.names)}",
            )
        self._labels = tuple(labels) or self._sets.names
        self._penalty, self._iterations = penalty, max_iterations
        kinds = ("accuracy", "train_accuracy", "log10_c")
        self.figures = tuple(f"{label}/{kind}" for label in self._labels for kind in kinds)

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Embed both sets and fit; see the class for the metrics."""
        del step
        train, asked = self._sets.embed(params)
        for label in self._labels:
            known, truth = train.labels[label], asked.labels[label]
            classes = np.unique(known)
            targets = np.searchsorted(classes, known)
            exponent = choose(train.values, targets, self._penalty, self._iterations)
            fitted = fit(train.values, targets, 10.0**exponent, self._penalty, self._iterations)
            named = classes[predict(fitted, asked.values)]
            yield f"{label}/accuracy", float(np.mean(named == truth))
            own = predict(fitted, train.values) == targets
            yield f"{label}/train_accuracy", float(np.mean(own))
            yield f"{label}/log10_c", exponent


def choose(features: np.ndarray, targets: np.ndarray, penalty: str, iterations: int) -> float:
    """The exponent of C that is best on the last fifth: float [n, D], int [n].

    Of equal ones the smaller, which penalises more.
    """
    first = len(features) - max(1, len(features) // _CHOSEN_ON)
    known: dict[float, float] = {}

    def score(exponent: float) -> float:
        if exponent not in known:
            classes = int(targets.max()) + 1
            fitted = fit(
                features[:first], targets[:first], 10.0**exponent, penalty, iterations, classes
            )
            known[exponent] = float(np.mean(predict(fitted, features[first:]) == targets[first:]))
        return known[exponent]

    best = max(EXPONENTS, key=lambda e: (score(e), -e))
    fine = best + np.linspace(-_DECADES, _DECADES, _FINE)
    fine = np.clip(fine, EXPONENTS[0], EXPONENTS[-1])
    place, reach = _FINE // 2, _FINE // 4
    while reach:
        near = [p for p in (place - reach, place, place + reach) if 0 <= p < _FINE]
        place = max(near, key=lambda p: (score(float(fine[p])), -p))
        reach //= 2
    return float(fine[place])


def fit(
    features: np.ndarray,
    targets: np.ndarray,
    strength: float,
    penalty: str = "squared",
    iterations: int = 1_000,
    classes: int = 0,
) -> Classifier:
    """The classifier of least penalised loss.

    Args:
        features: float [n, D].
        targets: int [n], 0 to K - 1.
        strength: C; the larger, the weaker is the penalty.
        penalty: ``squared`` or ``norm``.
        iterations: of L-BFGS, at most.
        classes: K; 0: as many as occur.
    """
    kernel = jnp.zeros((features.shape[1], classes or int(targets.max()) + 1))
    return _fit(
        Classifier(kernel, jnp.zeros(kernel.shape[1])),
        jnp.asarray(features, jnp.float32),
        jnp.asarray(targets, jnp.int32),
        jnp.float32(strength),
        jnp.int32(iterations),
        penalty == "squared",
    )


def predict(fitted: Classifier, features: np.ndarray) -> np.ndarray:
    """The likeliest class of each: float [n, D] -> int [n]."""
    logits = np.asarray(features) @ np.asarray(fitted.kernel) + np.asarray(fitted.bias)[None]
    return logits.argmax(axis=1)


@jax.jit(static_argnames="squared")
def _fit(
    start: Classifier,
    features: jax.Array,
    targets: jax.Array,
    strength: jax.Array,
    iterations: jax.Array,
    squared: bool,
) -> Classifier:
    count = len(targets)
    # Scaled features make one step length fit all directions; the penalty is of the true weights.
    scale = jnp.maximum(features.std(axis=0).mean(), _TINY)
    scaled = features / scale

    def objective(classifier: Classifier) -> jax.Array:
        logits = jnp.dot(scaled, classifier.kernel, precision=jax.lax.Precision.HIGHEST)
        logits += classifier.bias[None]
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        square = jnp.square(classifier.kernel / scale).sum()
        if squared:
            return loss + square / (2.0 * strength * count)
        # At zero the norm has no gradient; the square's is taken until it is left.
        positive = square > _TINY
        return loss + jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0) / strength

    method = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Classifier, optax.OptState]) -> tuple[Classifier, optax.OptState]:
        classifier, state = carry
        value, grad = value_and_grad(classifier, state=state)
        updates, state = method.update(
            grad, state, classifier, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(classifier, updates), state

    def goes_on(carry: tuple[Classifier, optax.OptState]) -> jax.Array:
        _, state = carry
        count = optax.tree.get(state, "count")
        steep = optax.tree.norm(optax.tree.get(state, "grad"))
        return (count == 0) | ((count < iterations) & (steep >= 1e-5))

    fitted, _ = jax.lax.while_loop(goes_on, step, (start, method.init(start)))
    return Classifier(fitted.kernel / scale, fitted.bias)
