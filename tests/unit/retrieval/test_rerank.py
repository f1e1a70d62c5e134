"""Reranking against loops over the whole corpus."""

import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import similarity
from rag_lightning.index.bm25 import Bm25Index
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.retrieval.rerank import CrossEncoderReranker, LiveReranker, live_vectors
from rag_lightning.retrieval.sparse import SparseRetriever

QUESTIONS = ["who made Amber", "who made Quartz", "who made Winter"]


@pytest.fixture(scope="module")
def corpus(tiny_world):
    return PassageCorpus.read(tiny_world.passages)


def publish(folder, corpus, vectors_ND, metric="inner_product", step=0):
    return SnapshotStore(folder).publish(
        vectors_ND, encoder_hash=f"e{step}", corpus_hash=corpus.hash, pooling="mean", metric=metric, step=step
    )


@pytest.fixture
def queries_BD():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Stale:
    """An index of one set of vectors, and an encoder that has moved to another."""

    def __init__(self, folder, corpus, metric):
        draw = torch.Generator().manual_seed(1)
        self.old = torch.randn(len(corpus), 6, generator=draw)
        self.fresh = torch.randn(len(corpus), 6, generator=draw)
        self.metric = metric
        self.asked = []
        self.dense = DenseRetriever(publish(folder, corpus, self.old, metric), corpus)

    def reencode(self, ids_BL):
        self.asked.append(ids_BL)
        return self.fresh[ids_BL]


@pytest.fixture(params=["inner_product", "l2", "cosine"])
def stale(request, tmp_path, corpus):
    return Stale(tmp_path, corpus, request.param)


# ---------------------------------------------------------------------- by the live encoder


def test_with_all_candidates_it_is_exact_search_with_fresh_vectors(stale, corpus, queries_BD):
    exact = ExactIndex(stale.fresh, metric=stale.metric)
    for num_candidates in (len(corpus), 1000):
        reranker = LiveReranker(retriever=stale.dense, reencode=stale.reencode, num_candidates=num_candidates)
        assert isinstance(reranker, Retriever)
        hits = reranker.retrieve(QUESTIONS, queries_BD, 5)
        scores_BK, ids_BK = exact.search(queries_BD, 5)
        assert torch.equal(hits.ids_BK, ids_BK)
        torch.testing.assert_close(hits.scores_BK, scores_BK)
    assert not torch.equal(stale.dense.retrieve(QUESTIONS, queries_BD, 5).ids_BK, ids_BK)


def test_candidates_are_the_stale_index_s_and_their_order_the_live_encoder_s(stale, queries_BD):
    reranker = LiveReranker(retriever=stale.dense, reencode=stale.reencode, num_candidates=8)
    hits = reranker.retrieve(QUESTIONS, queries_BD, 3)
    candidates = stale.dense.retrieve(QUESTIONS, queries_BD, 8).ids_BK
    assert torch.equal(stale.asked[0], candidates)
    for row, query in enumerate(queries_BD):
        scored = []
        for number in candidates[row].tolist():
            score = similarity(query[None], stale.fresh[number][None, None], stale.metric).item()
            scored.append((-score, number))
        assert hits.ids_BK[row].tolist() == [number for _, number in sorted(scored)[:3]]
        assert hits.scores_BK[row].tolist() == pytest.approx([-score for score, _ in sorted(scored)[:3]], abs=1e-5)
    assert hits.snapshot_id == reranker.snapshot_id == stale.dense.snapshot_id
    assert reranker.evidence(hits) == stale.dense.evidence(hits)


def test_vectors_are_live_and_scores_keep_gradient(stale, queries_BD):
    reranker = LiveReranker(retriever=stale.dense, reencode=stale.reencode)
    hits = reranker.retrieve(QUESTIONS, queries_BD, 2)
    vectors = reranker.vectors(hits.ids_BK)
    assert torch.equal(vectors, stale.fresh[hits.ids_BK])
    assert torch.equal(reranker.vectors(torch.tensor([[-1]])), torch.zeros(1, 1, 6))
    queries = queries_BD.clone().requires_grad_()
    live = similarity(queries, vectors, stale.metric)
    scores_BK = reranker.scores(hits, live, queries)
    torch.testing.assert_close(scores_BK.detach(), hits.scores_BK)
    scores_BK.log_softmax(dim=1)[:, 0].sum().backward()
    assert queries.grad.abs().sum() > 0
    assert reranker.gradient_to == ("query_encoder", "passage_encoder")
    assert reranker.needs_vectors
    with pytest.raises(ConfigError, match="expected the hits' similarities, came none"):
        reranker.scores(hits, None, None)


