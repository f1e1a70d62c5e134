"""Objectives: what a batch of questions is worth to the model, one loss for each question.

Each names what it reads (retrieved passages, its own, or none), the examples it draws, and the parts it trains; the
module does the rest. The mathematics is in :mod:`rag_lightning.losses`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.generators.base import EncodedContexts
from rag_lightning.index.base import similarity
from rag_lightning.losses.retriever import in_batch_contrastive
from rag_lightning.rag import Marginal, RagModel
from rag_lightning.rag_parts import MarginalKind
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.training.examples import ExampleKind
from rag_lightning.types import Hits, QuestionBatch, RagBatch, TensorRecord, TokenBatch

Reads = Literal["retrieved", "own", "nothing"]


@dataclass(frozen=True)
class Sources:
    """What the data module lends to a step.

    Attributes:
        assembler: Joins passages and questions.
        retriever: Searches the live snapshot; None where nothing is retrieved.
        reencode: Encoder tokens of passage numbers, when the passage tower learns; else None.
    """

    assembler: ContextAssembler
    retriever: Retriever | None = None
    reencode: Callable[[Int[Tensor, "B K"]], TokenBatch] | None = None


@dataclass(frozen=True)
class Outcome(TensorRecord):
    """What an objective says of a batch.

    Attributes:
        loss_B: One loss for each question.
        num_units_B: What a per-unit mean divides by: target tokens, or 1.
        marginal: For objectives that read.
        hits: For objectives that retrieve.
        encoded: The contexts, for decoding without encoding them again.
        doc_scores_BK: Their similarities.
    """

    loss_B: Float[Tensor, "B"]
    num_units_B: Int[Tensor, "B"]
    marginal: Marginal | None = None
    hits: Hits | None = None
    encoded: EncodedContexts | None = None
    doc_scores_BK: Float[Tensor, "B K"] | None = None


@runtime_checkable
class Objective(Protocol):
    """One way to train."""

    reads: Reads
    examples: ExampleKind
    eval_examples: ExampleKind
    trains: tuple[str, ...]

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the losses of a batch."""
        ...


class MarginalObjective:
    """RAG-Token or RAG-Sequence: retrieve, read each passage, sum the passages out (Lewis et al. 2020, §2.1).

    Args:
        kind: ``rag_token`` or ``rag_sequence``.
        label_smoothing: ε of the target distribution; the penalty is weighted by the passages' posterior.
        hf_compat: Prior placement and smoothing as in transformers.
    """

    reads: Reads = "retrieved"
    examples: ExampleKind = "questions"
    eval_examples: ExampleKind = "questions"
    trains: tuple[str, ...] = ("query_encoder", "passage_encoder", "generator")

    def __init__(self, *, kind: MarginalKind, label_smoothing: float = 0.0, hf_compat: bool = False) -> None:
        _check_smoothing(label_smoothing)
        self.kind: MarginalKind = kind
        self.label_smoothing = label_smoothing
        self.hf_compat = hf_compat

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns ``-log p(y | x)`` of each question, with gradient to every trained part."""
        if sources.retriever is None or batch.query is None:
            raise ConfigError(f"objective {self.kind}: expected a retriever, came none")
        texts = [question.question for question in batch.questions]
        hits, scores_BK = model.retrieve(batch.query, texts, sources.retriever, reencode=sources.reencode)
        contexts = sources.assembler.contexts(hits.ids_BK.to(scores_BK.device), batch.prompt)
        return _read(model, contexts, scores_BK, batch, self.kind, self.label_smoothing, self.hf_compat, hits)


class ClosedBook:
    """The generator alone: what it knows without any passage.

    Args:
        label_smoothing: ε of the target distribution.
    """

    reads: Reads = "nothing"
    examples: ExampleKind = "questions"
    eval_examples: ExampleKind = "questions"
    trains: tuple[str, ...] = ("generator",)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        _check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns ``-log p(y | x)`` without passages."""
        contexts = sources.assembler.without_passage(batch.prompt)
        scores_B1 = torch.zeros(len(batch.questions), 1, device=batch.labels.device)
        return _read(model, contexts, scores_B1, batch, "rag_token", self.label_smoothing)


