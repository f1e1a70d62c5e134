"""What is measured: answers (exact match, F1), passages (recall@k, MRR) and diagnostics of the retriever.

For the tasks beside question answering: classes (accuracy, macro F1), spans (F1 of entities) and ranking (hit@k,
nDCG@k, MRR of one item).

Each module holds pure functions and one torchmetrics class that sums their values, so that figures are right under
uneven batches and several processes. A figure that no question counted towards is left out, never reported as 0.
"""

from rag_lightning.metrics.answers import AnswerMetrics, exact_match, token_f1
from rag_lightning.metrics.classes import (
    ClassFigures,
    ClassMetrics,
    ClassReport,
    class_counts,
    confusion_matrix,
    macro_f1,
    report_of,
    semeval_macro_f1,
)
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
from rag_lightning.metrics.ranking import RankMetrics, hit_at, ndcg_at, reciprocal
from rag_lightning.metrics.spans import SpanMetrics, span_counts

__all__ = [
    "AnswerMetrics",
    "ClassFigures",
    "ClassMetrics",
    "ClassReport",
    "DiagnosticMetrics",
    "RankMetrics",
    "RetrievalMetrics",
    "SpanMetrics",
    "class_counts",
    "confusion_matrix",
    "distinct_passage_ratio",
    "exact_match",
    "hit_at",
    "macro_f1",
    "ndcg_at",
    "overlap_at_k",
    "posterior_entropy",
    "recall_at",
    "reciprocal",
    "reciprocal_rank",
    "relevant_by_answer",
    "relevant_by_gold",
    "report_of",
    "retrieval_utility",
    "semeval_macro_f1",
    "span_counts",
    "token_f1",
]
