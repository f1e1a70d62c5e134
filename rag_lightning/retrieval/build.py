"""The one place that chooses a retriever from settings."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.cross_encoder import CrossEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.index.bm25 import Bm25Index, Bm25Settings, StopWords, open_or_build
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.fusion import (
    ConvexFusion,
    GatedFusion,
    Normalisation,
    ReciprocalRankFusion,
    ScoreFusion,
    check_normalisation,
)
from rag_lightning.retrieval.hybrid import HybridRetriever
from rag_lightning.retrieval.rerank import CrossEncoderReranker, LiveReranker, LiveVectors, PairScorer
from rag_lightning.retrieval.sparse import SparseRetriever

Kind = Literal["dense", "sparse", "hybrid"]
FusionKind = Literal["rrf", "convex", "gate"]
Rerank = Literal["none", "live", "cross_encoder"]
PartT = TypeVar("PartT")


@dataclass(frozen=True, kw_only=True)
class RetrieverSettings:
    """How passages are found; saved with a model. A setting that the chosen kind does not read is refused.

    Attributes:
        kind: By vectors, by words, or by both.
        num_candidates: L of either search of a hybrid.
        fusion: How a hybrid joins scores; see :mod:`rag_lightning.retrieval.fusion`. None for the other kinds.
        rrf_k: Softens the first ranks in reciprocal rank fusion.
        fusion_weight: w of the dense score in convex fusion.
        normalisation: φ of convex and gated fusion.
        dense_floor: The least similarity there can be, for ``theoretical``: −1 for cosines and vectors of length 1.
        gate_hidden: Width of the gate's hidden layer; None is a linear gate.
        bm25_k1: See :class:`~rag_lightning.index.bm25.Bm25Settings`, as for the next two.
        bm25_b: Discount of long passages.
        bm25_stop_words: ``none`` or ``english``.
        rerank: By nothing, by the live passage encoder (dense only), or by a cross-encoder.
        rerank_candidates: L of reranking.
        cross_encoder: Folder or hub id of the cross-encoder.
        cross_encoder_max_tokens: Its longest pair.
        cross_encoder_batch_size: Its pairs at a time.

    Raises:
        ConfigError: A value out of its range, or one that nothing would read.
    """

    kind: Kind = "dense"
    num_candidates: int = 100
    fusion: FusionKind | None = None
    rrf_k: int = 60
    fusion_weight: float = 0.5
    normalisation: Normalisation = "theoretical"
    dense_floor: float | None = None
    gate_hidden: int | None = None
    bm25_k1: float = 0.9
    bm25_b: float = 0.4
    bm25_stop_words: StopWords = "english"
    rerank: Rerank = "none"
    rerank_candidates: int = 100
    cross_encoder: str | None = None
    cross_encoder_max_tokens: int = 256
    cross_encoder_batch_size: int = 32

    def __post_init__(self) -> None:
        for name, choices in (("kind", Kind), ("fusion", FusionKind | None), ("rerank", Rerank)):
            self._check_choice(name, choices)
        check_normalisation(self.normalisation)
        if self.kind == "hybrid" and self.fusion is None:
            raise ConfigError("retriever.fusion: expected one of rrf, convex, gate for kind=hybrid, came none.")
        if self.rerank == "live" and self.kind != "dense":
            raise ConfigError(
                f"retriever.rerank: live re-scores similarities, expected kind=dense, came {self.kind}. "
                "Use rerank=cross_encoder, or kind=dense."
            )
        if self.rerank == "cross_encoder" and self.cross_encoder is None:
            raise ConfigError("retriever.cross_encoder: expected a folder or hub id for rerank=cross_encoder.")
        self._check_read()
        for name in ("num_candidates", "rerank_candidates", "cross_encoder_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"retriever.{name}: expected at least 1, came {getattr(self, name)}.")
        if self.needs_words:
            _ = self.bm25  # its own checks
        if self.fusion is not None:
            build_fusion(self, dimension=1)  # likewise

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        known = [choice for part in get_args(choices) for choice in (get_args(part) or (part,))]
        if value not in known and not (value is None and type(None) in known):
            names = ", ".join(choice for choice in known if isinstance(choice, str))
            raise ConfigError(f"retriever.{name}: expected one of {names}, came {value!r}.")

    def _check_read(self) -> None:
        reranks = self.rerank != "none"
        read = {
            "num_candidates": self.kind == "hybrid",
            "fusion": self.kind == "hybrid",
            "rrf_k": self.fusion == "rrf",
            "fusion_weight": self.fusion == "convex",
            "normalisation": self.fusion in ("convex", "gate"),
            "dense_floor": self.fusion in ("convex", "gate"),
            "gate_hidden": self.fusion == "gate",
            "bm25_k1": self.needs_words,
            "bm25_b": self.needs_words,
            "bm25_stop_words": self.needs_words,
            "rerank_candidates": reranks,
            "cross_encoder": self.rerank == "cross_encoder",
            "cross_encoder_max_tokens": self.rerank == "cross_encoder",
            "cross_encoder_batch_size": self.rerank == "cross_encoder",
        }
        defaults = {field.name: field.default for field in fields(self)}
        for name, is_read in read.items():
            if not is_read and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"retriever.{name}: came {getattr(self, name)!r}, which nothing reads with kind={self.kind}, "
                    f"fusion={self.fusion}, rerank={self.rerank}. Leave it out, or choose what reads it."
                )

    @property
    def needs_vectors(self) -> bool:
        """Whether an index of passage vectors is searched."""
        return self.kind != "sparse"

    @property
    def needs_words(self) -> bool:
        """Whether BM25 is searched."""
        return self.kind != "dense"

    @property
    def bm25(self) -> Bm25Settings:
        """What the BM25 index is built with."""
        return Bm25Settings(k1=self.bm25_k1, b=self.bm25_b, stop_words=self.bm25_stop_words)


def build_fusion(settings: RetrieverSettings, *, dimension: int) -> ScoreFusion | None:
    """Returns the fusion that the settings name, with new weights; None where nothing is fused.

    Args:
        settings: Which.
        dimension: D, of the query vectors.

    Raises:
        ConfigError: A value out of its range.
    """
    if settings.fusion is None:
        return None
    if settings.fusion == "rrf":
        return ReciprocalRankFusion(k=settings.rrf_k)
    if settings.fusion == "convex":
        return ConvexFusion(
            weight=settings.fusion_weight, normalisation=settings.normalisation, dense_floor=settings.dense_floor
        )
    return GatedFusion(
        dimension=dimension,
        hidden=settings.gate_hidden,
        normalisation=settings.normalisation,
        dense_floor=settings.dense_floor,
    )


def open_bm25(
    settings: RetrieverSettings, corpus: PassageCorpus, *, cache_dir: Path, progress: bool = False
) -> Bm25Index | None:
    """Opens or builds the BM25 index that the settings need; None where they need none.

    Raises:
        DataError: Not one term in the whole corpus.
        MissingExtraError: bm25s is not installed.
    """
    if not settings.needs_words:
        return None
    return open_or_build(corpus, cache_dir=cache_dir, settings=settings.bm25, progress=progress)


def open_cross_encoder(settings: RetrieverSettings) -> CrossEncoder | None:
    """Loads the cross-encoder that the settings name; None where they need none.

    Raises:
        MissingFileError: No such folder.
        CheckpointError: It is no cross-encoder.
    """
    if settings.cross_encoder is None:
        return None
    return CrossEncoder.from_source(source=settings.cross_encoder, max_tokens=settings.cross_encoder_max_tokens)


def build_retriever(
    settings: RetrieverSettings,
    *,
    corpus: PassageCorpus,
    dense: DenseRetriever | None = None,
    bm25: Bm25Index | None = None,
    fusion: ScoreFusion | None = None,
    reencode: LiveVectors | None = None,
    cross_encoder: PairScorer | None = None,
) -> Retriever:
    """Puts a retriever together from parts that are open already.

    Args:
        settings: Which.
        corpus: What is searched.
        dense: For kinds dense and hybrid; its snapshot may be swapped later.
        bm25: For kinds sparse and hybrid; see :func:`open_bm25`.
        fusion: For hybrid; the model's, see :func:`build_fusion`.
        reencode: For rerank=live; see :func:`~rag_lightning.retrieval.rerank.live_vectors`.
        cross_encoder: For rerank=cross_encoder; see :func:`open_cross_encoder`.

    Raises:
        ConfigError: A part that the settings need is missing or was made with other settings.
        StaleIndexError: An index is of another corpus.
    """
    found: Retriever
    if settings.kind == "dense":
        found = _needed(dense, "an index of vectors", settings)
    elif settings.kind == "sparse":
        found = _sparse(settings, bm25, corpus)
    else:
        found = HybridRetriever(
            dense=_needed(dense, "an index of vectors", settings),
            sparse=_sparse(settings, bm25, corpus),
            fusion=_checked_fusion(settings, fusion),
            num_candidates=settings.num_candidates,
        )
    if settings.rerank == "live":
        return LiveReranker(
            retriever=_needed(dense, "an index of vectors", settings),
            reencode=_needed(reencode, "a passage encoder", settings),
            num_candidates=settings.rerank_candidates,
        )
    if settings.rerank == "cross_encoder":
        return CrossEncoderReranker(
            retriever=found,
            cross_encoder=_needed(cross_encoder, "a cross-encoder", settings),
            num_candidates=settings.rerank_candidates,
            batch_size=settings.cross_encoder_batch_size,
        )
    return found


def _needed(part: PartT | None, what: str, settings: RetrieverSettings) -> PartT:
    if part is None:
        raise ConfigError(
            f"retriever: expected {what} for kind={settings.kind}, rerank={settings.rerank}, came none. "
            "Open or build it first."
        )
    return part


def _sparse(settings: RetrieverSettings, bm25: Bm25Index | None, corpus: PassageCorpus) -> SparseRetriever:
    index = _needed(bm25, "a BM25 index", settings)
    if index.settings != settings.bm25:
        raise ConfigError(f"retriever: expected a BM25 index with {settings.bm25}, came one with {index.settings}.")
    return SparseRetriever(index, corpus)


def _checked_fusion(settings: RetrieverSettings, fusion: ScoreFusion | None) -> ScoreFusion:
    fusion = _needed(fusion, "the model's fusion", settings)
    expected = build_fusion(settings, dimension=getattr(fusion, "dimension", 1))
    if expected is None or expected.settings() != fusion.settings():
        wanted = None if expected is None else expected.settings()
        raise ConfigError(f"retriever: expected the fusion {wanted}, came the model's {fusion.settings()}.")
    return fusion
