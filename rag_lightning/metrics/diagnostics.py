"""Diagnostics of a retriever in training: is it still searching, and does searching help?

Joint training can fail silently. A collapsed retriever returns the same few passages for every question (the
distinct-passage ratio falls towards 0); a generator that ignores its passages leaves the posterior flat (entropy near
log K) and gains nothing from them (retrieval utility near 0); an encoder that has drifted from its index shows at the
next refresh (overlap@K falls). None needs gold passages. Inputs are the ids, posteriors and likelihoods that a
training step has anyway.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from rag_lightning.errors import ConfigError, DataError


def distinct_passage_ratio(ids_BK: Int[Tensor, "B K"]) -> float:
    """Returns the number of distinct passages over the number of passages found, in [1 / (B K), 1].

    Passages not found (``-1``) count on neither side; 0 where none was found.

    >>> distinct_passage_ratio(torch.tensor([[7, 8], [7, 9]]))
    0.75
    """
    found_M = ids_BK[ids_BK >= 0]
    return torch.unique(found_M).numel() / found_M.numel() if found_M.numel() > 0 else 0.0


def posterior_entropy(posterior_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Returns the entropy ``-Σ_k p log p`` of ``p(z_k | x, y)`` in nats, between 0 and log K, in float32 at least.

    A passage of probability 0 (not found, score ``-inf``) adds nothing.

    Raises:
        DataError: A negative or NaN entry; of log-probabilities, pass the ``exp``.

    >>> posterior_entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    if not bool((posterior_BK >= 0).all()):
        raise DataError(
            "posterior_entropy: expected probabilities, came a negative or NaN value. "
            "Of log-probabilities pass the exp; a NaN comes from the model."
        )
    values_BK = posterior_BK if posterior_BK.dtype == torch.float64 else posterior_BK.float()
    entropies_BK: Tensor = torch.special.entr(values_BK)
    return entropies_BK.sum(dim=1)


def overlap_at_k(ids_before_BK: Int[Tensor, "B K"], ids_after_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Returns ``|before ∩ after| / K``, the share of a question's passages that a refresh of the index kept.

    The order within the K plays no role. Passages not found (``-1``) are never shared.

    Raises:
        ConfigError: The two have different shapes.

    >>> overlap_at_k(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[4, 9, 8, 1]]))
    tensor([0.5000])
    """
    _check_same_shape("overlap_at_k: ids before and after the refresh", ids_before_BK, ids_after_BK)
    same_BKK = (ids_before_BK[:, :, None] == ids_after_BK[:, None, :]) & (ids_before_BK >= 0)[:, :, None]
    return same_BKK.any(dim=2).float().mean(dim=1)


