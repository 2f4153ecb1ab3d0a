"""Accuracy on a downstream classification task, beside what reads no image.

A score means little alone. Beside it stand three others: the same model shown black pictures
(``text_only``), shown the pictures of other examples (``image_shuffled``), and the answer that is
best on the training set, given to all (``majority``).
"""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.batch import Batch
from vlp_jax.data.cache import uncached
from vlp_jax.data.source import Answered, BadExample, Grouped, Questioned, Templated
from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.pictures import enlarge
from vlp_jax.evals.scores.vqa import vqa_accuracy
from vlp_jax.infra.artifacts import Card, Gallery, Picture, Span, Table
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.classification import Classifier, known_only

MAJORITY_SAMPLE = 5000  # training examples that the majority answer is counted on
CARDS = 12


class Task:
    """Accuracy of a classification objective on a fixed set.

    Metrics, fractions of one: ``accuracy`` (for questions with several annotators the official VQA
    accuracy); with ``controls`` also ``accuracy_text_only``, ``accuracy_image_shuffled`` and
    ``accuracy_majority``; where the source knows groups of its examples, ``worst_gap/<attribute>``,
    the best group's accuracy minus the worst's in points, over groups of ``min_group`` examples or
    more. Artefacts: a table by kind of text and by group, and a gallery. Every answer is written to
    ``predictions/<name>.jsonl`` of the workdir: ``record``, ``images`` (see ``Source.image_key``),
    ``text``, ``answer``, ``expected`` (all answers given, or the class), ``score``, and
    ``question_id`` where questions have one, which makes the rows those of VQA's official results.
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
        controls: bool = True,
        min_group: int = 30,
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``, also the name of the artefacts.
            source: key in ``config.data.sources``.
            objective: key in ``config.objectives``.
            split: of the source.
            num_examples: the first records, fewer where the split has fewer; 0: all of them.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            controls: whether to score what reads no image as well.
            min_group: examples below which a group is left out.

        Raises:
            ConfigError: an argument does not fit; the message names the key.
        """
        self._context, self._name = context, name
        self._controls, self._min_group = controls, min_group
        self.figures: tuple[str, ...] = ("accuracy", "worst_gap/")
        if controls:
            kinds = ("text_only", "image_shuffled", "majority")
            self.figures += tuple(f"accuracy_{kind}" for kind in kinds)
        self._objective = context.objective(name, objective, Classifier)
        fields = self._objective.extra_fields
        self._set = FixedSet(context, name, source, split, num_examples, batch_size, fields)
        self._source = uncached(self._set.source)
        self._train = context.sources[source]
        self._predict = context.once(
            (Task, objective, len(self._source.classes)),
            lambda: jax.jit(self._best_class, out_shardings=replicated(context.mesh)),
        )

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Score the set; see the class for the metrics."""
        records, labels, classes = self._predictions(params)

        def score(guesses: np.ndarray) -> np.ndarray:
            return self._scores(records, labels, guesses)

        scores = {kind: score(guesses) for kind, guesses in classes.items()}
        own = scores[""]
        yield "accuracy", float(own.mean())
        if self._controls:
            for kind in ("text_only", "image_shuffled"):
                yield f"accuracy_{kind}", float(scores[kind].mean())
            majority = score(np.full(len(records), self._majority))
            yield "accuracy_majority", float(majority.mean())
        groups = self._groups(records)
        for attribute, members in groups.items():
            means = [own[rows].mean() for rows in members.values() if len(rows) >= self._min_group]
            if attribute != "text" and len(means) > 1:
                yield f"worst_gap/{attribute}", float(100 * (max(means) - min(means)))
        self._write_predictions(records, labels, classes[""], own)
        self._save_table(scores, groups, step)
        self._save_gallery(records, classes[""], own, step)

    def _write_predictions(
        self, records: np.ndarray, labels: np.ndarray, guesses: np.ndarray, scores: np.ndarray
    ) -> None:
        source = self._source

        def row(record: int, label: int, guess: int, score: float) -> dict[str, Any]:
            facts: dict[str, Any] = {
                "record": record,
                "images": list(source.image_key(record)),
                "text": source.caption(record, 0),
                "answer": source.classes[guess],
                "expected": source.classes[label],
                "score": score,
            }
            if isinstance(source, Answered):
                facts["expected"] = list(source.answers_of(record))
            if isinstance(source, Questioned):
                facts["question_id"] = source.question_id(record)
            return facts

        columns = (column.tolist() for column in (records, labels, guesses, scores))
        self._context.write_predictions(self._name, map(row, *columns))

    def _best_class(self, params: Params, batch: Batch) -> jax.Array:
        """int32 [B]; classes that the source does not have are never chosen."""
        logits = self._objective.logits(params, batch)
        return known_only(logits, len(self._source.classes)).argmax(axis=1)

    def _predictions(self, params: Params) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Of the examples that could be read: record, label (0 without one), and guesses.

        Returns:
            int64 [n], int32 [n], and int32 [n] by what was shown.
        """
        records: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        guesses: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        mesh = self._context.mesh
        with jax.set_mesh(mesh):
            batches = zip(self._set.planned(), self._set.host_batches(), strict=True)
            for planned, host_batch in batches:
                batch = global_batch(host_batch, mesh)
                shown = {"": _shown(batch, "")}
                if self._controls:
                    shown["image_shuffled"] = _shown(batch, "_shuffled")
                    black = {k: jnp.zeros_like(v) for k, v in batch.items() if "image" in k}
                    shown["text_only"] = _shown({**batch, **black}, "")
                # A damaged row is not valid, which the plan does not know.
                none = jnp.zeros_like(batch["position"])
                valid, label = map(
                    np.asarray, self._set.gather((batch["valid"], batch.get("label", none)))
                )
                records.append(planned.record[valid])
                labels.append(label[valid])
                for kind, part in shown.items():
                    guesses[kind].append(np.asarray(self._predict(params, part))[valid])
        joined = {kind: np.concatenate(parts) for kind, parts in guesses.items()}
        return np.concatenate(records), np.concatenate(labels), joined

    def _scores(self, records: np.ndarray, labels: np.ndarray, guesses: np.ndarray) -> np.ndarray:
        """Score of each guess: float64 [n]."""
        source = self._source
        if not isinstance(source, Answered):
            return (guesses == labels).astype(np.float64)
        return np.array(
            [
                vqa_accuracy(source.classes[guess], source.answers_of(record))
                for record, guess in zip(records.tolist(), guesses.tolist(), strict=True)
            ]
        )

    @functools.cached_property
    def _majority(self) -> int:
        """The class with the highest total score on the training set, or on its first records."""
        train, size = self._train, self._context.config.data.image_size
        total = np.zeros(len(self._source.classes))
        for record in range(min(train.num_records or MAJORITY_SAMPLE, MAJORITY_SAMPLE)):
            try:
                fields = train.extras(record, size)
            except BadExample:  # training does without it as well
                continue
            if "answer" in fields:
                kept = fields["answer"] >= 0
                np.add.at(total, fields["answer"][kept], fields["answer_score"][kept])
            else:
                total[int(fields["label"])] += 1
        return int(total.argmax())

    def _groups(self, records: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """Attribute -> value -> rows of the examples that have it; ``text`` is the kind of text."""
        values: dict[str, list[str]] = collections.defaultdict(list)
        for record in records.tolist():
            if isinstance(self._source, Templated):
                values["text"].append(self._source.template(record))
            if isinstance(self._source, Grouped):
                for attribute, value in self._source.group(record).items():
                    values[attribute].append(value)
        return {
            attribute: {
                value: np.flatnonzero(np.array(column) == value) for value in sorted(set(column))
            }
            for attribute, column in values.items()
        }

    def _save_table(
        self,
        scores: Mapping[str, np.ndarray],
        groups: Mapping[str, Mapping[str, np.ndarray]],
        step: int,
    ) -> None:
        kinds = [kind for kind in ("", "text_only", "image_shuffled") if kind in scores]
        everything = np.arange(len(scores[""]))
        parts = [("all", "", everything)] + [
            (attribute, value, rows)
            for attribute, members in groups.items()
            for value, rows in members.items()
        ]
        self._context.save(
            f"{self._name}_groups",
            Table(
                title=f"{self._name}: accuracy by kind and group",
                columns=("group", "value", "examples", *(f"accuracy {k}".strip() for k in kinds)),
                rows=tuple(
                    (a, v, len(rows), *(float(scores[kind][rows].mean()) for kind in kinds))
                    for a, v, rows in parts
                ),
                note="text_only: black pictures; image_shuffled: the picture of another example.",
                step=step,
            ),
        )

    def _save_gallery(
        self, records: np.ndarray, classes: np.ndarray, scores: np.ndarray, step: int
    ) -> None:
        size = self._context.config.data.image_size
        cards = []
        for row in np.linspace(0, len(records) - 1, min(CARDS, len(records))).astype(int):
            record = int(records[row])
            pictures = [self._source.image(record, size)]
            if "second_image" in self._source.extra_fields:
                pictures.append(self._source.extras(record, size)["second_image"])
            right = self._truth(record)
            spans = [Span(self._source.caption(record, 0) + " ", "plain")]
            guess = self._source.classes[classes[row]]
            spans.append(Span(guess, "right" if scores[row] > 0 else "wrong"))
            if guess not in right:
                spans.append(Span(f" ({', '.join(right)})", "plain"))
            cards.append(
                Card(
                    images=tuple(Picture.from_array(enlarge(p)) for p in pictures),
                    spans=tuple(spans),
                )
            )
        self._context.save(
            self._name,
            Gallery(
                title=f"{self._name}: examples and the model's answers",
                cards=tuple(cards),
                note="Green: right, red: wrong, with what was expected.",
                step=step,
            ),
        )

    def _truth(self, record: int) -> Sequence[str]:
        if isinstance(self._source, Answered):
            return tuple(dict.fromkeys(self._source.answers_of(record)))
        size = self._context.config.data.image_size
        return (self._source.classes[int(self._source.extras(record, size)["label"])],)


def _shown(batch: Batch, suffix: str) -> Batch:
    """The batch with the pictures of this suffix, and no others."""
    names = [name for name in ("image", "second_image") if name in batch]
    rest = {k: v for k, v in batch.items() if not k.endswith("_shuffled")}
    return rest | {name: batch[f"{name}{suffix}"] for name in names}
