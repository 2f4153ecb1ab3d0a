import itertools
import json

import pytest

from vlp_jax.data.tasks import normalise_answer
from vlp_jax.data.tasks.answers import (
    accepted_answers,
    accuracy,
    check_coverage,
    most_common_answers,
    read_answers,
)
from vlp_jax.infra.errors import ConfigError


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        (" The cat\n", "cat"),
        ("a an the", ""),
        ("none", "0"),
        ("Ten", "10"),
        ("twenty one", "twenty 1"),
        ("eleven", "eleven"),
        # Punctuation that touches a space anywhere in the answer goes, other becomes a space.
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("meatballs, potatoes,vegetables", "meatballs potatoesvegetables"),
        ("red/white", "red white"),
        ("t-shirt", "t shirt"),
        ("1-12 x - y", "112 x y"),
        # A comma between digits makes all punctuation go.
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        # Periods go unless a digit follows.
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("5.", "5"),
        (".5 a.m.", ".5 am"),
        # Colons and apostrophes are no punctuation here.
        ("10:30", "10:30"),
        ("woman's", "woman's"),
        # Contractions get the apostrophe that they lack.
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("'ows'at", "'ow's'at"),
        ("its", "its"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
    ],
)
def test_normal_form_of_the_authors(answer, expected):
    assert normalise_answer(answer) == expected


def test_soft_scores():
    answers = ["Two"] * 2 + ["2"] * 2 + ["three"] * 3 + ["the"] + ["4", "five"]
    accepted = accepted_answers(answers)
    assert list(accepted) == ["2", "3", "4", "5"]  # by frequency, then the alphabet; no ""
    assert list(accepted.values()) == pytest.approx([1, 0.9, 0.3, 0.3])
    assert accepted_answers(["Garbage bin."]) == {"garbage bin": 1.0}
    assert accepted_answers(["a"]) == {}


@pytest.mark.parametrize("annotators", range(2, 11))
def test_accuracy_is_the_mean_over_the_annotator_left_out(annotators):
    needed = {2: 1, 3: 2}.get(annotators, 3)
    for agreeing in range(annotators + 1):
        given = [True] * agreeing + [False] * (annotators - agreeing)
        left = itertools.combinations(given, annotators - 1)
        mean = sum(min(sum(others) / needed, 1) for others in left) / annotators
        assert accuracy(agreeing, annotators) == pytest.approx(mean)
    assert accuracy(annotators, annotators) == 1
    assert accepted_answers(["Yes"] * annotators) == {"yes": 1.0}


def test_the_list_holds_the_most_common_majority_answers():
    questions = [["yes"] * 9 + ["no"], ["no"], ["yes"] * 10, ["blue"], ["?"]]
    accepted = [accepted_answers(answers) for answers in questions]
    assert most_common_answers(accepted, 10) == ("yes", "blue", "no")
    assert most_common_answers(accepted, 2) == ("yes", "blue")


def test_coverage():
    accepted = [accepted_answers([answer]) for answer in ("yes", "no", "two", "blue")]
    check_coverage(("Yes", "no", "2"), accepted, 0.75, "data.sources.vqa.answers")
    with pytest.raises(ConfigError, match=r"answer list that misses.* 75\.0% of 4 .*'blue'") as e:
        check_coverage(("yes", "no", "2"), accepted, 0.76, "data.sources.vqa.answers")
    assert e.value.key == "data.sources.vqa.answers"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"yes": 0}, "is not a list of texts"),
        (["yes", 1], "is not a list of texts"),
        (["yes", "two", "2"], "'two', '2' are the same answer"),
        (["yes", "the"], "'the' are the same answer or none"),
    ],
)
def test_faulty_answer_lists(tmp_path, content, problem):
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=problem) as error:
        read_answers(file, "data.sources.vqa.answers")
    assert error.value.key == "data.sources.vqa.answers"
    assert str(file) in str(error.value)


def test_absent_or_damaged_answer_lists(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: .*absent\.json"):
        read_answers(tmp_path / "absent.json", "answers")
    (tmp_path / "answers.json").write_text('["yes",')
    with pytest.raises(ValueError, match=r"answers\.json:1:8: not JSON"):
        read_answers(tmp_path / "answers.json", "answers")
