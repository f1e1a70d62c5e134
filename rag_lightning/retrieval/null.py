"""The null passage: a choice beside the K retrieved ones, for questions that need no passage (REALM, §3.4).

Inputs: a search's hits with their scores. Where a reader can answer by itself, or where nothing retrieved helps, credit
goes to ∅ instead of to whatever passage happens to be there. Its context is the question alone.

Its score is the similarity of the question's vector and a vector of its own. REALM (Guu et al. 2020) encodes an empty
document; here that is where the vector starts, and it then learns by itself, because the passage tower mostly stays as
it is (RAG) and could otherwise not make ∅ more or less likely. It is saved with the model and learns with the query
encoder. Only a retriever whose document scores are similarities can weigh it against passages: dense retrieval,
reranked by the live tower or not; a BM25 score, a fused or a cross-encoder's one has no scale for ∅.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.index.base import MISSING_ID, Metric, similarity
from rag_lightning.retrieval.base import MISSING_PASSAGE, Retriever
from rag_lightning.retrieval.contexts import pad_sequences
from rag_lightning.types import Hits


class NullPassage(nn.Module):
    """The vector of ∅.

    Args:
        vector_D: Where it starts.
    """

    vector_D: Tensor

    def __init__(self, vector_D: Float[Tensor, "D"]) -> None:
        super().__init__()
        self.vector_D = nn.Parameter(vector_D.detach().clone())

    @classmethod
    def of(cls, encoder: BiEncoder) -> "NullPassage":
        """Returns one that starts at the passage tower's vector of a passage without title and text.

        Where that has no direction (no token is written for it, or none of weight), it starts at the vector of length 1
        whose entries are equal.
        """
        even_D = torch.full((encoder.dimension,), encoder.dimension**-0.5)
        if encoder.tokenizer is None or encoder.passage is None:
            return cls(even_D)
        ids = encoder.tokenizer(encoder.passage_text(MISSING_PASSAGE))["input_ids"]
        if not ids:
            return cls(even_D)
        tower = encoder.passage_tower()
        was_training = tower.training
        tower.eval()
        with torch.no_grad():
            tokens = pad_sequences([ids], encoder.tokenizer.pad_token_id).to(next(tower.parameters()).device)
            vector_D = tower(tokens)[0].float().cpu()
        tower.train(was_training)
        usable = bool(torch.isfinite(vector_D).all()) and float(torch.linalg.vector_norm(vector_D)) > 1e-6
        return cls(vector_D if usable else even_D)

    def forward(
        self, hits: Hits, scores_BK: Float[Tensor, "B K"], queries_BD: Float[Tensor, "B D"], metric: Metric
    ) -> tuple[Hits, Float[Tensor, "B K1"]]:
        """Returns hits and scores with ∅ in a last place more, passage number -1 and a score with gradient."""
        vectors_B1D = self.vector_D.to(queries_BD.device).expand(len(queries_BD), 1, -1)
        null_B1 = similarity(queries_BD, vectors_B1D, metric)
        joined = replace(
            hits,
            scores_BK=torch.cat([hits.scores_BK, null_B1.detach().to(hits.scores_BK)], dim=1),
            ids_BK=torch.cat([hits.ids_BK, torch.full_like(hits.ids_BK[:, :1], MISSING_ID)], dim=1),
            has_null=True,
        )
        return joined, torch.cat([scores_BK, null_B1.to(scores_BK)], dim=1)


def check_similarities(retriever: Retriever, hits: Hits, what: str) -> None:
    """Refuses a retriever whose document scores are not on one scale with other similarities of the model.

    Args:
        retriever: Which.
        hits: What it found.
        what: What needs the similarities.

    Raises:
        ConfigError: They are constants, or fused of several.
    """
    if "query_encoder" not in retriever.gradient_to or hits.fusion is not None:
        raise ConfigError(
            f"{what}: expected a retriever whose document scores are similarities, came {retriever.snapshot_id}: "
            "scores of words, fused ones and a cross-encoder's are on another scale. Use retriever=dense, or leave "
            f"{what} out."
        )
