"""Image-text retrieval: recall by embeddings, and after matching has re-ranked the best.

Every image of the set is ranked for every caption and the other way round; an image may have
several captions, each of which is right for it.
"""

from collections.abc import Iterator

import numpy as np

from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.scores.retrieval import (
    RETRIEVAL_SCORES,
    retrieval_ranks,
    retrieval_scores,
)
from vlp_jax.infra.artifacts import Table
from vlp_jax.infra.errors import ConfigError
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.transfer.ranking import Ranker


class Retrieval:
    """Recall at 1, 5 and 10 both ways over the images of a set and all their captions.

    Metrics: ``i2t_r1`` and so on (fractions of one, see ``scores.retrieval``) by embeddings,
    ``chance_r1`` of a random order for a caption; with ``matching`` also ``reranked/i2t_r1`` and
    so on, from ITM over the ``shortlist`` best of each row and column.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        split: str = "val",
        num_examples: int = 1000,
        max_captions: int = 5,
        objective: str = "itc",
        matching: str = "",
        shortlist: int = 128,
        batch_size: int = 0,
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``, also the name of the artefact.
            source: key in ``config.data.sources``.
            split: of the source.
            num_examples: images, fewer where the split has fewer; 0: all of them.
            max_captions: of each image, the first ones.
            objective: key of an ``itc`` in ``config.objectives``.
            matching: key of an ``itm`` there; empty: embeddings alone.
            shortlist: candidates that matching re-ranks.
            batch_size: rows at a time; 0: those of the run's micro-batches.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        self._context, self._name = context, name
        for key, value in (("max_captions", max_captions), ("shortlist", shortlist)):
            if value < 1:
                raise ConfigError(f"evals.{name}.{key}", f"{value} of them", "Use 1 or more")
        self._set = FixedSet(context, name, source, split, num_examples, batch_size)
        itm = context.objective(name, matching, ITM) if matching else None
        itc = context.objective(name, objective, ITC)
        rows = self._set.plan.batch_size
        self._ranker = context.once(
            (Ranker, objective, matching, rows), lambda: Ranker(itc, itm, context.mesh, rows)
        )
        self._max_captions, self._shortlist = max_captions, shortlist
        self.figures: tuple[str, ...] = (*RETRIEVAL_SCORES, "chance_r1")
        if itm is not None:
            self.figures += tuple(f"reranked/{key}" for key in RETRIEVAL_SCORES)

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Rank the set; see the class for the metrics."""
        records, pixels = self._images()
        images = self._ranker.encode_images(params, pixels)
        ids, lengths, image_of_text = self._texts(records)
        texts = self._ranker.encode_texts(params, ids, lengths)
        similarity = images.embeddings @ texts.embeddings.T
        found = {"": retrieval_scores(retrieval_ranks(similarity, image_of_text))}
        if self._ranker.itm is not None:
            ranked = self._ranker.rerank(params, images, texts, self._shortlist)
            found["reranked/"] = retrieval_scores(retrieval_ranks(ranked, image_of_text))
        for prefix, scores in found.items():
            for key, value in scores.items():
                yield f"{prefix}{key}", value
        yield "chance_r1", 1.0 / len(records)
        self._context.save(
            self._name,
            Table(
                title=f"{self._name}: {len(records)} images, {len(ids)} captions",
                columns=("ranked by", *found[""]),
                rows=tuple(
                    ("matching" if prefix else "embeddings", *scores.values())
                    for prefix, scores in found.items()
                ),
                step=step,
            ),
        )

    def _images(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Records of the images that could be read, and their pixels by batch."""
        records, pixels = [], []
        for planned, batch in zip(self._set.planned(), self._set.whole_batches(), strict=True):
            records.append(planned.record[batch["valid"]])
            pixels.append(batch["image"][batch["valid"]])
        return np.concatenate(records), pixels

    def _texts(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids int32 [n, N], lengths int32 [n] and the image of each caption int64 [n]."""
        source, tokenizer = self._set.source, self._context.tokenizer
        cap = self._context.config.data.max_text_length
        counts = np.minimum(source.num_captions(records), self._max_captions)
        image_of_text = np.repeat(np.arange(len(records)), counts)
        captions = [
            source.caption(int(record), index)
            for record, count in zip(records, counts, strict=True)
            for index in range(count)
        ]
        return *tokenizer.padded(captions, cap), image_of_text
