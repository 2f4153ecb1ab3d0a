import jax
import numpy as np
import pytest

from tests.evals.conftest import EXAMPLES, announced
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizer import Tokenizer, normalise_caption
from vlp_jax.evals import build_evaluators
from vlp_jax.evals import cloze as module
from vlp_jax.evals.cloze import choose_span, token_texts
from vlp_jax.evals.pictures import HEAT_COLOUR, heat_map
from vlp_jax.infra import artifacts


def build(context):
    [evaluator] = build_evaluators(context).values()
    return evaluator


@pytest.fixture(scope="module")
def cloze(with_evals, tmp_path_factory):
    section = {"type": "cloze", "source": "scenes", "num_examples": EXAMPLES, "every_percent": 50.0}
    return build(with_evals({"gaps": section}, workdir=tmp_path_factory.mktemp("cloze")))


@pytest.fixture(scope="module")
def outcome(cloze, params):
    with jax.transfer_guard("disallow"):
        return announced(cloze, cloze.run(params, step=7))


def test_gallery_shows_every_caption_with_its_answers(context, cloze, outcome):
    gallery = artifacts.load(cloze._context.workdir / "artifacts" / "gaps")
    assert isinstance(gallery, artifacts.Gallery)
    assert gallery.step == 7
    assert len(gallery.cards) == EXAMPLES
    source = build_source(context.config, "scenes", split="val", num_records=EXAMPLES)
    right = hidden = 0
    for record, card in enumerate(gallery.cards):
        text = "".join(span.text for span in card.spans)
        assert text == normalise_caption(source.caption(record, 0))
        answers = [span for span in card.spans if span.kind != "plain"]
        assert len(answers) == len(card.rows) >= 1
        for span, (word, guess, probability, others) in zip(answers, card.rows, strict=True):
            assert (span.kind == "right") == (word == guess)
            assert 0.0 < probability <= 1.0
            assert len(others.split(", ")) == 2
        assert len(card.images) == 2
        right += sum(span.kind == "right" for span in answers)
        hidden += len(answers)
    assert outcome == {"accuracy": pytest.approx(right / hidden)}


def test_spans_hold_a_content_word_and_the_share_asked_for(context, cloze, outcome, params):
    batch, _ = cloze.answers(params)
    source = build_source(context.config, "scenes", split="val", num_records=EXAMPLES)
    for row in range(EXAMPLES):
        _, words = context.tokenizer.encode_with_words(source.caption(row, 0), 24)
        first, last, query = (
            int(batch[name][row]) for name in ("first_hidden", "last_hidden", "query")
        )
        assert 1 <= first <= query <= last <= batch["text_length"][row] - 2
        assert source.word_classes()[words[query]] != "function"
        assert last - first + 1 == round(0.3 * (batch["text_length"][row] - 1))


def test_image_attention_is_a_distribution_that_depends_on_the_image(cloze, params):
    batch, answers = cloze.answers(params)
    assert answers.attention.shape == (16, 65)
    assert (answers.attention >= 0).all()
    np.testing.assert_allclose(answers.attention[:EXAMPLES].sum(axis=1), 1.0, rtol=1e-5)
    images = batch["image"].copy()
    batch["image"][:] = np.roll(images, 1, axis=0)
    _, others = cloze.answers(params)
    batch["image"][:] = images
    assert np.abs(others.attention - answers.attention)[:EXAMPLES].max() > 1e-3


def test_no_answer_sees_its_span(cloze, params):
    batch, answers = cloze.answers(params)
    ids = batch["text_ids"].copy()
    for row in range(EXAMPLES):
        span = slice(batch["first_hidden"][row], batch["last_hidden"][row] + 1)
        batch["text_ids"][row, span] = ids[row, span] - 1
    _, others = cloze.answers(params)
    # Outside the span every token is read.
    batch["text_ids"][:] = np.where(batch["text_ids"] == ids, ids - 1, ids)
    _, changed = cloze.answers(params)
    batch["text_ids"][:] = ids
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), answers, others)
    assert not np.allclose(changed.probabilities, answers.probabilities)


def test_a_span_of_one_token_equals_the_base_rate(context, with_evals, params, scores, monkeypatch):
    monkeypatch.setattr(module, "GUESSES", context.tokenizer.vocab_size)
    section = {"source": "scenes", "num_examples": EXAMPLES, "rate": 0.0}
    batch, answers = build(with_evals({"cloze": section})).answers(params)
    for row in range(EXAMPLES):
        query = batch["query"][row]
        assert batch["first_hidden"][row] == batch["last_hidden"][row] == query
        rank = answers.ids[row, 0].tolist().index(batch["text_ids"][row, query])
        expected = {name: found[row, query - 1] for name, found in scores[0.0, False].items()}
        assert (rank == 0) == expected["correct"]
        assert answers.probabilities[row, 0, rank] == pytest.approx(
            np.exp(-expected["nll"]), rel=1e-4
        )


def test_spans_stay_inside_the_caption_and_repeat():
    for words in range(1, 12):
        for seed in range(20):
            classes = np.r_[-1, np.zeros(words, np.int32)]
            first, last, heart = choose_span(classes, 0.5, seed)
            assert 1 <= first <= heart <= last <= words
            assert last - first + 1 == min(max(round(0.5 * (words + 1)), 1), words)
            assert choose_span(classes, 0.5, seed) == (first, last, heart)
    hearts = {choose_span(np.r_[-1, np.zeros(9, np.int32)], 0.1, seed)[2] for seed in range(60)}
    assert hearts == set(range(1, 10))
    assert choose_span(np.array([-1, 0, 0, 3, 0]), 0.2, 0) == (3, 3, 3)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_token_texts_join_to_the_caption(kind):
    caption = "A reddish square, don't touch the squares"
    size = {"wordpiece": 60, "bpe": 280}[kind]
    tokenizer = Tokenizer.train(["red square touch the don't, ish s"] * 3, size, kind)
    [ids] = tokenizer.encode([caption], 64)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert len(texts) == len(ids)
    assert texts[0] == texts[-1] == ""


def test_heat_map_colours_what_is_attended():
    image = np.full((32, 32, 3), 100, np.uint8)
    attention = np.zeros(64)
    attention[10] = 0.3  # row 1, column 2
    picture = heat_map(image, attention)
    assert picture.shape == (192, 192, 3)
    redness = picture[..., 0].astype(int) - picture[..., 2]
    centre = np.unravel_index(redness.argmax(), redness.shape)
    assert 24 <= centre[0] < 48
    assert 48 <= centre[1] < 72
    assert picture[150:, 150:].max() == 100
    np.testing.assert_allclose(picture[36, 60], 0.25 * 100 + 0.75 * np.array(HEAT_COLOUR), atol=12)
    np.testing.assert_array_equal(heat_map(image, np.zeros(64)), np.full((192, 192, 3), 100))
