"""Why answers are wrong, and which are right without a passage that holds them.

Inputs: predictions, their questions with the accepted answers, and the passages' texts. Each answer gets one verdict:

=======================  ==============================================================================================
``right``                Exact match (or the question's regular expression), as the metric has it.
``annotation_mismatch``  Wrong by exact match, yet the same for a lenient reader, see :func:`loosely_same`.
``not_retrieved``        Wrong otherwise, and no retrieved passage holds an accepted answer.
``not_read``             Wrong otherwise, though a retrieved passage holds one.
=======================  ==============================================================================================

A passage holds an answer as recall by answer string has it, see
:func:`~rag_lightning.metrics.passages.relevant_by_answer`. Lewis et al. (2020, §4.1) report 11.8 % accuracy on NQ among
the questions whose answer is in no retrieved document, where an extractive reader scores 0:
:attr:`ErrorCounts.accuracy_without_passage`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rag_lightning.errors import DataError
from rag_lightning.metrics.answers import exact_match
from rag_lightning.metrics.passages import relevant_by_answer
from rag_lightning.text.normalise import Language, words_of
from rag_lightning.types import Passage, Prediction, Question

Verdict = Literal["right", "annotation_mismatch", "not_retrieved", "not_read"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MIN_SHARED_F1 = 0.8
MAX_FURTHER_WORDS = 3
_NUMBER_TEXT = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
"""
_ORDINAL_TEXT = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_NUMBER_WORDS: Mapping[str, str] = {
    **{word: str(number) for number, word in enumerate(_NUMBER_TEXT.split())},
    **{word: str(number) for number, word in enumerate(_ORDINAL_TEXT.split(), start=1)},
}
_SCALES = frozenset(("hundred", "thousand", "million", "billion", "trillion"))
_ORDINAL = re.compile(r"(\d+)(?:st|nd|rd|th)")


