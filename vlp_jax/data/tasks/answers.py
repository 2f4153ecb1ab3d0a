"""Answers of visual question answering: their normal form, soft targets, and the answer list.

The normal form is that of the VQA authors' evaluation (Antol et al. 2015, "VQA: Visual Question
Answering"; vqaEval of the GT-Vision-Lab/VQA repository, version 2 of the punctuation list), to
the letter and with its oddities, for accuracies are compared across papers.
"""

import collections
import functools
import pathlib
import re
from collections.abc import Iterable, Sequence

from vlp_jax.data.files import read_json
from vlp_jax.infra.errors import ConfigError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # 3.5 keeps its period, "no." does not
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# The right forms. What is mended are the forms that lack exactly one of the apostrophes, so
# neither "its" nor "were" nor "well", whose right forms are not here.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_MENDED = {
    form[: match.start()] + form[match.end() :]: form
    for form in _CONTRACTIONS.split()
    for match in re.finditer("'", form)
} | {"somebody'd": "somebodyd"}  # the wrong way round in the original too


@functools.lru_cache(maxsize=1 << 18)
def normalise_answer(answer: str) -> str:
    """An answer in the form in which answers are compared; may be "".

    Punctuation that touches a space, or all of it where a comma stands between digits, goes;
    other punctuation becomes a space; periods stay before digits only. Then lower case, number
    words up to ten as digits ("none" is 0), no articles, apostrophes back in contractions.

    Examples: ``A Cat.`` -> ``cat``; ``red/white`` -> ``red white``; ``1,000`` -> ``1000``;
    ``red, blue`` -> ``red blue``; ``Dont`` -> ``don't``.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    bare = answer
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if touches_space or has_number else " ")
    bare = _PERIOD.sub("", bare)
    words = (_DIGITS.get(word, word) for word in bare.lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(agreeing: int, annotators: int) -> float:
    """The accuracy of an answer that some of the annotators gave (Antol et al. 2015), in [0, 1].

    An answer is as right as others gave it: min(n / 3, 1) where n of the other annotators agree,
    averaged over which annotator is left out. Of ten, one makes 0.3, two 0.6, three 0.9, four 1.
    Where fewer than three others are left, all of them are needed in place of 3, so that what all
    annotators gave is always 1: of three, one makes 1/3, two 2/3; of two, one 1/2. Where there is
    one annotator, as in DAQUAR, it is 1 or 0.

    Args:
        agreeing: annotators who gave the answer.
        annotators: all of them.
    """
    if annotators == 1:
        return float(agreeing)
    needed = min(3, annotators - 1)
    leaving_one_of_them = min((agreeing - 1) / needed, 1.0)
    leaving_another = min(agreeing / needed, 1.0)
    others = annotators - agreeing
    return (agreeing * leaving_one_of_them + others * leaving_another) / annotators


def accepted_answers(answers: Sequence[str]) -> dict[str, float]:
    """The normalised answers to a question with their soft scores, most frequent first.

    The soft score is the ``accuracy`` of the answer, that of few annotators too. Ties are in
    alphabetical order.

    Args:
        answers: as the annotators wrote them.
    """
    counts = collections.Counter(filter(None, map(normalise_answer, answers)))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {answer: accuracy(count, len(answers)) for answer, count in ordered}


def most_common_answers(
    accepted: Iterable[Sequence[str] | dict[str, float]], num_answers: int
) -> tuple[str, ...]:
    """The answers that are the most common answer to most questions, in that order.

    Args:
        accepted: for each question its normalised answers, most frequent first.
        num_answers: how many at most.
    """
    counts = collections.Counter(next(iter(answers)) for answers in accepted if answers)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(answer for answer, _ in ordered[:num_answers])


def read_answers(file: pathlib.Path, key: str) -> tuple[str, ...]:
    """An answer list: a JSON list of texts that differ also in normal form.

    Args:
        file: the list.
        key: config key that names it.

    Raises:
        ConfigError: the file is absent or holds something else.
        ValueError: the file is not JSON.
    """
    if not file.is_file():
        raise ConfigError(key, f"no such file: {file}", "Name a JSON list of answers")
    answers = read_json(file)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ConfigError(key, f"{file} is not a list of texts", 'Write it as ["yes", "no", ...]')
    counts = collections.Counter(map(normalise_answer, answers))
    twice = [answer for answer in answers if counts[normalise_answer(answer)] > 1]
    if twice or not all(counts):
        faulty = twice or [answer for answer in answers if not normalise_answer(answer)]
        raise ConfigError(
            key,
            f"{file}: {', '.join(map(repr, faulty[:4]))} are the same answer or none in normal "
            "form (no articles, no punctuation, digits)",
            "Keep one of each",
        )
    return tuple(answers)


def check_coverage(
    classes: Sequence[str],
    accepted: Sequence[dict[str, float]],
    min_coverage: float,
    key: str,
) -> None:
    """Refuses an answer list that misses the answers to too many questions.

    Args:
        classes: the answer list.
        accepted: the normalised answers to each question; a question counts as covered if the
            list has one of them.
        min_coverage: share of the questions that must be covered, in [0, 1].
        key: config key of the list, for messages.

    Raises:
        ConfigError: the share is smaller.
    """
    known = set(map(normalise_answer, classes))
    missed = [answers for answers in accepted if known.isdisjoint(answers)]
    coverage = 1 - len(missed) / len(accepted)
    if coverage >= min_coverage:
        return
    examples = most_common_answers(missed, 4)
    raise ConfigError(
        key,
        f"an answer list that misses answers: its {len(classes)} answers cover {coverage:.1%} of "
        f"{len(accepted):,} train questions, min_coverage is {min_coverage:.1%}; missed are, for "
        f"example, {', '.join(map(repr, examples)) or 'answers that are empty in normal form'}",
        "Take a list made from these questions, raise num_answers, or lower min_coverage",
    )
