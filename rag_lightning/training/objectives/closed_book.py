"""The generator without any passage: the baseline that retrieval must beat."""

import torch

from rag_lightning.rag import RagModel
from rag_lightning.training.examples import ExampleKind
from rag_lightning.training.objectives.base import Outcome, Reads, Sources, check_smoothing, read
from rag_lightning.types import QuestionBatch


class ClosedBook:
    """The generator alone: what it knows without any passage.

    Args:
        label_smoothing: ε of the target distribution.
    """

    reads: Reads = "nothing"
    examples: ExampleKind = "questions"
    eval_examples: ExampleKind = "questions"
    trains: tuple[str, ...] = ("generator",)
    num_negatives: int = 0
    cross_process: bool = False

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns ``-log p(y | x)`` without passages."""
        contexts = sources.assembler.without_passage(batch.prompt)
        scores_B1 = torch.zeros(len(batch.questions), 1, device=batch.labels.device)
        return read(
            model, contexts, scores_B1, batch, "rag_token", self.label_smoothing, keep_logits=sources.keep_logits
        )
