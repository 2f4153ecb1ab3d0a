import itertools

import pytest

from vlp_jax.evals.scores import vqa_accuracy


def spread(**counts):
    return [answer for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "prediction", "expected"),
    [
        ({"yes": 10}, "yes", 1.0),
        ({"yes": 10}, "no", 0.0),
        # Leaving one of the 4 out leaves 3 of 3 needed, and so does leaving out another.
        ({"yes": 4, "no": 6}, "yes", 1.0),
        # 3 times 2/3 and 7 times 3/3: 9 of 10.
        ({"yes": 3, "no": 7}, "yes", 0.9),
        # 2 times 1/3 and 8 times 2/3: 6 of 10.
        ({"yes": 2, "no": 8}, "yes", 0.6),
        # Once 0 and 9 times 1/3: 3 of 10.
        ({"yes": 1, "no": 9}, "yes", 0.3),
        ({"yes": 1, "no": 9}, "maybe", 0.0),
    ],
)
def test_leave_one_out_over_ten_annotators(counts, prediction, expected):
    assert vqa_accuracy(prediction, spread(**counts)) == pytest.approx(expected)


def test_the_closed_form_is_the_average_over_the_annotators_left_out():
    for counts in itertools.product(range(4), repeat=3):
        answers = spread(**dict(zip(("red", "blue", "grey"), counts, strict=True)))
        if len(answers) < 2:
            continue
        scores = []
        for left_out in range(len(answers)):
            others = answers[:left_out] + answers[left_out + 1 :]
            scores.append(min(others.count("red") / min(3, len(others)), 1))
        assert vqa_accuracy("red", answers) == pytest.approx(sum(scores) / len(scores))


def test_answers_are_compared_in_normal_form_where_annotators_differ():
    answers = ["Two", "2", "2.", "the two", *["three"] * 6]
    assert vqa_accuracy("two", answers) == 1.0
    assert vqa_accuracy("a 3", answers) == 1.0


def test_unanimous_answers_are_compared_as_written_as_in_the_authors_code():
    assert vqa_accuracy(" one way\n", ["one way"] * 10) == 1.0
    assert vqa_accuracy("1 way", ["one way"] * 10) == 0.0


def test_a_single_answer_is_right_or_wrong():
    assert vqa_accuracy("garbage bin", ["Garbage bin."]) == 1.0
    assert vqa_accuracy("bin", ["garbage bin"]) == 0.0
    with pytest.raises(ValueError, match="without annotators' answers"):
        vqa_accuracy("bin", [])
