"""Losses that train the retriever alone.

Inputs: similarities of questions and passages, or passage numbers. Assumption: every question has exactly one gold
passage that is learned from in its row; other passages that are gold for it are marked and left out.
Use :func:`in_batch_contrastive` to warm a retriever up before the marginal objectives, which need some gold
passages among the K retrieved to start learning from (the paper starts from a DPR trained this way).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def in_batch_contrastive(
    scores_BN: Float[Tensor, "B N"],
    positives_B: Int[Tensor, "B"],
    ignored_BN: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B"]:
    """Returns ``-log softmax`` of each question's gold passage among the batch's passages (DPR §3.2, eq. 3).

    Args:
        scores_BN: Similarities of B questions with N passages: the batch's gold passages and any hard negatives.
        positives_B: Column of each question's gold passage.
        ignored_BN: True where a passage must not count as a negative, for instance because two questions of the
            batch share their gold passage. The gold passage itself is never ignored.

    Raises:
        ValueError: A column out of range, or fewer than two passages (the loss would be 0 and teach nothing).

    >>> in_batch_contrastive(torch.zeros(2, 2), torch.tensor([0, 1]))  # log 2
    tensor([0.6931, 0.6931])
    """
    if scores_BN.shape[1] < 2:
        raise ValueError(f"expected at least two passages to contrast, got {scores_BN.shape[1]}: raise the batch size")
    if bool(((positives_B < 0) | (positives_B >= scores_BN.shape[1])).any()):
        raise ValueError(f"expected gold columns within 0..{scores_BN.shape[1] - 1}, got {positives_B.tolist()}")
    scores_BN = scores_BN if scores_BN.dtype == torch.float64 else scores_BN.float()
    if ignored_BN is not None:
        gold_BN = torch.nn.functional.one_hot(positives_B, scores_BN.shape[1]).bool()
        scores_BN = scores_BN.masked_fill(ignored_BN & ~gold_BN, -torch.inf)
    return torch.nn.functional.cross_entropy(scores_BN, positives_B, reduction="none")


def false_negatives(
    gold_BG: Int[Tensor, "B G"], ids_N: Int[Tensor, "N"], counted_N: Bool[Tensor, "N"] | None = None
) -> Bool[Tensor, "B N"]:
    """Returns True where a passage must not count as a question's negative: it is gold for it, or only a filler.

    With more questions in a batch, and with hard negatives, it grows likely that one question's passage answers
    another too; a loss that pushes it away from its own question unlearns what was learned.

    Args:
        gold_BG: All gold passages known of each question, filled up with -1.
        ids_N: Passage numbers of the columns; -1 where unknown, which is gold for none.
        counted_N: False on passages that only keep processes in step.

    >>> false_negatives(torch.tensor([[7, 9], [8, -1]]), torch.tensor([7, 8, 9, -1]))
    tensor([[ True, False,  True, False],
            [False,  True, False, False]])
    """
    same_BGN = (gold_BG[:, :, None] == ids_N) & (gold_BG >= 0)[:, :, None]
    gold_BN = same_BGN.any(dim=1)
    return gold_BN if counted_N is None else gold_BN | ~counted_N