def retrieval_utility(
    marginal_log_likelihood_B: Float[Tensor, "B"], no_passage_log_likelihood_B: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Returns what the passages add to the answer's log-likelihood, in nats.

    REALM (Guu et al. 2020) measures the same of a single passage; here it is of the K together.

    Args:
        marginal_log_likelihood_B: ``log p(y | x)``, marginalised over the retrieved passages.
        no_passage_log_likelihood_B: ``log p(y | x)`` of the same generator given the question alone.

    Raises:
        ConfigError: The two have different shapes.

    >>> retrieval_utility(torch.tensor([-1.0, -5.0]), torch.tensor([-4.0, -4.5]))
    tensor([ 3.0000, -0.5000])
    """
    _check_same_shape("retrieval_utility: the log-likelihoods", marginal_log_likelihood_B, no_passage_log_likelihood_B)
    wide = torch.promote_types(marginal_log_likelihood_B.dtype, torch.float32)
    return marginal_log_likelihood_B.to(wide) - no_passage_log_likelihood_B.to(wide)


def _check_same_shape(what: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ConfigError(f"{what}: expected one shape, came {tuple(one.shape)} and {tuple(other.shape)}.")


class DiagnosticMetrics(Metric):
    """The diagnostics over an epoch.

    ``compute`` returns ``{"distinct_passage_ratio", "posterior_entropy", "retrieval_utility", "null_probability",
    "null_posterior"}``; what no question counted towards is left out. The ratio is that of all passages found since the
    last reset, over all batches and processes: it falls as the epoch grows past the corpus, so compare it between
    epochs of one length.

    Args:
        corpus_size: N, the number of passages that may be found.

    Raises:
        ConfigError: ``corpus_size`` below 1.

    >>> metric = DiagnosticMetrics(corpus_size=10)
    >>> metric.update(torch.tensor([[7, 8]]), torch.tensor([[1.0, 0.0]]))
    >>> metric.update(torch.tensor([[7, 9]]), torch.tensor([[1.0, 0.0]]))
    >>> metric.compute()
    {'distinct_passage_ratio': tensor(0.7500), 'posterior_entropy': tensor(0.)}
    """

    is_differentiable = False
    full_state_update = False

    seen_N: Tensor
    num_found: Tensor
    sum_entropy: Tensor
    num_entropies: Tensor
    sum_utility: Tensor
    num_utilities: Tensor
    sum_null: Tensor
    num_null: Tensor

    def __init__(self, *, corpus_size: int) -> None:
        super().__init__()
        if corpus_size < 1:
            raise ConfigError(f"corpus_size: expected the number of passages, at least 1; came {corpus_size}.")
        # one byte for each passage; the maximum over processes is the union of what they saw
        self.add_state("seen_N", torch.zeros(corpus_size, dtype=torch.uint8), dist_reduce_fx="max")
        for name in ("num_found", "num_entropies", "num_utilities", "num_null"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        for name in ("sum_entropy", "sum_utility"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("sum_null", torch.zeros(2), dist_reduce_fx="sum")  # of priors and of posteriors

    def update(
        self,
        ids_BK: Int[Tensor, "B K"],
        posterior_BK: Float[Tensor, "B K"] | None = None,
        utility_B: Float[Tensor, "B"] | None = None,
    ) -> None:
        """Adds questions.

        Args:
            ids_BK: Passages found, ``-1`` where none.
            posterior_BK: ``p(z_k | x, y)``, where known.
            utility_B: :func:`retrieval_utility`, where the no-passage likelihood was computed.

        Raises:
            DataError: An id outside the corpus, or a posterior that is not one.
        """
        found_M = ids_BK[ids_BK >= 0].to(self.seen_N.device)
        if found_M.numel() > 0 and int(found_M.max()) >= self.seen_N.numel():
            raise DataError(
                f"DiagnosticMetrics: expected passage numbers below corpus_size = {self.seen_N.numel()}, "
                f"came {int(found_M.max())}. Give the size of the corpus that is searched."
            )
        self.seen_N[found_M] = 1
        self.num_found += found_M.numel()
        if posterior_BK is not None:
            self.sum_entropy += posterior_entropy(posterior_BK.detach()).sum().to(self.sum_entropy)
            self.num_entropies += posterior_BK.shape[0]
        if utility_B is not None:
            self.sum_utility += utility_B.detach().float().sum().to(self.sum_utility)
            self.num_utilities += utility_B.shape[0]

    def update_null(self, prior_B: Float[Tensor, "B"], posterior_B: Float[Tensor, "B"]) -> None:
        """Adds what a model with a null passage chose: ``p(∅ | x)`` and ``p(∅ | x, y)`` of each question."""
        both_2B = torch.stack([prior_B.detach(), posterior_B.detach()])
        self.sum_null += both_2B.sum(dim=1).to(self.sum_null)
        self.num_null += prior_B.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Returns the diagnostics over all questions added."""
        figures: dict[str, Tensor] = {}
        if self.num_found > 0:
            figures["distinct_passage_ratio"] = self.seen_N.sum(dtype=torch.long) / self.num_found
        if self.num_entropies > 0:
            figures["posterior_entropy"] = self.sum_entropy / self.num_entropies
        if self.num_utilities > 0:
            figures["retrieval_utility"] = self.sum_utility / self.num_utilities
        if self.num_null > 0:
            figures["null_probability"], figures["null_posterior"] = self.sum_null / self.num_null
        return figures
