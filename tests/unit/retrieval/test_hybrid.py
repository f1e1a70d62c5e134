"""The fused search against a loop over the whole corpus."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, DataError, StaleIndexError
from rag_lightning.index.bm25 import Bm25Index
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.fusion import ConvexFusion, GatedFusion, ReciprocalRankFusion
from rag_lightning.retrieval.hybrid import HybridRetriever, union
from rag_lightning.retrieval.sparse import SparseRetriever
from rag_lightning.types import Passage

pytest.importorskip("bm25s")

WORDS = "amber quartz winter kismet silver tower".split()
NUM, DIMENSION = 20, 5
QUESTIONS = ["amber tower", "quartz", "unknown", "silver silver winter"]


@pytest.fixture(scope="module")
def corpus():
    draw = torch.Generator().manual_seed(3)
    texts = [" ".join(WORDS[i] for i in torch.randint(6, (4,), generator=draw).tolist()) for _ in range(NUM)]
    return PassageCorpus.from_passages([Passage(f"p{n}", f"title {n}", text) for n, text in enumerate(texts)])


@pytest.fixture(scope="module")
def vectors_ND():
    return torch.randn(NUM, DIMENSION, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def queries_BD():
    return torch.randn(len(QUESTIONS), DIMENSION, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def sparse(corpus):
    return SparseRetriever(Bm25Index.build(corpus), corpus)


@pytest.fixture
def publish(tmp_path, corpus):
    def build(vectors_ND, *, step=0, metric="inner_product"):
        return SnapshotStore(tmp_path).publish(
            vectors_ND, encoder_hash=f"e{step}", corpus_hash=corpus.hash, pooling="mean", step=step, metric=metric
        )

    return build


@pytest.fixture
def dense(publish, vectors_ND, corpus):
    return DenseRetriever(publish(vectors_ND), corpus)


def naive_hybrid(dense_scores, sparse_scores, num_candidates, num_passages, fuse):
    """Candidates, fused scores and order for one question, from all N scores of both kinds."""
    by_dense = sorted(range(NUM), key=lambda row: (-dense_scores[row], row))[:num_candidates]
    by_words = [row for row in range(NUM) if sparse_scores[row] > 0]
    by_words = sorted(by_words, key=lambda row: (-sparse_scores[row], row))[:num_candidates]
    candidates = sorted(set(by_dense) | set(by_words))
    fused = fuse([dense_scores[row] for row in candidates], [sparse_scores[row] for row in candidates])
    ranked = sorted(zip((-score for score in fused), candidates, strict=True))[:num_passages]
    return [row for _, row in ranked], [-score for score, _ in ranked]


def rrf(dense, sparse, k=60):
    return [
        sum(1 / (k + 1 + sum(other > scores[place] for other in scores)) for scores in (dense, sparse)) * (k + 1) / 2
        for place in range(len(dense))
    ]


def convex(weight):
    def fuse(dense, sparse):
        low, high, top = min(dense), max(dense), max(sparse)
        return [
            weight * (d - low) / (high - low) + (1 - weight) * (s / top if top > 0 else 0.0)
            for d, s in zip(dense, sparse, strict=True)
        ]

    return fuse


FUSIONS = [
    (ReciprocalRankFusion(k=60), rrf),
    (ConvexFusion(weight=0.3), convex(0.3)),
    (GatedFusion(dimension=DIMENSION), convex(0.5)),
]


@pytest.mark.parametrize(("fusion", "fuse"), FUSIONS)
@pytest.mark.parametrize(("num_candidates", "num_passages"), [(3, 3), (5, 2), (100, 20)])
def test_hits_are_the_best_of_the_fused_union(
    dense, sparse, vectors_ND, queries_BD, corpus, fusion, fuse, num_candidates, num_passages
):
    retriever = HybridRetriever(dense=dense, sparse=sparse, fusion=fusion, num_candidates=num_candidates)
    assert isinstance(retriever, Retriever)
    hits = retriever.retrieve(QUESTIONS, queries_BD, num_passages)
    for row, question in enumerate(QUESTIONS):
        query = queries_BD[row].tolist()
        dense_scores = [sum(a * b for a, b in zip(vector, query, strict=True)) for vector in vectors_ND.tolist()]
        sparse_scores = sparse.index.scores_of([question], torch.arange(NUM)[None])[0].tolist()
        ids, scores = naive_hybrid(dense_scores, sparse_scores, min(num_candidates, NUM), num_passages, fuse)
        assert hits.ids_BK[row].tolist() == ids
        assert hits.scores_BK[row].tolist() == pytest.approx(scores, abs=1e-5)
    assert not hits.scores_BK.requires_grad
    titles = [[passage.title for passage in passages] for passages in retriever.evidence(hits).passages]
    assert titles == [[f"title {i}" for i in ids] for ids in hits.ids_BK.tolist()]


def test_a_passage_that_only_words_find_gets_its_similarity_all_the_same(corpus, publish):
    vectors = torch.zeros(NUM, 2)
    vectors[:, 0] = torch.arange(NUM, 0, -1)
    index = Bm25Index.build(corpus)
    word = "amber"
    rare = int(index.search([word], 1)[1][0, 0])
    dense = DenseRetriever(publish(vectors), corpus)
    query = torch.tensor([[1.0, 0.0]])
    # only the first 2 rows are among the dense candidates
    retriever = HybridRetriever(
        dense=dense, sparse=SparseRetriever(index, corpus), fusion=ConvexFusion(weight=1.0), num_candidates=2
    )
    hits = retriever.retrieve([word], query, 2)
    assert hits.ids_BK.tolist() == [[0, 1]]  # ranked by similarity alone, words' candidates among them
    fused = HybridRetriever(
        dense=dense, sparse=SparseRetriever(index, corpus), fusion=ConvexFusion(weight=0.5), num_candidates=2
    ).retrieve([word], query, 2)
    assert rare in fused.ids_BK[0].tolist()


@pytest.mark.parametrize("fusion", [ConvexFusion(weight=0.3), GatedFusion(dimension=DIMENSION)])
def test_live_scores_are_the_hits_scores_and_carry_gradient(dense, sparse, queries_BD, fusion):
    retriever = HybridRetriever(dense=dense, sparse=sparse, fusion=fusion, num_candidates=6)
    queries = queries_BD.clone().requires_grad_()
    hits = retriever.retrieve(QUESTIONS, queries, 3)
    vectors = retriever.vectors(hits.ids_BK)
    assert not vectors.requires_grad
    live_BK = retriever.scores(hits, (queries[:, None] * vectors).sum(dim=2), queries)
    torch.testing.assert_close(live_BK.detach(), hits.scores_BK, atol=1e-6, rtol=1e-5)
    live_BK[:, 0].sum().backward()
    weight = fusion.weights(queries_BD).detach()
    expected = weight * vectors[:, 0] / hits.fusion.dense_scale_B1
    torch.testing.assert_close(queries.grad, expected)
    # gradient by finite differences, past the search: the constants of the search stand still
    step = 1e-3 * torch.randn(queries_BD.shape, generator=torch.Generator().manual_seed(1))
    moved = retriever.scores(hits, ((queries_BD + step)[:, None] * vectors).sum(dim=2), queries_BD)
    change = (moved - live_BK.detach())[:, 0]
    torch.testing.assert_close(change, (expected * step).sum(dim=1), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("fusion", [ReciprocalRankFusion(), ConvexFusion(weight=0.0)])
def test_a_fusion_without_gradient_gives_constants(dense, sparse, queries_BD, fusion):
    retriever = HybridRetriever(dense=dense, sparse=sparse, fusion=fusion)
    assert retriever.gradient_to == ()
    hits = retriever.retrieve(QUESTIONS, queries_BD, 3)
    assert torch.equal(retriever.scores(hits, None, None), hits.scores_BK)


def test_hits_move_between_devices_whole(dense, sparse, queries_BD):
    retriever = HybridRetriever(dense=dense, sparse=sparse, fusion=ConvexFusion())
    moved = retriever.retrieve(QUESTIONS, queries_BD, 3).to("meta")
    tensors = (moved.ids_BK, moved.fusion.sparse_BK, moved.fusion.dense_shift_B1, moved.fusion.dense_scale_B1)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_swap_beneath_is_seen_and_old_hits_keep_their_texts(dense, sparse, publish, vectors_ND, queries_BD):
    retriever = HybridRetriever(dense=dense, sparse=sparse, fusion=ConvexFusion(weight=0.9))
    before = retriever.retrieve(QUESTIONS, queries_BD, 2)
    first_id = retriever.snapshot_id
    assert first_id == before.snapshot_id == f"{dense.snapshot_id}+{sparse.snapshot_id}"
    dense.swap(publish(vectors_ND.flip(0), step=1))
    after = retriever.retrieve(QUESTIONS, queries_BD, 2)
    assert retriever.snapshot_id == after.snapshot_id != first_id
    assert after.ids_BK.tolist() != before.ids_BK.tolist()
    ids = [[passage.id for passage in passages] for passages in retriever.evidence(before).passages]
    assert ids == [[f"p{i}" for i in row] for row in before.ids_BK.tolist()]


def test_foreign_hits_are_refused(dense, sparse, queries_BD):
    retriever = HybridRetriever(dense=dense, sparse=sparse, fusion=ConvexFusion())
    for foreign in (dense.retrieve(QUESTIONS, queries_BD, 1), sparse.retrieve(QUESTIONS, None, 1)):
        with pytest.raises(StaleIndexError, match=f"came ones of {foreign.snapshot_id}"):
            retriever.evidence(foreign)


ids = st.lists(st.integers(-1, 6), min_size=1, max_size=6)


@given(rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=3))
def test_the_union_is_the_set_union(rows):
    width = [max(len(row[side]) for row in rows) for side in (0, 1)]
    padded = [torch.tensor([row[side] + [-1] * (width[side] - len(row[side])) for row in rows]) for side in (0, 1)]
    found = union(*padded).tolist()
    for row, (left, right) in zip(found, rows, strict=True):
        expected = sorted((set(left) | set(right)) - {-1})
        assert row == expected + [-1] * (sum(width) - len(expected))


def test_bad_questions_and_settings_are_refused(dense, sparse, queries_BD):
    retriever = HybridRetriever(dense=dense, sparse=sparse, fusion=ConvexFusion(), num_candidates=4)
    with pytest.raises(ConfigError, match=r"retriever.num_candidates: expected at least num_passages=5, came 4"):
        retriever.retrieve(QUESTIONS, queries_BD, 5)
    with pytest.raises(ConfigError, match="expected query vectors, came none"):
        retriever.retrieve(QUESTIONS, None, 2)
    with pytest.raises(DataError, match="one query vector for each of 4 questions, came 1"):
        retriever.retrieve(QUESTIONS, queries_BD[:1], 2)
    wide = HybridRetriever(dense=dense, sparse=sparse, fusion=ConvexFusion())
    with pytest.raises(ConfigError, match=r"expected 1 to 20, .* came 21"):
        wide.retrieve(QUESTIONS, queries_BD, 21)
    with pytest.raises(ConfigError, match="num_candidates: expected at least 1, came 0"):
        HybridRetriever(dense=dense, sparse=sparse, fusion=ConvexFusion(), num_candidates=0)
    hits = retriever.retrieve(QUESTIONS, queries_BD, 2)
    with pytest.raises(ConfigError, match="expected the hits' similarities and the query vectors, came none"):
        retriever.scores(hits, None, None)


def test_two_corpora_are_refused(dense):
    other = PassageCorpus.from_passages([Passage(f"p{n}", "", "amber") for n in range(NUM)])
    with pytest.raises(StaleIndexError, match="expected both searches over one corpus"):
        HybridRetriever(dense=dense, sparse=SparseRetriever(Bm25Index.build(other), other), fusion=ConvexFusion())


def test_an_index_that_finds_less_leaves_empty_places(corpus, publish, vectors_ND, sparse, queries_BD):
    pytest.importorskip("faiss")
    snapshot = SnapshotStore(publish(vectors_ND).path.parent, nprobe=1).publish(
        vectors_ND, encoder_hash="e", corpus_hash=corpus.hash, pooling="mean", factory="IVF10,Flat"
    )
    retriever = HybridRetriever(dense=DenseRetriever(snapshot, corpus), sparse=sparse, fusion=ConvexFusion())
    hits = retriever.retrieve(["unknown"], queries_BD[:1], NUM)
    assert bool((hits.ids_BK == -1).any())
    assert bool((hits.scores_BK[hits.ids_BK == -1] == -math.inf).all())
    assert bool(torch.isfinite(hits.scores_BK[hits.ids_BK >= 0]).all())
