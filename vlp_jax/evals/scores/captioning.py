"""BLEU, CIDEr-D and ROUGE-L of captions, as the COCO captioning evaluation defines them.

BLEU is that of Papineni et al. (2002), CIDEr-D that of Vedantam et al. (2015), ROUGE-L that of Lin
(2004) with the choices of the evaluation (Chen et al. 2015). Its public code, ``pycocoevalcap``,
gives the same figures but in two places: where no n-gram of an order is right, BLEU is 0 here and a
tiny number there; and an empty caption scores 0 here, whatever the references.

The public tokeniser is a Java program (Stanford's PTBTokenizer); ``tokenise`` writes the same
tokens without Java for what captions hold: on the 11,179 captions, sentences and questions of
``../shared/data`` no line differs.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_MAX_N = 4  # longest n-gram counted
_SIGMA = 6.0  # of CIDEr-D's penalty on other lengths than the reference's, in words
_BETA = 1.2  # ROUGE-L: how much more recall counts than precision

_Ngram = tuple[str, ...]

_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-"})
_DROPPED = frozenset("'\"`.?!,:-;")
# The original drops "-LRB-" and so on, but after it wrote them in lower case: they stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_FUSED = re.compile(r"\b(can|gon|got|wan|gim|lem)(not|na|ta|me)\b")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)")
_TOKEN = re.compile(
    r"""
      (?:[a-z]\.)+[a-z]\.                               # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ft|mt)\.          # abbreviations of captions
    | no\.(?=\s*\d)
    | (?:n't|'(?:s|m|d|ll|re|ve))(?!\w)                 # what was cut off words
    | \w+(?:(?:[-'/.@&]|(?<=\d)[,:](?=\d))\w+)*         # t-shirt, o'clock, 10:30, 1,000
    | [^\w\s]
    """,
    re.VERBOSE,
)


def tokenise(caption: str) -> str:
    """The tokens of a caption, one space between them: lower case, Penn Treebank, no punctuation.

    ``"Don't pet Mr. Smith's dog!"`` -> ``"do n't pet mr. smith 's dog"``.
    """
    text = caption.translate(_PLAIN).lower()
    text = _CLITIC.sub(r" \1", _FUSED.sub(r"\1 \2", text))
    tokens = (token for token in _TOKEN.findall(text) if token not in _DROPPED)
    return " ".join(_BRACKETS.get(token, token) for token in tokens)


CAPTION_SCORES = ("bleu1", "bleu2", "bleu3", "bleu4", "cider", "rouge_l")


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """BLEU-1 to 4 over the corpus, CIDEr-D and ROUGE-L averaged over its images.

    CIDEr weighs n-grams by how few images' references have them, so that it needs many images,
    depends on which, and is 0 for a single one.

    Args:
        predictions: one caption for each image.
        references: its reference captions, one or more for each image.

    Returns:
        ``bleu1`` ... ``bleu4`` and ``rouge_l`` in [0, 1], ``cider`` in [0, 10]; tables usually
        show them times 100.

    Raises:
        ValueError: there is no image, the lengths differ, or an image has no references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and references of {len(references)} images: there "
            "must be one prediction for each image"
        )
    if not all(references):
        raise ValueError(f"image {[len(r) for r in references].index(0)} has no reference captions")
    given = [_counted(text) for text in predictions]
    wanted = [[_counted(text) for text in texts] for texts in references]
    scores = {f"bleu{n}": score for n, score in enumerate(_bleu(given, wanted), 1)}
    rouge = sum(map(_rouge_l, given, wanted)) / len(given)
    return {**scores, "cider": _cider_d(given, wanted), "rouge_l": rouge}


class _Caption(NamedTuple):
    """A caption as the scores see it.

    Attributes:
        words: its tokens.
        ngrams: for n = 1 to 4, how often it has each n-gram.
    """

    words: list[str]
    ngrams: tuple[Mapping[_Ngram, int], ...]


def _counted(text: str) -> _Caption:
    words = tokenise(text).split()
    ngrams = (
        collections.Counter(zip(*(words[start:] for start in range(n)), strict=False))
        for n in range(1, _MAX_N + 1)
    )
    return _Caption(words, tuple(ngrams))


def _bleu(given: Sequence[_Caption], wanted: Sequence[Sequence[_Caption]]) -> list[float]:
    """BLEU-1 to 4: counts and lengths are summed over the corpus before they are divided."""
    length = wanted_length = 0
    right, total = [0] * _MAX_N, [0] * _MAX_N
    for caption, references in zip(given, wanted, strict=True):
        own = len(caption.words)
        length += own
        # The reference of nearest length counts; of two, the shorter.
        wanted_length += min((abs(len(r.words) - own), len(r.words)) for r in references)[1]
        for n, ngrams in enumerate(caption.ngrams):
            total[n] += max(own - n, 0)
            for ngram, count in ngrams.items():
                right[n] += min(count, max(r.ngrams[n].get(ngram, 0) for r in references))
    precisions = [right[n] / max(total[n], 1) for n in range(_MAX_N)]
    brevity = math.exp(min(1 - wanted_length / length, 0)) if length else 0.0
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, _MAX_N + 1)]


def _cider_d(given: Sequence[_Caption], wanted: Sequence[Sequence[_Caption]]) -> float:
    """CIDEr-D, averaged over the images."""
    images_with: collections.Counter[_Ngram] = collections.Counter()
    for references in wanted:
        images_with.update({ngram for r in references for ngrams in r.ngrams for ngram in ngrams})
    rarity = {ngram: math.log(len(wanted) / count) for ngram, count in images_with.items()}
    rarest = math.log(len(wanted))  # an n-gram of no reference counts as one of a single image

    def weights(caption: _Caption) -> list[dict[_Ngram, float]]:
        return [
            {ngram: count * rarity.get(ngram, rarest) for ngram, count in ngrams.items()}
            for ngrams in caption.ngrams
        ]

    score = 0.0
    for caption, references in zip(given, wanted, strict=True):
        own = weights(caption)
        for reference in references:
            difference = len(caption.words) - len(reference.words)
            penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
            similarity = sum(map(_clipped_cosine, own, weights(reference))) / _MAX_N
            score += 10 * penalty * similarity / len(references)
    return score / len(given)


def _clipped_cosine(own: Mapping[_Ngram, float], reference: Mapping[_Ngram, float]) -> float:
    """The cosine, where repeating an n-gram more often than the reference earns nothing."""
    dot = sum(
        min(weight, reference[ngram]) * reference[ngram]
        for ngram, weight in own.items()
        if ngram in reference
    )
    return dot / (math.hypot(*own.values()) * math.hypot(*reference.values())) if dot else 0.0


def _rouge_l(caption: _Caption, references: Sequence[_Caption]) -> float:
    """F of the longest common subsequences: the best precision and the best recall."""
    common = [_common_length(caption.words, r.words) for r in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption.words)
    recall = max(c / len(r.words) for c, r in zip(common, references, strict=True) if c)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)  # entry j: with the first j words of `second`
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            longest = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], longest
    return row[-1]
