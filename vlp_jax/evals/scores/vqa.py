"""VQA accuracy as its authors define it (Antol et al. 2015; Goyal et al. 2017 for VQA v2)."""

from collections.abc import Sequence

from vlp_jax.data.tasks.answers import normalise_answer


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of one prediction, in [0, 1]; a data set's is the mean over its questions.

    With several annotators an answer is as right as others gave it: min(n / 3, 1) where n of the
    other annotators agree, averaged over which annotator is left out. As in the authors' code,
    texts are compared in normal form, but where all annotators wrote the same, as they are.
    With one annotator, as in DAQUAR, it is 1 or 0, and texts are compared in normal form.

    Args:
        prediction: the answer predicted.
        answers: as the annotators wrote them.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("a question without annotators' answers has no accuracy")
    if len(answers) == 1:
        return float(normalise_answer(prediction) == normalise_answer(answers[0]))
    answers = [_one_line(answer) for answer in answers]
    prediction = _one_line(prediction)
    if len(set(answers)) > 1:
        answers = [normalise_answer(answer) for answer in answers]
        prediction = normalise_answer(prediction)
    agreeing = sum(answer == prediction for answer in answers)
    leaving_one_of_them = min((agreeing - 1) / 3, 1.0)
    leaving_another = min(agreeing / 3, 1.0)
    others = len(answers) - agreeing
    return (agreeing * leaving_one_of_them + others * leaving_another) / len(answers)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
