"""What compression does to single examples: which of them a tower no longer knows.

    config.evals.compressed = {"source": "scenes", "buckets": ("p8@64k16", "p16@64")}

Every picture is encoded whole and, several times, as each bucket leaves it. Two figures tell what
was lost: how far the class token has moved (one minus the cosine), and the loss of telling the
picture from all others of the set, the cross-entropy over the cosines of its compressed token with
the whole tokens of all (temperature 0.1). Tokens lose the mean of the whole ones first: what all
pictures share tells none of them. Pictures are ranked by that loss, for a token that moves
as all do costs little: those at the top are the ones that compression hurts most, such as pictures
whose subject is so small that dropped patches hide it. They are shown with the patches that were
kept, and all are written to ``predictions/<name>.jsonl``, which a run may take as its
``compression.guard_file``.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.compress.buckets import View, bucket_text, parse_bucket
from vlp_jax.compress.token_dropout import kept_patches
from vlp_jax.data.augment import normalize, resize
from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.features import Rows, compute_rows, tower_config, unit
from vlp_jax.evals.fixed_set import FixedSet
from vlp_jax.evals.pictures import enlarge
from vlp_jax.infra.artifacts import Card, Gallery, Picture, Row, Table
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import replicated
from vlp_jax.objectives.base import Params, Seen, example_keys
from vlp_jax.objectives.tower import tower_tokens

TEMPERATURE = 0.1
_DIMMED = 0.25  # brightness of a patch that was dropped


class Compressed:
    """How far buckets move single examples, and which are hurt most.

    Metrics, for every bucket: ``<bucket>/moved`` and ``<bucket>/loss``, means over the set, and
    ``<bucket>/loss_worst``, the mean of its worst tenth. Artefacts: a table of them, and a gallery
    of the pictures with the largest loss.
    """

    def __init__(
        self,
        context: EvalContext,
        name: str,
        source: str,
        buckets: Sequence[str] = (),
        split: str = "train",
        num_examples: int = 2_000,
        draws: int = 4,
        shown: int = 12,
        batch_size: int = 0,
    ):
        """Plans the set; reads no image yet.

        Args:
            context: of the run.
            name: key in ``config.evals``, also the name of the artefacts.
            source: key in ``config.data.sources``.
            buckets: as in ``compression.buckets``, of whose views the first counts; empty: those of
                the run.
            split: of that source.
            num_examples: the first records of it, fewer where it has fewer; 0: all.
            draws: choices of patches for each picture.
            shown: pictures in the gallery.
            batch_size: rows of a global batch; 0: those of the run's micro-batches.

        Raises:
            ConfigError: an argument does not fit; the message names its key.
        """
        for key, value, least in (("draws", draws, 1), ("shown", shown, 0)):
            if value < least:
                raise ConfigError(f"evals.{name}.{key}", f"{value}", f"Use {least} or more")
        self._context, self._name = context, name
        self._draws, self._shown = draws, shown
        self._source, self._split = source, split
        self._set = FixedSet(context, name, source, split, num_examples, batch_size)
        self._image = tower_config(context)
        key = f"evals.{name}.buckets"
        texts = tuple(buckets) or tuple(context.config.compression.buckets)
        parsed = [parse_bucket(text, key, self._image.view) for text in texts]
        self._views: tuple[View, ...] = tuple(dict.fromkeys(v[0] for v in parsed if v))
        if not self._views:
            raise ConfigError(key, "name no compressed image", "Give some, such as ('p8@64k16',)")
        for view in self._views:
            self._image.check_view(view, key)
        self.figures: tuple[str, ...] = tuple(
            f"{bucket_text((view,))}/{kind}"
            for view in self._views
            for kind in ("moved", "loss", "loss_worst")
        )
        self._tokens = jax.jit(self._encode, out_shardings=replicated(context.mesh))

    def run(self, params: Params, step: int = 0) -> Iterator[tuple[str, float]]:
        """Encode the set whole and compressed; see the class for the metrics."""
        whole, parts, embedded = self._embed(params)
        moved = 1.0 - np.einsum("vdne,ne->vn", parts, whole) / self._draws
        losses = np.stack([self._losses(whole, part) for part in parts])
        rows: list[Row] = []
        for view, far, loss in zip(self._views, moved, losses, strict=True):
            worst = np.sort(loss)[-max(1, len(loss) // 10) :]
            name = bucket_text((view,))
            figures = {
                "moved": float(far.mean()),
                "loss": float(loss.mean()),
                "loss_worst": float(worst.mean()),
            }
            yield from ((f"{name}/{kind}", value) for kind, value in figures.items())
            rows.append((name, view.tokens, *figures.values()))
        ranking = np.argsort(-losses.mean(axis=0), kind="stable")
        self._write(ranking, embedded.records, moved, losses)
        columns = ("bucket", "tokens", "moved", "loss", "loss of the worst tenth")
        note = "Moved: one minus the cosine with the whole picture's token."
        self._context.save(
            f"{self._name}_buckets",
            Table(f"{self._name}: what buckets change", columns, tuple(rows), note, step=step),
        )
        self._save_gallery(ranking[: self._shown], embedded, moved, losses, step)

    def _encode(self, params: Params, image: jax.Array, positions: jax.Array) -> jax.Array:
        """Class tokens of every row: [B, 1 + V * draws, D], that of the whole picture first."""
        pixels = normalize(image)
        seen = [
            Seen(view, _keys(draw, positions))
            for view in self._views
            for draw in range(self._draws)
        ]
        found = [tower_tokens(self._image, params, pixels)]
        found += [
            tower_tokens(self._image, params, resize(pixels, one.view.image_size), None, one)
            for one in seen
        ]
        return jnp.stack([tokens[:, 0].astype(jnp.float32) for tokens in found], axis=1)

    def _embed(self, params: Params) -> tuple[np.ndarray, np.ndarray, Rows]:
        """Unit vectors of whole pictures [n, D] and of compressed ones [V, draws, n, D]."""
        rows = compute_rows(
            self._set,
            self._set.plan,
            self._set.host_batches(),
            lambda batch: self._tokens(params, batch["image"], batch["position"]),
        )
        tokens = np.moveaxis(rows.values, 1, 0)
        tokens = unit(tokens - tokens[:1].mean(axis=1, keepdims=True))
        shape = (len(self._views), self._draws, *tokens.shape[1:])
        return tokens[0], tokens[1:].reshape(shape), rows

    @staticmethod
    def _losses(whole: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Mean over draws of telling each from all: [n, D], [draws, n, D] -> [n]."""
        total = np.zeros(len(whole))
        for tokens in part:
            logits = tokens @ whole.T / TEMPERATURE
            top = logits.max(axis=1, keepdims=True)
            total += np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - np.diagonal(logits)
        losses: np.ndarray = total / len(part)
        return losses

    def _write(
        self, ranking: np.ndarray, records: np.ndarray, moved: np.ndarray, losses: np.ndarray
    ) -> None:
        names = [bucket_text((view,)) for view in self._views]
        self._context.write_predictions(
            self._name,
            (
                {
                    "rank": rank,
                    "source": self._source,
                    "split": self._split,
                    "record": int(records[row]),
                    "images": list(self._set.source.image_key(int(records[row]))),
                    "loss": dict(zip(names, losses[:, row].tolist(), strict=True)),
                    "moved": dict(zip(names, moved[:, row].tolist(), strict=True)),
                }
                for rank, row in enumerate(ranking.tolist(), start=1)
            ),
        )

    def _save_gallery(
        self,
        rows: np.ndarray,
        embedded: Rows,
        moved: np.ndarray,
        losses: np.ndarray,
        step: int,
    ) -> None:
        """The pictures that are hurt most, and which patches the first draw has kept of them."""
        if self._context.workdir is None or jax.process_index() != 0 or not len(rows):
            return
        size, cards = self._context.config.data.image_size, []
        for rank, row in enumerate(rows.tolist(), start=1):
            image = self._set.source.image(int(embedded.records[row]), size)
            pictures = [Picture.from_array(enlarge(image), "whole")]
            for view in self._views:
                keys = _keys(0, jnp.array([embedded.positions[row]]))
                kept = kept_patches(keys, view.patches, view.kept)
                shown = _dimmed(image, np.asarray(kept[0]), view.grid)
                pictures.append(Picture.from_array(enlarge(shown), bucket_text((view,))))
            table = tuple(
                (bucket_text((view,)), float(moved[i, row]), float(losses[i, row]))
                for i, view in enumerate(self._views)
            )
            cards.append(
                Card(
                    images=tuple(pictures),
                    title=f"{rank}: {self._set.source.caption(int(embedded.records[row]), 0)}",
                    columns=("bucket", "moved", "loss"),
                    rows=table,
                )
            )
        note = (
            f"Of {len(embedded.records):,} pictures, those that are told worst from others once "
            "compressed. Dropped patches are dimmed, as the first draw has chosen them."
        )
        self._context.save(
            self._name, Gallery("Hurt most by compression", tuple(cards), note, step=step)
        )


def _keys(draw: int, positions: jax.Array) -> jax.Array:
    """The keys that choose patches: the same in every run."""
    return example_keys(jax.random.fold_in(jax.random.key(0), draw), positions)


def _dimmed(image: np.ndarray, kept: np.ndarray, grid: int) -> np.ndarray:
    """A picture whose dropped patches are dark: uint8 [H, H, 3]."""
    light = np.full(grid * grid, _DIMMED)
    light[kept] = 1.0
    edges = np.linspace(0, grid, len(image), endpoint=False).astype(int)
    shown: np.ndarray = (image * light.reshape(grid, grid)[edges][:, edges][..., None]).astype(
        np.uint8
    )
    return shown