class Denoising:
    """Warm-up of the reader on gold passages, so that it copies instead of remembering.

    See :class:`rag_lightning.training.examples.DenoisingExamples`: renamed entities (Longpre et al. 2021) and span
    infilling (Lewis et al. 2019, BART). The retriever is not touched.

    Args:
        label_smoothing: ε of the target distribution.
    """

    reads: Reads = "own"
    examples: ExampleKind = "denoising"
    eval_examples: ExampleKind = "gold_passages"
    trains: tuple[str, ...] = ("generator",)

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        _check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns ``-log p(y | x, z)`` on each example's own passage."""
        if batch.contexts is None:
            raise DataError("objective denoising: expected examples with their own passages")
        scores_B1 = torch.zeros(len(batch.questions), 1, device=batch.labels.device)
        return _read(model, batch.contexts, scores_B1, batch, "rag_token", self.label_smoothing)


class Contrastive:
    """Warm-up of the retriever with in-batch negatives (Karpukhin et al. 2020, DPR §3.2).

    Negatives are the other passages of the process's own part of the batch. A passage that is also gold for a question
    is no negative for it.

    Args:
        examples: ``gold_passages`` (questions with gold passages), ``inverse_cloze`` (passages alone) or ``denoising``
            (both, with renamed entities and spans as questions; settings under ``data.denoising``).
    """

    reads: Reads = "retrieved"
    eval_examples: ExampleKind = "questions"
    trains: tuple[str, ...] = ("query_encoder", "passage_encoder")

    def __init__(self, *, examples: Literal["gold_passages", "inverse_cloze", "denoising"] = "gold_passages") -> None:
        if examples not in ("gold_passages", "inverse_cloze", "denoising"):
            raise ConfigError(
                f"objective.examples: expected gold_passages, inverse_cloze or denoising, got {examples!r}"
            )
        self.examples: ExampleKind = examples

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the contrastive loss; on batches without passages (validation) only retrieves."""
        if model.encoder is None or batch.query is None:
            raise ConfigError("objective contrastive: expected a model with an encoder")
        ones_B = torch.ones(len(batch.questions), dtype=torch.long, device=batch.labels.device)
        if batch.passages is None:
            if sources.retriever is None:
                raise DataError("objective contrastive: expected examples with their own passages")
            texts = [question.question for question in batch.questions]
            hits, scores_BK = model.retrieve(batch.query, texts, sources.retriever)
            return Outcome(torch.zeros_like(scores_BK[:, 0]), ones_B, hits=hits, doc_scores_BK=scores_BK)
        queries_BD = model.encoder.query(batch.query)
        passages_BD = model.encoder.passage_tower()(batch.passages)
        passages_BBD = passages_BD[None].expand(len(queries_BD), -1, -1)
        scores_BB = similarity(queries_BD, passages_BBD, model.settings.metric) / model.settings.temperature
        if len(queries_BD) == 1:  # the odd last one of an epoch has nothing to be contrasted with
            return Outcome(0.0 * scores_BB.sum(dim=1), ones_B)
        ids_B = batch.positive_ids
        same_BB = (ids_B[:, None] == ids_B[None]) & (ids_B >= 0)[:, None]
        return Outcome(in_batch_contrastive(scores_BB, torch.arange(len(ids_B), device=ids_B.device), same_BB), ones_B)


def _read(
    model: RagModel,
    contexts: TokenBatch,
    doc_scores_BK: Float[Tensor, "B K"],
    batch: QuestionBatch,
    kind: MarginalKind,
    label_smoothing: float,
    hf_compat: bool = False,
    hits: Hits | None = None,
) -> Outcome:
    encoded = model.generator.encode(contexts)
    marginal = model.marginal(
        RagBatch(contexts, doc_scores_BK, batch.labels),
        encoded=encoded,
        objective=kind,
        label_smoothing=label_smoothing if model.training else 0.0,
        hf_compat=hf_compat,
    )
    return Outcome(marginal.nll_B, marginal.num_tokens_B, marginal, hits, encoded, doc_scores_BK)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"objective.label_smoothing: expected 0 <= ε < 1, got {label_smoothing}")
