"""Rank images by texts and texts by images: what does not depend on the pair runs once.

    ranker = Ranker(itc, itm, mesh)
    images = ranker.encode_images(params, batches_of_pixels)
    texts = ranker.encode_texts(params, ids, lengths)
    scores = ranker.match(params, images, texts, pairs)      # re-ranks what embeddings shortlist

Re-encoding each pair took 38 hours for one test set in a predecessor (fact sheet of Free Language
Modeling, section 6): the image tower and the lower half of the text stack (of three towers: that
of texts) do not depend on the pair. In a shared stack only embeddings do not, and every pair that
is matched passes the whole stack.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlp_jax.infra.mesh import batch_sharding, batch_shards, host_rows, replicated
from vlp_jax.models.encoder import Encoder
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.objectives.readout import EncodedText

TEXTS_AT_ONCE = 16  # matched with one image, whose keys and values they share
_ROWS_AT_ONCE = 1024  # of a similarity matrix, while candidates are chosen


class Images(NamedTuple):
    """Encoded images.

    Attributes:
        embeddings: float32 [n, E], unit vectors.
        tokens: [n, I, D], on the devices; None without matching.
    """

    embeddings: np.ndarray
    tokens: jax.Array | None


class Texts(NamedTuple):
    """Encoded texts.

    Attributes:
        embeddings: float32 [n, E], unit vectors.
        encoded: what matching reads, on the devices; None without matching.
    """

    embeddings: np.ndarray
    encoded: EncodedText | None


class Ranker:
    """Embeddings and matching scores of a checkpoint.

    Attributes:
        itc: gives the embeddings.
        itm: gives the scores of pairs, or None.
    """

    def __init__(
        self,
        itc: ITC,
        itm: ITM | None,
        mesh: Mesh,
        batch_size: int = 64,
        pairs_at_once: int = 1024,
    ):
        """Compiles nothing yet.

        Args:
            itc: of the run.
            itm: of the run, or None for embeddings alone.
            mesh: of the run.
            batch_size: rows encoded at a time; made a multiple of the devices.
            pairs_at_once: pairs matched at a time, where there are so many.
        """
        self.itc, self.itm = itc, itm
        self.batch_size = _multiple(batch_size, batch_shards(mesh))
        self.pairs_at_once = pairs_at_once
        self._mesh = mesh
        whole, rows = replicated(mesh), batch_sharding(mesh)
        self._images = jax.jit(self._encode_images, out_shardings=(whole, rows))
        self._texts = jax.jit(self._encode_texts, out_shardings=(whole, rows))
        self._pairs = jax.jit(self._match, out_shardings=whole)

    def encode_images(self, params: Params, pixels: Iterable[np.ndarray]) -> Images:
        """Encode batches of images: uint8 [n_i, H, W, 3] each, in any sizes."""
        batches = ((batch,) for batch in _rebatched(pixels, self.batch_size))
        return Images(*self._encoded(self._images, params, batches))

    def encode_texts(self, params: Params, ids: np.ndarray, lengths: np.ndarray) -> Texts:
        """Encode texts padded to one length: int32 [n, N], int32 [n]."""
        parts = (slice(i, i + self.batch_size) for i in range(0, len(ids), self.batch_size))
        batches = ((ids[part], lengths[part]) for part in parts)
        return Texts(*self._encoded(self._texts, params, batches))

    def match(self, params: Params, images: Images, texts: Texts, pairs: np.ndarray) -> np.ndarray:
        """Log-odds that texts belong to images: int [p, 2] of (image, text) -> float32 [p].

        Raises:
            ValueError: the ranker has no matching objective.
        """
        if images.tokens is None or texts.encoded is None:
            raise ValueError("matching needs the objective `itm`, and this checkpoint has none")
        tokens, encoded = images.tokens, texts.encoded
        groups = grouped(pairs)
        per_group = groups.text.shape[1]
        unit = _multiple(-(-self.batch_size // per_group), batch_shards(self._mesh))
        size = _multiple(min(-(-self.pairs_at_once // per_group), len(groups.image)), unit)

        def scores() -> Iterator[jax.Array]:
            for start in range(0, len(groups.image), size):
                part = slice(start, start + size)
                image = self._put(groups.image[part], size)
                text = self._put(groups.text[part], size)
                yield self._pairs(params, tokens, encoded, image, text)

        with jax.set_mesh(self._mesh):
            return np.concatenate(list(_fetched(scores())))[groups.place]

    def rerank(self, params: Params, images: Images, texts: Texts, shortlist: int) -> np.ndarray:
        """Similarities with the best of each row and column replaced by matching scores.

        Of each image the ``shortlist`` most similar texts are matched, and of each text the
        ``shortlist`` most similar images; whatever is matched comes before what is not.

        Returns:
            float64 [images, texts], only their order within a row or a column means something.
        """
        similarity = (images.embeddings @ texts.embeddings.T).astype(np.float64)
        pairs = shortlisted(images.embeddings, texts.embeddings, shortlist)
        # A cosine lies in [-1, 1]; log-odds are squeezed into (2, 4).
        odds = self.match(params, images, texts, pairs).astype(np.float64)
        similarity[pairs[:, 0], pairs[:, 1]] = 3.0 + np.tanh(odds / 20.0)
        return similarity

    def _encoded(
        self,
        encode: Callable[..., tuple[jax.Array, Any]],
        params: Params,
        batches: Iterable[tuple[np.ndarray, ...]],
    ) -> tuple[np.ndarray, Any]:
        """Embeddings on the host, and what matching reads on the devices, of all rows."""
        kept: list[Any] = []
        count = 0

        def embeddings() -> Iterator[jax.Array]:
            nonlocal count
            for batch in batches:
                rows = (self._put(part, self.batch_size) for part in batch)
                embedding, states = encode(params, *rows)
                kept.append(states)
                count += len(batch[0])
                yield embedding

        with jax.set_mesh(self._mesh):
            found = np.concatenate(list(_fetched(embeddings())))[:count]
            return found, jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *kept)

    def _encode_images(
        self, params: Params, pixels: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        tokens = self.itc.dual_encoder.image_tokens(params, pixels)
        embedding = self.itc.dual_encoder.embed_image(params, tokens)
        return embedding, tokens if self.itm is not None else None

    def _encode_texts(
        self, params: Params, ids: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, EncodedText | None]:
        feature = self.itc.dual_encoder.text_feature(params, ids, lengths)
        embedding = self.itc.dual_encoder.embed_text(params, feature)
        if self.itm is None:
            return embedding, None
        reader = self.itm.reader

        def forward(model: Encoder) -> EncodedText:
            return reader.encode(model, ids, lengths, None)

        return embedding, nn.apply(forward, self.itm.model)({"params": params})

    def _match(
        self,
        params: Params,
        tokens: jax.Array,
        texts: EncodedText,
        image: jax.Array,
        text: jax.Array,
    ) -> jax.Array:
        assert self.itm is not None
        return self.itm.match(params, texts.rows(text.reshape(-1)), tokens[image])

    def _put(self, rows: np.ndarray, size: int) -> jax.Array:
        """Rows on the devices, filled up to ``size`` by repeating them."""
        filled = np.resize(rows, (size, *rows.shape[1:]))
        mine = filled[host_rows(self._mesh, size)]
        return jax.make_array_from_process_local_data(batch_sharding(self._mesh), mine)


class Groups(NamedTuple):
    """Pairs by image, for texts that are read with one image at a time.

    Attributes:
        image: int32 [g].
        text: int32 [g, T], matched with it; groups that are not full are filled up with text 0.
        place: int64 [p], where each pair lies in ``text``, flattened.
    """

    image: np.ndarray
    text: np.ndarray
    place: np.ndarray


def grouped(pairs: np.ndarray) -> Groups:
    """Arrange pairs int [p, 2] of (image, text) in groups of ``TEXTS_AT_ONCE`` or fewer texts."""
    image, index, counts = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    size = min(TEXTS_AT_ONCE, int(counts.max()))
    groups = -(-counts // size)
    order = np.argsort(index, kind="stable")
    rank = np.empty(len(pairs), np.int64)  # of a pair among those of its image
    rank[order] = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = ((np.cumsum(groups) - groups) * size)[index] + rank
    text = np.zeros(groups.sum() * size, np.int32)
    text[place] = pairs[:, 1]
    return Groups(np.repeat(image, groups).astype(np.int32), text.reshape(-1, size), place)


def shortlisted(images: np.ndarray, texts: np.ndarray, count: int) -> np.ndarray:
    """The pairs worth matching: of each image the most similar texts, and the other way round.

    Args:
        images: float [n, E].
        texts: float [m, E].
        count: candidates of each, all where there are fewer.

    Returns:
        int64 [p, 2] of (image, text), sorted; a pair that both ways choose is there once.
    """
    keys = [image * len(texts) + text for image, text in _nearest(images, texts, count)]
    keys += [image * len(texts) + text for text, image in _nearest(texts, images, count)]
    return np.stack(np.divmod(np.unique(np.concatenate(keys)), len(texts)), axis=1)


def _nearest(
    rows: np.ndarray, candidates: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row with its ``count`` most similar candidates: indices int64 [b * count], in blocks."""
    count = min(count, len(candidates))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        similarity = rows[start : start + _ROWS_AT_ONCE] @ candidates.T
        best = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        yield np.repeat(np.arange(start, start + len(best)), count), best.reshape(-1)


def _multiple(size: int, unit: int) -> int:
    """``size`` rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


def _fetched(results: Iterable[jax.Array]) -> Iterator[np.ndarray]:
    """Results on the host, each fetched once the next is under way: the devices never wait."""
    before = None
    for result in results:
        if before is not None:
            yield np.asarray(before)
        before = result
    if before is not None:
        yield np.asarray(before)


def _rebatched(parts: Iterable[np.ndarray], size: int) -> Iterable[np.ndarray]:
    """The rows of all parts, ``size`` at a time; the last may be fewer."""
    held: list[np.ndarray] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part)
        while count >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(held)
