"""Ranking one relevant item among many: hit@k, nDCG@k and mean reciprocal rank.

Inputs: the rank of each question's one relevant item, from 1; 0 where it was not ranked at all. Use them where exactly
one item is right, as in next-item recommendation with one held-out item and in link prediction; whoever makes the ranks
settles ties and which other right items to leave out. For several relevant passages see
:mod:`~rag_lightning.metrics.passages`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from rag_lightning.errors import ConfigError, DataError


def hit_at(ranks_N: Int[Tensor, "N"], k: int) -> Float[Tensor, "N"]:
    """Returns 1 where the item is among the first k, else 0.

    Raises:
        ConfigError: ``k`` below 1.

    >>> hit_at(torch.tensor([1, 3, 0]), k=2)
    tensor([1., 0., 0.])
    """
    _check_cutoff(k)
    return ((ranks_N >= 1) & (ranks_N <= k)).float()


def ndcg_at(ranks_N: Int[Tensor, "N"], k: int) -> Float[Tensor, "N"]:
    """Returns the normalised discounted cumulative gain of the first k (Järvelin and Kekäläinen 2002).

    With one relevant item the ideal gain is 1, so it is ``1 / log2(1 + rank)``, and 0 beyond k.

    Raises:
        ConfigError: ``k`` below 1.

    >>> ndcg_at(torch.tensor([1, 3, 0]), k=3)
    tensor([1.0000, 0.5000, 0.0000])
    """
    return hit_at(ranks_N, k) / torch.log2(1 + ranks_N.clamp(min=1).float())


def reciprocal(ranks_N: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Returns 1 / rank, 0 where the item was not ranked.

    >>> reciprocal(torch.tensor([1, 4, 0]))
    tensor([1.0000, 0.2500, 0.0000])
    """
    return (ranks_N >= 1) / ranks_N.clamp(min=1)


class RankMetrics(Metric):
    """Means of hit@k, nDCG@k and the reciprocal rank over questions.

    ``compute`` returns ``{"hit@1", "ndcg@1", …, "mrr"}`` as fractions of 1; nothing where there were no questions.

    Args:
        ks: Cut-offs, each positive and named once.

    Raises:
        ConfigError: ``ks`` holds none, one twice or one below 1.

    >>> metric = RankMetrics(ks=(3,))
    >>> metric.update(torch.tensor([1, 3, 0, 4]))
    >>> metric.compute()
    {'hit@3': tensor(0.5000), 'ndcg@3': tensor(0.3750), 'mrr': tensor(0.3958)}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    num_questions: Tensor
    sum_hits: Tensor
    sum_gains: Tensor
    sum_reciprocal: Tensor

    def __init__(self, *, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
            raise ConfigError(f"ks: expected cut-offs of at least 1, each once, such as (1, 5, 10); came {tuple(ks)}.")
        self.ks = tuple(ks)
        self.add_state("num_questions", torch.tensor(0), dist_reduce_fx="sum")
        for name in ("sum_hits", "sum_gains"):
            self.add_state(name, torch.zeros(len(self.ks)), dist_reduce_fx="sum")
        self.add_state("sum_reciprocal", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, ranks_N: Int[Tensor, "N"]) -> None:
        """Adds questions by the rank of their relevant item.

        Args:
            ranks_N: From 1; 0 where it was not ranked.

        Raises:
            DataError: A rank below 0.
        """
        if ranks_N.numel() and int(ranks_N.min()) < 0:
            raise DataError(f"expected ranks from 1, or 0 for an item that was not ranked, came {int(ranks_N.min())}.")
        ranks_N = ranks_N.to(self.num_questions.device)
        self.num_questions += ranks_N.numel()
        self.sum_hits += torch.stack([hit_at(ranks_N, k).sum() for k in self.ks])
        self.sum_gains += torch.stack([ndcg_at(ranks_N, k).sum() for k in self.ks])
        self.sum_reciprocal += reciprocal(ranks_N).sum()

    def compute(self) -> dict[str, Tensor]:
        """Returns the means over all questions added."""
        if self.num_questions == 0:
            return {}
        figures: dict[str, Tensor] = {}
        for place, k in enumerate(self.ks):
            figures[f"hit@{k}"] = self.sum_hits[place] / self.num_questions
            figures[f"ndcg@{k}"] = self.sum_gains[place] / self.num_questions
        return figures | {"mrr": self.sum_reciprocal / self.num_questions}


def _check_cutoff(k: int) -> None:
    if k < 1:
        raise ConfigError(f"expected a cut-off k of at least 1, came {k}.")
