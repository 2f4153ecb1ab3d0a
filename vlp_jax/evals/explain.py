"""Where a classification comes from: occlusion and attention rollout, side by side.

*Occlusion* asks the model: cover a cell of the picture with grey and see how far the
log-probability of the answer falls (Zeiler and Fergus, arXiv 1311.2901, section 4.2). *Attention
rollout* reads the weights: the attentions of the image tower, each mixed half and half with the
identity for the residual stream, multiplied through the layers (Abnar and Zuidema, arXiv
2005.00928, section 3), weighed by how much the readout's last cross-attention reads of each image
token. Blocks that read image and text as one are multiplied through as well, in place of that. The
first is what the model does, the second what it looks at; where they differ, trust the first.
"""

from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import Batch, HostBatch
from vlp_jax.evals.attention_maps import (
    patches_over_image,
    query_over_text,
    text_over_image,
)
from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.pictures import enlarge, heat_map
from vlp_jax.infra.artifacts import Card, Gallery, Picture, Span
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.models.encoder import Encoder
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.classification import NLVR2, VQA, Classification, known_only

GREY = 128  # what a covered cell is filled with


class Explanation(NamedTuple):
    """What is said about each row of a batch.

    Attributes:
        answer: best class, int32 [B].
        probability: of it, float32 [B].
        occlusion: fall of its log-probability when a cell is covered, float32 [B, G, G].
        rollout: share of the readout's attention that each patch gets, float32 [B, P, P].
    """

    answer: jax.Array
    probability: jax.Array
    occlusion: jax.Array
    rollout: jax.Array


