"""Retrieval by words: BM25, no encoder, no gradient.

Use it as the baseline that a trained retriever must beat, for rare names and numbers that vectors blur, to retrieve
while an encoder is not trained yet, and for hard negatives. The document prior is
``p(z|x) = softmax(BM25 / temperature)``, a constant: the generator learns to read under it, the retriever nothing.
BM25 scores differ by whole units between good passages, so a temperature of 1 or more suits it.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, StaleIndexError
from rag_lightning.retrieval.base import TextIndex, even_where_empty, foreign_hits, look_up
from rag_lightning.types import Evidence, Hits


class SparseRetriever:
    """A text index and the corpus that it indexes.

    Args:
        index: What to search, such as a :class:`~rag_lightning.index.bm25.Bm25Index`.
        corpus: What its rows number.

    Raises:
        StaleIndexError: The index is of another corpus; both hashes are named.
    """

    def __init__(self, index: TextIndex, corpus: PassageCorpus) -> None:
        if index.corpus_hash != corpus.hash:
            raise StaleIndexError(
                f"text index {index.id}: expected one of corpus {corpus.hash} ({corpus.source}), came one of corpus "
                f"{index.corpus_hash}. Build the index again, or name the passages that it was made from."
            )
        self._index = index
        self._corpus = corpus

    @property
    def corpus(self) -> PassageCorpus:
        """What is searched."""
        return self._corpus

    @property
    def index(self) -> TextIndex:
        """What searches."""
        return self._index

    @property
    def snapshot_id(self) -> str:
        """The index's id, such as ``bm25-1f0c9d3a``."""
        return self._index.id

    @property
    def needs_vectors(self) -> bool:
        """False: it searches by words, and no query encoder need be run, or be there."""
        return False

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """No part: the scores are constants."""
        return ()

    def retrieve(
        self, questions: Sequence[str], query_vectors_BD: Float[Tensor, "B D"] | None, num_passages: int
    ) -> Hits:
        """Searches for each question; see :class:`~rag_lightning.retrieval.base.Retriever`.

        Vectors are not looked at. A question that shares terms with fewer than K passages gets as many.

        Returns:
            Hits on the CPU.

        Raises:
            ConfigError: K is larger than the corpus.
        """
        scores_BK, ids_BK = self._index.search(questions, num_passages)
        return Hits(scores_BK=scores_BK, ids_BK=ids_BK, snapshot_id=self.snapshot_id)

    def vectors(self, ids_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Refuses: words have no vectors.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "retriever 'sparse': expected to be asked for scores alone, it has no passage vectors. Use retriever "
            "'dense' or 'hybrid' where similarities are needed."
        )

    def scores(
        self,
        hits: Hits,
        similarities_BK: Float[Tensor, "B K"] | None,
        query_vectors_BD: Float[Tensor, "B D"] | None,
    ) -> Float[Tensor, "B K"]:
        """Returns the BM25 scores; 0 throughout for a question of which no term is in the corpus.

        See :func:`~rag_lightning.retrieval.base.even_where_empty`.
        """
        return even_where_empty(hits.scores_BK)

    def evidence(self, hits: Hits) -> Evidence:
        """Looks the passages up, :data:`~rag_lightning.retrieval.base.MISSING_PASSAGE` where nothing was found.

        Raises:
            StaleIndexError: Hits of another index.
        """
        if hits.snapshot_id != self.snapshot_id:
            raise foreign_hits(self.snapshot_id, hits)
        return look_up(hits, self._corpus)
