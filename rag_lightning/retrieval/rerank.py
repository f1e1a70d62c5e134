"""Reranking: take L passages from a retriever, score them again by something better, keep the K best.

Two scorers. A **cross-encoder** reads question and passage together: constants, no gradient; the document prior is
``p(z|x) = softmax(logit / temperature)`` over the K kept. The **live passage encoder** re-scores what a stale index
found (Izacard et al. 2022, "Atlas", §2.3, "re-ranking"): an index as old as it may be only has to bring the good
passages among its first L, not in order; with L = N the result is exact search with today's encoder. It costs encoding
L passages for each question of a step, and keeps gradient as dense retrieval does.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import MISSING_ID, best_first, similarity
from rag_lightning.retrieval.base import Retriever, even_where_empty
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.types import Evidence, Hits, Passage

LiveVectors: TypeAlias = Callable[[Int[Tensor, "B L"]], Float[Tensor, "B L D"]]
"""Gives the vectors of passage numbers by the passage encoder as it is now; what it gives for ``-1`` is not read."""


@runtime_checkable
class PairScorer(Protocol):
    """Reads question and passage together, as :class:`~rag_lightning.encoders.cross_encoder.CrossEncoder` does."""

    def score(
        self, questions: Sequence[str], passages: Sequence[Passage], *, batch_size: int = 32
    ) -> Float[Tensor, "N"]:
        """Returns one score for each of N pairs, larger is more relevant, without gradient."""
        ...


class CrossEncoderReranker:
    """Over-retrieves from any retriever and keeps what a cross-encoder scores highest.

    Args:
        retriever: Finds the candidates.
        cross_encoder: Scores them; it learns nothing here.
        num_candidates: L; at least K, at most the corpus counts.
        batch_size: Pairs at a time.

    Raises:
        ConfigError: Fewer than one candidate.
    """

    def __init__(
        self, *, retriever: Retriever, cross_encoder: PairScorer, num_candidates: int = 100, batch_size: int = 32
    ) -> None:
        _check_candidates(num_candidates)
        self.retriever = retriever
        self.cross_encoder = cross_encoder
        self.num_candidates = num_candidates
        self.batch_size = batch_size

    @property
    def corpus(self) -> PassageCorpus:
        """What is searched."""
        return self.retriever.corpus

    @property
    def snapshot_id(self) -> str:
        """The index that finds the candidates."""
        return self.retriever.snapshot_id

    @property
    def needs_vectors(self) -> bool:
        """As the retriever that finds the candidates."""
        return self.retriever.needs_vectors

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """No part: the logits are constants."""
        return ()

    @torch.no_grad()
    def retrieve(
        self, questions: Sequence[str], query_vectors_BD: Float[Tensor, "B D"] | None, num_passages: int
    ) -> Hits:
        """Searches, scores all pairs, keeps K; see :class:`~rag_lightning.retrieval.base.Retriever`.

        Returns:
            Hits whose scores are logits, equal ones by ascending row.

        Raises:
            ConfigError: K is larger than the number of candidates or than the corpus.
        """
        hits = self.retriever.retrieve(questions, query_vectors_BD, _width(self.num_candidates, num_passages, self))
        found_BL = hits.found_BK
        places = found_BL.nonzero().tolist()
        passages = [self.corpus[row] for row in hits.ids_BK[found_BL].tolist()]
        asked = [questions[question] for question, _ in places]
        logits = self.cross_encoder.score(asked, passages, batch_size=self.batch_size)
        scores_BL = torch.full_like(hits.scores_BK, -torch.inf)
        scores_BL[found_BL] = logits.to(scores_BL)
        scores_BK, ids_BK = best_first(scores_BL, hits.ids_BK, num_passages)
        return Hits(scores_BK, ids_BK, hits.snapshot_id)

    def vectors(self, ids_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Returns the vectors that the retriever beneath has."""
        return self.retriever.vectors(ids_BK)

    def scores(
        self,
        hits: Hits,
        similarities_BK: Float[Tensor, "B K"] | None,
        query_vectors_BD: Float[Tensor, "B D"] | None,
    ) -> Float[Tensor, "B K"]:
        """Returns the logits; 0 throughout for a question for which nothing was found."""
        return even_where_empty(hits.scores_BK)

    def evidence(self, hits: Hits) -> Evidence:
        """Looks the passages up."""
        return self.retriever.evidence(hits)


