import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.retrieval.base import MISSING_PASSAGE, Retriever, even_where_empty, look_up
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.hybrid import HybridRetriever
from rag_lightning.retrieval.rerank import CrossEncoderReranker, LiveReranker
from rag_lightning.retrieval.sparse import SparseRetriever
from rag_lightning.types import Hits, Passage


def test_every_place_keeps_its_passage_and_empty_places_stay_places():
    corpus = PassageCorpus.from_passages([Passage(id=str(n), title=f"t{n}", text=f"x{n}") for n in range(4)])
    hits = Hits(
        scores_BK=torch.tensor([[3.0, 1.0], [2.0, -torch.inf]]),
        ids_BK=torch.tensor([[2, 0], [3, -1]]),
        snapshot_id="s",
    )
    evidence = look_up(hits, corpus)
    assert evidence.passages == ((corpus[2], corpus[0]), (corpus[3], MISSING_PASSAGE))
    assert evidence.hits is hits
    assert MISSING_PASSAGE.id == MISSING_PASSAGE.text == ""


KINDS = [DenseRetriever, SparseRetriever, HybridRetriever, CrossEncoderReranker, LiveReranker]


@pytest.mark.parametrize("kind", KINDS)
def test_every_retriever_keeps_the_protocol(kind):
    names = [name for name in vars(Retriever) if not name.startswith("_")]
    assert sorted(names) == [
        "corpus",
        "evidence",
        "gradient_to",
        "needs_vectors",
        "retrieve",
        "scores",
        "snapshot_id",
        "vectors",
    ]
    assert all(hasattr(kind, name) for name in names)


def test_only_a_row_without_any_passage_becomes_even():
    scores_BK = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf], [1.0, 2.0]], requires_grad=True)
    even_BK = even_where_empty(scores_BK)
    assert even_BK.tolist() == [[0.0, 0.0], [0.0, -torch.inf], [1.0, 2.0]]
    even_BK.log_softmax(dim=1)[:, 0].sum().backward()
    assert torch.isfinite(scores_BK.grad).all()
