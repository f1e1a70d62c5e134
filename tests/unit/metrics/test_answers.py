"""Exact match and F1 against an independent writing of SQuAD's rules and against torchmetrics'."""

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from rag_lightning.errors import DataError
from rag_lightning.metrics.answers import AnswerMetrics, exact_match, token_f1
from rag_lightning.types import Question

words = st.lists(
    st.sampled_from(["the", "A", "an", "Rio", "rio!", "2", "'til", "—", "Élan", "o'brien", "..."]), max_size=6
)
texts = words.map(" ".join)


def oracle_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    # an article is a whole run of word characters; other symbols part words for that purpose alone
    out, run = "", ""
    for character in kept + " ":
        if character.isalnum() or character == "_":
            run += character
            continue
        out += (" " if run in {"a", "an", "the"} else run) + character
        run = ""
    return out.split()


def oracle_f1(prediction: str, answer: str) -> float:
    left, right = oracle_words(prediction), oracle_words(answer)
    if not left or not right:
        return 1.0 if left == right else 0.0
    remaining, shared = list(right), 0
    for word in left:
        if word in remaining:
            remaining.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(left), shared / len(right)
    return 2 * precision * recall / (precision + recall)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_scores_agree_with_an_independent_writing_of_the_rules(prediction, answers):
    assert exact_match(prediction, answers) == any(oracle_words(prediction) == oracle_words(one) for one in answers)
    assert token_f1(prediction, answers) == pytest.approx(max(oracle_f1(prediction, one) for one in answers))


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_scores_agree_with_torchmetrics(prediction, answers):
    theirs = squad(
        [{"prediction_text": prediction, "id": "1"}],
        [{"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "1"}],
    )
    assert 100 * exact_match(prediction, answers) == pytest.approx(theirs["exact_match"].item())
    assert 100 * token_f1(prediction, answers) == pytest.approx(theirs["f1"].item(), abs=1e-4)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_f1_lies_between_exact_match_and_one(prediction, answers):
    assert exact_match(prediction, answers) <= token_f1(prediction, answers) <= 1


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Godfather", ["godfather"], True, 1.0),
        ("spider-man 2", ["Spiderman 2!"], True, 1.0),
        ("", ["Kismet"], False, 0.0),
        ("the", ["a"], True, 1.0),
        ("red red", ["red"], False, 2 / 3),
        ("Carlos", ["Don Rhymer", "Carlos Saldanha"], False, 2 / 3),
        ("x", ["y"], False, 0.0),
    ],
)
def test_known_scores(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) is exact
    assert token_f1(prediction, answers) == pytest.approx(f1)


def test_a_regular_expression_replaces_the_answers():
    assert exact_match("it was in NINETEEN forty-four", [], answer_regex=r"nineteen\s+forty")
    assert not exact_match("forty-four", ["forty-four"], answer_regex=r"^four")


def test_no_answers_are_refused():
    with pytest.raises(DataError, match="at least one accepted answer, or a regular expression; came neither"):
        exact_match("x", [])
    with pytest.raises(DataError, match="at least one accepted answer"):
        token_f1("x", [])


QUESTIONS = [
    Question("1", "?", ("red", "dark blue")),
    Question("2", "?", ("green",)),
    Question("3", "?", (), answer_regex="[0-9]{4}"),
]
PREDICTIONS = ["blue", "Green.", "in 1944"]


def test_metric_means_over_questions_and_leaves_regex_questions_out_of_f1():
    metric = AnswerMetrics()
    metric.update(PREDICTIONS, QUESTIONS)
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert figures == pytest.approx({"exact_match": 2 / 3, "f1": (2 / 3 + 1) / 2})


def test_uneven_batches_merging_and_reset_change_nothing():
    whole, parts, other = AnswerMetrics(), AnswerMetrics(), AnswerMetrics()
    whole.update(PREDICTIONS, QUESTIONS)
    parts.update(PREDICTIONS[:1], QUESTIONS[:1])
    other.update(PREDICTIONS[1:], QUESTIONS[1:])
    parts.merge_state(other)
    torch.testing.assert_close(parts.compute(), whole.compute())
    parts.reset()
    parts.update(["wrong"], QUESTIONS[1:2])
    assert parts.compute() == {"exact_match": torch.tensor(0.0), "f1": torch.tensor(0.0)}


def test_figures_without_questions_are_left_out():
    metric = AnswerMetrics()
    metric.update([], [])
    assert metric.compute() == {}
    metric.update(PREDICTIONS[2:], QUESTIONS[2:])
    assert set(metric.compute()) == {"exact_match"}


def test_predictions_must_match_questions():
    with pytest.raises(DataError, match="came 2 for 3 questions"):
        AnswerMetrics().update(PREDICTIONS[:2], QUESTIONS)


# the sums of the official script of CMRC 2018 (eval/cmrc2018_evaluate.py), worked out by hand
@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("山东省北部，环渤海地区。", ["山东省北部环渤海地区"], True, 1.0),
        ("北部地区", ["山东省北部环渤海地区"], False, 2 * 2 / (4 + 10)),  # the longest run is 北部 or 地区
        ("2004年", ["1999年", "2004 年"], True, 1.0),
        ("Nexon公司", ["韩国nexon"], False, 2 * 1 / (3 + 3)),
        ("", ["雪"], False, 0.0),
        ("，", ["雪"], False, 0.0),
    ],
)
def test_chinese_is_compared_as_cmrc_2018_does(prediction, answers, exact, f1):
    assert exact_match(prediction, answers, language="zh") == exact
    assert token_f1(prediction, answers, language="zh") == pytest.approx(f1)
    metric = AnswerMetrics(language="zh")
    metric.update([prediction], [Question("1", "?", tuple(answers))])
    assert metric.compute() == {"exact_match": torch.tensor(float(exact)), "f1": pytest.approx(f1)}
