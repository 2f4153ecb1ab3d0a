"""Reconstruction on a fixed validation set, with the right image and with another one.

The text is the same in both cases, so what the right image adds is what the model reads in it: the
**grounding gap**, accuracy with the right image minus accuracy with the image of another row, at
the base rate (only the token that is asked for is hidden).

Figures count the tokens of words: ``</s>`` and padding are left out, and so is ``<s>``, which is
never predicted. Losses are in nats a token, accuracies fractions of one, gaps accuracy points: 0.9
against 0.5 is a gap of 40.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.batch import Batch, HostBatch
from vlp_jax.data.source import ManyCaptions, Source
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.evals.base import EvalContext, token_classes
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.flm import FLM

RATES = (0.0, 0.15, 0.3, 0.5)
_CAPTIONS_AT_ONCE = 4096
_RECORDS_AT_ONCE = 1024


class Reconstruction:
    """Loss, accuracy and grounding gap on a fixed set.

    Metrics, for each rate (``base`` for 0): ``<rate>/loss``, ``<rate>/accuracy``,
    ``<rate>/loss_shuffled``, ``<rate>/accuracy_shuffled``; where 0 is among the rates,
    ``grounding_gap`` and, for each class of words that the source names and the set holds,
    ``grounding_gap/<class>`` (the share of the class's tokens; all pieces of a word count). For a
    finite training source also ``unigram_entropy`` in nats: the loss of the best guess that reads
    neither text nor image.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str = "val",
        num_examples: int = 512,
        batch_size: int = 0,
        rates: Sequence[float] = RATES,
        objective: str = "flm",
        train_source: str = "",
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``.
            source: key in ``config.data.sources``.
            split: of that source.
            num_examples: the first records, fewer where the split has fewer; 0: all of them.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            rates: corruption rates in [0, 1].
            objective: key in ``config.objectives``.
            train_source: key in ``config.data.sources`` whose captions ``unigram_entropy`` is of;
                empty: ``source``, in the split that the run trains on.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        if not rates or not all(0.0 <= rate <= 1.0 for rate in rates):
            raise ConfigError(
                f"evals.{name}.rates",
                f"{tuple(rates)} are not corruption rates",
                "Give one or more numbers in [0, 1]",
            )
        self._context = context
        self._objective = context.objective(name, objective, FLM)
        self._set = FixedSet(context, name, source, split, num_examples, batch_size)
        self._train_source = train_source or source
        context.check_source(f"evals.{name}.train_source", self._train_source)
        self._classes = tuple(sorted(set(self._set.source.word_classes().values())))
        whole = replicated(context.mesh)
        self._rates = {
            _label(rate): jax.device_put(np.float32(rate), whole) for rate in sorted(set(rates))
        }
        self.figures: tuple[str, ...] = tuple(
            f"{label}/{kind}{suffix}"
            for label in self._rates
            for kind in ("loss", "accuracy")
            for suffix in ("", "_shuffled")
        )
        if "base" in self._rates:
            self.figures += ("grounding_gap", "grounding_gap/")
        if context.sources[self._train_source].num_records is not None:
            self.figures += ("unigram_entropy",)
        self._sums = jax.jit(self._batch_sums, out_shardings=whole)
        self._token_classes: dict[int, np.ndarray] = {}

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Score the set; see the class for the metrics."""
        sums = self._set_sums(params)
        for label in self._rates:
            for suffix in ("", "_shuffled"):
                nll, correct, count = sums[f"{label}{suffix}"].sum(axis=-1)
                yield f"{label}/loss{suffix}", float(nll / count)
                yield f"{label}/accuracy{suffix}", float(correct / count)
        if "base" in self._rates:
            _, right, count = sums["base"]
            gain = right - sums["base_shuffled"][1]
            yield "grounding_gap", float(100 * gain.sum() / count.sum())
            for index, name in enumerate(self._classes, start=1):
                if count[index]:
                    yield f"grounding_gap/{name}", float(100 * gain[index] / count[index])
        if self._unigram_entropy is not None:
            yield "unigram_entropy", self._unigram_entropy

    def host_batches(self) -> Iterator[HostBatch]:
        """This process's rows of every batch of the set.

        Each holds, beside what ``FixedSet`` gives, ``token_class`` int32 [B, N] (see
        ``token_classes``).
        """
        plan, rows = self._set.plan, self._set.rows
        for t, batch in enumerate(self._set.host_batches()):
            if t not in self._token_classes:
                tokenizer = self._context.tokenizer
                classes = token_classes(plan, tokenizer, t, rows, self._classes)
                self._token_classes[t] = np.where(batch["valid"][:, None], classes, -1)
            yield {**batch, "token_class": self._token_classes[t]}

    def _set_sums(self, params: Params) -> dict[str, np.ndarray]:
        """Sums over the set, by rate with and without ``_shuffled``: float64 [3, 1 + classes]."""
        totals: dict[str, np.ndarray] = {}
        with jax.set_mesh(self._context.mesh):
            for host_batch in self.host_batches():
                batch = global_batch(host_batch, self._context.mesh)
                shuffled = {**batch, "image": batch.pop("image_shuffled")}
                del shuffled["image_shuffled"]
                sums = {}
                for label, rate in self._rates.items():
                    sums[label] = self._sums(params, batch, rate)
                    sums[f"{label}_shuffled"] = self._sums(params, shuffled, rate)
                for key, value in jax.device_get(sums).items():
                    totals[key] = totals.get(key, 0.0) + value.astype(np.float64)
        return totals

    def _batch_sums(self, params: Params, batch: Batch, rate: jax.Array) -> jax.Array:
        """Sums of nll, of correct and of ones by class of word: float32 [3, 1 + classes]."""
        scores = self._objective.reconstruction_scores(params, batch, jax.random.key(0), rate)
        targets = batch["token_class"][:, 1:]
        member = targets[..., None] == jnp.arange(1 + len(self._classes))[None, None]
        values = (scores.nll, scores.correct, jnp.ones_like(scores.nll))
        return jnp.stack(
            [jnp.where(member, value[..., None], 0.0).sum(axis=(0, 1)) for value in values]
        )

    @functools.cached_property
    def _unigram_entropy(self) -> float | None:
        config = self._context.config
        source = self._context.sources[self._train_source]
        if source.num_records is None:
            return None
        return unigram_entropy(
            all_captions(source), self._context.tokenizer, config.data.max_text_length
        )


def all_captions(source: Source) -> Iterator[str]:
    """Every caption of a finite source."""
    assert source.num_records is not None, "an unbounded source has no last caption"
    for start in range(0, source.num_records, _RECORDS_AT_ONCE):
        records = np.arange(start, min(start + _RECORDS_AT_ONCE, source.num_records))
        counts = source.num_captions(records)
        pairs = [(r, i) for r, n in zip(records, counts, strict=True) for i in range(n)]
        if isinstance(source, ManyCaptions):
            yield from source.captions(*np.asarray(pairs, np.int64).T)
        else:
            yield from (source.caption(int(record), index) for record, index in pairs)


def unigram_entropy(captions: Iterable[str], tokenizer: Tokenizer, max_length: int) -> float:
    """Entropy of the tokens of words, taken one by one.

    Args:
        captions: the texts, at least one of them with a word.
        tokenizer: what encodes them.
        max_length: longest row in tokens, special tokens included; longer captions are cut.

    Returns:
        Nats a token; ``<s>`` and ``</s>`` are not counted.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    captions = iter(captions)
    while chunk := list(itertools.islice(captions, _CAPTIONS_AT_ONCE)):
        rows = tokenizer.encode(chunk, max_length)
        words = np.concatenate([row[1:-1] for row in rows])
        counts += np.bincount(words, minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _label(rate: float) -> str:
    """How a rate is called in the names of metrics."""
    return "base" if rate == 0.0 else f"{rate:g}"
