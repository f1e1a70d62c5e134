"""What an objective promises, what it is lent, and what it says of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import EncodedContexts
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import MarginalKind
from rag_lightning.rag_reading import Marginal
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.training.examples import ExampleKind
from rag_lightning.types import Hits, QuestionBatch, RagBatch, TensorRecord, TokenBatch

Reads = Literal["retrieved", "own", "nothing"]


@dataclass(frozen=True)
class Sources:
    """What a step is lent, and asked to keep.

    Attributes:
        assembler: Joins passages and questions.
        retriever: Searches the live snapshot; None where nothing is retrieved.
        reencode: Encoder tokens of passage numbers, when the passage tower learns; else None.
        teaching: False in validation and test, where nobody reads the terms that only teach: they are left out.
        step: Optimiser steps so far, for what is scheduled or drawn.
        keep_logits: Leave the generator's logits in the outcome's marginal, for whoever compares whole distributions.
    """

    assembler: ContextAssembler
    retriever: Retriever | None = None
    reencode: Callable[[Int[Tensor, "B K"]], TokenBatch] | None = None
    teaching: bool = True
    step: int = 0
    keep_logits: bool = False


@dataclass(frozen=True)
class Outcome(TensorRecord):
    """What an objective says of a batch.

    Attributes:
        loss_B: One loss for each question.
        num_units_B: What a per-unit mean divides by: target tokens, or 1.
        marginal: For objectives that read.
        hits: For objectives that retrieve.
        encoded: The contexts, for decoding without encoding them again.
        doc_scores_BK: Their similarities, with gradient to what retrieves, whether or not the loss has one.
        terms: What the loss is the sum of, by name and without weights, where it has several terms.
    """

    loss_B: Float[Tensor, "B"]
    num_units_B: Int[Tensor, "B"]
    marginal: Marginal | None = None
    hits: Hits | None = None
    encoded: EncodedContexts | None = None
    doc_scores_BK: Float[Tensor, "B K"] | None = None
    terms: Mapping[str, Float[Tensor, "B"]] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """One way to train.

    Attributes:
        reads: Retrieved passages, the examples' own, or none.
        examples: What is trained on.
        eval_examples: What is validated and tested on.
        trains: The parts that learn.
        num_negatives: Hard negatives wanted with each training example.
        cross_process: Whether a process's loss reads other processes' examples too.
    """

    reads: Reads
    examples: ExampleKind
    eval_examples: ExampleKind
    trains: tuple[str, ...]
    num_negatives: int
    cross_process: bool

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the losses of a batch."""
        ...


@runtime_checkable
class Attaching(Protocol):
    """An objective that has to see the model as it starts, and which of its parts learn."""

    def attach(self, model: RagModel, trained: tuple[str, ...]) -> None:
        """Called once, before training and before a checkpoint is restored."""
        ...


def read(
    model: RagModel,
    contexts: TokenBatch,
    doc_scores_BK: Float[Tensor, "B K"],
    batch: QuestionBatch,
    kind: MarginalKind,
    label_smoothing: float,
    hf_compat: bool = False,
    hits: Hits | None = None,
    read_alone: bool = False,
    alone: EncodedContexts | None = None,
    keep_logits: bool = False,
) -> Outcome:
    """Returns the marginal loss of a batch's targets given its contexts, smoothed in training only.

    What ``fid`` reads of each passage alone is a diagnostic in evaluation; training asks for it by ``read_alone``.
    ``stuffed`` contexts hold all passages of a question; those of each ``alone`` are given beside them.
    """
    encoded = model.generator.encode(contexts)
    marginal = model.marginal(
        RagBatch(contexts, doc_scores_BK, batch.labels),
        encoded=encoded,
        objective=kind,
        label_smoothing=label_smoothing if model.training else 0.0,
        hf_compat=hf_compat,
        read_alone=read_alone or not model.training,
        alone=alone,
        keep_logits=keep_logits,
    )
    return Outcome(marginal.nll_B, marginal.num_tokens_B, marginal, hits, encoded, doc_scores_BK)


def check_smoothing(label_smoothing: float) -> None:
    """Refuses an ε that leaves nothing of the target.

    Raises:
        ConfigError: Not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"objective.label_smoothing: expected 0 <= ε < 1, got {label_smoothing}")