class LiveReranker:
    """Over-retrieves from a dense index and keeps what the live passage encoder scores highest.

    Args:
        retriever: Finds the candidates through an index that may be stale.
        reencode: Gives the live vectors; see :func:`live_vectors`.
        num_candidates: L; at least K, at most the corpus counts.

    Raises:
        ConfigError: Fewer than one candidate.
    """

    def __init__(self, *, retriever: DenseRetriever, reencode: LiveVectors, num_candidates: int = 100) -> None:
        _check_candidates(num_candidates)
        self.retriever = retriever
        self.reencode = reencode
        self.num_candidates = num_candidates

    @property
    def corpus(self) -> PassageCorpus:
        """What is searched."""
        return self.retriever.corpus

    @property
    def snapshot_id(self) -> str:
        """The index that finds the candidates."""
        return self.retriever.snapshot_id

    @property
    def needs_vectors(self) -> bool:
        """True: it searches by the questions' vectors."""
        return True

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """Both encoders, as dense retrieval."""
        return self.retriever.gradient_to

    @torch.no_grad()
    def retrieve(
        self, questions: Sequence[str], query_vectors_BD: Float[Tensor, "B D"] | None, num_passages: int
    ) -> Hits:
        """Searches, encodes the L candidates anew, keeps K; see :class:`~rag_lightning.retrieval.base.Retriever`.

        Returns:
            Hits whose scores are live similarities, equal ones by ascending row.

        Raises:
            ConfigError: No vectors, or K is larger than the number of candidates or than the corpus.
            DataError: NaN queries, or live vectors that are not finite.
        """
        hits = self.retriever.retrieve(questions, query_vectors_BD, _width(self.num_candidates, num_passages, self))
        assert query_vectors_BD is not None  # the dense search has refused None
        vectors_BLD = self.vectors(hits.ids_BK)
        scores_BL = similarity(query_vectors_BD, vectors_BLD, self.retriever.metric, hits.found_BK)
        scores_BK, ids_BK = best_first(scores_BL, hits.ids_BK, num_passages)
        return Hits(scores_BK, ids_BK, hits.snapshot_id)

    @torch.no_grad()
    def vectors(self, ids_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Returns the live vectors, constants for the gradient of the query encoder; zeros where the id is -1.

        Raises:
            DataError: NaN or infinity among them.
        """
        vectors_BKD = self.reencode(ids_BK).masked_fill((ids_BK == MISSING_ID).unsqueeze(-1), 0.0)
        if not bool(torch.isfinite(vectors_BKD).all()):
            raise DataError(
                "live passage vectors: expected finite numbers, came NaN or infinity. The passage encoder has "
                "diverged: lower its learning rate, or resume from before."
            )
        return vectors_BKD

    def scores(
        self,
        hits: Hits,
        similarities_BK: Float[Tensor, "B K"] | None,
        query_vectors_BD: Float[Tensor, "B D"] | None,
    ) -> Float[Tensor, "B K"]:
        """Returns the similarities, as dense retrieval."""
        return self.retriever.scores(hits, similarities_BK, query_vectors_BD)

    def evidence(self, hits: Hits) -> Evidence:
        """Looks the passages up."""
        return self.retriever.evidence(hits)


def live_vectors(encoder: BiEncoder, tokens: PassageTokens, *, batch_size: int = 64) -> LiveVectors:
    """Returns the re-encoding that :class:`LiveReranker` asks for: no gradient, dropout off, no passage twice.

    Args:
        encoder: Whose passage tower encodes, as it is at each call.
        tokens: The corpus in its vocabulary.
        batch_size: Passages at a time.

    Raises:
        ConfigError: The encoder has no passage tower.
    """
    encoder.passage_tower()

    @torch.no_grad()
    def reencode(ids_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        tower = encoder.passage_tower()
        device = next(tower.parameters()).device
        ids_M, place_BL = torch.unique(ids_BL, return_inverse=True)
        rows_M = ids_M.cpu().numpy()
        modes = {module: module.training for module in tower.modules()}
        tower.eval()
        try:
            parts = [
                tower(tokens.batch(rows_M[start : start + batch_size]).to(device)).float()
                for start in range(0, len(rows_M), batch_size)
            ]
        finally:
            for module, mode in modes.items():
                module.training = mode
        return torch.cat(parts).to(ids_BL.device)[place_BL]

    return reencode


def _width(num_candidates: int, num_passages: int, retriever: Retriever) -> int:
    """Returns how many candidates to take."""
    if num_candidates < num_passages:
        raise ConfigError(
            f"retriever.rerank_candidates: expected at least num_passages={num_passages}, came {num_candidates}. "
            "Raise it: reranking chooses from more candidates than it keeps."
        )
    return max(min(num_candidates, len(retriever.corpus)), num_passages)


def _check_candidates(num_candidates: int) -> None:
    if num_candidates < 1:
        raise ConfigError(f"retriever.rerank_candidates: expected at least 1, came {num_candidates}. 100 is usual.")
