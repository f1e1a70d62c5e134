"""Does a model that is sure of its answer tend to be right? The probability of the answer against its correctness.

Inputs: for each answer its probability ``p(y|x)`` (``exp`` of the log-likelihood, marginalised over the passages) and
whether it was right. The expected calibration error (Naeini et al. 2015; Guo et al. 2017) is the mean distance of a
bin's accuracy from its mean probability, weighted by the bin's size, over bins of equal width. The probability of a
whole sequence falls with its length and is shared among its paraphrases, so answers of a well-trained model look less
sure than they are.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from rag_lightning.errors import ConfigError, DataError


@dataclass(frozen=True)
class Reliability:
    """Answers by how probable they were.

    Attributes:
        edges: Of the bins, one more than bins.
        counts: Answers in each.
        confidence: Mean probability in each; NaN where it is empty.
        accuracy: Share of right answers in each; NaN where it is empty.
        error: Expected calibration error, a fraction of 1.
    """

    edges: Float[np.ndarray, "E"]
    counts: Int[np.ndarray, "N"]
    confidence: Float[np.ndarray, "N"]
    accuracy: Float[np.ndarray, "N"]
    error: float


def reliability(
    probabilities: Float[np.ndarray, "Q"], right: Bool[np.ndarray, "Q"], *, num_bins: int = 10
) -> Reliability:
    """Returns accuracy by probability, in bins of equal width, and the expected calibration error.

    Raises:
        ConfigError: No bin.
        DataError: No answer, not as many of both, or a probability outside [0, 1].

    >>> round(reliability(np.array([0.95, 0.85, 0.15]), np.array([True, True, False]), num_bins=2).error, 4)
    0.1167
    """
    if num_bins < 1:
        raise ConfigError(f"num_bins: expected at least 1, got {num_bins}.")
    if len(probabilities) == 0 or len(probabilities) != len(right):
        raise DataError(
            f"calibration: expected a probability for each answer, came {len(probabilities)} for {len(right)} answers."
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise DataError("calibration: expected probabilities between 0 and 1, came others. Are log-likelihoods finite?")
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    places = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(places, minlength=num_bins)
    sums = [np.bincount(places, weights=values, minlength=num_bins) for values in (probabilities, right.astype(float))]
    confidence, accuracy = (np.divide(total, counts, out=np.full(num_bins, np.nan), where=counts > 0) for total in sums)
    error = float(np.nansum(counts * np.abs(accuracy - confidence)) / counts.sum())
    return Reliability(edges, counts, confidence, accuracy, error)
