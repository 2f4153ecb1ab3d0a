"""Greedy and beam search against what they stand for, on logits of the whole text each time."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captioning import caption_params, whole_logits
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny import VOCAB, make_batch, shared_model, tiny_model

from vlp_jax.data.augment import normalize
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.mesh import batch_sharding, make_mesh, replicated
from vlp_jax.models.decoding import encode_image
from vlp_jax.transfer.generate import (
    Captions,
    Search,
    beam_search,
    caption_search,
    generate,
    greedy_search,
)

BOS, PAD, EOS, MASK = 0, 1, 2, 3
ROWS, TOKENS, BEAMS = 8, 10, 3
IMAGE = jnp.asarray(make_batch([TOKENS] * ROWS)["image"])
SEARCH = Search(BOS, EOS, PAD, forbidden=(BOS, PAD, MASK), max_length=TOKENS)
WORDS = (7, 22, 30)  # those of the small vocabulary

MODEL, SHARED = tiny_model(), shared_model()


@pytest.fixture(scope="module")
def params() -> Any:
    """Captions of several lengths; forbidden tokens and padding would be the likeliest."""
    return tempted(caption_params(MODEL))


@pytest.fixture(scope="module")
def shared_params() -> Any:
    return tempted(caption_params(SHARED))


def tempted(params: Any) -> Any:
    """By tokens that no caption holds."""
    bias = params["vocabulary_head"]["decoder_bias"]
    bias = bias.at[jnp.array([BOS, PAD, MASK])].set(50.0).at[VOCAB:].set(60.0).at[EOS].set(0.9)
    return params | {"vocabulary_head": params["vocabulary_head"] | {"decoder_bias": bias}}


@pytest.fixture(scope="module")
def log_probs(params: Any) -> Callable[..., np.ndarray]:
    """(texts, images, forbidden) -> log-probabilities [N, T, V] after each token of the texts."""

    @jax.jit
    def logits(ids: jax.Array, image: jax.Array) -> jax.Array:
        return whole_logits(MODEL, params, ids, normalize(image))

    def run(ids: np.ndarray, image: jax.Array, search: Search) -> np.ndarray:
        found = np.array(logits(ids, image), np.float64)
        found[..., [*search.forbidden, *range(VOCAB, found.shape[-1])]] = -np.inf
        return found - np.log(np.exp(found).sum(axis=-1, keepdims=True))

    return run


def few_words(**settings: Any) -> Search:
    """A search over captions of ``WORDS`` alone."""
    forbidden = tuple(i for i in range(VOCAB) if i not in (EOS, *WORDS))
    return dataclasses.replace(SEARCH, forbidden=forbidden, **settings)


def beams(params: Any, search: Search, image: jax.Array = IMAGE) -> Captions:
    """Beam search, also where ``generate`` would take the greedy one."""
    run = jax.jit(
        lambda params: beam_search(
            MODEL, params, encode_image(MODEL, params, normalize(image)), search
        )
    )
    return jax.device_get(run(params))


def check_rows(captions: Captions, search: Search) -> None:
    """Every caption begins, ends once, and is followed by padding."""
    ids, length = np.asarray(captions.ids), np.asarray(captions.length)
    assert (ids[..., 0] == BOS).all()
    np.testing.assert_array_equal((ids == EOS).sum(axis=-1), 1)
    np.testing.assert_array_equal((ids == EOS).argmax(axis=-1) + 1, length)
    after = np.arange(search.max_length) >= length[..., None]
    np.testing.assert_array_equal(ids == PAD, after)
    assert not np.isin(ids[..., 1:], [BOS, MASK]).any()
    assert ids.max() < VOCAB
    assert (length >= search.min_length).all()


def test_greedy_equals_encoding_the_whole_text_for_each_token(
    params: Any, log_probs: Callable[..., np.ndarray]
) -> None:
    found = jax.device_get(generate(MODEL, params, IMAGE, SEARCH))
    ids = np.full((ROWS, TOKENS), PAD, np.int32)
    ids[:, 0] = BOS
    total, ended = np.zeros(ROWS), np.zeros(ROWS, bool)
    for place in range(1, TOKENS):
        step = log_probs(ids, IMAGE, SEARCH)[:, place - 1]
        if place + 1 < SEARCH.min_length:
            step[:, EOS] = -np.inf
        if place + 1 == TOKENS:
            step[:, [i for i in range(step.shape[1]) if i != EOS]] = -np.inf
        token = step.argmax(axis=-1)
        ids[:, place] = np.where(ended, PAD, token)
        total += np.where(ended, 0.0, step.max(axis=-1))
        ended |= token == EOS
    np.testing.assert_array_equal(found.ids[:, 0], ids)
    np.testing.assert_allclose(found.score[:, 0], total, rtol=1e-5)
    assert len(set(found.length[:, 0].tolist())) > 2
    assert len({tuple(row) for row in ids.tolist()}) > 2


@pytest.mark.parametrize("min_length", [2, 3, TOKENS])
@pytest.mark.parametrize("beam_count", [1, BEAMS])
def test_captions_are_well_formed(params: Any, beam_count: int, min_length: int) -> None:
    """They end once and stay ended, though forbidden tokens would be the likeliest."""
    search = dataclasses.replace(SEARCH, min_length=min_length, beams=beam_count)
    captions = jax.device_get(generate(MODEL, params, IMAGE, search))
    assert captions.ids.shape == (ROWS, beam_count, TOKENS)
    check_rows(captions, search)
    assert (np.diff(captions.score, axis=1) <= 0).all()
    shortest = int(captions.length.min())
    assert shortest == TOKENS if min_length == TOKENS else shortest < TOKENS


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_of_one_is_greedy(params: Any, length_penalty: float) -> None:
    search = dataclasses.replace(SEARCH, length_penalty=length_penalty)
    greedy = jax.device_get(generate(MODEL, params, IMAGE, search))
    found = beams(params, search)
    np.testing.assert_array_equal(greedy.ids, found.ids)
    np.testing.assert_array_equal(greedy.length, found.length)
    np.testing.assert_allclose(greedy.score, found.score, rtol=1e-6)  # sums in another order


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@pytest.mark.parametrize("min_length", [2, 4])
def test_wide_beams_find_every_caption(
    params: Any,
    log_probs: Callable[..., np.ndarray],
    length_penalty: float,
    min_length: int,
) -> None:
    """As many beams as there are captions: all of them, in the order of their scores."""
    tokens = 5
    texts = [
        (BOS, *words, EOS)
        for count in range(min_length - 2, tokens - 1)
        for words in itertools.product(WORDS, repeat=count)
    ]
    search = few_words(
        max_length=tokens,
        min_length=min_length,
        beams=len(texts),
        length_penalty=length_penalty,
    )
    found = beams(params, search, IMAGE[:2])
    check_rows(found, search)
    padded = np.array([(*text, *[PAD] * (tokens - len(text))) for text in texts], np.int32)
    for row in range(2):
        steps = log_probs(padded, jnp.repeat(IMAGE[row : row + 1], len(texts), axis=0), search)
        scores = {
            text: sum(step[place, token] for place, token in enumerate(text[1:]))
            / (len(text) - 1) ** length_penalty
            for text, step in zip(texts, steps, strict=True)
        }
        captions = [
            tuple(ids[:length])
            for ids, length in zip(found.ids[row], found.length[row], strict=True)
        ]
        assert sorted(captions) == sorted(texts)
        np.testing.assert_allclose(found.score[row], [scores[text] for text in captions], rtol=1e-5)
        np.testing.assert_allclose(found.score[row], sorted(scores.values())[::-1], rtol=1e-5)


def plain_beam_search(
    log_probs: Callable[..., np.ndarray], image: jax.Array, search: Search
) -> list[tuple[float, tuple[int, ...]]]:
    """The same search with lists, for one image: scores and captions, best first."""
    count, images = search.beams, jnp.repeat(image[None], search.beams, axis=0)
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, (BOS,))]
    ended: list[tuple[float, tuple[int, ...]]] = []
    while len(live[0][1]) < search.max_length and len(ended) < count:
        place = len(live[0][1])
        ids = np.full((count, search.max_length), PAD, np.int32)
        for row, (_, text) in enumerate(live):
            ids[row, :place] = text
        steps = log_probs(ids, images, search)[:, place - 1]
        allowed = [EOS] if place + 1 == search.max_length else range(VOCAB)
        grown = [
            (total + steps[row, token], (*text, token))
            for row, (total, text) in enumerate(live)
            for token in allowed
            if np.isfinite(steps[row, token]) and (token != EOS or place + 1 >= search.min_length)
        ]
        grown.sort(reverse=True)
        ended += [
            (total / place**search.length_penalty, text)
            for total, text in grown[:count]
            if text[-1] == EOS
        ]
        live = [item for item in grown if item[1][-1] != EOS][:count] or live
        if place + 1 == search.max_length:
            break
    return sorted(ended, reverse=True)[:count]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_narrow_beams_equal_a_plain_search(
    params: Any, log_probs: Callable[..., np.ndarray], length_penalty: float
) -> None:
    search = dataclasses.replace(SEARCH, beams=BEAMS, length_penalty=length_penalty)
    found = jax.device_get(generate(MODEL, params, IMAGE, search))
    for row in range(ROWS):
        expected = plain_beam_search(log_probs, IMAGE[row], search)
        captions = [
            tuple(ids[:length])
            for ids, length in zip(found.ids[row], found.length[row], strict=True)
        ]
        assert captions == [text for _, text in expected]
        np.testing.assert_allclose(found.score[row], [score for score, _ in expected], rtol=1e-5)
    greedy = jax.device_get(generate(MODEL, params, IMAGE, SEARCH))
    assert (found.ids[:, 0] != greedy.ids[:, 0]).any()  # beams are of use


@pytest.mark.parametrize("beam_count", [1, BEAMS])
def test_a_batch_equals_each_image_alone(params: Any, beam_count: int) -> None:
    search = dataclasses.replace(SEARCH, beams=beam_count)
    together = jax.device_get(generate(MODEL, params, IMAGE, search))
    for row in range(ROWS):
        alone = jax.device_get(generate(MODEL, params, IMAGE[row : row + 1], search))
        np.testing.assert_array_equal(alone.ids[0], together.ids[row])
        np.testing.assert_array_equal(alone.length[0], together.length[row])
        np.testing.assert_allclose(alone.score[0], together.score[row], rtol=1e-5)


def test_fewer_captions_than_beams(params: Any) -> None:
    """One word, three tokens: a single caption, and no other is made up."""
    forbidden = tuple(i for i in range(VOCAB) if i not in (EOS, 7))
    search = dataclasses.replace(SEARCH, forbidden=forbidden, max_length=3, beams=2)
    found = jax.device_get(generate(MODEL, params, IMAGE, search))
    assert (found.ids[:, 0] == [BOS, 7, EOS]).all()
    assert (found.ids[:, 1] == PAD).all()
    assert (found.length == [[3, 0]]).all()
    assert np.isneginf(found.score[:, 1]).all()


def every_shape(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of all arrays of a program, inside loops as well."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield getattr(variable.aval, "shape", ())
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from every_shape(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("model", ["two_stacks", "shared"])
def test_beams_share_the_keys_and_values_of_the_image(
    model: str, params: Any, shared_params: Any
) -> None:
    """Nothing as large as a copy of them for each beam exists, inside the loop or outside."""
    network = {"two_stacks": MODEL, "shared": SHARED}[model]
    params = {"two_stacks": params, "shared": shared_params}[model]
    c = network.config
    image = jnp.zeros((ROWS, c.image.tokens, c.text.width))
    search = dataclasses.replace(SEARCH, beams=BEAMS)
    traced = jax.make_jaxpr(lambda p, x: beam_search(network, p, x, search))(params, image)
    shapes = [s for s in every_shape(traced.jaxpr) if c.image.tokens in s]
    weights = {
        "two_stacks": (ROWS, c.text.heads, BEAMS, c.image.tokens),
        "shared": (ROWS, BEAMS, c.text.heads, 1, c.image.tokens),
    }
    assert weights[model] in shapes  # inside the loop
    largest = max(int(np.prod(s)) for s in shapes)
    # The shared stack encodes the image here: its blocks are wider inside.
    assert largest == image.size if model == "two_stacks" else largest < BEAMS * image.size


@pytest.mark.parametrize("beam_count", [1, BEAMS])
@pytest.mark.parametrize("model", ["two_stacks", "shared"])
def test_eight_devices_equal_one(
    model: str, params: Any, shared_params: Any, beam_count: int
) -> None:
    """And all they tell each other in the loop is whether they are done."""
    network = {"two_stacks": MODEL, "shared": SHARED}[model]
    params = {"two_stacks": params, "shared": shared_params}[model]
    search = dataclasses.replace(SEARCH, beams=beam_count)
    alone = jax.device_get(generate(network, params, IMAGE, search))
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, replicated(mesh))
        images = jax.device_put(IMAGE, batch_sharding(mesh))
        program = generate.lower(network, placed, images, search).compile()
        together = program(placed, images)
    assert together.ids.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    np.testing.assert_array_equal(together.ids, alone.ids)
    np.testing.assert_allclose(together.score, alone.score, rtol=1e-5)
    exchanges = re.findall(r"(\S+) (?:all-|reduce-scatter|collective-)\S*\(", program.as_text())
    assert exchanges == ["pred[]"]


def test_one_program_for_all_batches_of_a_size(params: Any) -> None:
    search = dataclasses.replace(SEARCH, max_length=4)
    before = generate._cache_size()
    for image in (IMAGE, IMAGE[::-1]):
        again = dataclasses.replace(search)  # equal, not the same object
        generate(tiny_model(), jax.tree.map(lambda x: x + 1.0, params), image, again)
    assert generate._cache_size() == before + 1


def test_settings_that_cannot_work(params: Any) -> None:
    for settings, message in [
        ({"min_length": 1}, r"min_length=1 and max_length=10"),
        ({"min_length": 11}, r"min_length=11 and max_length=10"),
        ({"beams": 0}, r"beams=0"),
        ({"length_penalty": -0.5}, r"length_penalty=-0.5"),
        ({"forbidden": (EOS,)}, r"forbidden holds eos_id=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SEARCH, **settings)
    with pytest.raises(ValueError, match=r"model.text.max_positions=64"):
        generate(MODEL, params, IMAGE, dataclasses.replace(SEARCH, max_length=65))
    with pytest.raises(ValueError, match=r"greedy search has 1"):
        greedy_search(MODEL, params, IMAGE, dataclasses.replace(SEARCH, beams=2))


def test_search_in_the_words_of_a_tokenizer() -> None:
    tokenizer = Tokenizer.train(["a red square", "a blue circle"], vocab_size=60)
    search = caption_search(tokenizer, max_length=16, beams=4, length_penalty=1.0)
    [ids] = tokenizer.encode(["a red circle"], search.max_length)
    assert (ids[0], ids[-1]) == (search.bos_id, search.eos_id)
    assert len(set(search.forbidden)) == 4
    assert not set(search.forbidden) & {*ids[1:].tolist()}
    assert (search.max_length, search.min_length, search.beams) == (16, 3, 4)
