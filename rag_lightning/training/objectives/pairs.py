"""Questions paired with passages that are gold for some of them: what contrasting looks at."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.index.base import Metric, unit_length
from rag_lightning.losses.retriever import false_negatives
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.null import check_similarities
from rag_lightning.training.objectives.base import Sources
from rag_lightning.types import Hits, QuestionBatch, TensorRecord


@dataclass(frozen=True)
class Pairs(TensorRecord):
    """The questions of a batch against passages.

    Attributes:
        scores_BN: Similarities over the model's temperature, with gradient. The first B columns are the gold passages
            drawn for the B questions, the others each question's own retrieved passages.
        own_B: Column of each question's gold passage.
        ignored_BN: True where a passage must not count as a negative: it is gold for the question, stands in another
            column already, was not found, or belongs to a filler.
        known_B: False on questions without a gold passage.
    """

    scores_BN: Float[Tensor, "B N"]
    own_B: Int[Tensor, "B"]
    ignored_BN: Bool[Tensor, "B N"]
    known_B: Bool[Tensor, "B"]


def batch_pairs(
    model: RagModel,
    batch: QuestionBatch,
    sources: Sources,
    queries_BD: Float[Tensor, "B D"],
    hits: Hits,
    scores_BK: Float[Tensor, "B K"],
) -> Pairs:
    """Returns the questions against their batch's gold passages and against what each retrieved (hard negatives).

    The gold passages' vectors are the index's, or freshly encoded where the passage tower learns; the retrieved
    passages' similarities are those that the marginal reads, so nothing is encoded twice.

    Args:
        model: Its temperature and metric.
        batch: Its gold passages.
        sources: Where vectors come from.
        queries_BD: The questions' vectors, those that retrieved.
        hits: What they retrieved.
        scores_BK: The hits' similarities with gradient.

    Raises:
        ConfigError: The document scores are no similarities.
    """
    retriever = sources.retriever
    assert retriever is not None
    check_similarities(retriever, hits, "retriever_loss contrastive")
    width = hits.retrieved.ids_BK.shape[1]
    ids_BK, scores_BK = hits.ids_BK[:, :width].to(scores_BK.device), scores_BK[:, :width]
    known_B = (batch.positive_ids >= 0) & (batch.weights_B > 0)
    rows_B1 = batch.positive_ids.clamp(min=0)[:, None]  # any passage where none is known: its column is ignored
    if sources.reencode is None:
        gold_BD = retriever.vectors(rows_B1)[:, 0].to(queries_BD.device)
    else:
        assert model.encoder is not None
        gold_BD = model.encoder.passage_tower()(sources.reencode(rows_B1))
    gold_BB = all_pairs(queries_BD, gold_BD, model.settings.metric)
    if model.settings.metric == "l2":  # which all_pairs leaves out and the hits' similarities hold
        gold_BB = gold_BB - queries_BD.to(gold_BB.dtype).square().sum(dim=1, keepdim=True)
    gold_BG = gold_rows(batch, sources)
    column_ids_B = batch.positive_ids.masked_fill(~known_B, -1)
    is_gold_BK = ((ids_BK[:, :, None] == gold_BG[:, None, :]) & (gold_BG >= 0)[:, None, :]).any(dim=2)
    ignored_BK = is_gold_BK | (ids_BK < 0) | torch.isin(ids_BK, column_ids_B)
    return Pairs(
        scores_BN=torch.cat([gold_BB, scores_BK.to(gold_BB)], dim=1) / model.settings.temperature,
        own_B=torch.arange(len(queries_BD), device=queries_BD.device),
        ignored_BN=torch.cat([false_negatives(gold_BG, column_ids_B, known_B), ignored_BK], dim=1),
        known_B=known_B,
    )


def query_vectors(model: RagModel, batch: QuestionBatch) -> Float[Tensor, "B D"]:
    """Returns the questions' vectors with gradient.

    Raises:
        ConfigError: There is no encoder.
    """
    if model.encoder is None or batch.query is None:
        raise ConfigError("retriever_loss contrastive: expected a model with an encoder, came one without")
    vectors_BD: Tensor = model.encoder.query(batch.query)
    return vectors_BD


def gold_rows(batch: QuestionBatch, sources: Sources) -> Int[Tensor, "B G"]:
    """Returns all gold passages known of each question, the one drawn first, filled up with -1."""
    corpus = sources.assembler.corpus
    rows = [[drawn] for drawn in batch.positive_ids.tolist()]
    for row, question in zip(rows, batch.questions, strict=True):
        row += [corpus.row_of(passage_id) for passage_id in question.positive_passage_ids] if corpus is not None else []
    width = max(len(row) for row in rows)
    filled = [row + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.long, device=batch.positive_ids.device)


def all_pairs(
    queries_BD: Float[Tensor, "B D"], passages_ND: Float[Tensor, "N D"], metric: Metric
) -> Float[Tensor, "B N"]:
    """Returns :func:`~rag_lightning.index.base.similarity` of all pairs by one product, without ``[B, N, D]``.

    ``l2`` leaves out the question's own squared length, which a softmax over passages does not see.
    """
    with torch.autocast(queries_BD.device.type, enabled=False):
        dtype = torch.promote_types(queries_BD.dtype, torch.float32)
        queries_BD, passages_ND = queries_BD.to(dtype), passages_ND.to(dtype)
        if metric == "cosine":
            queries_BD = unit_length(queries_BD, "query vectors")
            passages_ND = unit_length(passages_ND, "passage vectors")
        products_BN = queries_BD @ passages_ND.T
        return 2.0 * products_BN - passages_ND.square().sum(dim=1) if metric == "l2" else products_BN
