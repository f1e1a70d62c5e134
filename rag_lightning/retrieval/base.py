"""What every retriever promises: hits first, as numbers; their texts afterwards."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.index.base import MISSING_ID
from rag_lightning.types import Evidence, Hits, Passage

MISSING_PASSAGE = Passage(id="", title="", text="")
"""Stands where nothing was found, so that K passages stay K places; its score is ``-inf`` and its prior 0."""


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
        """Returns the passages' vectors, constants for the gradient of the query encoder."""
        ...

    def evidence(self, hits: Hits) -> Evidence:
        """Looks the passages up."""
        ...


def look_up(hits: Hits, corpus: PassageCorpus) -> Evidence:
    """Returns the passages behind hits, K for each question, :data:`MISSING_PASSAGE` where nothing was found."""
    passages = tuple(
        tuple(MISSING_PASSAGE if row == MISSING_ID else corpus[row] for row in rows) for rows in hits.ids_BK.tolist()
    )
    return Evidence(passages=passages, hits=hits)
