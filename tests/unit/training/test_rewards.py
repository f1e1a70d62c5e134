import pytest

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.training.rewards import Attempt, WeightedReward
from rag_lightning.types import Question

ASKED = Question("q1", "who directed Rio 2?", ("Carlos Saldanha",), ("p7",))


@pytest.mark.parametrize(
    ("weights", "answer", "cited", "expected"),
    [
        ({"exact_match": 1.0}, "carlos saldanha.", "p1", 1.0),
        ({"exact_match": 1.0}, "Saldanha", "p1", 0.0),
        ({"f1": 2.0}, "Saldanha", "p1", 2 / 3),
        ({"citation": 1.0}, "anyone", "p7", 1.0),
        ({"citation": 1.0}, "anyone", "", 0.0),
        ({"f1": 3.0, "citation": 1.0}, "Carlos Saldanha", "p1", 0.75),
    ],
)
def test_rewards_by_hand(weights, answer, cited, expected):
    assert WeightedReward(weights)(Attempt(ASKED, answer, cited)) == pytest.approx(expected)


def test_an_expression_in_place_of_answers_is_matched():
    asked = Question("q2", "when?", (), answer_regex="19[0-9]{2}")
    for name in ("exact_match", "f1"):
        assert WeightedReward({name: 1.0})(Attempt(asked, "in 1944", "")) == 1.0


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_reward_out_of_range_is_refused(value):
    reward = WeightedReward({"mine": 1.0}, own={"mine": lambda _: value})
    with pytest.raises(ConfigError, match="reward mine: expected a number from 0 to 1, came .* for question 'q1'"):
        reward(Attempt(ASKED, "x", ""))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "got none"),
        ({"bleu": 1.0}, "got 'bleu'"),
        ({"f1": 0.0}, "got none"),
        ({"f1": -1.0}, "expected a weight of 0 or more, got -1.0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        WeightedReward(weights)


def test_citation_without_gold_passages_is_refused():
    with pytest.raises(DataError, match="question 'q3' has no positive_passage_ids"):
        WeightedReward({"citation": 1.0})(Attempt(Question("q3", "who?", ("a",)), "a", "p1"))