def test_the_tower_as_it_is_now_encodes_each_passage_once_without_dropout(tiny_encoder, corpus, monkeypatch):
    torch.manual_seed(0)
    encoder = tiny_encoder(dropout=0.5)
    tokens = PassageTokens(encoder=encoder, corpus=corpus)
    reencode = live_vectors(encoder, tokens, batch_size=2)
    ids_BL = torch.tensor([[3, 5, 3], [7, 5, 0]])
    for _ in range(2):
        expected = torch.cat(list(encode_passages(encoder, tokens, range(len(corpus)), progress=False)))
        encoder.train()
        encoder.passage.projection = None
        encoder.passage.backbone.embeddings.eval()
        modes = [module.training for module in encoder.modules()]
        seen = []
        batch = tokens.batch
        monkeypatch.setattr(tokens, "batch", lambda rows, batch=batch, seen=seen: (seen.extend(rows), batch(rows))[1])
        vectors = reencode(ids_BL)
        monkeypatch.undo()
        torch.testing.assert_close(vectors, expected[ids_BL])
        assert not vectors.requires_grad
        assert sorted(seen) == [0, 3, 5, 7]
        assert [module.training for module in encoder.modules()] == modes
        with torch.no_grad():  # the encoder moves, and the next round must see it
            for weight in encoder.passage.parameters():
                weight.add_(0.1)


def test_a_dead_live_encoder_is_refused(stale, queries_BD):
    stale.fresh[3] = float("nan")
    reranker = LiveReranker(retriever=stale.dense, reencode=stale.reencode)
    with pytest.raises(DataError, match=r"live passage vectors: expected finite numbers, came NaN .* has diverged"):
        reranker.retrieve(QUESTIONS, queries_BD, 2)


def test_an_encoder_without_passage_tower_is_refused(tiny_encoder, corpus):
    encoder = tiny_encoder()
    tokens = PassageTokens(encoder=encoder, corpus=corpus)
    encoder.passage = None
    with pytest.raises(ConfigError, match="this encoder has no passage tower"):
        live_vectors(encoder, tokens)


# ---------------------------------------------------------------------- by a cross-encoder


class Judge:
    """Scores a pair by a formula, so that the test need not trust a model."""

    def score(self, questions, passages, *, batch_size=32):
        self.batch_size = batch_size
        self.pairs = list(zip(questions, (passage.id for passage in passages), strict=True))
        return torch.tensor([judged(question, number) for question, number in self.pairs], dtype=torch.float32)


def judged(question, passage_id):
    return float((7 * int(passage_id.removeprefix("film-")) + len(question)) % 11)


def test_the_cross_encoder_keeps_the_best_of_the_candidates(tmp_path, corpus, queries_BD):
    vectors_ND = torch.randn(len(corpus), 6, generator=torch.Generator().manual_seed(2))
    dense = DenseRetriever(publish(tmp_path, corpus, vectors_ND), corpus)
    judge = Judge()
    reranker = CrossEncoderReranker(retriever=dense, cross_encoder=judge, num_candidates=6, batch_size=4)
    assert isinstance(reranker, Retriever)
    hits = reranker.retrieve(QUESTIONS, queries_BD, 3)
    candidates = dense.retrieve(QUESTIONS, queries_BD, 6).ids_BK.tolist()
    for row, question in enumerate(QUESTIONS):
        ranked = sorted((-judged(question, f"film-{number}"), number) for number in candidates[row])[:3]
        assert hits.ids_BK[row].tolist() == [number for _, number in ranked]
        assert hits.scores_BK[row].tolist() == [-score for score, _ in ranked]
    assert judge.batch_size == 4
    assert len(judge.pairs) == 18
    assert torch.equal(reranker.scores(hits, None, None), hits.scores_BK)
    assert reranker.gradient_to == ()
    assert reranker.needs_vectors
    assert hits.snapshot_id == reranker.snapshot_id == dense.snapshot_id
    assert [p.id for p in reranker.evidence(hits).passages[0]] == [f"film-{n}" for n in hits.ids_BK[0].tolist()]
    assert torch.equal(reranker.vectors(hits.ids_BK), dense.vectors(hits.ids_BK))


def test_over_words_it_needs_no_vectors_and_keeps_empty_places_empty(corpus):
    pytest.importorskip("bm25s")
    sparse = SparseRetriever(Bm25Index.build(corpus), corpus)
    judge = Judge()
    reranker = CrossEncoderReranker(retriever=sparse, cross_encoder=judge)
    assert not reranker.needs_vectors
    hits = reranker.retrieve(["Amber", "nothing shared"], None, 4)
    assert judge.pairs == [("Amber", "film-0")]
    assert hits.ids_BK.tolist() == [[0, -1, -1, -1], [-1] * 4]
    assert hits.scores_BK[0].tolist() == [judged("Amber", "film-0"), *[-float("inf")] * 3]
    assert reranker.scores(hits, None, None)[1].tolist() == [0.0] * 4


def test_fewer_candidates_than_passages_are_refused(tmp_path, corpus, queries_BD):
    dense = DenseRetriever(publish(tmp_path, corpus, torch.randn(len(corpus), 6)), corpus)
    for build in (
        lambda n: CrossEncoderReranker(retriever=dense, cross_encoder=Judge(), num_candidates=n),
        lambda n: LiveReranker(retriever=dense, reencode=lambda ids: torch.zeros(*ids.shape, 6), num_candidates=n),
    ):
        with pytest.raises(ConfigError, match="rerank_candidates: expected at least num_passages=5, came 4"):
            build(4).retrieve(QUESTIONS, queries_BD, 5)
        with pytest.raises(ConfigError, match="rerank_candidates: expected at least 1, came 0"):
            build(0)
        with pytest.raises(ConfigError, match=r"expected 1 to 24, .* came 25"):
            build(100).retrieve(QUESTIONS, queries_BD, 25)