class Explain:
    """Maps of what a classification objective looks at, for a few examples.

    Writes the gallery ``artifacts/<name>``. Metric: ``agreement``, the mean correlation between
    the two maps over the cells (1: they tell the same story, 0: nothing in common).
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        objective: str,
        split: str = "val",
        num_examples: int = 8,
        cells: int = 8,
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``, also the name of the artefact.
            source: key in ``config.data.sources``.
            objective: key of a task with one image in ``config.objectives``.
            split: of the source.
            num_examples: the first records, fewer where the split has fewer.
            cells: G; the picture is covered in G x G cells, one at a time.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        self.figures: tuple[str, ...] = ("agreement",)
        self._context, self._name = context, name
        self._objective = context.objective(name, objective, Classification)
        if isinstance(self._objective, NLVR2):
            raise ConfigError(
                f"evals.{name}.objective", f"{objective!r} reads two images", "Use a task with one"
            )
        size = context.config.data.image_size
        if not 2 <= cells <= size or size % cells:
            raise ConfigError(
                f"evals.{name}.cells",
                f"{cells} does not divide data.image_size={size}",
                "Use a divisor of it, 2 or more",
            )
        self._cells = cells
        self._set = FixedSet.one_batch(context, name, source, split, num_examples)
        self._explain = jax.jit(self._explain_batch, out_shardings=replicated(context.mesh))

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Explain the set; see the class for the metric."""
        batch, found = self.explanations(params)
        rows = np.flatnonzero(batch["valid"])
        yield "agreement", float(np.mean([_correlation(found, int(row)) for row in rows]))
        gallery = Gallery(
            title=f"{self._name}: what the answer depends on",
            cards=tuple(self._card(batch, found, int(row)) for row in rows),
            note=(
                "Middle: how far the answer's log-probability falls when a cell is covered with "
                "grey. Right: attention rollout."
            ),
            step=step,
        )
        self._context.save(self._name, gallery)

    def explanations(self, params: Params) -> tuple[HostBatch, Explanation]:
        """The set as one batch, whole on every process, and what is said about each row."""
        context = self._context
        [batch] = self._set.whole_batches()
        mine = self._set.rows
        with jax.set_mesh(context.mesh):
            rows = global_batch({k: v[mine] for k, v in batch.items()}, context.mesh)
            return batch, jax.device_get(self._explain(params, rows))

    def _explain_batch(self, params: Params, batch: Batch) -> Explanation:
        log_chances = self._log_chances(params, batch)
        answer = log_chances.argmax(axis=1)

        def score(log_chances: jax.Array) -> jax.Array:
            return jnp.take_along_axis(log_chances, answer[:, None], axis=1)[:, 0]

        size = batch["image"].shape[1] // self._cells

        def covered(cell: jax.Array) -> jax.Array:
            row, column = cell // self._cells, cell % self._cells
            grey = jnp.full((len(answer), size, size, 3), GREY, jnp.uint8)
            image = jax.lax.dynamic_update_slice(
                batch["image"], grey, (0, row * size, column * size, 0)
            )
            return score(log_chances) - score(self._log_chances(params, {**batch, "image": image}))

        falls = jax.lax.map(covered, jnp.arange(self._cells**2))
        occlusion = falls.T.reshape(-1, self._cells, self._cells)
        return Explanation(
            answer, jnp.exp(score(log_chances)), occlusion, self._rollout(params, batch)
        )

    def _log_chances(self, params: Params, batch: Batch) -> jax.Array:
        """Log-probabilities as the objective trains them: an answer of VQA stands for itself."""
        logits = self._objective.logits(params, batch)
        logits = known_only(logits, len(self._set.source.classes))
        if isinstance(self._objective, VQA):
            return jax.nn.log_sigmoid(logits)
        return jax.nn.log_softmax(logits)

    def _rollout(self, params: Params, batch: Batch) -> jax.Array:
        reader = self._objective.reader

        def forward(model: Encoder) -> jax.Array:
            image = model.encode_image(normalize(batch["image"]))
            text = reader.encode(model, batch["text_ids"], batch["text_length"], None)
            return reader.read(model, text, image, None)

        model = self._objective.model
        _, variables = nn.apply(forward, model, mutable=["intermediates"])({"params": params})
        weights = variables.get("intermediates", {})  # none where all attention is skipped
        examples, tokens = batch["text_ids"].shape
        texts = examples, reader.streams, tokens
        reading = text_over_image(model, params, weights, texts)
        if reader.kind == "query":
            reading = (query_over_text(model, weights) @ reading)[:, 0]
        elif reader.kind == "bidirectional":
            reading = reading[:, 0]
        else:
            end = (batch["text_length"] - 1)[:, None, None]
            reading = jnp.take_along_axis(reading, end, axis=1)[:, 0]
        shares = (reading[:, None] @ patches_over_image(model, params, weights))[:, 0, 1:]
        side = round(shares.shape[1] ** 0.5)
        return shares.reshape(-1, side, side)

    def _card(self, batch: HostBatch, found: Explanation, row: int) -> Card:
        image, ids = batch["image"][row], batch["text_ids"][row, : batch["text_length"][row]]
        answer = int(found.answer[row])
        classes = self._set.source.classes
        name = classes[answer] if answer < len(classes) else f"class {answer}"
        return Card(
            images=(
                Picture.from_array(enlarge(image), "what is shown"),
                Picture.from_array(
                    heat_map(image, np.ravel(found.occlusion[row])), "what the answer needs"
                ),
                Picture.from_array(
                    heat_map(image, np.ravel(found.rollout[row])), "what is looked at"
                ),
            ),
            spans=(
                Span(self._context.tokenizer.decode(ids)),
                Span(f" {name} ({found.probability[row]:.0%})"),
            ),
        )


def _correlation(found: Explanation, row: int) -> float:
    """Between both maps of a row, on the coarser of their grids; 0 where one is flat."""
    maps = [np.asarray(found.occlusion[row]), np.asarray(found.rollout[row])]
    side = min(len(one) for one in maps)
    pooled = [_pooled(one, side).ravel() for one in maps]
    if min(one.std() for one in pooled) == 0.0:
        return 0.0
    return float(np.corrcoef(np.stack(pooled))[0, 1])


def _pooled(grid: np.ndarray, side: int) -> np.ndarray:
    """Means over blocks, or over nearest cells where the sides do not divide."""
    index = np.arange(len(grid)) * side // len(grid)
    rows = np.stack([grid[index == i].mean(axis=0) for i in range(side)])
    return np.stack([rows[:, index == i].mean(axis=1) for i in range(side)], axis=1)
