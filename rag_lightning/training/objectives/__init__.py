"""Objectives: what a batch of questions is worth to the model, one loss for each question.

Each names what it reads (retrieved passages, its own, or none), the examples it draws, and the parts it trains; the
module does the rest. The mathematics is in :mod:`rag_lightning.losses`.
"""

from rag_lightning.training.objectives.base import Objective, Outcome, Sources
from rag_lightning.training.objectives.closed_book import ClosedBook
from rag_lightning.training.objectives.contrastive import Contrastive
from rag_lightning.training.objectives.denoising import Denoising
from rag_lightning.training.objectives.knowledge import KnowledgeDistillation
from rag_lightning.training.objectives.marginal import MarginalObjective
from rag_lightning.training.objectives.policy_gradient import PolicyGradient
from rag_lightning.training.objectives.retriever_losses import (
    AttentionDistillation,
    CrossEncoderDistillation,
    Emdr2,
    InBatchContrastive,
    LeaveOneOut,
    PerplexityDistillation,
)
from rag_lightning.training.objectives.teacher import Teacher

__all__ = [
    "AttentionDistillation",
    "ClosedBook",
    "Contrastive",
    "CrossEncoderDistillation",
    "Denoising",
    "Emdr2",
    "InBatchContrastive",
    "KnowledgeDistillation",
    "LeaveOneOut",
    "MarginalObjective",
    "Objective",
    "Outcome",
    "PerplexityDistillation",
    "PolicyGradient",
    "Sources",
    "Teacher",
]
