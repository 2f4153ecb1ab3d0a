"""BLEU, CIDEr-D and ROUGE-L of captions, as the COCO captioning evaluation computes them.

The scorers are those of ``pycocoevalcap``, the evaluation code of the COCO captioning challenge
(Chen et al. 2015). Its tokeniser is a Java program (Stanford's PTBTokenizer); ``tokenise`` writes
the same tokens without Java for what captions hold: on the 11,179 captions, sentences and
questions of ``../shared/data`` no line differs.
"""

import re
from collections.abc import Sequence

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
    # Imported here: a training machine that scores no captions can do without the package.
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and references of {len(references)} images: there "
            "must be one prediction for each image"
        )
    if not all(references):
        raise ValueError(f"image {[len(r) for r in references].index(0)} has no reference captions")
    wanted = {i: [tokenise(text) for text in texts] for i, texts in enumerate(references)}
    given = {i: [tokenise(text)] for i, text in enumerate(predictions)}
    bleu, _ = Bleu(4).compute_score(wanted, given, verbose=0)
    cider, _ = Cider().compute_score(wanted, given)
    rouge, _ = Rouge().compute_score(wanted, given)
    scores = {f"bleu{n}": float(score) for n, score in enumerate(bleu, 1)}
    return {**scores, "cider": float(cider), "rouge_l": float(rouge)}
