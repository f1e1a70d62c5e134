import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.retrieval.base import MISSING_PASSAGE, Retriever, look_up
from rag_lightning.retrieval.dense import DenseRetriever
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


def test_the_dense_retriever_keeps_the_protocol():
    names = [name for name in vars(Retriever) if not name.startswith("_")]
    assert sorted(names) == ["corpus", "evidence", "retrieve", "snapshot_id", "vectors"]
    assert all(hasattr(DenseRetriever, name) for name in names)
