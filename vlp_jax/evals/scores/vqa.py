"""VQA accuracy as its authors define it (Antol et al. 2015; Goyal et al. 2017 for VQA v2)."""

from collections.abc import Sequence

from vlp_jax.data.tasks.answers import accuracy, normalise_answer


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of one prediction, in [0, 1]; a data set's is the mean over its questions.

    It is that of ``answers.accuracy``. As in the authors' code, texts are compared in normal form,
    but where all of several annotators wrote the same, as they are.

    Args:
        prediction: the answer predicted.
        answers: as the annotators wrote them.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("a question without annotators' answers has no accuracy")
    answers = [_one_line(answer) for answer in answers]
    prediction = _one_line(prediction)
    if len(answers) == 1 or len(set(answers)) > 1:
        answers = [normalise_answer(answer) for answer in answers]
        prediction = normalise_answer(prediction)
    return accuracy(sum(answer == prediction for answer in answers), len(answers))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
