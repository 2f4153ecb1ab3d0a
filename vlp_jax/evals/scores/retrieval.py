"""Recall at k of image-text retrieval, both ways, with several captions an image.

ranks = retrieval_ranks(DotProducts(images, texts), image_of_text)
scores = retrieval_scores(ranks)                    # {"i2t_r1": 0.41, ...}
"""

import dataclasses
from typing import Protocol

import numpy as np


class Similarity(Protocol):
    """What is read of a similarity matrix: its rows. An array, a memory map, ``DotProducts``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(images, texts)."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Some rows: [rows, texts]; the same numbers each time they are read."""
        ...


class DotProducts:
    """The similarity matrix of two sets of embeddings, made a block of rows at a time.

    Args:
        images: float [images, D].
        texts: float [texts, D].
    """

    def __init__(self, images: np.ndarray, texts: np.ndarray):
        self.shape = (len(images), len(texts))
        self._images, self._texts = images, texts

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Some rows: [rows, texts]."""
        return self._images[rows] @ self._texts.T


@dataclasses.dataclass(frozen=True)
class Ranks:
    """How many wrong candidates are placed before the right one; 0 is best.

    Attributes:
        image_to_text: int64 [images]; texts of other images before the image's best text.
        text_to_image: int64 [texts]; other images before the text's own.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray


def retrieval_ranks(similarity: Similarity, image_of_text: np.ndarray, block: int = 512) -> Ranks:
    """The ranks of the right candidates.

    Ties count as lost, and so does NaN: a model that gives all pairs one score retrieves nothing.

    Args:
        similarity: [images, texts], higher for pairs that belong together.
        image_of_text: int [texts], the image that each text describes.
        block: rows of the matrix that are held at a time. The rows are read twice.

    Raises:
        ValueError: the shapes do not fit, or an image has no text.
    """
    images, texts = similarity.shape
    image_of_text = np.asarray(image_of_text)
    if image_of_text.shape != (texts,):
        raise ValueError(f"image_of_text has shape {image_of_text.shape} for {texts} texts")
    if not np.array_equal(np.unique(image_of_text), np.arange(images)):
        raise ValueError(f"every one of {images} images needs a text, and every text one of them")

    blocks = [slice(start, start + block) for start in range(0, images, block)]
    own_score = np.empty(texts)
    image_to_text = np.empty(images, np.int64)
    for rows in blocks:
        scores = similarity[rows]
        is_own = image_of_text == np.arange(images)[rows, None]
        row, text = np.nonzero(is_own)
        own_score[text] = scores[row, text]
        best = np.max(scores, axis=1, where=is_own, initial=-np.inf, keepdims=True)
        image_to_text[rows] = np.sum(~(scores < best) & ~is_own, axis=1)
    text_to_image = np.full(texts, -1, np.int64)  # the text's own image is not before itself
    for rows in blocks:
        text_to_image += np.sum(~(similarity[rows] < own_score), axis=0)
    return Ranks(image_to_text, text_to_image)


RETRIEVAL_SCORES = tuple(
    f"{way}_{key}" for way in ("i2t", "t2i") for key in ("r1", "r5", "r10", "median_rank")
)


def retrieval_scores(ranks: Ranks) -> dict[str, float]:
    """Recall at 1, 5 and 10 in [0, 1] and the median rank, from 1, both ways.

    Returns:
        ``i2t_r1``, ``i2t_r5``, ``i2t_r10``, ``i2t_median_rank``, and the same with ``t2i``.
    """
    scores = {}
    for way, found in (("i2t", ranks.image_to_text), ("t2i", ranks.text_to_image)):
        for k in (1, 5, 10):
            scores[f"{way}_r{k}"] = float(np.mean(found < k))
        scores[f"{way}_median_rank"] = float(np.median(found)) + 1
    return scores
