import json
import math
import pathlib
import random
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from vlp_jax.evals.scores import caption_scores
from vlp_jax.evals.scores.captioning import tokenise


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [  # written by Stanford's PTBTokenizer 3.4.1 and the evaluation's list of punctuation
        ("Don't stop; it's Mr. Smith's dog!", "do n't stop it 's mr. smith 's dog"),
        ("A man's dogs' tails", "a man 's dogs tails"),
        ("black & white (old)", "black & white -lrb- old -rrb-"),
        ("A t-shirt, and/or a \"cake\" -- at 3.5 p.m. in the U.S.",
         "a t-shirt and/or a cake at 3.5 p.m. in the u.s."),
        ("I'm gonna cannot 'quote' you're we'll", "i 'm gon na can not quote you 're we 'll"),
        ("hello,world 1,000 3,4 at 10:30", "hello world 1,000 3,4 at 10:30"),
        ("a 1,000-year-old o'clock", "a 1,000-year-old o'clock"),
        ("“quoted” ‘single’ it’s – fast...", "quoted single it 's fast"),
        ("50% of no. 5, no.", "50 % of no. 5 no"),
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_penn_treebank_without_punctuation(caption, tokens):
    assert tokenise(caption) == tokens


def test_scores_computed_by_hand():
    scores = caption_scores(["Red cat.", "a blue cat"], [["red cat"], ["a blue dog!"]])
    # Unigrams 2 of 2 and 2 of 3; bigrams 1 of 1 and 1 of 2; trigrams 0 of 1; lengths are equal.
    assert scores["bleu1"] == pytest.approx(4 / 5)
    assert scores["bleu2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 3))
    assert scores["bleu3"] == 0
    # The longest common subsequences are whole, and 2 of 3 words: F = P = R.
    assert scores["rouge_l"] == pytest.approx((1 + 2 / 3) / 2)
    # Every n-gram is in the references of one image of two (idf ln 2), or of none (idf ln 2 too),
    # so similarities are cosines of counts. First image: 1 for n = 1 and 2, no longer n-gram.
    # Second: 2/3 (a, blue of three), 1/2 (a blue of two), 0. Averages over n = 1..4, times 10.
    first, second = 10 * 2 / 4, 10 * (2 / 3 + 1 / 2) / 4
    assert scores["cider"] == pytest.approx((first + second) / 2)


def test_cider_is_the_clipped_kind_with_a_length_penalty():
    # cat cat against cat dog: min(2, 1) * 1 / (2 * sqrt 2) unigrams; x y is right: 10 * 2 / 4.
    repeated = caption_scores(["cat cat", "x y"], [["cat dog"], ["x y"]])["cider"]
    assert repeated == pytest.approx((10 / (2 * math.sqrt(2)) / 4 + 5) / 2)
    # cat against cat dog sun: 1 / sqrt 3, lengths 0 and 2 bigrams, sigma 6.
    short = caption_scores(["cat", "x y"], [["cat dog sun"], ["x y"]])["cider"]
    penalty = math.exp(-(2**2) / (2 * 6**2))
    assert short == pytest.approx((10 * penalty / math.sqrt(3) / 4 + 5) / 2)


def test_words_of_all_images_count_nothing():
    # "a" is in the references of both images: idf ln(2/2) = 0.
    scores = caption_scores(["a", "a dog"], [["a cat"], ["a dog"]])
    # dog alone has weight: cosine 1 for the unigrams and 1 for the bigram of the second image.
    assert scores["cider"] == pytest.approx((0 + 10 * 2 / 4) / 2)


def test_brevity_and_the_closest_reference():
    # One word for a reference of two: precision 1, penalty exp(1 - 2/1).
    assert caption_scores(["cat"], [["cat dog"]])["bleu1"] == pytest.approx(math.exp(-1))
    # The reference of nearest length, one word, asks for no penalty.
    references = [["cat dog sun", "dog"]]
    assert caption_scores(["cat"], references)["bleu1"] == pytest.approx(1)


def test_rouge_takes_precision_and_recall_each_from_the_best_reference():
    references = [["cat tree dog sun moon sky", "cat dog"]]  # 3 of 4 and 3 of 6; 2 of 4 and 2 of 2
    precision, recall, beta = 3 / 4, 1.0, 1.2
    wanted = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert caption_scores(["cat tree dog bird"], references)["rouge_l"] == pytest.approx(wanted)
    # The order counts: of "dog cat", one word follows "cat dog".
    assert caption_scores(["dog cat"], [["cat dog"]])["rouge_l"] == pytest.approx(1 / 2)


def test_scores_of_nothing_are_zero():
    scores = caption_scores(["", "?!"], [["a cat"], ["..."]])
    assert set(scores.values()) == {0.0}


def test_a_caption_may_be_empty_but_references_may_not():
    scores = caption_scores(["", "a dog"], [["a cat"], ["a dog"]])
    assert scores["rouge_l"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="image 1 has no reference captions"):
        caption_scores(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="1 predictions and references of 2 images"):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="0 predictions"):
        caption_scores([], [])


def public(module: str) -> Any:
    """A module of the public evaluation code, or a skip that says how to get it."""
    reason = "the public code is absent: pip install -e '.[parity]'"
    return pytest.importorskip(f"pycocoevalcap.{module}", reason=reason)


def assert_scores_of_the_public_code(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    given = {i: [tokenise(text)] for i, text in enumerate(predictions)}
    wanted = {i: [tokenise(text) for text in texts] for i, texts in enumerate(references)}
    bleu, _ = public("bleu.bleu").Bleu(4).compute_score(wanted, given, verbose=0)
    cider, _ = public("cider.cider").Cider().compute_score(wanted, given)
    rouge, _ = public("rouge.rouge").Rouge().compute_score(wanted, given)
    theirs = {f"bleu{n}": score for n, score in enumerate(bleu, 1)}
    scores = caption_scores(predictions, references)
    assert scores == pytest.approx({**theirs, "cider": cider, "rouge_l": rouge}, rel=1e-10)
    assert all(score > 0 for score in scores.values())


@pytest.mark.parametrize("longest", [9, 30])
@pytest.mark.parametrize("num_words", [4, 8])
def test_scores_of_random_captions_are_those_of_the_public_code(num_words, longest):
    """Few words repeat themselves in every caption; some captions are short, some are empty."""
    rng = random.Random(num_words)
    words = [f"w{i}" for i in range(num_words)]

    def caption(shortest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(shortest, longest)))

    predictions = [caption(shortest=0) for _ in range(200)]
    references = [[caption(shortest=1) for _ in range(rng.randint(1, 5))] for _ in predictions]
    assert "" in predictions
    assert_scores_of_the_public_code(predictions, references)


@pytest.mark.pack
def test_scores_of_the_pack_are_those_of_the_public_code(pack: pathlib.Path) -> None:
    """The first caption of every picture against its others."""
    captions = [item["captions"] for item in json.loads((pack / "captions.json").read_text())]
    assert_scores_of_the_public_code([own[0] for own in captions], [own[1:] for own in captions])


@pytest.mark.slow
@pytest.mark.pack
@pytest.mark.skipif(shutil.which("java") is None, reason="the public tokeniser needs Java")
def test_the_public_tokeniser_writes_the_same_tokens_for_the_pack(pack: pathlib.Path) -> None:
    ptbtokenizer = public("tokenizer.ptbtokenizer")
    texts = [text for item in json.loads((pack / "captions.json").read_text())
             for text in item["captions"]]  # fmt: skip
    texts += [item["sentence"] for item in json.loads((pack / "ve.json").read_text())]
    texts += [item["question"] for item in json.loads((pack / "vqa.json").read_text())]
    theirs = ptbtokenizer.PTBTokenizer().tokenize(
        {i: [{"caption": text}] for i, text in enumerate(texts)}
    )
    assert [tokenise(text) for text in texts] == [theirs[i][0] for i in range(len(texts))]
