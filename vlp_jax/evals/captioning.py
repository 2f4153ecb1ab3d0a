"""Captions of a fixed set, scored against its references, beside those of other pictures."""

from collections.abc import Iterator

import jax
import numpy as np

from vlp_jax.data.batch import Batch
from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.pictures import enlarge
from vlp_jax.evals.scores.captioning import CAPTION_SCORES, caption_scores
from vlp_jax.infra.artifacts import Card, Gallery, Picture, Span
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, replicated
from vlp_jax.models.encoder import Encoder
from vlp_jax.objectives import captioner
from vlp_jax.objectives.base import Params
from vlp_jax.transfer.generate import caption_search, generate

CARDS = 12


class Captioning:
    """Captions by greedy or beam search, from the forward stream.

    Metrics: ``bleu1`` to ``bleu4``, ``cider`` and ``rouge_l`` against all references of each
    image (see ``scores.captioning``), and with ``controls`` the same under ``shuffled/`` for
    captions of other pictures. Artefact: a gallery. Every caption is written to
    ``predictions/<name>.jsonl`` of the workdir, with ``record``, ``images`` and the references.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        objective: str,
        split: str = "val",
        num_examples: int = 500,
        batch_size: int = 0,
        beams: int = 1,
        max_length: int = 0,
        length_penalty: float = 0.0,
        controls: bool = True,
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``, also the name of the artefact.
            source: key in ``config.data.sources``.
            objective: key of an ``ar``, ``prefix_lm`` or ``flm`` in ``config.objectives``: what has
                trained the forward stream.
            split: of the source.
            num_examples: images, fewer where the split has fewer; 0: all of them.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.
            beams: captions kept at a time; 1: greedy search.
            max_length: most tokens of a caption with <s> and </s>; 0: ``data.max_text_length``.
            length_penalty: see ``transfer.generate.Search``.
            controls: whether to caption other pictures as well.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        self._context, self._name, self._controls = context, name, controls
        self.figures: tuple[str, ...] = CAPTION_SCORES
        if controls:
            self.figures += tuple(f"shuffled/{key}" for key in CAPTION_SCORES)
        self._model = self._forward_model(objective)
        positions = self._model.config.max_positions
        if max_length > positions:
            raise ConfigError(
                f"evals.{name}.max_length",
                f"{max_length} tokens, but the model has {positions} positions",
                "Use no more than model.text.max_positions",
            )
        self._set = FixedSet(context, name, source, split, num_examples, batch_size)
        try:
            self._search = caption_search(
                context.tokenizer,
                max_length or context.config.data.max_text_length,
                beams=beams,
                length_penalty=length_penalty,
            )
        except ValueError as error:
            raise ConfigError(f"evals.{name}", str(error), "Mend the keys named") from error
        self._captions = context.once(
            (Captioning, objective, self._search),
            lambda: jax.jit(self._best_captions, out_shardings=replicated(context.mesh)),
        )

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Caption the set; see the class for the metrics."""
        records, captions = self._generate(params)
        source = self._set.source
        counts = source.num_captions(records)
        references = [
            [source.caption(int(record), index) for index in range(count)]
            for record, count in zip(records, counts, strict=True)
        ]
        for kind, texts in captions.items():
            for key, value in caption_scores(texts, references).items():
                yield f"{kind}{key}", value
        self._context.write_predictions(
            self._name,
            (
                {
                    "record": record,
                    "images": list(source.image_key(record)),
                    "caption": caption,
                    "references": given,
                }
                for record, caption, given in zip(
                    records.tolist(), captions[""], references, strict=True
                )
            ),
        )
        self._save_gallery(records, captions[""], references, step)

    def _forward_model(self, objective: str) -> Encoder:
        for one in self._context.objectives:
            if one.name == objective and (model := captioner(one)) is not None:
                return model
        raise ConfigError(
            f"evals.{self._name}.objective",
            f"{objective!r} is no objective of this run that trains the forward stream",
            "Use an `ar`, a `prefix_lm`, or an `flm` with loss_weights.forward, of the run",
        )

    def _best_captions(self, params: Params, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = generate(self._model, params, pixels, self._search)
        return found.ids[:, 0], found.length[:, 0]

    def _generate(self, params: Params) -> tuple[np.ndarray, dict[str, list[str]]]:
        """Records that could be read, and captions by what was shown."""
        records: list[np.ndarray] = []
        captions: dict[str, list[str]] = {"": [], "shuffled/": []}
        mesh, tokenizer = self._context.mesh, self._context.tokenizer
        if not self._controls:
            del captions["shuffled/"]
        with jax.set_mesh(mesh):
            for planned, host in zip(self._set.planned(), self._set.host_batches(), strict=True):
                batch: Batch = global_batch(host, mesh)
                valid = np.asarray(self._set.gather(batch["valid"]))
                records.append(planned.record[valid])
                for kind, texts in captions.items():
                    pixels = batch["image_shuffled" if kind else "image"]
                    ids, lengths = map(np.asarray, self._captions(params, pixels))
                    texts += [
                        tokenizer.decode(row[1 : length - 1])
                        for row, length in zip(ids[valid], lengths[valid], strict=True)
                    ]
        return np.concatenate(records), captions

    def _save_gallery(
        self, records: np.ndarray, captions: list[str], references: list[list[str]], step: int
    ) -> None:
        size = self._context.config.data.image_size
        cards = []
        for row in np.linspace(0, len(records) - 1, min(CARDS, len(records))).astype(int):
            pixels = self._set.source.image(int(records[row]), size)
            spans = (Span(captions[row]), Span(f" (reference: {references[row][0]})"))
            cards.append(Card(images=(Picture.from_array(enlarge(pixels)),), spans=spans))
        gallery = Gallery(title=f"{self._name}: captions", cards=tuple(cards), step=step)
        self._context.save(self._name, gallery)
