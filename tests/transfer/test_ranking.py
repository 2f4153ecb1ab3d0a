"""Pairs of cached towers score as pairs encoded anew, in any order and in batches of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BUCKET, IMAGE_SIZE, TOKENS, VOCAB, shared_model, tiny_model

from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.objectives.base import encode_image
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.transfer import ranking
from vlp_jax.transfer.ranking import Ranker, grouped, shortlisted

IMAGES, TEXTS = 5, 7


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    lengths = draw.integers(3, TOKENS + 1, TEXTS, dtype=np.int32)
    ids = draw.integers(5, VOCAB, (TEXTS, TOKENS), dtype=np.int32)
    return pixels, ids, lengths


READERS = [
    *((tiny_model, readout) for readout in ("query", "bidirectional", "forward")),
    *((shared_model, readout) for readout in ("query", "bidirectional")),
]


@pytest.fixture(scope="module", params=READERS, ids=lambda one: f"{one[0].__name__}-{one[1]}")
def itm_and_params(request):
    model, readout = request.param
    itm = ITM(ITC(model(), embedding_dim=8), readout=readout)
    spec = batch_spec(BUCKET[0][1], 1)
    params = jax.jit(lambda key: itm.init(key, spec)[0])(jax.random.key(0))
    # Far from zero, so that scores depend on both sides.
    return itm, jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, params)


def scores_anew(itm, params, data):
    """Every pair on its own: float32 [images, texts]."""
    pixels, ids, lengths = data
    image, text = map(np.ravel, np.indices((IMAGES, TEXTS)))

    def score(params):
        encoded = itm.model.apply(
            {"params": params},
            method=lambda model: itm.reader.encode(model, ids[text], lengths[text], None),
        )
        tokens = encode_image(itm.model, params, {"image": jnp.asarray(pixels)[image]}, None)
        return itm.match(params, encoded, tokens)

    return np.asarray(jax.jit(score)(params)).reshape(IMAGES, TEXTS)


def test_matching_equals_encoding_every_pair_anew(itm_and_params, data, monkeypatch):
    monkeypatch.setattr(ranking, "TEXTS_AT_ONCE", 4)
    itm, params = itm_and_params
    pixels, ids, lengths = data
    expected = scores_anew(itm, params, data)
    assert np.ptp(expected, axis=0).min() > 1e-3  # the image matters
    assert np.ptp(expected, axis=1).min() > 1e-3  # and so does the text
    draw = np.random.default_rng(1)
    pairs = np.stack([draw.integers(0, IMAGES, 50), draw.integers(0, TEXTS, 50)], axis=1)
    ranker = Ranker(itm.itc, itm, make_mesh(), batch_size=8, pairs_at_once=16)
    images = ranker.encode_images(params, [pixels[:2], pixels[2:]])
    texts = ranker.encode_texts(params, ids, lengths)
    for some in (pairs, pairs[:1]):
        found = ranker.match(params, images, texts, some)
        np.testing.assert_allclose(found, expected[some[:, 0], some[:, 1]], atol=1e-4)
    ranked = ranker.rerank(params, images, texts, shortlist=2)
    chosen = shortlisted(images.embeddings, texts.embeddings, 2)
    matched = np.zeros(ranked.shape, np.bool_)
    matched[chosen[:, 0], chosen[:, 1]] = True
    assert ranked[matched].min() > ranked[~matched].max()
    order = np.argsort(expected[matched])
    assert (np.diff(ranked[matched][order]) > -1e-5).all()


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_shortlist_is_the_best_both_ways(count, monkeypatch):
    monkeypatch.setattr(ranking, "_ROWS_AT_ONCE", 4)
    draw = np.random.default_rng(0)
    images, texts = (draw.normal(size=(n, 6)).astype(np.float32) for n in (9, 14))
    similarity = images @ texts.T
    expected = set()
    for image in range(9):
        expected |= {(image, int(text)) for text in np.argsort(-similarity[image])[:count]}
    for text in range(14):
        expected |= {(int(image), text) for image in np.argsort(-similarity[:, text])[:count]}
    found = shortlisted(images, texts, count)
    assert found.tolist() == [list(pair) for pair in sorted(expected)]


def test_groups_hold_each_pair_in_its_place():
    draw = np.random.default_rng(0)
    # Image 3 has most texts, image 1 none, and one pair is there twice.
    pairs = np.array([(3, t) for t in range(40)] + [(0, 5), (2, 1), (2, 7), (0, 5)])
    pairs = draw.permutation(pairs)
    groups = grouped(pairs)
    assert groups.text.shape == (5, ranking.TEXTS_AT_ONCE)  # 3 of image 3, one of 0 and of 2
    assert groups.image.tolist() == [0, 2, 3, 3, 3]
    assert len(set(groups.place)) == len(pairs)
    row, column = np.divmod(groups.place, ranking.TEXTS_AT_ONCE)
    np.testing.assert_array_equal(groups.image[row], pairs[:, 0])
    np.testing.assert_array_equal(groups.text[row, column], pairs[:, 1])
    assert grouped(pairs[:1]).text.shape == (1, 1)  # few pairs are not filled up


@pytest.mark.parametrize("itm_and_params", READERS[:1], indirect=True)
def test_matching_needs_its_objective(itm_and_params, data):
    itm, params = itm_and_params
    pixels, ids, lengths = data
    ranker = Ranker(itm.itc, None, make_mesh(), batch_size=8)
    images = ranker.encode_images(params, [pixels])
    texts = ranker.encode_texts(params, ids, lengths)
    assert images.embeddings.shape == (IMAGES, 8)
    with pytest.raises(ValueError, match="needs the objective `itm`"):
        ranker.match(params, images, texts, np.zeros((1, 2), np.int64))
