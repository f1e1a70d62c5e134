"""How stale the live index is, and how much an approximate one misses, measured on a few probe questions.

Inputs: the model as it is now and the live index. Use :func:`freshness` to decide on a refresh by need instead of by
schedule; :class:`Probe` also compares retrieval before and after one. :func:`index_recall` is about the index alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.index.base import best_first, similarity
from rag_lightning.index.quality import recall_against_exact
from rag_lightning.metrics.diagnostics import overlap_at_k
from rag_lightning.rag import RagModel
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.types import Question


@dataclass(frozen=True)
class Probe:
    """Questions to look at an index with.

    Attributes:
        texts: The P questions.
        queries_PD: Their vectors under the query tower as it is now.
        num_passages: K.
    """

    texts: tuple[str, ...]
    queries_PD: Float[Tensor, "P D"]
    num_passages: int

    def search(self, data: RagDataModule, num_passages: int | None = None) -> Int[Tensor, "P K"]:
        """Returns what the live index finds."""
        assert data.dense is not None
        num_passages = num_passages if num_passages is not None else self.num_passages
        return data.dense.retrieve(self.texts, self.queries_PD, num_passages).ids_BK


@torch.no_grad()
def take_probe(model: RagModel, data: RagDataModule, size: int) -> Probe | None:
    """Returns the first validation (or else training) questions as a probe; None where there are none to take."""
    return _probe(model, data.questions.get("validation") or data.questions.get("train") or [], size)


def _probe(model: RagModel, questions: Sequence[Question], size: int) -> Probe | None:
    questions = questions[:size]
    if not questions or model.encoder is None:
        return None
    texts = tuple(question.question for question in questions)
    tower = model.encoder.query
    was_training = tower.training
    tower.eval()
    try:
        queries_PD = tower(model.query_tokens(texts).to(next(model.parameters()).device))
    finally:
        tower.train(was_training)
    return Probe(texts, queries_PD, model.settings.num_passages)


@torch.no_grad()
def index_recall(model: RagModel, data: RagDataModule, *, size: int = 500) -> dict[str, float]:
    """Returns the share of the exact K best passages that a live approximate index finds for the test's questions.

    Both search the same stored vectors with the same questions, so it is the index's doing alone: a figure such as
    ``{"index_recall@5": 0.93}``, empty where search is exact, divided among processes, or not by vectors.

    Args:
        model: Gives K and the questions' vectors.
        data: Holds the live index.
        size: The first so many questions are asked.
    """
    probe = _probe(model, data.questions.get("test") or [], size)
    if probe is None or data.dense is None or data.dense.snapshot.manifest.factory == "exact":
        return {}
    snapshot = data.dense.snapshot
    num_passages = min(probe.num_passages, len(data.corpus))
    found = recall_against_exact(
        snapshot.index, snapshot.vectors_ND, probe.queries_PD.float().cpu(), num_passages=num_passages
    )
    return {f"index_recall@{num_passages}": found}


@torch.no_grad()
def freshness(model: RagModel, data: RagDataModule, probe: Probe | None, *, num_candidates: int) -> float:
    """Returns overlap@K of what the live index finds and what a fresh one would, in [0, 1], 1 where nothing has moved.

    Encoding the whole corpus to find out whether it must be encoded would be the refresh itself. So the live index
    gives ``num_candidates`` passages for each probe question, those are encoded by the passage tower as it is now, and
    the fresh K are the best of them. A passage that has moved up from beyond the candidates is not seen: the figure is
    an upper bound of the overlap, tight when there are many candidates. Related: Atlas re-ranks such candidates
    instead of refreshing (Izacard et al. 2022, section 2.4).

    Args:
        model: Both towers as they are now.
        data: Holds the live index.
        probe: Questions with their vectors.
        num_candidates: Passages found for each question, at least K.

    Raises:
        ConfigError: No probe questions, or fewer candidates than K.
    """
    if probe is None or model.encoder is None:
        raise ConfigError("reindex.trigger=staleness: expected validation or training questions to probe with")
    if num_candidates < probe.num_passages:
        raise ConfigError(
            f"reindex.num_candidates: expected at least num_passages={probe.num_passages}, got {num_candidates}"
        )
    wide_PL = probe.search(data, min(num_candidates, len(data.corpus)))
    vectors_PLD = data.live_vectors(wide_PL).to(probe.queries_PD.device)
    scores_PL = similarity(probe.queries_PD, vectors_PLD, model.settings.metric, wide_PL >= 0)
    _, fresh_PK = best_first(scores_PL, wide_PL, probe.num_passages)
    return float(overlap_at_k(wide_PL[:, : probe.num_passages], fresh_PK).mean())
