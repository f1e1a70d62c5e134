"""BM25 on two real collections, against the figures in RESULTS.md; metrics by torchmetrics, not by this package."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torchmetrics.retrieval import RetrievalNormalizedDCG, RetrievalRecall

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.types import Passage

pytest.importorskip("bm25s")
from rag_lightning.index.bm25 import Bm25Index, Bm25Settings

DATA = Path(__file__).parents[3] / "shared" / "data"


def lines(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.skipif(not (DATA / "cranfield").is_dir(), reason="the Cranfield collection is not there")
@pytest.mark.parametrize(
    ("k1", "b", "ndcg_at_10", "recall_at_100"), [(0.9, 0.4, 0.3478, 0.6874), (1.5, 0.75, 0.3678, 0.7098)]
)
def test_cranfield(k1, b, ndcg_at_10, recall_at_100):
    """1,400 abstracts, 225 questions, graded judgements; two documents without a text keep a dash."""
    rows = lines(DATA / "cranfield" / "passages.jsonl.gz")
    corpus = PassageCorpus.from_passages(Passage(r["id"], r["title"], r["text"].strip() or "-") for r in rows)
    queries = lines(DATA / "cranfield" / "queries.jsonl.gz")
    index = Bm25Index.build(corpus, Bm25Settings(k1=k1, b=b))
    all_rows = torch.arange(len(corpus))[None].expand(len(queries), -1)
    scores = index.scores_of([query["question"] for query in queries], all_rows)
    ndcg, recall = RetrievalNormalizedDCG(top_k=10), RetrievalRecall(top_k=100)
    for number, query in enumerate(queries):
        grades = torch.zeros(len(corpus), dtype=torch.long)
        for passage_id, grade in query["relevant"].items():
            grades[corpus.row_of(passage_id)] = grade
        where = torch.full((len(corpus),), number)
        ndcg.update(scores[number], grades, indexes=where)
        recall.update(scores[number], grades > 0, indexes=where)
    assert float(ndcg.compute()) == pytest.approx(ndcg_at_10, abs=5e-4)
    assert float(recall.compute()) == pytest.approx(recall_at_100, abs=5e-4)


@pytest.mark.skipif(not (DATA / "squad_open").is_dir(), reason="squad_open is not there")
def test_squad_open():
    corpus = PassageCorpus.read(DATA / "squad_open" / "passages.jsonl.gz")
    questions = read_questions(DATA / "squad_open" / "dev.jsonl.gz", corpus=corpus)
    _, ids_BK = Bm25Index.build(corpus, Bm25Settings()).search([question.question for question in questions], 20)
    gold = [{corpus.row_of(name) for name in question.positive_passage_ids} for question in questions]
    for k, expected in ((1, 71.38), (5, 92.45), (20, 97.01)):
        hits = [bool(rows & set(found[:k])) for rows, found in zip(gold, ids_BK.tolist(), strict=True)]
        assert 100 * sum(hits) / len(hits) == pytest.approx(expected, abs=0.01)
