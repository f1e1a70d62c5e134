"""Bootstrap intervals, against a naive one with loops and against what is known of easy cases."""

import inspect

import numpy as np
import pytest

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.reports.bootstrap import difference_interval, mean_interval

RNG = np.random.default_rng(3)
SCORES = (RNG.random((4, 60)) < 0.6).astype(float)


def naive(scores_SQ: np.ndarray, count: int) -> tuple[float, float]:
    rng, means = np.random.default_rng(11), []
    for _ in range(count):
        seeds = rng.integers(len(scores_SQ), size=len(scores_SQ))
        questions = rng.integers(scores_SQ.shape[1], size=scores_SQ.shape[1])
        means.append(np.mean([[scores_SQ[seed, question] for question in questions] for seed in seeds]))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_the_interval_is_that_of_loops() -> None:
    assert mean_interval(SCORES, num_resamples=3000) == pytest.approx(naive(SCORES, 3000), abs=0.015)


def test_seeds_widen_it_as_much_as_they_differ() -> None:
    same = np.repeat(SCORES[:1], 4, axis=0)
    apart = same + np.array([-0.3, -0.1, 0.1, 0.3])[:, None]
    width = [np.diff(mean_interval(scores))[0] for scores in (same, apart)]
    assert width[0] == pytest.approx(np.diff(mean_interval(SCORES[:1]))[0], abs=0.03)
    assert width[1] > 1.1 * width[0]


def test_of_questions_alone_it_is_the_normal_one() -> None:
    scores = (RNG.random((1, 2000)) < 0.3).astype(float)
    half = 1.96 * np.sqrt(scores.mean() * (1 - scores.mean()) / 2000)
    assert mean_interval(scores) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.004)


def test_what_is_hard_for_both_cancels() -> None:
    hard = RNG.random((1, 300)) < 0.5
    first, second = np.repeat(hard * 1.0, 3, axis=0), np.repeat(hard * 1.0, 3, axis=0)
    second[:, :30] = 0.0
    paired = difference_interval(first, second, same_seeds=True)
    assert paired[0] > 0
    alone = [mean_interval(scores) for scores in (first, second)]
    assert alone[0][0] < alone[1][1]  # apart, the two overlap


def test_other_seeds_are_drawn_apart() -> None:
    first, second = SCORES[:3] + np.array([[0.2], [0.0], [-0.2]]), SCORES[:3] + np.array([[0.2], [0.0], [-0.2]])
    together = difference_interval(first, second, same_seeds=True)
    apart = difference_interval(first, second, same_seeds=False)
    assert together == (0.0, 0.0)
    assert np.diff(apart)[0] > 0.2
    assert difference_interval(first, second[:2], same_seeds=False) is not None


def test_a_single_figure_has_no_spread() -> None:
    one = np.array([[0.4]])
    assert mean_interval(one) is None
    assert difference_interval(one, one, same_seeds=False) is None


def test_it_is_the_same_again() -> None:
    assert mean_interval(SCORES, seed=5) == mean_interval(SCORES, seed=5) != mean_interval(SCORES, seed=6)


def test_what_cannot_be_drawn_from_is_refused() -> None:
    with pytest.raises(DataError, match="expected finite scores, at least one, came an array of shape"):
        mean_interval(np.array([[np.nan, 1.0]]))
    with pytest.raises(DataError, match="expected the same questions and seeds, came scores of shape"):
        difference_interval(SCORES, SCORES[:2], same_seeds=True)
    with pytest.raises(DataError, match="expected the same questions, came"):
        inspect.unwrap(difference_interval)(SCORES, SCORES[:, :5], same_seeds=False)
    with pytest.raises(ConfigError, match="at least one resample, got level=0.95, num_resamples=0"):
        mean_interval(SCORES, num_resamples=0)
