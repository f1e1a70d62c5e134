"""Exact match and token F1 of generated answers, after SQuAD's normalisation (Rajpurkar et al. 2016, §6.1).

Inputs: the text generated for each question, and the question with its accepted answers; the best of several answers
counts. Use them for short factual answers: both look at words only, so a paraphrase is wrong. CuratedTREC's questions
come with a regular expression in place of answers; for them exact match asks whether the expression is found in the
prediction (as in Chen et al. 2017, DrQA, and Lewis et al. 2020), and F1, which has no words to compare with, is not
counted. Chinese (``language="zh"``) is compared as CMRC 2018 compares it (Cui et al. 2019): character by character, F1
by the longest run that both share.
"""

from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor
from torchmetrics import Metric

from rag_lightning.errors import DataError
from rag_lightning.text.normalise import (
    Language,
    answer_tokens,
    matches_regex,
    mixed_segments,
    normalise_answer,
    normalise_chinese,
)
from rag_lightning.types import Question


def exact_match(
    prediction: str, answers: Sequence[str], answer_regex: str | None = None, language: Language = "en"
) -> bool:
    """Returns whether the prediction equals one of the answers after normalisation.

    Args:
        prediction: The generated answer.
        answers: Accepted answers; not looked at when ``answer_regex`` is given.
        answer_regex: A regular expression to be found anywhere in the prediction, in place of ``answers``.
        language: Whose normalisation.

    Raises:
        DataError: Neither answers nor a regular expression, or an invalid one.

    >>> exact_match("The Godfather!", ["Goodfellas", "godfather"])
    True
    >>> exact_match("in May 1944", [], answer_regex=r"19[0-9]{2}")
    True
    """
    if answer_regex is not None:
        return matches_regex(prediction, answer_regex)
    _require_answers(answers)
    normalise = normalise_chinese if language == "zh" else normalise_answer
    normalised = normalise(prediction)
    return any(normalised == normalise(answer) for answer in answers)


def token_f1(prediction: str, answers: Sequence[str], language: Language = "en") -> float:
    """Returns the best F1 of the words of the prediction and of an answer, each word counted as often as it occurs.

    Where nothing is left of either text after normalisation, F1 is 1 if nothing is left of both, else 0, as in the
    official script of SQuAD 2.0; so F1 is never below exact match. In Chinese, what both share is the longest run of
    characters that stands in both, as in the official script of CMRC 2018.

    Raises:
        DataError: No answers.

    >>> round(token_f1("directed by Carlos Saldanha", ["Carlos Saldanha", "Saldanha"]), 3)
    0.667
    """
    _require_answers(answers)
    if language == "zh":
        segments = mixed_segments(prediction)
        return max(_longest_run_f1(segments, mixed_segments(answer)) for answer in answers)
    predicted = answer_tokens(prediction)
    return max(_pair_f1(predicted, answer_tokens(answer)) for answer in answers)


def _pair_f1(predicted: list[str], accepted: list[str]) -> float:
    if not predicted or not accepted:
        return float(predicted == accepted)
    num_shared = (Counter(predicted) & Counter(accepted)).total()
    # 2PR / (P + R) with P = shared / predicted and R = shared / accepted
    return 2 * num_shared / (len(predicted) + len(accepted))


def _longest_run_f1(predicted: list[str], accepted: list[str]) -> float:
    if not predicted or not accepted:
        return float(predicted == accepted)
    run = SequenceMatcher(None, predicted, accepted, autojunk=False).find_longest_match()
    return 2 * run.size / (len(predicted) + len(accepted))


def _require_answers(answers: Sequence[str]) -> None:
    if not answers:
        raise DataError("expected at least one accepted answer, or a regular expression; came neither.")


class AnswerMetrics(Metric):
    """Means of exact match and F1 over questions.

    ``compute`` returns ``{"exact_match", "f1"}`` as fractions of 1. ``f1`` is the mean over the questions that have
    answers in words; it is left out where all have regular expressions, and both where there were no questions.

    Args:
        language: Whose normalisation.

    >>> metric = AnswerMetrics()
    >>> metric.update(["Carlos Saldanha"], [Question("1", "who directed Rio 2", ("Carlos Saldanha",))])
    >>> metric.compute()
    {'exact_match': tensor(1.), 'f1': tensor(1.)}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    num_questions: Tensor
    num_exact: Tensor
    num_worded: Tensor
    sum_f1: Tensor

    def __init__(self, *, language: Language = "en") -> None:
        super().__init__()
        self.language: Language = language
        for name in ("num_questions", "num_exact", "num_worded"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sum_f1", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], questions: Sequence[Question]) -> None:
        """Adds predictions, one for each question.

        Raises:
            DataError: Not as many predictions as questions.
        """
        if len(predictions) != len(questions):
            raise DataError(
                f"expected one prediction for each question, came {len(predictions)} for {len(questions)} questions."
            )
        num_exact, num_worded, sum_f1 = 0, 0, 0.0
        for prediction, question in zip(predictions, questions, strict=True):
            num_exact += exact_match(prediction, question.answers, question.answer_regex, self.language)
            if question.answer_regex is None:
                num_worded += 1
                sum_f1 += token_f1(prediction, question.answers, self.language)
        self.num_questions += len(questions)
        self.num_exact += num_exact
        self.num_worded += num_worded
        self.sum_f1 += sum_f1

    def compute(self) -> dict[str, Tensor]:
        """Returns the means over all questions added."""
        figures: dict[str, Tensor] = {}
        if self.num_questions > 0:
            figures["exact_match"] = self.num_exact / self.num_questions
        if self.num_worded > 0:
            figures["f1"] = self.sum_f1 / self.num_worded
        return figures
