"""What every retriever promises: hits first, as numbers; their texts afterwards; and scores that a loss can use."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, StaleIndexError
from rag_lightning.index.base import MISSING_ID
from rag_lightning.types import Evidence, Hits, Passage

MISSING_PASSAGE = Passage(id="", title="", text="")
"""Stands where nothing was found, so that K passages stay K places; its score is ``-inf`` and its prior 0."""


@runtime_checkable
class TextIndex(Protocol):
    """N passages that can be searched by words; the sibling of :class:`~rag_lightning.index.base.Index`.

    It keeps that protocol's promises on scores, order and missing places.
    """

    corpus_hash: str
    num_passages: int

    @property
    def id(self) -> str:
        """Names what decides every score."""
        ...

    def search(self, questions: Sequence[str], num_passages: int) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Finds the K best rows for each question."""
        ...

    def scores_of(self, questions: Sequence[str], ids_BM: Int[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """Returns the scores of given rows; ``-inf`` for row ``-1``."""
        ...


@runtime_checkable
class Retriever(Protocol):
    """Finds K passages of one corpus for each question."""

    @property
    def corpus(self) -> PassageCorpus:
        """What is searched."""
        ...

    @property
    def snapshot_id(self) -> str:
        """The index snapshot that answers now."""
        ...

    @property
    def needs_vectors(self) -> bool:
        """Whether ``retrieve`` works on the questions' vectors; where not, no query encoder is run."""
        ...

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """The parts of the model that a loss on ``scores`` teaches: query_encoder, passage_encoder, fusion.

        Empty where the document scores are constants; then no similarities are computed either.
        """
        ...

    def retrieve(
        self, questions: Sequence[str], query_vectors_BD: Float[Tensor, "B D"] | None, num_passages: int
    ) -> Hits:
        """Searches once for the whole batch, without gradient.

        Args:
            questions: The B texts, for retrievers that match words.
            query_vectors_BD: Their vectors, for retrievers that match meaning.
            num_passages: K.

        Raises:
            ConfigError: More passages asked for than there are, or the input that this retriever works on is missing.
        """
        ...

    def vectors(self, ids_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Returns the passages' vectors, constants for the gradient of the query encoder.

        Raises:
            ConfigError: A retriever without vectors; it says so by ``gradient_to``.
        """
        ...

    def scores(
        self,
        hits: Hits,
        similarities_BK: Float[Tensor, "B K"] | None,
        query_vectors_BD: Float[Tensor, "B D"] | None,
    ) -> Float[Tensor, "B K"]:
        """Returns the document scores, so that ``p(z|x) = softmax(scores / temperature)``.

        Args:
            hits: What ``retrieve`` found.
            similarities_BK: The hits' similarities with gradient; None where ``gradient_to`` is empty.
            query_vectors_BD: The questions' vectors with gradient; None likewise.

        Returns:
            Scores with gradient to ``gradient_to``; ``-inf`` where nothing was found.

        Raises:
            ConfigError: The similarities are missing.
        """
        ...

    def evidence(self, hits: Hits) -> Evidence:
        """Looks the passages up."""
        ...


def search(
    retriever: Retriever,
    questions: Sequence[str],
    query_vectors_BD: Float[Tensor, "B D"] | None,
    num_passages: int,
    forbidden_ids: Int[Tensor, "B *F"] | None = None,
) -> Hits:
    """Returns K passages for each question, and never one that is forbidden for it.

    As many more are searched for as may be forbidden, as far as the corpus and the retriever's own ``num_candidates``
    (of hybrids and rerankers) go, so that K are left; where there are fewer, places stay empty.

    Args:
        retriever: Where to search.
        questions: The B texts.
        query_vectors_BD: Their vectors, for a retriever that needs them.
        num_passages: K.
        forbidden_ids: A passage number for each question, or F of them, ``-1`` for none.

    Raises:
        ConfigError: Every passage of the corpus may be forbidden, or as :meth:`Retriever.retrieve`.
    """
    if forbidden_ids is None:
        return retriever.retrieve(questions, query_vectors_BD, num_passages)
    if len(retriever.corpus) < 2:
        raise ConfigError("retrieval: expected at least 2 passages, as one may be forbidden, came 1. Add passages.")
    num_forbidden = forbidden_ids.shape[1] if forbidden_ids.ndim > 1 else 1
    most = min(len(retriever.corpus), getattr(retriever, "num_candidates", len(retriever.corpus)))
    wanted = min(num_passages + num_forbidden, max(num_passages, most))
    hits = retriever.retrieve(questions, query_vectors_BD, wanted)
    return without(hits, forbidden_ids.to(hits.ids_BK.device), num_passages)


def without(hits: Hits, forbidden_ids: Int[Tensor, "B *F"], num_passages: int) -> Hits:
    """Returns the best K hits that are not forbidden, in their order; the last places empty where fewer are left.

    >>> hits = Hits(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([[7, 8, 9], [4, 5, 6]]), "a")
    >>> without(hits, torch.tensor([8, -1]), 2).ids_BK
    tensor([[7, 9],
            [4, 5]])
    """
    forbidden_BF = forbidden_ids.reshape(len(forbidden_ids), -1)
    dropped = [torch.isin(ids, forbidden) for ids, forbidden in zip(hits.ids_BK, forbidden_BF, strict=True)]
    dropped_BL = torch.stack(dropped) & hits.found_BK  # row by row: [B, L, F] is large where F is
    scores_BL = hits.scores_BK.masked_fill(dropped_BL, -torch.inf)
    ids_BL = hits.ids_BK.masked_fill(dropped_BL, MISSING_ID)
    order_BK = (ids_BL == MISSING_ID).to(torch.int8).argsort(dim=1, stable=True)[:, :num_passages]
    fusion = hits.fusion
    if fusion is not None:
        fusion = replace(fusion, sparse_BK=fusion.sparse_BK.gather(1, order_BK))
    return Hits(scores_BL.gather(1, order_BK), ids_BL.gather(1, order_BK), hits.snapshot_id, fusion)


def look_up(hits: Hits, corpus: PassageCorpus) -> Evidence:
    """Returns the passages behind hits, K for each question, :data:`MISSING_PASSAGE` where nothing was found."""
    passages = tuple(
        tuple(MISSING_PASSAGE if row == MISSING_ID else corpus[row] for row in rows) for rows in hits.ids_BK.tolist()
    )
    return Evidence(passages=passages, hits=hits)


def even_where_empty(scores_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Returns scores whose rows without any passage are 0 instead of ``-inf`` throughout.

    A question may share no word with the corpus. Its K places stay empty, the generator reads the question alone in
    each, and under an even prior the marginal is that of the question without passages, where ``-inf`` throughout has
    no softmax.

    >>> even_where_empty(torch.tensor([[2.0, -torch.inf], [-torch.inf, -torch.inf]]))
    tensor([[2., -inf],
            [0., 0.]])
    """
    empty_B1 = (scores_BK == -torch.inf).all(dim=1, keepdim=True)
    return scores_BK.masked_fill(empty_B1, 0.0)


def foreign_hits(snapshot_id: str, hits: Hits) -> StaleIndexError:
    """Returns the error that refuses hits of an index never served here."""
    return StaleIndexError(
        f"hits: expected ones of snapshot {snapshot_id} or of one served before it, "
        f"came ones of {hits.snapshot_id}. Retrieve and look up with the same retriever."
    )
