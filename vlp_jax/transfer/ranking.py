"""Rank images by texts and texts by images: towers run once, pairs meet in the upper half.

    ranker = Ranker(itc, itm, mesh)
    images = ranker.encode_images(params, batches_of_pixels)
    texts = ranker.encode_texts(params, ids, lengths)
    scores = ranker.match(params, images, texts, pairs)      # re-ranks what embeddings shortlist

Re-encoding each pair took 38 hours for one test set in a predecessor (fact sheet of Free Language
Modeling, section 6): the image tower and the lower half of the text stack do not depend on the
pair.
"""

from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlp_jax.infra.mesh import batch_sharding, batch_shards, host_rows, replicated
from vlp_jax.models.vision_language import VisionLanguageModel
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.objectives.readout import EncodedText


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

    def __init__(self, itc: ITC, itm: ITM | None, mesh: Mesh, batch_size: int = 64):
        """Compiles nothing yet.

        Args:
            itc: of the run.
            itm: of the run, or None for embeddings alone.
            mesh: of the run.
            batch_size: rows encoded at a time; made a multiple of the devices.
        """
        self.itc, self.itm = itc, itm
        shards = batch_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self._mesh = mesh
        whole, rows = replicated(mesh), batch_sharding(mesh)
        self._images = jax.jit(self._encode_images, out_shardings=(whole, rows))
        self._texts = jax.jit(self._encode_texts, out_shardings=(whole, rows))
        self._pairs = jax.jit(self._match, out_shardings=whole)

    def encode_images(self, params: Params, pixels: Iterable[np.ndarray]) -> Images:
        """Encode batches of images: uint8 [n_i, H, W, 3] each, in any sizes."""
        embeddings, tokens = [], []
        with jax.set_mesh(self._mesh):
            for batch in _rebatched(pixels, self.batch_size):
                count = len(batch)
                one, states = self._images(params, self._put(batch))
                embeddings.append(np.asarray(one)[:count])
                if states is not None:
                    tokens.append(states[:count])
            kept = jnp.concatenate(tokens) if tokens else None
        return Images(np.concatenate(embeddings), kept)

    def encode_texts(self, params: Params, ids: np.ndarray, lengths: np.ndarray) -> Texts:
        """Encode texts padded to one length: int32 [n, N], int32 [n]."""
        embeddings, encoded = [], []
        with jax.set_mesh(self._mesh):
            for start in range(0, len(ids), self.batch_size):
                part = slice(start, start + self.batch_size)
                count = len(ids[part])
                one, states = self._texts(params, self._put(ids[part]), self._put(lengths[part]))
                embeddings.append(np.asarray(one)[:count])
                encoded.append(jax.tree.map(lambda x, count=count: x[:count], states))
            kept = None
            if self.itm is not None:
                kept = jax.tree.map(lambda *parts: jnp.concatenate(parts), *encoded)
        return Texts(np.concatenate(embeddings), kept)

    def match(self, params: Params, images: Images, texts: Texts, pairs: np.ndarray) -> np.ndarray:
        """Log-odds that texts belong to images: int [p, 2] of (image, text) -> float32 [p].

        Raises:
            ValueError: the ranker has no matching objective.
        """
        if images.tokens is None or texts.encoded is None:
            raise ValueError("matching needs the objective `itm`, and this checkpoint has none")
        scores = []
        with jax.set_mesh(self._mesh):
            for start in range(0, len(pairs), self.batch_size):
                part = pairs[start : start + self.batch_size].astype(np.int32)
                found = self._pairs(
                    params,
                    images.tokens,
                    texts.encoded,
                    self._put(part[:, 0]),
                    self._put(part[:, 1]),
                )
                scores.append(np.asarray(found)[: len(part)])
        return np.concatenate(scores)

    def rerank(self, params: Params, images: Images, texts: Texts, shortlist: int) -> np.ndarray:
        """Similarities with the best of each row and column replaced by matching scores.

        Of each image the ``shortlist`` most similar texts are matched, and of each text the
        ``shortlist`` most similar images; whatever is matched comes before what is not.

        Returns:
            float64 [images, texts], only their order within a row or a column means something.
        """
        similarity = (images.embeddings @ texts.embeddings.T).astype(np.float64)
        chosen = np.zeros(similarity.shape, np.bool_)
        for axis in (0, 1):
            count = min(shortlist, similarity.shape[axis])
            best = np.argpartition(-similarity, count - 1, axis=axis)
            np.put_along_axis(chosen, best.take(range(count), axis=axis), True, axis=axis)
        pairs = np.argwhere(chosen)
        # A cosine lies in [-1, 1]; log-odds are squeezed into (2, 4).
        odds = self.match(params, images, texts, pairs).astype(np.float64)
        similarity[chosen] = 3.0 + np.tanh(odds / 20.0)
        return similarity

    def _encode_images(
        self, params: Params, pixels: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        tokens = self.itc.towers.image_tokens(params, pixels)
        embedding = self.itc.towers.embed_image(params, tokens)
        return embedding, tokens if self.itm is not None else None

    def _encode_texts(
        self, params: Params, ids: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, EncodedText | None]:
        feature = self.itc.towers.text_feature(params, ids, lengths)
        embedding = self.itc.towers.embed_text(params, feature)
        if self.itm is None:
            return embedding, None
        reader = self.itm.reader

        def forward(model: VisionLanguageModel) -> EncodedText:
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
        return self.itm.match(params, texts.rows(text), tokens[image])

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Rows on the devices, filled up to a whole batch by repeating them."""
        filled = np.resize(rows, (self.batch_size, *rows.shape[1:]))
        mine = filled[host_rows(self._mesh, self.batch_size)]
        return jax.make_array_from_process_local_data(batch_sharding(self._mesh), mine)


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
