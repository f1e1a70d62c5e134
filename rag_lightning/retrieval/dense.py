"""Retrieval by vectors: one search of an index snapshot for the whole batch (DPR, RAG)."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, DataError, StaleIndexError
from rag_lightning.index.base import Metric
from rag_lightning.index.snapshot import Snapshot
from rag_lightning.retrieval.base import foreign_hits, look_up
from rag_lightning.types import Evidence, Hits


class DenseRetriever:
    """A live snapshot and the corpus that it indexes.

    Args:
        snapshot: What to search.
        corpus: What its rows number.

    Raises:
        StaleIndexError: The snapshot is of another corpus; both hashes are named.
    """

    def __init__(self, snapshot: Snapshot, corpus: PassageCorpus) -> None:
        _check_corpus(snapshot, corpus)
        self._corpus = corpus
        self._snapshot = snapshot
        self._served = {snapshot.id}

    @property
    def corpus(self) -> PassageCorpus:
        """What is searched."""
        return self._corpus

    @property
    def snapshot(self) -> Snapshot:
        """The live snapshot."""
        return self._snapshot

    @property
    def snapshot_id(self) -> str:
        """The live snapshot's id."""
        return self._snapshot.id

    @property
    def metric(self) -> Metric:
        """The similarity, for the training side's scores."""
        return self._snapshot.index.metric

    @property
    def needs_vectors(self) -> bool:
        """True: it searches by the questions' vectors."""
        return True

    @property
    def gradient_to(self) -> tuple[str, ...]:
        """Both encoders: the scores are their similarities."""
        return ("query_encoder", "passage_encoder")

    def retrieve(
        self, questions: Sequence[str], query_vectors_BD: Float[Tensor, "B D"] | None, num_passages: int
    ) -> Hits:
        """Searches once for the whole batch; see :class:`~rag_lightning.retrieval.base.Retriever`.

        Raises:
            ConfigError: No vectors, or K or their dimension do not fit the index.
            DataError: NaN queries, or another number of vectors than of questions.
        """
        if query_vectors_BD is None:
            raise ConfigError("retriever 'dense': expected query vectors, came none. Encode the questions first.")
        if len(questions) != len(query_vectors_BD):
            raise DataError(
                f"retriever 'dense': expected one query vector for each of {len(questions)} questions, "
                f"came {len(query_vectors_BD)}."
            )
        snapshot = self._snapshot
        scores_BK, ids_BK = snapshot.index.search(query_vectors_BD.detach(), num_passages)
        return Hits(scores_BK=scores_BK, ids_BK=ids_BK, snapshot_id=snapshot.id)

    def scores(
        self,
        hits: Hits,
        similarities_BK: Float[Tensor, "B K"] | None,
        query_vectors_BD: Float[Tensor, "B D"] | None,
    ) -> Float[Tensor, "B K"]:
        """Returns the similarities: ``p(z|x)`` is their softmax (Lewis et al. 2020, §2.2).

        Raises:
            ConfigError: There are none.
        """
        if similarities_BK is None:
            raise ConfigError("retriever 'dense': expected the hits' similarities, came none. Compute them first.")
        return similarities_BK

    def has_served(self, snapshot_id: str) -> bool:
        """Whether a snapshot is live here or was before a swap."""
        return snapshot_id in self._served

    def evidence(self, hits: Hits) -> Evidence:
        """Looks the passages up, :data:`~rag_lightning.retrieval.base.MISSING_PASSAGE` where nothing was found.

        Hits from before a swap are answered too: every snapshot served here numbers the same corpus.

        Raises:
            StaleIndexError: Hits of a snapshot that was never served here.
        """
        if not self.has_served(hits.snapshot_id):
            raise foreign_hits(self.snapshot_id, hits)
        return look_up(hits, self._corpus)

    def vectors(self, ids_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Returns the live snapshot's exact vectors, on the device of the ids; zeros where the id is -1."""
        return self._snapshot.vectors(ids_BK)

    def swap(self, snapshot: Snapshot) -> None:
        """Makes another snapshot live; call it between steps.

        Raises:
            StaleIndexError: A snapshot of another corpus; the old one stays live.
            ConfigError: A snapshot of another dimension or metric; the old one stays live.
        """
        _check_corpus(snapshot, self._corpus)
        old, new = self._snapshot.index, snapshot.index
        if (old.dimension, old.metric) != (new.dimension, new.metric):
            raise ConfigError(
                f"index snapshot {snapshot.id}: expected dimension {old.dimension} and metric '{old.metric}' as of the "
                f"live {self.snapshot_id}, came {new.dimension} and '{new.metric}'. Build it with the same settings."
            )
        self._snapshot = snapshot
        self._served.add(snapshot.id)


def _check_corpus(snapshot: Snapshot, corpus: PassageCorpus) -> None:
    manifest = snapshot.manifest
    if manifest.corpus_hash != corpus.hash:
        raise StaleIndexError(
            f"index snapshot {snapshot.id}: expected one of corpus {corpus.hash} ({corpus.source}), came one of corpus "
            f"{manifest.corpus_hash}. Build the index again, or name the passages that it was made from."
        )
    if manifest.num_vectors != len(corpus):
        raise StaleIndexError(
            f"index snapshot {snapshot.id}: expected one vector for each of {len(corpus)} passages of {corpus.source}, "
            f"came {manifest.num_vectors}. Build the index again from all of them."
        )
