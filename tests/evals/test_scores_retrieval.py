import numpy as np
import pytest

from vlp_jax.evals.scores import DotProducts, retrieval_ranks, retrieval_scores


def test_ranks_computed_by_hand():
    similarity = np.float32([
        # texts of image 0, 0, 1, 2
        [0.9, 0.1, 0.5, 0.2],
        [0.8, 0.3, 0.4, 0.9],
        [0.1, 0.2, 0.3, 0.3],
    ])  # fmt: skip
    ranks = retrieval_ranks(similarity, np.asarray([0, 0, 1, 2]))
    # Image 0: 0.9 beats all. Image 1: 0.8 and 0.9 beat 0.4. Image 2: 0.3 ties with 0.3, lost.
    np.testing.assert_array_equal(ranks.image_to_text, [0, 2, 1])
    # Columns: 0.9 is best; 0.1 loses to 0.3 and 0.2; 0.4 loses to 0.5; 0.3 loses to 0.9.
    np.testing.assert_array_equal(ranks.text_to_image, [0, 2, 1, 1])
    scores = retrieval_scores(ranks)
    assert scores["i2t_r1"] == pytest.approx(1 / 3)
    assert scores["t2i_r1"] == pytest.approx(1 / 4)
    assert scores["i2t_r5"] == scores["t2i_r10"] == 1
    assert scores["i2t_median_rank"] == 2
    assert scores["t2i_median_rank"] == 2


def five_texts_each(images, rng):
    return rng.permutation(np.repeat(np.arange(images), 5))


def test_blocks_agree_with_sorting():
    rng = np.random.default_rng(0)
    image_of_text = five_texts_each(37, rng)
    similarity = rng.standard_normal((37, 185))  # no ties
    i2t = [
        np.flatnonzero(image_of_text[np.argsort(-row)] == image)[0]
        for image, row in enumerate(similarity)
    ]
    t2i = [
        np.flatnonzero(np.argsort(-column) == image)[0]
        for column, image in zip(similarity.T, image_of_text, strict=True)
    ]
    # The image's other texts before its best are none, so sorting counts wrong texts alone.
    for block in (1, 8, 512):
        ranks = retrieval_ranks(similarity, image_of_text, block)
        np.testing.assert_array_equal(ranks.image_to_text, i2t)
        np.testing.assert_array_equal(ranks.text_to_image, t2i)


def test_dot_products_are_the_matrix():
    rng = np.random.default_rng(1)
    images = rng.integers(-3, 4, (20, 6)).astype(np.float32)  # exact, and full of ties
    texts = rng.integers(-3, 4, (100, 6)).astype(np.float32)
    image_of_text = five_texts_each(20, rng)
    expected = retrieval_ranks(images @ texts.T, image_of_text)
    found = retrieval_ranks(DotProducts(images, texts), image_of_text, block=7)
    np.testing.assert_array_equal(found.image_to_text, expected.image_to_text)
    np.testing.assert_array_equal(found.text_to_image, expected.text_to_image)


@pytest.mark.parametrize("value", [0.0, -np.inf, np.nan])
def test_a_model_that_tells_nothing_apart_retrieves_nothing(value):
    rng = np.random.default_rng(2)
    ranks = retrieval_ranks(np.full((20, 100), value), five_texts_each(20, rng))
    assert (ranks.image_to_text == 95).all()
    assert (ranks.text_to_image == 19).all()
    scores = retrieval_scores(ranks)
    assert scores["i2t_r10"] == scores["t2i_r10"] == 0


def test_what_is_not_on_a_shortlist_is_last():
    similarity = np.full((3, 3), -np.inf)
    similarity[0, :2] = similarity[1, :2] = similarity[2, 0] = 1.0
    similarity[0, 0] = similarity[1, 1] = 2.0
    ranks = retrieval_ranks(similarity, np.arange(3))
    np.testing.assert_array_equal(ranks.image_to_text, [0, 0, 2])
    np.testing.assert_array_equal(ranks.text_to_image, [0, 0, 2])


@pytest.mark.parametrize("image_of_text", [[0, 0, 1], [0, 0, 0, 0], [0, 1, 2, 1], [-1, 0, 1, 1]])
def test_every_image_needs_a_text(image_of_text):
    with pytest.raises(ValueError, match=r"needs a text|image_of_text has shape"):
        retrieval_ranks(np.zeros((2, 4)), np.asarray(image_of_text))
