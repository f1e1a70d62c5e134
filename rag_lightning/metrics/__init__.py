"""What is measured: answers (exact match, F1), passages (recall@k, MRR) and diagnostics of the retriever.

Each module holds pure functions and one torchmetrics class that sums their values, so that figures are right under
uneven batches and several processes. A figure that no question counted towards is left out, never reported as 0.
"""

from rag_lightning.metrics.answers import AnswerMetrics, exact_match, token_f1
from rag_lightning.metrics.diagnostics import (
    DiagnosticMetrics,
    distinct_passage_ratio,
    overlap_at_k,
    posterior_entropy,
    retrieval_utility,
)
from rag_lightning.metrics.passages import (
    RetrievalMetrics,
    recall_at,
    reciprocal_rank,
    relevant_by_answer,
    relevant_by_gold,
)

__all__ = [
    "AnswerMetrics",
    "DiagnosticMetrics",
    "RetrievalMetrics",
    "distinct_passage_ratio",
    "exact_match",
    "overlap_at_k",
    "posterior_entropy",
    "recall_at",
    "reciprocal_rank",
    "relevant_by_answer",
    "relevant_by_gold",
    "retrieval_utility",
    "token_f1",
]
