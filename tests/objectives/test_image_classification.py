"""Classification of images: losses by hand, whole images outside training, a run that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BATCH, IMAGE_SIZE, TOKENS, make_batch, tiny_model

from vlp_jax.compress.buckets import Bucket, View
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.flops import vit_flops
from vlp_jax.models.vit import ViT
from vlp_jax.objectives.base import Seen
from vlp_jax.objectives.image_classification import ImageClassification

KEY, SIZES, CLASSES = jax.random.key(0), Bucket(TOKENS, IMAGE_SIZE), 5


@pytest.fixture(scope="module")
def batch():
    rows = make_batch() | {"label": np.arange(BATCH, dtype=np.int32) % CLASSES}
    rows["valid"][-3:] = False
    return jax.tree.map(jnp.asarray, rows)


def built(**arguments):
    task = ImageClassification(tiny_model(), "image_classification", CLASSES, **arguments)
    params, _ = task.init(KEY, batch_spec(SIZES, 1))
    head = params["image_classification_head"]["classifier"]
    head["kernel"] = jax.random.normal(KEY, head["kernel"].shape)
    return task, params


def test_a_fresh_head_prefers_no_class(batch):
    task = ImageClassification(tiny_model(), "image_classification", CLASSES)
    params, _ = task.init(KEY, batch_spec(SIZES, 1))
    assert set(params) == {"image_tower", "image_classification_head"}
    np.testing.assert_array_equal(task.logits(params, batch), 0.0)


def test_the_loss_is_the_cross_entropy_of_the_class_token(batch):
    """With smoothing, a share of it is that of all classes alike."""
    task, params = built(label_smoothing=0.1)
    output = task.loss(params, {}, batch, KEY, SIZES, train=False)
    tokens = ViT(task.model.config.image).apply(
        {"params": params["image_tower"]}, normalize(batch["image"])
    )
    kernel = np.asarray(params["image_classification_head"]["classifier"]["kernel"], np.float64)
    logits = np.asarray(tokens[:, 0], np.float64) @ kernel
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows, label = np.asarray(batch["valid"]), np.asarray(batch["label"])
    own = logs[np.arange(BATCH), label]
    expected = -(0.9 * own + 0.1 * logs.mean(axis=1))[rows].mean()
    assert float(output.loss.sum / output.loss.weight) == pytest.approx(expected, rel=1e-4)
    right = (logits.argmax(axis=1) == label)[rows].mean()
    found = output.metrics["accuracy"]
    assert float(found.sum / found.weight) == pytest.approx(right)
    np.testing.assert_allclose(task.logits(params, batch), logits, atol=1e-3)


def test_training_sees_random_views_and_buckets(batch):
    task, params = built()
    whole = task.loss(params, {}, batch, KEY, SIZES, train=False).loss.sum
    one, same = (task.loss(params, {}, batch, KEY, SIZES).loss.sum for _ in range(2))
    other = task.loss(params, {}, batch, jax.random.key(1), SIZES).loss.sum
    assert one == same
    assert len({float(x) for x in (whole, one, other)}) == 3
    half = Bucket(TOKENS, IMAGE_SIZE, (View(IMAGE_SIZE, 8, 2),))
    assert np.isfinite(float(task.loss(params, {}, batch, KEY, half).loss.sum))
    assert task.flops(0, half) == vit_flops(task.model.config.image, half.views[0])
    keys = jax.random.split(KEY, BATCH)
    seen = task.logits(params, batch, None, Seen(half.views[0], keys))
    assert (np.asarray(seen) != np.asarray(task.logits(params, batch))).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0"),
        ({"augment": {"blurr": 1.0}}, "augment.blurr"),
        ({"num_classes": 1}, "num_classes: 1 classes"),
    ],
)
def test_bad_arguments_name_the_key(arguments, message):
    arguments = {"num_classes": CLASSES, **arguments}
    with pytest.raises(ConfigError, match=rf"objectives\.image_classification\.{message}"):
        ImageClassification(tiny_model(), "image_classification", **arguments)
