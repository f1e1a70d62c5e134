"""The marginals as the paper prints them, in probabilities of plain Python: the oracle of the loss tests."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def prior(scores: Sequence[float]) -> list[float]:
    """p(z_k | x) of one question."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]


def rag_sequence(token_probs_KT: Rows, prior_K: Sequence[float], scored_T: Sequence[bool]) -> float:
    """Σ_k p(z_k|x) Π_t p(y_t|x,z_k,y_<t) of one example."""
    total = 0.0
    for passage, probs_T in enumerate(token_probs_KT):
        product = prior_K[passage]
        for scored, prob in zip(scored_T, probs_T, strict=True):
            if scored:
                product *= prob
        total += product
    return total


def rag_token(token_probs_KT: Rows, prior_K: Sequence[float], scored_T: Sequence[bool]) -> float:
    """Π_t Σ_k p(z_k|x) p(y_t|x,z_k,y_<t) of one example."""
    product = 1.0
    for place, scored in enumerate(scored_T):
        if scored:
            mixture = 0.0
            for passage, probs_T in enumerate(token_probs_KT):
                mixture += prior_K[passage] * probs_T[place]
            product *= mixture
    return product


def posterior(token_probs_KT: Rows, prior_K: Sequence[float], scored_T: Sequence[bool]) -> list[float]:
    """p(z_k | x, y) of one example, by Bayes."""
    joint = [rag_sequence([probs_T], [prior_K[passage]], scored_T) for passage, probs_T in enumerate(token_probs_KT)]
    return [value / sum(joint) for value in joint]
