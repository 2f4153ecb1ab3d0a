"""The evaluator contract, and what evaluators over a fixed set of records share."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.data.batch import HostBatch, standard_fields
from vlp_jax.data.build import build_eval_plan
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.loader import Loader
from vlp_jax.data.planned import Packed
from vlp_jax.data.source import Source, has_pictures
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.artifacts import ARTIFACTS_FOLDER, Artifact
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.objectives.base import Objective, Params

PREDICTIONS_FOLDER = "predictions"

T = TypeVar("T")


class Evaluator(Protocol):
    """Figures about a set of parameters; all that the train loop knows of an evaluator.

    Attributes:
        figures: the names that ``run`` may give, by which a run can rank its checkpoints or from
            which an objective can learn. One that ends in ``/`` stands for all that begin so.
    """

    figures: tuple[str, ...]

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Evaluate; artefacts are written beside the metrics by process 0.

        Every process must run it to its end, for the programs inside are collective.

        Args:
            params: parameters of the run, sharded or not.
            step: updates made, which artefacts carry.

        Returns:
            (name, value) pairs, the same on every process.
        """
        ...


def has_figure(evaluator: Evaluator, figure: str) -> bool:
    """Whether an evaluator may give a figure of this name."""
    return any(
        figure == known or (known.endswith("/") and figure.startswith(known))
        for known in evaluator.figures
    )


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """What a run gives to each of its evaluators.

    Attributes:
        config: of the run.
        objectives: of the run.
        tokenizer: of the run.
        mesh: of the run.
        sources: training sources of the run by name.
        edges: increasing text lengths that the training plan pads to.
        workdir: where artefacts go, below ``artifacts/``; None: nowhere.
        shared: what several evaluators use, see ``once``.
    """

    config: ConfigDict
    objectives: tuple[Objective, ...]
    tokenizer: Tokenizer
    mesh: Mesh
    sources: Mapping[str, Source]
    edges: tuple[int, ...]
    workdir: pathlib.Path | None
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What evaluators of a run have in common, made for the first that asks for it.

        A jitted function, above all: evaluators that differ by the records that they read, as those
        of a validation and of a test split, trace and compile one program and not two.

        Args:
            key: all that it depends on, apart from the run.
            make: makes it.
        """
        if key not in self.shared:
            self.shared[key] = make()
        found: T = self.shared[key]
        return found

    def objective(self, evaluator: str, name: str, kind: type[T]) -> T:
        """The objective that ``evals.<evaluator>.objective`` names.

        Raises:
            ConfigError: the run has none of that name and kind.
        """
        found = {o.name: o for o in self.objectives if isinstance(o, kind)}
        if name not in found:
            raise ConfigError(
                f"evals.{evaluator}.objective",
                f"{name!r} is no objective of type {kind.__name__} of this run",
                f"Use one of {sorted(found)}" if found else "Add one to `objectives`",
            )
        return found[name]

    def source(self, evaluator: str, name: str, split: str, num_examples: int) -> Source:
        """The source that ``evals.<evaluator>.source`` names.

        Args:
            evaluator: key in ``config.evals``.
            name: key in ``config.data.sources``.
            split: of that source.
            num_examples: how many records will be read; 0: all of the split.

        Raises:
            ConfigError: there is no such source, or nothing to read.
            ValueError: from the source, naming the key or the file.
        """
        self.check_source(f"evals.{evaluator}.source", name)
        key = f"evals.{evaluator}.num_examples"
        if num_examples < 0:
            raise ConfigError(
                key,
                f"{num_examples} examples are no set",
                "Use 1 or more, 0 for all of the split, or remove the evaluator",
            )
        source = build_source(self.config, name, split=split, num_records=num_examples or None)
        if not num_examples and source.num_records is None:
            raise ConfigError(
                key,
                f"0 asks for all examples of split {split!r} of data.sources.{name}, which is "
                "unbounded",
                "Use 1 or more, or set num_records there",
            )
        return source

    def check_source(self, key: str, name: str) -> None:
        """Raise a ConfigError about ``key`` if the run has no source of that name."""
        if name not in self.config.data.sources:
            raise ConfigError(
                key,
                f"{name!r} is no source of this run",
                f"Use one of {sorted(self.config.data.sources)}",
            )

    def write_predictions(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``workdir/predictions/<name>.jsonl``, one JSON object a row, on process 0 alone."""
        if self.workdir is not None and jax.process_index() == 0:
            folder = self.workdir / PREDICTIONS_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / f"{name}.jsonl", "".join(lines))

    def save(self, name: str, artifact: Artifact) -> None:
        """Write an artefact to ``workdir/artifacts/<name>``, on process 0 alone."""
        if self.workdir is not None and jax.process_index() == 0:
            artifact.save(self.workdir / ARTIFACTS_FOLDER / name)


