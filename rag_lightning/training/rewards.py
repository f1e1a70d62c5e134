"""Rewards: what an answer, and the passages behind it, are worth; numbers from 0 to 1 without a derivative."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.metrics.answers import exact_match, token_f1
from rag_lightning.types import Question


@dataclass(frozen=True, slots=True)
class Attempt:
    """One answer to a question.

    Attributes:
        question: Asked, with its accepted answers and gold passages.
        answer: Given.
        cited_passage_id: Of the passage that the answer came from most likely, ``argmax p(z|x,y)``.
    """

    question: Question
    answer: str
    cited_passage_id: str


Reward = Callable[[Attempt], float]


def exact_match_reward(attempt: Attempt) -> float:
    """Returns 1 if the answer is one of the accepted ones after normalisation, else 0."""
    question = attempt.question
    return float(exact_match(attempt.answer, question.answers, question.answer_regex))


def f1_reward(attempt: Attempt) -> float:
    """Returns the best token F1 of the answer with an accepted one; exact match where there is only an expression."""
    question = attempt.question
    return token_f1(attempt.answer, question.answers) if question.answers else exact_match_reward(attempt)


def citation_reward(attempt: Attempt) -> float:
    """Returns 1 if the passage that the answer came from most likely is a gold one, else 0.

    Raises:
        DataError: The question names no gold passage.
    """
    gold = attempt.question.positive_passage_ids
    if not gold:
        raise DataError(
            f"reward citation: question {attempt.question.id!r} has no positive_passage_ids, so no citation could ever "
            "earn anything. Add them, or leave reinforce.rewards.citation out."
        )
    return float(attempt.cited_passage_id in gold)


KNOWN: dict[str, Reward] = {"exact_match": exact_match_reward, "f1": f1_reward, "citation": citation_reward}


class WeightedReward:
    """The weighted mean of several rewards.

    Args:
        weights: Of ``exact_match``, ``f1``, ``citation``, and of ``own`` ones by their names; 0 leaves one out.
        own: Further rewards; each has to give a number from 0 to 1.

    Raises:
        ConfigError: No reward, an unknown name, or a negative weight.

    >>> reward = WeightedReward({"exact_match": 1.0, "f1": 1.0})
    >>> round(reward(Attempt(Question("1", "who?", ("Carlos Saldanha",)), "Saldanha", "p1")), 3)
    0.333
    """

    def __init__(self, weights: Mapping[str, float], own: Mapping[str, Reward] | None = None) -> None:
        self.rewards: dict[str, Reward] = {**KNOWN, **(own or {})}
        for name, weight in weights.items():
            if name not in self.rewards:
                raise ConfigError(f"reinforce.rewards: expected some of {', '.join(self.rewards)}, got {name!r}")
            if not weight >= 0:
                raise ConfigError(f"reinforce.rewards.{name}: expected a weight of 0 or more, got {weight}")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not self.weights:
            raise ConfigError(
                f"reinforce.rewards: expected some of {', '.join(self.rewards)} with weights above 0, got none"
            )

    def __call__(self, attempt: Attempt) -> float:
        """Returns the mean.

        Raises:
            ConfigError: A reward out of range: advantages would be of a size that the loss is not made for.
        """
        total = 0.0
        for name, weight in self.weights.items():
            value = self.rewards[name](attempt)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(
                    f"reward {name}: expected a number from 0 to 1, came {value} for question {attempt.question.id!r} "
                    f"and answer {attempt.answer!r}. Scale it."
                )
            total += weight * value
        return total / sum(self.weights.values())
