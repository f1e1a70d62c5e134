"""Hybrid retrieval: the union of what vectors and words find, under one fused score.

The L best of either search are candidates; both scores are computed for every one of them (similarities from the
snapshot's vectors, BM25 from the text index), and fused; the K best of the fused list are the hits. How scores are
fused and what the document prior of a fused list is: :mod:`rag_lightning.retrieval.fusion`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, StaleIndexError
from rag_lightning.index.base import MISSING_ID, similarity
from rag_lightning.retrieval.base import foreign_hits, look_up
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.fusion import ScoreFusion
from rag_lightning.retrieval.sparse import SparseRetriever
from rag_lightning.types import Evidence, FusionInputs, Hits


def union(ids_BL: Int[Tensor, "B L"], ids_BM: Int[Tensor, "B M"]) -> Int[Tensor, "B U"]:
    """Returns each row's distinct ids, ascending, then ``-1`` up to U = L + M places.

    >>> union(torch.tensor([[4, 2, -1]]), torch.tensor([[2, 0]]))
    tensor([[ 0,  2,  4, -1, -1]])
    """
    ids_BU = torch.cat([ids_BL, ids_BM], dim=1).sort(dim=1).values
    last = torch.iinfo(ids_BU.dtype).max
    again_BU = torch.zeros_like(ids_BU, dtype=torch.bool)
    again_BU[:, 1:] = ids_BU[:, 1:] == ids_BU[:, :-1]
    ids_BU = ids_BU.masked_fill(again_BU | (ids_BU == MISSING_ID), last).sort(dim=1).values
    return ids_BU.masked_fill(ids_BU == last, MISSING_ID)


class HybridRetriever:
    """A dense and a sparse retriever over one corpus, and how their scores are fused.

    Args:
        dense: Searches by vectors; its snapshot may be swapped as ever.
        sparse: Searches by words.
        fusion: The model's, so that what is trained is what retrieves.
        num_candidates: L, the passages taken from either search; at least K, at most the corpus counts.

    Raises:
        StaleIndexError: The two search different corpora.
        ConfigError: Fewer than one candidate.
    """

    def __init__(
        self, *, dense: DenseRetriever, sparse: SparseRetriever, fusion: ScoreFusion, num_candidates: int = 100
    ) -> None:
        if dense.corpus.hash != sparse.corpus.hash:
            raise StaleIndexError(
                f"retriever 'hybrid': expected both searches over one corpus, came {dense.corpus.hash} (dense) and "
                f"{sparse.corpus.hash} (sparse). Build both indexes from the same passages."
            )
        if num_candidates < 1:
            raise ConfigError(f"retriever.num_candidates: expected at least 1, came {num_candidates}. 100 is usual.")
        self.dense = dense
        self.sparse = sparse
        self.fusion = fusion
        self.num_candidates = num_candidates

    @property
    def corpus(self) -> PassageCorpus:
        """What is searched."""
        return self.dense.corpus

    @property
    def snapshot_id(self) -> str:
        """Both indexes' ids, joined by ``+``."""
        return f"{self.dense.snapshot_id}+{self.sparse.snapshot_id}"

    @property
    def needs_vectors(self) -> bool:
        """True: half of the search is by vectors."""
        return True

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """What the fusion passes gradient to."""
        return self.fusion.gradient_to

    @torch.no_grad()
    def retrieve(
        self, questions: Sequence[str], query_vectors_BD: Float[Tensor, "B D"] | None, num_passages: int
    ) -> Hits:
        """Searches twice and fuses; see :class:`~rag_lightning.retrieval.base.Retriever`.

        Returns:
            Hits whose scores are the fused ones, equal scores by ascending row.

        Raises:
            ConfigError: No vectors, or K is larger than the number of candidates or than the corpus.
            DataError: NaN queries, or another number of vectors than of questions.
        """
        num_candidates = min(self.num_candidates, len(self.corpus))
        if self.num_candidates < num_passages:
            raise ConfigError(
                f"retriever.num_candidates: expected at least num_passages={num_passages}, came {self.num_candidates}. "
                "Raise it: a fused list is chosen from more candidates than it keeps."
            )
        dense_hits = self.dense.retrieve(questions, query_vectors_BD, max(num_candidates, num_passages))
        assert query_vectors_BD is not None  # the dense search has refused None
        sparse_hits = self.sparse.retrieve(questions, None, num_candidates)
        ids_BU = union(dense_hits.ids_BK, sparse_hits.ids_BK.to(dense_hits.ids_BK.device))
        vectors_BUD = self.dense.vectors(ids_BU)
        dense_BU = similarity(query_vectors_BD, vectors_BUD, self.dense.metric, ids_BU != MISSING_ID)
        sparse_BU = self.sparse.index.scores_of(questions, ids_BU)
        fused_BU, inputs = self.fusion.fuse(dense_BU, sparse_BU, query_vectors_BD)
        # ids ascend, so a stable order gives equal scores by ascending row
        chosen_BK = fused_BU.argsort(dim=1, descending=True, stable=True)[:, :num_passages]
        if inputs is not None:
            inputs = FusionInputs(inputs.sparse_BK.gather(1, chosen_BK), inputs.dense_shift_B1, inputs.dense_scale_B1)
        snapshot_id = f"{dense_hits.snapshot_id}+{sparse_hits.snapshot_id}"
        return Hits(fused_BU.gather(1, chosen_BK), ids_BU.gather(1, chosen_BK), snapshot_id, inputs)

    def vectors(self, ids_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Returns the live snapshot's exact vectors, on the device of the ids; zeros where the id is -1."""
        return self.dense.vectors(ids_BK)

    def scores(
        self,
        hits: Hits,
        similarities_BK: Float[Tensor, "B K"] | None,
        query_vectors_BD: Float[Tensor, "B D"] | None,
    ) -> Float[Tensor, "B K"]:
        """Returns the fused scores of live similarities, with gradient to what the fusion passes it to.

        Raises:
            ConfigError: A fusion with gradient, without similarities or query vectors.
        """
        if hits.fusion is None or not self.gradient_to:
            return hits.scores_BK
        if similarities_BK is None or query_vectors_BD is None:
            raise ConfigError(
                "retriever 'hybrid': expected the hits' similarities and the query vectors, came none. Compute them "
                "first, or the gradient ends here."
            )
        return self.fusion.live(similarities_BK, hits.fusion, query_vectors_BD)

    def evidence(self, hits: Hits) -> Evidence:
        """Looks the passages up; hits from before a swap are answered too.

        Raises:
            StaleIndexError: Hits of indexes that were never served here.
        """
        dense_id, _, sparse_id = hits.snapshot_id.rpartition("+")
        if not self.dense.has_served(dense_id) or sparse_id != self.sparse.snapshot_id:
            raise foreign_hits(self.snapshot_id, hits)
        return look_up(hits, self.corpus)
