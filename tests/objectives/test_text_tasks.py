"""Tasks on texts alone: losses by hand, what the head reads, and what no gradient reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BATCH, IMAGE_SIZE, MASK_ID, TOKENS, VOCAB, make_batch, tiny_model

from vlp_jax.compress.buckets import Bucket
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.heads import apply_head
from vlp_jax.models.sizes import build_model, model_config
from vlp_jax.objectives.classification import NLVR2, Classification
from vlp_jax.objectives.text_tasks import TextClassification, TextRegression

SIZES = Bucket(TOKENS, IMAGE_SIZE)
CLASSES = 3
READOUTS = ["query", "bidirectional", "forward"]


def shared_model(width=32, depth=2):
    config = model_config("shared_tiny")
    config.dtype = "float32"
    config.image.update(width=width, heads=2, mlp_width=2 * width, depth=depth, patch_size=8)
    config.reconstructor.depth = 1
    return build_model(config, VOCAB, MASK_ID, IMAGE_SIZE)


def text_batch():
    """A batch without images."""
    draw = np.random.default_rng(0)
    batch = make_batch() | {
        "label": draw.integers(0, CLASSES, BATCH).astype(np.int32),
        "target": draw.uniform(0, 5, BATCH).astype(np.float32),
        "valid": np.arange(BATCH) != 2,
    }
    del batch["image"]
    return {name: jnp.asarray(value) for name, value in batch.items()}


def created(task):
    return jax.jit(lambda: task.init(jax.random.key(1), jax.eval_shape(text_batch))[0])()


def test_classification_is_the_cross_entropy_of_what_the_head_reads():
    task = TextClassification(shared_model(), "t", CLASSES, readout="bidirectional")
    params, batch = created(task), text_batch()
    output = task.loss(params, {}, batch, jax.random.key(0), SIZES, train=False)
    feature = task.model.apply(
        {"params": params}, batch["text_ids"], batch["text_length"], method="text_feature"
    )
    logits = np.asarray(apply_head(task.head, params["t_head"], feature), np.float64)
    rows = np.flatnonzero(batch["valid"])
    label = np.asarray(batch["label"])
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(output.loss.sum, -np.log(chances[rows, label[rows]]).sum(), 1e-5)
    right = (logits.argmax(axis=1) == label)[rows].sum()
    assert float(output.metrics["accuracy"].sum) == right
    assert float(output.loss.weight) == BATCH - 1


def test_regression_is_the_squared_error_in_scales():
    task = TextRegression(shared_model(), "t", readout="bidirectional", scale=5.0)
    params, batch = created(task), text_batch()
    output = task.loss(params, {}, batch, jax.random.key(0), SIZES, train=False)
    heads = np.asarray(task.outputs(params, batch), np.float64)
    assert heads.shape == (BATCH, 1)
    loss, error = 0.0, 0.0
    for row in np.flatnonzero(batch["valid"]):
        target = float(batch["target"][row])
        loss += (heads[row, 0] - target / 5.0) ** 2
        error += abs(5.0 * heads[row, 0] - target)
    np.testing.assert_allclose(output.loss.sum, loss, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["absolute_error"].sum, error, rtol=1e-5)
    np.testing.assert_allclose(task.scores(params, batch), 5.0 * heads[:, 0], rtol=1e-5)
    assert float(output.loss.weight) == BATCH - 1


@pytest.mark.parametrize("readout", READOUTS)
def test_all_of_the_text_is_read_and_nothing_else(readout):
    task = TextClassification(shared_model(), "t", CLASSES, readout=readout)
    params, batch = created(task), text_batch()
    logits = jax.jit(task.logits)
    before = logits(params, batch)
    padding = np.arange(TOKENS)[None] >= np.asarray(batch["text_length"])[:, None]
    padded = {**batch, "text_ids": jnp.where(jnp.asarray(padding), 9, batch["text_ids"])}
    np.testing.assert_array_equal(before, logits(params, padded))
    with_image = {**batch, "image": jnp.asarray(make_batch()["image"])}
    np.testing.assert_allclose(before, logits(params, with_image), atol=1e-6)
    ids = batch["text_ids"].at[:, 1].set(jnp.where(batch["text_ids"][:, 1] == 7, 8, 7))
    changed = logits(params, {**batch, "text_ids": ids})
    assert (np.abs(np.asarray(changed - before)).max(axis=1) > 0).all()


@pytest.mark.parametrize("kind", ["classes", "score"])
def test_no_gradient_reaches_what_the_model_has_for_images(kind):
    model = shared_model()
    task = (
        TextClassification(model, "t", CLASSES, readout="bidirectional")
        if kind == "classes"
        else TextRegression(model, "t", readout="bidirectional")
    )
    params, batch = created(task), text_batch()

    def loss(params):
        return task.loss(params, {}, batch, jax.random.key(0), SIZES).loss.sum

    tower = jax.jit(jax.grad(loss))(params)["image_tower"]
    seen = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(leaf.any())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tower)
    }
    of_both = {name for name in seen if name.startswith(("block_", "norm/"))}
    assert of_both < set(seen)
    assert {name for name, moved in seen.items() if moved} <= of_both
    # A key's bias shifts all scores of a query alike; everything else of the stack learns.
    assert all(seen[name] for name in of_both if not name.endswith("key/bias"))


@pytest.mark.parametrize("readout", READOUTS)
def test_flops_are_those_of_the_lowered_module(readout):
    width, tokens = 64, 32
    model = shared_model(width)
    task = TextClassification(model, "t", CLASSES, readout=readout)
    params = jax.eval_shape(lambda: task.init(jax.random.key(1), jax.eval_shape(text_batch))[0])
    batch = {
        "text_ids": jax.ShapeDtypeStruct((4, tokens), np.int32),
        "text_length": jax.ShapeDtypeStruct((4,), np.int32),
    }
    counted = jax.jit(task.logits).lower(params, batch).cost_analysis()["flops"] / 4
    head = 2.0 * (width**2 + 2 * width**2 + 2 * width * CLASSES)
    assert counted == pytest.approx(task.flops(tokens) + head, rel=0.1)
    pair = Classification(model, "e", CLASSES, readout=readout)
    assert task.flops(tokens) < pair.flops(tokens)


@pytest.mark.parametrize("task", [TextClassification, TextRegression])
def test_a_model_that_cannot_read_a_text_alone_is_refused(task):
    arguments = {"num_classes": 2} if task is TextClassification else {}
    message = r"model\.type: 'two_stacks', but objectives\.t gives it a text without an image"
    with pytest.raises(ConfigError, match=message):
        task(tiny_model(), "t", **arguments)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda model: TextClassification(model, "t", 1), "num_classes"),
        (lambda model: TextClassification(model, "t", 2, readout="cls"), "readout"),
        (lambda model: TextRegression(model, "t", readout="cls"), "readout"),
        (lambda model: TextRegression(model, "t", scale=0.0), "scale"),
        (lambda model: TextRegression(model, "t", scale=float("nan")), "scale"),
    ],
)
def test_bad_arguments_name_the_key(make, key):
    with pytest.raises(ConfigError, match=rf"objectives\.t\.{key}: "):
        make(shared_model())


@pytest.mark.parametrize("task", [Classification, NLVR2])
def test_tasks_with_images_refuse_a_batch_of_texts(task):
    with pytest.raises(ConfigError, match=r"objectives\.t: .* but its batch has texts alone"):
        task(shared_model(), "t", 2).init(jax.random.key(1), jax.eval_shape(text_batch))