@dataclass(frozen=True, slots=True)
class Judged:
    """A prediction beside what was accepted.

    Attributes:
        prediction: The answer.
        question: With its accepted answers.
        verdict: See the module's table.
        holds_answer: Which of the prediction's passages hold an accepted answer.
        is_gold: Which of them the data set names as gold.
    """

    prediction: Prediction
    question: Question
    verdict: Verdict
    holds_answer: tuple[bool, ...]
    is_gold: tuple[bool, ...]

    @property
    def retrieved(self) -> bool:
        """Whether some passage holds an accepted answer."""
        return any(self.holds_answer)


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """How many answers got which verdict.

    Attributes:
        counts: By verdict, all of them named.
        num_without_passage: Questions whose accepted answers stand in no retrieved passage.
        num_right_without_passage: Those of them that were answered right.
    """

    counts: Mapping[Verdict, int]
    num_without_passage: int
    num_right_without_passage: int

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> "ErrorCounts":
        """Counts verdicts."""
        counts = Counter(one.verdict for one in judged)
        without = [one for one in judged if not one.retrieved]
        right = sum(one.verdict == "right" for one in without)
        return cls({verdict: counts[verdict] for verdict in VERDICTS}, len(without), right)

    @classmethod
    def sum(cls, parts: Sequence["ErrorCounts"]) -> "ErrorCounts":
        """Adds up the counts of several runs, at least one."""
        counts = {verdict: sum(part.counts[verdict] for part in parts) for verdict in VERDICTS}
        without = sum(part.num_without_passage for part in parts)
        return cls(counts, without, sum(part.num_right_without_passage for part in parts))

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts and shares as plain values."""
        return {
            **{str(verdict): count for verdict, count in self.counts.items()},
            "num_questions": self.num_questions,
            "num_without_passage": self.num_without_passage,
            "num_right_without_passage": self.num_right_without_passage,
            "accuracy_without_passage": self.accuracy_without_passage,
            "share_of_right_without_passage": self.share_of_right_without_passage,
        }

    @property
    def num_questions(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    @property
    def accuracy_without_passage(self) -> float | None:
        """Accuracy where no passage holds the answer, the 11.8 % of Lewis et al. 2020; None without such a question."""
        return self.num_right_without_passage / self.num_without_passage if self.num_without_passage > 0 else None

    @property
    def share_of_right_without_passage(self) -> float | None:
        """How many of the right answers stand in no retrieved passage; None where none is right."""
        num_right = self.counts["right"]
        return self.num_right_without_passage / num_right if num_right > 0 else None


def judge(
    predictions: Sequence[Prediction],
    questions: Mapping[str, Question],
    passages: Mapping[str, Passage],
    *,
    language: Language = "en",
) -> list[Judged]:
    """Returns a verdict on each prediction.

    Args:
        predictions: In any order.
        questions: By id.
        passages: With their texts, by id.
        language: Whose normalisation.

    Raises:
        DataError: A prediction of an unknown question, or with an unknown passage.

    >>> asked = Question("q", "who made Kismet", ("Vincente Minnelli",))
    >>> judge([Prediction("q", asked.question, "Minnelli", -0.5, ())], {"q": asked}, {})[0].verdict
    'annotation_mismatch'
    """
    asked = [question_of(prediction, questions) for prediction in predictions]
    rows = [tuple(_text_of(found.id, passages) for found in prediction.passages) for prediction in predictions]
    relevant_BK, _ = relevant_by_answer(rows, asked, language=language)
    judged = []
    for prediction, question, relevant in zip(predictions, asked, relevant_BK.tolist(), strict=True):
        holds = tuple(relevant[: len(prediction.passages)])
        gold = tuple(found.id in question.positive_passage_ids for found in prediction.passages)
        verdict = _verdict(prediction.answer, question, retrieved=any(holds), language=language)
        judged.append(Judged(prediction, question, verdict, holds, gold))
    return judged


def loosely_same(answer: str, accepted: str, language: Language = "en") -> bool:
    """Whether a lenient reader would call two answers the same.

    Both lose case, diacritics, punctuation, articles, thousands separators and ordinal endings; numbers up to twenty
    are written in digits. They are then the same where their words are, or where the words of one stand in the other
    in a row beside at most three more, none of them a number, or where they have the same numbers and the F1 of their
    words is at least 0.8.

    >>> loosely_same("Beyoncé Knowles-Carter", "Beyonce"), loosely_same("3rd", "Third"), loosely_same("5", "5 million")
    (True, True, False)
    """
    first, second = _loose_words(answer, language), _loose_words(accepted, language)
    if not first or not second:
        return False
    shorter, longer = sorted((first, second), key=len)
    if first == second or _stands_in(shorter, longer):
        return True
    shared = (Counter(first) & Counter(second)).total()
    return _numbers(first) == _numbers(second) and 2 * shared / (len(first) + len(second)) >= MIN_SHARED_F1


def question_of(prediction: Prediction, questions: Mapping[str, Question]) -> Question:
    """Returns a prediction's question.

    Raises:
        DataError: The questions are others.
    """
    if prediction.id not in questions:
        raise DataError(
            f"predictions: expected answers to the {len(questions)} given questions, came one to {prediction.id!r} "
            f"({prediction.question[:60]!r}). Give the question file that was answered: questions=FILE."
        )
    return questions[prediction.id]


def _verdict(answer: str, question: Question, *, retrieved: bool, language: Language) -> Verdict:
    if exact_match(answer, question.answers, question.answer_regex, language):
        return "right"
    if any(loosely_same(answer, accepted, language) for accepted in question.answers):
        return "annotation_mismatch"
    return "not_read" if retrieved else "not_retrieved"


def _text_of(passage_id: str, passages: Mapping[str, Passage]) -> Passage:
    if passage_id == "":  # nothing was found there, or the question alone was read
        return Passage("", "", "")
    if passage_id not in passages:
        raise DataError(
            f"predictions: expected ids of the given passages, came {passage_id!r}. Give the passages that were "
            "searched: passages=FILE."
        )
    return passages[passage_id]


def _loose_words(text: str, language: Language) -> list[str]:
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(sign for sign in decomposed if not unicodedata.combining(sign))
    joined = re.sub(r"(?<=\d)[,\s](?=\d{3}(?!\d))", "", plain)
    apart = "".join(" " if unicodedata.category(sign)[0] in "PS" else sign for sign in joined)
    return [_NUMBER_WORDS.get(word, _ORDINAL.sub(r"\1", word)) for word in words_of(apart, language)]


def _stands_in(shorter: list[str], longer: list[str]) -> bool:
    size = len(shorter)
    if len(longer) - size > MAX_FURTHER_WORDS:
        return False
    starts = [start for start in range(len(longer) - size + 1) if longer[start : start + size] == shorter]
    return any(not _numbers(longer[:start] + longer[start + size :]) for start in starts)


def _numbers(words: list[str]) -> list[str]:
    return sorted(word for word in words if word in _SCALES or any(sign.isdigit() for sign in word))
