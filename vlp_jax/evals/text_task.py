"""The official figures of a downstream task on texts alone, such as one of GLUE."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.batch import Batch
from vlp_jax.data.cache import original, uncached
from vlp_jax.data.source import PAIR_SEPARATOR, BadExample, has_pictures
from vlp_jax.data.tasks import GLUE
from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.scores.glue import GLUE_SCORES, accuracy, glue_scores, pearson, spearman
from vlp_jax.evals.task import MAJORITY_SAMPLE
from vlp_jax.infra.artifacts import Row, Table
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.classification import known_only
from vlp_jax.objectives.text_tasks import TextAlone, TextClassification, TextRegression

_READ = ("text_ids", "text_length", "valid")
_RANGES = 5  # of expected scores, in the table


class TextTask:
    """Figures of a ``text_classification`` or a ``text_regression`` on a fixed set.

    Metrics: those of the source's task of GLUE, by their names in ``scores.glue.GLUE_SCORES``; of
    another source ``accuracy``, or ``pearson`` and ``spearman``. ``score`` is their mean, the one
    number of a task, and ``majority`` the ``score`` of giving all texts the class that most of the
    training set has: 0 of CoLA, whose metric is a correlation. Artefact: a table of what was
    answered where. Every answer is written to ``predictions/<name>.jsonl`` of the workdir:
    ``record``, ``text`` (of two sentences with `` / `` between them), ``answer`` and ``expected``
    (names of classes, or numbers), and ``score``: 1 where both agree and 0 elsewhere; of numbers
    ``error``, the answer minus what was expected.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        objective: str,
        split: str = "val",
        num_examples: int = 2000,
        batch_size: int = 0,
    ):
        """Plans the set.

        Args:
            context: of the run.
            name: key in ``config.evals``, also the name of the artefact.
            source: key in ``config.data.sources``.
            objective: key in ``config.objectives``.
            split: of the source.
            num_examples: the first records, fewer where the split has fewer; 0: all of them.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.

        Raises:
            ConfigError: an argument does not fit; the message names the key.
        """
        self._context, self._name = context, name
        self._objective: TextAlone = context.objective(name, objective, TextAlone)
        fields = self._objective.extra_fields
        self._set = FixedSet(
            context, name, source, split, num_examples, batch_size, fields, pictures=False
        )
        self._source = uncached(self._set.source)
        self._train = context.sources[source]
        [self._field] = fields
        self._classes = self._source.classes if self._field == "label" else ()
        read = original(self._source)
        self._task = read.task if isinstance(read, GLUE) else ""
        own = ("accuracy",) if self._classes else ("pearson", "spearman")
        self.figures: tuple[str, ...] = (*GLUE_SCORES.get(self._task, own), "score")
        if self._classes:
            self.figures += ("majority",)
        self._answer = context.once(
            (TextTask, objective, len(self._classes)),
            lambda: jax.jit(self._answers, out_shardings=replicated(context.mesh)),
        )
        self._most: int | None = None

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Score the set; see the class for the metrics."""
        records, answers, expected = self._predictions(params)
        scores = self._scores(answers, expected)
        yield from scores.items()
        yield "score", _mean(scores)
        if self._classes:
            same = np.full_like(answers, self._majority())
            yield "majority", _mean(self._scores(same, expected))
        self._write_predictions(records, answers, expected)
        self._save_table(answers, expected, scores, step)

    def _answers(self, params: Params, batch: Batch) -> jax.Array:
        """Classes int32 [B], of those that the source has, or scores float32 [B]."""
        objective = self._objective
        if isinstance(objective, TextClassification):
            logits = objective.logits(params, batch)
            return known_only(logits, len(self._classes)).argmax(axis=1).astype(jnp.int32)
        assert isinstance(objective, TextRegression)
        return objective.scores(params, batch)

    def _predictions(self, params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the examples that could be read: record int64 [n], answer and what was expected."""
        parts: list[tuple[np.ndarray, ...]] = []
        mesh = self._context.mesh
        with jax.set_mesh(mesh):
            for planned, host in zip(self._set.planned(), self._set.host_batches(), strict=True):
                batch = global_batch({name: host[name] for name in (*_READ, self._field)}, mesh)
                # A damaged row is not valid, which the plan does not know.
                valid, expected = map(
                    np.asarray, self._set.gather((batch["valid"], batch[self._field]))
                )
                answers = np.asarray(self._answer(params, batch))
                parts.append((planned.record[valid], answers[valid], expected[valid]))
        records, answers, expected = map(np.concatenate, zip(*parts, strict=True))
        return records, answers, expected

    def _scores(self, answers: np.ndarray, expected: np.ndarray) -> dict[str, float]:
        if self._task:
            return glue_scores(self._task, answers, expected)
        if self._classes:
            return {"accuracy": accuracy(answers, expected)}
        return {
            "pearson": pearson(answers, expected),
            "spearman": spearman(answers, expected),
        }

    def _majority(self) -> int:
        """The most frequent class of the training set, or of its first records.

        Texts are all counted, which is quick; where records are pictures, those may be read.
        """
        if self._most is None:
            train, size = self._train, self._context.config.data.image_size
            count = train.num_records
            if count is None or has_pictures(train):
                count = min(count or MAJORITY_SAMPLE, MAJORITY_SAMPLE)
            total = np.zeros(len(self._classes), np.int64)
            for record in range(count):
                try:
                    total[int(train.extras(record, size)[self._field])] += 1
                except BadExample:  # training does without it as well
                    continue
            self._most = int(total.argmax())
        return self._most

    def _write_predictions(
        self, records: np.ndarray, answers: np.ndarray, expected: np.ndarray
    ) -> None:
        def row(record: int, answer: Any, right: Any) -> dict[str, Any]:
            facts = {
                "record": record,
                "text": self._source.caption(record, 0).replace(PAIR_SEPARATOR, " / "),
            }
            if not self._classes:
                return {**facts, "answer": answer, "expected": right, "error": answer - right}
            return {
                **facts,
                "answer": self._classes[answer],
                "expected": self._classes[right],
                "score": float(answer == right),
            }

        columns = (column.tolist() for column in (records, answers, expected))
        self._context.write_predictions(self._name, map(row, *columns))

    def _save_table(
        self, answers: np.ndarray, expected: np.ndarray, scores: dict[str, float], step: int
    ) -> None:
        told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        columns, rows = self._confusion(answers, expected)
        title = f"{self._name}: {self._task or self._source.name}, {len(expected):,} texts"
        note = f"{told}."
        self._context.save(self._name, Table(title, columns, rows, note, step=step))

    def _confusion(
        self, answers: np.ndarray, expected: np.ndarray
    ) -> tuple[tuple[str, ...], tuple[Row, ...]]:
        """Columns and rows of the table: by class, or by fifths of the range of the scores."""
        if self._classes:
            kinds = np.arange(len(self._classes))
            counts = [
                [int(np.sum((expected == right) & (answers == given))) for given in kinds]
                for right in kinds
            ]
            columns = ("expected", "examples", *(f"answered {name}" for name in self._classes))
            return columns, tuple(
                (name, sum(row), *row) for name, row in zip(self._classes, counts, strict=True)
            )
        edges = np.linspace(expected.min(), expected.max(), _RANGES + 1)
        bins = np.clip(np.digitize(expected, edges) - 1, 0, _RANGES - 1)
        rows: list[Row] = []
        for index in np.unique(bins).tolist():
            inside = bins == index
            rows.append(
                (
                    f"{edges[index]:.2f} to {edges[index + 1]:.2f}",
                    int(inside.sum()),
                    float(answers[inside].mean()),
                    float(np.abs(answers - expected)[inside].mean()),
                )
            )
        return ("expected", "examples", "mean answer", "mean absolute error"), tuple(rows)


def _mean(scores: dict[str, float]) -> float:
    """The one number of a task: the mean of its figures."""
    return float(np.mean(list(scores.values())))
