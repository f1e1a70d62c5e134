"""Verdicts on answers, and the shares that come of them."""

import pytest

from rag_lightning.errors import DataError
from rag_lightning.reports.error_analysis import ErrorCounts, judge, loosely_same
from rag_lightning.types import Passage, Prediction, Question, RetrievedPassage

PASSAGES = {"p": Passage("p", "Kismet", "A film by Vincente Minnelli."), "o": Passage("o", "Oslo", "A town.")}
ASKED = Question("q", "who made Kismet", ("Vincente Minnelli",), ("p",))


def answered(answer: str, *found: str, question: Question = ASKED) -> Prediction:
    passages = tuple(RetrievedPassage(one, "", "", 1.0, 0.5, 0.5) for one in found)
    return Prediction(question.id, question.question, answer, -1.0, passages)


@pytest.mark.parametrize(
    ("answer", "found", "verdict"),
    [
        ("vincente minnelli", ("o",), "right"),
        ("Minnelli", ("p",), "annotation_mismatch"),
        ("William Dieterle", ("o", "p"), "not_read"),
        ("William Dieterle", ("o",), "not_retrieved"),
        ("", (), "not_retrieved"),
        ("someone", ("",), "not_retrieved"),
    ],
)
def test_each_answer_gets_its_verdict(answer: str, found: tuple[str, ...], verdict: str) -> None:
    (judged,) = judge([answered(answer, *found)], {"q": ASKED}, PASSAGES)
    assert judged.verdict == verdict
    assert judged.holds_answer == tuple(one == "p" for one in found)
    assert judged.is_gold == judged.holds_answer


def test_rows_of_different_lengths_keep_their_passages() -> None:
    other = Question("r", "where", ("town",))
    judged = judge([answered("x", "p", "o"), answered("y", "o", question=other)], {"q": ASKED, "r": other}, PASSAGES)
    assert [one.holds_answer for one in judged] == [(True, False), (True,)]


def test_a_regular_expression_is_right_or_wrong() -> None:
    asked = Question("q", "when", (), answer_regex="19[0-9]{2}")
    verdicts = [
        judge([answered(text, "o", question=asked)], {"q": asked}, PASSAGES)[0].verdict for text in ("in 1944", "44")
    ]
    assert verdicts == ["right", "not_retrieved"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Beyoncé", "beyonce", True),
        ("twenty-one", "21", False),
        ("two", "2", True),
        ("3rd", "third", True),
        ("1,000", "1000", True),
        ("1 000 people", "1000 people", True),
        ("May 1944", "1944", True),
        ("5", "5 million", False),
        ("14 May 1944", "May 1944", False),
        ("the Dieterle", "William Dieterle", True),
        ("he was William Dieterle as told by them", "Dieterle", False),
        ("John F. Kennedy Airport New York", "John F Kennedy Airport Jamaica York", True),
        ("10 May 1944 at noon", "11 May 1944 at noon", False),
        ("Paris", "London", False),
        ("", "the", False),
    ],
)
def test_lenient_readers(one: str, other: str, same: bool) -> None:
    assert loosely_same(one, other) is same
    assert loosely_same(other, one) is same


def test_the_shares_are_those_of_counting() -> None:
    cases = [("Vincente Minnelli", "o"), ("Vincente Minnelli", "p"), ("x", "o"), ("x", "p"), ("Minnelli", "o")]
    counts = ErrorCounts.of(judge([answered(answer, found) for answer, found in cases], {"q": ASKED}, PASSAGES))
    assert counts.counts == {"right": 2, "annotation_mismatch": 1, "not_retrieved": 1, "not_read": 1}
    assert counts.accuracy_without_passage == pytest.approx(1 / 3)  # the paper's 11.8 %
    assert counts.share_of_right_without_passage == pytest.approx(1 / 2)
    twice = ErrorCounts.sum([counts, counts])
    assert twice.num_questions == 10
    assert twice.as_dict()["accuracy_without_passage"] == pytest.approx(1 / 3)


def test_shares_of_nothing_are_none() -> None:
    counts = ErrorCounts.of(judge([answered("x", "p")], {"q": ASKED}, PASSAGES))
    assert counts.accuracy_without_passage is None
    assert counts.share_of_right_without_passage is None


def test_other_questions_or_passages_are_named() -> None:
    with pytest.raises(DataError, match="expected answers to the 0 given questions, came one to 'q'.*questions=FILE"):
        judge([answered("x")], {}, PASSAGES)
    with pytest.raises(DataError, match="expected ids of the given passages, came 'z'.*passages=FILE"):
        judge([answered("x", "z")], {"q": ASKED}, PASSAGES)
