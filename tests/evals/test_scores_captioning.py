import json
import math
import shutil

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
    assert scores["bleu1"] == pytest.approx(4 / 5, abs=1e-6)
    assert scores["bleu2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 3), abs=1e-6)
    assert scores["bleu3"] == pytest.approx(0, abs=1e-4)
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
    assert caption_scores(["cat"], [["cat dog"]])["bleu1"] == pytest.approx(math.exp(-1), abs=1e-6)
    # The reference of nearest length, one word, asks for no penalty.
    references = [["cat dog sun", "dog"]]
    assert caption_scores(["cat"], references)["bleu1"] == pytest.approx(1, abs=1e-6)


def test_a_caption_may_be_empty_but_references_may_not():
    scores = caption_scores(["", "a dog"], [["a cat"], ["a dog"]])
    assert scores["rouge_l"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="image 1 has no reference captions"):
        caption_scores(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="1 predictions and references of 2 images"):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="0 predictions"):
        caption_scores([], [])


@pytest.mark.slow
@pytest.mark.pack
@pytest.mark.skipif(shutil.which("java") is None, reason="the public tokeniser needs Java")
def test_the_public_tokeniser_writes_the_same_tokens_for_the_pack(pack):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [text for item in json.loads((pack / "captions.json").read_text())
             for text in item["captions"]]  # fmt: skip
    texts += [item["sentence"] for item in json.loads((pack / "ve.json").read_text())]
    texts += [item["question"] for item in json.loads((pack / "vqa.json").read_text())]
    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert [tokenise(text) for text in texts] == [theirs[i][0] for i in range(len(texts))]
