"""The reader on gold passages alone: its warm-up."""

import torch

from rag_lightning.errors import DataError
from rag_lightning.rag import RagModel
from rag_lightning.training.examples import ExampleKind
from rag_lightning.training.objectives.base import Outcome, Reads, Sources, check_smoothing, read
from rag_lightning.types import QuestionBatch


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
    num_negatives: int = 0
    cross_process: bool = False

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns ``-log p(y | x, z)`` on each example's own passage."""
        if batch.contexts is None:
            raise DataError("objective denoising: expected examples with their own passages")
        scores_B1 = torch.zeros(len(batch.questions), 1, device=batch.labels.device)
        return read(model, batch.contexts, scores_B1, batch, "rag_token", self.label_smoothing)
