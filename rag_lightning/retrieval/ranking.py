"""Ranking all N passages for each question: scores of every one, and the rank of the one that is right.

Inputs: query vectors and an index's passage vectors, a BM25 index, or counts. Use it where a metric needs the place of
one passage among all (recommendation with one held-out item; sampled negatives mislead, as Krichene and Rendle 2020,
"On Sampled Metrics for Item Recommendation", show); a search finds only the first K. Costs B x N scores of 4 bytes;
passage vectors are read block by block.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import DataError
from rag_lightning.index.base import Metric, unit_length
from rag_lightning.index.bm25 import Bm25Index
from rag_lightning.index.vectors import Vectors, blocks
from rag_lightning.types import Question


def rank_of(
    scores_BN: Float[Tensor, "B N"], target_B: Int[Tensor, "B"], excluded: Sequence[Sequence[int]] | None = None
) -> Int[Tensor, "B"]:
    """Returns the rank of each question's target from 1: one more than the passages that score as high or higher.

    Ties count against the target, so scores that are all the same rank it last: a collapsed encoder cannot look good.

    Args:
        scores_BN: Larger is better.
        target_B: The row of the passage that is right.
        excluded: Rows to leave out, for each question; a target among them is ranked all the same.

    Raises:
        DataError: Scores that are NaN, or another number of exclusions than of questions.

    >>> scores = torch.tensor([[0.9, 0.5, 0.7, 0.5], [0.9, 0.5, 0.7, 0.5]])
    >>> rank_of(scores, torch.tensor([1, 1]), excluded=[[], [0, 3]])
    tensor([4, 2])
    """
    excluded = [()] * len(scores_BN) if excluded is None else excluded
    if len(excluded) != len(scores_BN):
        raise DataError(
            f"ranking: expected exclusions for each of {len(scores_BN)} questions, came {len(excluded)} lists of them."
        )
    if bool(scores_BN.isnan().any()):
        raise DataError("ranking: expected numbers as scores, came NaN. Look at the encoder: has it diverged?")
    own_B1 = scores_BN.gather(1, target_B[:, None])
    counted_BN = scores_BN >= own_B1
    for row, ids in enumerate(excluded):
        counted_BN[row, list(ids)] = False
    counted_BN.scatter_(1, target_B[:, None], False)
    return 1 + counted_BN.sum(dim=1)


@torch.no_grad()
def dense_scores(
    queries_BD: Float[Tensor, "B D"], vectors_ND: Vectors, metric: Metric, *, block_size: int | None = None
) -> Float[Tensor, "B N"]:
    """Returns :func:`~rag_lightning.index.base.similarity` of each question with every passage, in float32.

    Args:
        queries_BD: Query vectors.
        vectors_ND: Passage vectors, in memory or in an index's storage.
        metric: The similarity.
        block_size: Passages at a time; None is 32 MiB of them.
    """
    parts = []
    with torch.autocast(queries_BD.device.type, enabled=False):
        queries_BD = queries_BD.float()
        if metric == "cosine":
            queries_BD = unit_length(queries_BD, "query vectors")
        for _, rows_MD in blocks(vectors_ND, block_size):
            rows_MD = rows_MD.to(queries_BD.device)
            if metric == "cosine":
                rows_MD = unit_length(rows_MD, "passage vectors")
            scores_BM = queries_BD @ rows_MD.T
            if metric == "l2":
                scores_BM = 2.0 * scores_BM - rows_MD.square().sum(dim=1) - queries_BD.square().sum(dim=1, keepdim=True)
            parts.append(scores_BM)
    return torch.cat(parts, dim=1)


def bm25_scores(index: Bm25Index, texts: Sequence[str]) -> Float[Tensor, "B N"]:
    """Returns the BM25 scores of every passage, 0 where it shares no term with the text."""
    scores_BK, ids_BK = index.search(texts, index.num_passages)
    scores_BN = torch.zeros(len(texts), index.num_passages)
    for row, (scores_K, ids_K) in enumerate(zip(scores_BK, ids_BK, strict=True)):
        found_K = ids_K >= 0
        scores_BN[row, ids_K[found_K]] = scores_K[found_K]
    return scores_BN


def gold_counts(questions: Iterable[Question], corpus: PassageCorpus) -> Int[Tensor, "N"]:
    """Returns how often each passage is gold for a question: of training questions, its popularity.

    >>> from rag_lightning.types import Passage
    >>> corpus = PassageCorpus.from_passages([Passage("a", "", "A."), Passage("b", "", "B.")])
    >>> gold_counts([Question("1", "?", (), ("b",)), Question("2", "?", (), ("b", "a"))], corpus)
    tensor([1, 2])
    """
    counts = Counter(passage_id for question in questions for passage_id in question.positive_passage_ids)
    counts_N = torch.zeros(len(corpus), dtype=torch.long)
    for passage_id, count in counts.items():
        counts_N[corpus.row_of(passage_id)] = count
    return counts_N