def fixed_plan(
    context: EvalContext, source: Source, num_examples: int, batch_size: int
) -> EvalPlan:
    """The first records of a source, each with its first caption, in a single bucket.

    One bucket means one compile. It is the smallest edge of the run that holds every caption, or
    ``data.max_text_length`` where a caption is longer than any that the run trains on.

    Args:
        context: of the run.
        source: where the records come from.
        num_examples: how many of them.
        batch_size: rows of a global batch.
    """
    config = context.config
    cap = config.data.max_text_length
    edges = (*(edge for edge in context.edges if edge < cap), max(cap, context.edges[-1]))

    def plan(edges: tuple[int, ...]) -> EvalPlan:
        return build_eval_plan(config, source, context.tokenizer, edges, num_examples, batch_size)

    needed = plan(edges).buckets()[-1].text_length
    return plan(edges[edges.index(needed) :])


def set_fields(plan: EvalPlan, extra_fields: Sequence[str] = ()) -> tuple[str, ...]:
    """The arrays of a set's batches: the standard ones that its source gives, and these."""
    [planned] = plan.sources
    packed = isinstance(planned.captions, Packed)
    return (*standard_fields(has_pictures(planned.source), packed), *extra_fields)


def read(
    config: ConfigDict, plan: EvalPlan, rows: slice, extra_fields: Sequence[str] = ()
) -> Iterator[HostBatch]:
    """Read the whole set once.

    Args:
        config: of the run; ``data.threads`` and ``data.prefetch`` apply.
        plan: the set.
        rows: the rows of each global batch to read, as ``infra.mesh.host_rows`` gives them.
        extra_fields: keys of ``batch.EXTRA_FIELDS`` to read.
    """
    share = rows.stop - rows.start
    with Loader(
        plan,
        start_step=0,
        stop_step=plan.num_batches,
        host=rows.start // share,
        hosts=plan.batch_size // share,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        fields=set_fields(plan, extra_fields),
    ) as loader:
        yield from loader


def token_classes(
    plan: EvalPlan, tokenizer: Tokenizer, t: int, rows: slice, classes: tuple[str, ...]
) -> np.ndarray:
    """What kind of word each token of batch t belongs to.

    Args:
        plan: the set.
        tokenizer: of the run.
        t: which batch.
        rows: the rows wanted.
        classes: names of the classes of ``source.word_classes()`` that are told apart.

    Returns:
        int32 [B, N]: ``1 + classes.index(...)``, 0 for tokens of other words and for figures and
        commas, -1 for ``<s>``, ``</s>`` and padding. All pieces of a word are of its class.
    """
    planned = plan.batch(t).rows(rows)
    [source] = plan.sources
    class_of = {
        word: 1 + classes.index(name)
        for word, name in source.source.word_classes().items()
        if name in classes
    }
    result = np.full((len(planned), planned.bucket.text_length), -1, np.int32)
    for row, (record, caption, length) in enumerate(
        zip(planned.record, planned.caption, planned.length, strict=True)
    ):
        result[row, 1 : length - 1] = 0
        if class_of:
            text = source.source.caption(int(record), int(caption))
            _, words = tokenizer.encode_with_words(text, source.captions.max_length)
            result[row, 1 : length - 1] = [class_of.get(word or "", 0) for word in words[1:-1]]
    return result
