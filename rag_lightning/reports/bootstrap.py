"""Bootstrap intervals for a mean over seeds and test questions, and for the difference of two such means.

Inputs: one score for each seed and question (0 or 1 of exact match, F1, …), or one figure for each seed where a metric
is of a whole test set (BLEU). Seeds and questions are crossed, not nested: all runs answer the same questions. So both
are drawn anew, each with replacement, and a resample is the mean over the drawn seeds at the drawn questions: it speaks
of another training and of other questions. Intervals are percentiles (Efron and Tibshirani 1993, §13). The percentiles
of few seeds are too narrow, as the spread of n drawn ones is (n - 1) / n of the truth on average: of one seed, nothing
is known of the spread over seeds.

Of two systems on the same questions the same questions are drawn for both, and the same seeds where both have the same
(Koehn 2004, paired bootstrap): what is hard for both then cancels.
"""

from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from rag_lightning.errors import ConfigError, DataError

Interval: TypeAlias = tuple[float, float]
Scores: TypeAlias = Float[np.ndarray, "S Q"]
_CHUNK = 250
"""Resamples at a time: what is held is so many rows of Q numbers."""


def mean_interval(
    scores_SQ: Scores, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Returns the interval of the mean of all scores.

    Args:
        scores_SQ: A row for each seed, a column for each question; a single column where a seed has one figure.
        level: Share of the resamples within.
        num_resamples: Draws.
        seed: Of the draws.

    Returns:
        Lower and upper end; None of a single number, which has no spread.

    Raises:
        ConfigError: A level outside (0, 1), or no resample.
        DataError: No score, or one that is not finite.

    >>> lower, upper = mean_interval(np.array([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]]), num_resamples=500)
    >>> round(lower, 5), round(upper, 5)
    (0.36875, 1.0)
    >>> mean_interval(np.array([[0.5]])) is None
    True
    """
    _check(scores_SQ, level, num_resamples)
    if scores_SQ.size == 1:
        return None
    return _percentiles(_resampled_means(scores_SQ, num_resamples, np.random.default_rng(seed)), level)


def difference_interval(
    first_SQ: Scores,
    second_SQ: Float[np.ndarray, "S2 Q"],
    *,
    same_seeds: bool,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Returns the interval of the first mean minus the second, over the same questions.

    Args:
        first_SQ: As in :func:`mean_interval`.
        second_SQ: Of the other system, columns for the same questions in the same order.
        same_seeds: Rows are of the same seeds in the same order, and are drawn together.
        level: Share of the resamples within.
        num_resamples: Draws.
        seed: Of the draws.

    Raises:
        ConfigError: A level outside (0, 1), or no resample.
        DataError: Not the same questions, or with ``same_seeds`` not as many seeds.

    >>> right, wrong = np.ones((3, 20)), np.zeros((3, 20))
    >>> [round(end, 6) for end in difference_interval(right, wrong, same_seeds=True, num_resamples=100)]
    [1.0, 1.0]
    """
    for scores_SQ in (first_SQ, second_SQ):
        _check(scores_SQ, level, num_resamples)
    if first_SQ.shape[1] != second_SQ.shape[1] or (same_seeds and len(first_SQ) != len(second_SQ)):
        raise DataError(
            f"difference: expected the same questions{' and seeds' if same_seeds else ''}, came scores of shape "
            f"{first_SQ.shape} and {second_SQ.shape}."
        )
    if same_seeds:
        return mean_interval(first_SQ - second_SQ, level=level, num_resamples=num_resamples, seed=seed)
    if first_SQ.size == 1 and second_SQ.size == 1:
        return None
    rng = np.random.default_rng(seed)
    differences = []
    for count in _chunks(num_resamples):
        by_question_RQ = _seed_means(first_SQ, count, rng) - _seed_means(second_SQ, count, rng)
        differences.append((by_question_RQ * _drawn(first_SQ.shape[1], count, rng)).sum(axis=1))
    return _percentiles(np.concatenate(differences), level)


def _resampled_means(scores_SQ: Scores, num_resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "R"]:
    means = []
    for count in _chunks(num_resamples):
        by_question_RQ = _seed_means(scores_SQ, count, rng)
        means.append((by_question_RQ * _drawn(scores_SQ.shape[1], count, rng)).sum(axis=1))
    return np.concatenate(means)


def _chunks(num_resamples: int) -> list[int]:
    return [min(_CHUNK, num_resamples - start) for start in range(0, num_resamples, _CHUNK)]


def _seed_means(scores_SQ: Scores, count: int, rng: np.random.Generator) -> Float[np.ndarray, "R Q"]:
    """Returns each question's mean over seeds drawn anew, ``count`` times."""
    return np.asarray(_drawn(len(scores_SQ), count, rng) @ scores_SQ)


def _drawn(size: int, count: int, rng: np.random.Generator) -> Float[np.ndarray, "R N"]:
    """Returns how large a share of a resample each of ``size`` things is; rows add up to 1."""
    return rng.multinomial(size, np.full(size, 1 / size), size=count) / size


def _percentiles(means_R: Float[np.ndarray, "R"], level: float) -> Interval:
    lower, upper = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def _check(scores_SQ: np.ndarray, level: float, num_resamples: int) -> None:
    if not 0 < level < 1 or num_resamples < 1:
        raise ConfigError(
            f"bootstrap: expected a level between 0 and 1 and at least one resample, got level={level}, "
            f"num_resamples={num_resamples}."
        )
    if scores_SQ.size == 0 or not np.isfinite(scores_SQ).all():
        raise DataError(f"bootstrap: expected finite scores, at least one, came an array of shape {scores_SQ.shape}.")
