"""Downstream heads: losses by hand, one query equals all, the pair's order matters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BATCH, IMAGE_SIZE, TOKENS, make_batch, tiny_model

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import MAX_ANSWERS
from vlp_jax.models.masks import two_stream_mask
from vlp_jax.objectives.classification import NLVR2, VQA, Classification
from vlp_jax.objectives.flm import visible_mask
from vlp_jax.objectives.readout import Readout

SIZES = Bucket(TOKENS, IMAGE_SIZE)
CLASSES = 7


def task_batch(seed=0):
    draw = np.random.default_rng(seed)
    answer = np.full((BATCH, MAX_ANSWERS), -1, np.int32)
    answer[:, 0] = draw.integers(0, CLASSES, BATCH)
    answer[::2, 1] = (answer[::2, 0] + 1) % CLASSES
    score = np.where(answer >= 0, draw.random(answer.shape), 0).astype(np.float32)
    batch = make_batch(seed=seed) | {
        "second_image": make_batch(seed=seed + 1)["image"],
        "label": draw.integers(0, 2, BATCH).astype(np.int32),
        "answer": answer,
        "answer_score": score,
        "valid": np.arange(BATCH) != 2,
    }
    return {name: jnp.asarray(value) for name, value in batch.items()}


def created(task):
    return jax.jit(lambda: task.init(jax.random.key(1), jax.eval_shape(task_batch))[0])()


def test_vqa_sums_binary_cross_entropies_of_soft_targets():
    vqa = VQA(tiny_model(), "vqa", CLASSES)
    params, batch = created(vqa), task_batch()
    loss = jax.jit(lambda *given: vqa.loss(*given, jax.random.key(0), SIZES, train=False))
    output = loss(params, {}, batch)
    logits = np.asarray(jax.jit(vqa.logits)(params, batch), np.float64)
    expected, right = 0.0, 0.0
    for row in np.flatnonzero(batch["valid"]):
        target = np.zeros(CLASSES)
        for answer, score in zip(batch["answer"][row], batch["answer_score"][row], strict=True):
            if answer >= 0:
                target[answer] = score
        chance = 1 / (1 + np.exp(-logits[row]))
        expected -= (target * np.log(chance) + (1 - target) * np.log(1 - chance)).sum()
        right += target[logits[row].argmax()]
    np.testing.assert_allclose(output.loss.sum, expected, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["accuracy"].sum, right, rtol=1e-5)
    assert float(output.loss.weight) == BATCH - 1


def test_a_fresh_vqa_head_expects_one_right_answer():
    vqa = VQA(tiny_model(), "vqa", 400)
    chances = jax.nn.sigmoid(jax.jit(vqa.logits)(created(vqa), task_batch()))
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, rtol=0.2)
    same = Classification(tiny_model(), "entailment", 3)
    assert not np.asarray(created(same)["entailment_head"]["classifier"]["bias"]).any()


@pytest.mark.parametrize("readout", ["query", "bidirectional", "forward"])
def test_entailment_reads_the_text_and_no_padding(readout):
    task = Classification(tiny_model(), "entailment", 3, readout=readout)
    params, batch = created(task), task_batch()
    logits = jax.jit(task.logits)
    before = logits(params, batch)
    lengths = np.asarray(batch["text_length"])
    padding = np.arange(TOKENS)[None] >= lengths[:, None]
    padded = {**batch, "text_ids": jnp.where(jnp.asarray(padding), 9, batch["text_ids"])}
    np.testing.assert_array_equal(before, logits(params, padded))
    for token in (1, 2):
        ids = batch["text_ids"].at[:, token].set(jnp.where(batch["text_ids"][:, token] == 7, 8, 7))
        changed = logits(params, {**batch, "text_ids": ids})
        assert (np.abs(np.asarray(changed - before)).max(axis=1) > 0).all()
    other = {**batch, "image": batch["second_image"]}
    assert (np.abs(np.asarray(logits(params, other) - before)).max(axis=1) > 0).all()


def test_one_query_equals_all():
    """The readout's only query is the query for 0 among all of them."""
    model, batch = tiny_model(), task_batch()
    task = Classification(model, "entailment", 3)
    params = created(task)
    ids, lengths = batch["text_ids"], batch["text_length"]

    def one(model):
        image = model.encode_image(normalize(batch["image"]))
        reader = Readout("query", "key")
        return reader.read(model, reader.encode(model, ids, lengths, None), image, None)

    def all_of_them(model):
        image = model.encode_image(normalize(batch["image"]))
        mask = two_stream_mask(lengths, TOKENS)
        states = model.encode_text(ids, mask, image, ("forward", "reverse"))
        span = jnp.broadcast_to(jnp.arange(TOKENS)[None], (BATCH, TOKENS))
        positions = jnp.arange(TOKENS)
        visible = visible_mask(positions, lengths, span, span, TOKENS)
        return model.reconstruct(positions, states, visible)[:, 0]

    values = [jax.jit(nn.apply(f, model))({"params": params}) for f in (one, all_of_them)]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)


def test_nlvr2_tells_the_images_apart():
    task = NLVR2(tiny_model(), "nlvr2")
    params, batch = created(task), task_batch()
    logits = jax.jit(task.logits)
    before = logits(params, batch)
    swapped = {**batch, "image": batch["second_image"], "second_image": batch["image"]}
    assert (np.abs(np.asarray(logits(params, swapped) - before)).max(axis=1) > 1e-6).all()
    # Rows do not mix: the first row alone gives its own logits.
    alone = logits(params, {name: value[:1] for name, value in batch.items()})
    np.testing.assert_allclose(alone, before[:1], atol=1e-5)


def test_flops_count_what_is_read():
    model = tiny_model()
    entailment = Classification(model, "entailment", 3)
    assert entailment.flops(8) < NLVR2(model, "nlvr2").flops(8) < 2 * entailment.flops(8)
    assert Classification(model, "e", 3, readout="forward").flops(8) < entailment.flops(8)


@pytest.mark.parametrize(
    ("arguments", "key"), [({"num_classes": 1}, "num_classes"), ({"readout": "cls"}, "readout")]
)
def test_bad_arguments_name_the_key(arguments, key):
    with pytest.raises(ValueError, match=rf"objectives\.vqa\.{key}: "):
        VQA(tiny_model(), "vqa", **{"num_classes": 3, **arguments})
