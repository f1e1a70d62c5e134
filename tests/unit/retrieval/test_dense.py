import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, DataError, StaleIndexError
from rag_lightning.index.base import similarity
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.types import Passage

TEXTS = ["kismet", "sita sings the blues", "spider-man 2", "the mummy"]


def corpus_of(texts):
    return PassageCorpus.from_passages([Passage(id=f"p{n}", title=t, text=f"{t}.") for n, t in enumerate(texts)])


@pytest.fixture
def corpus():
    return corpus_of(TEXTS)


@pytest.fixture
def publish(tmp_path, corpus):
    def build(vectors_ND, *, step=0, corpus_hash=None, **settings):
        corpus_hash = corpus.hash if corpus_hash is None else corpus_hash
        return SnapshotStore(tmp_path).publish(
            vectors_ND, encoder_hash=f"e{step}", corpus_hash=corpus_hash, pooling="mean", step=step, **settings
        )

    return build


def test_questions_find_their_passages_in_one_search(corpus, publish):
    snapshot = publish(torch.eye(4))
    retriever = DenseRetriever(snapshot, corpus)
    queries_BD = torch.tensor([[0.1, 0.2, 0.9, 0.0], [0.8, 0.0, 0.0, 0.3]])
    hits = retriever.retrieve(["a", "b"], queries_BD, 2)
    assert hits.ids_BK.tolist() == [[2, 1], [0, 3]]
    assert hits.snapshot_id == snapshot.id == retriever.snapshot_id
    titles = [[passage.title for passage in passages] for passages in retriever.evidence(hits).passages]
    assert titles == [["spider-man 2", "sita sings the blues"], ["kismet", "the mummy"]]
    assert isinstance(retriever, Retriever)


def test_gradient_reaches_the_query_through_the_exact_vectors(corpus, publish):
    retriever = DenseRetriever(publish(torch.eye(4), metric="l2"), corpus)
    queries_BD = torch.tensor([[0.1, 0.2, 0.9, 0.0]], requires_grad=True)
    hits = retriever.retrieve(["a"], queries_BD, 3)
    assert not hits.scores_BK.requires_grad
    scores_BK = similarity(queries_BD, retriever.vectors(hits.ids_BK), retriever.metric, hits.found_BK)
    assert torch.equal(scores_BK.detach(), hits.scores_BK)
    scores_BK.log_softmax(-1)[0, 0].backward()
    assert queries_BD.grad.abs().sum() > 0


def test_its_document_scores_are_the_similarities(corpus, publish):
    retriever = DenseRetriever(publish(torch.eye(4)), corpus)
    hits = retriever.retrieve(["a"], torch.eye(4)[:1], 2)
    live_BK = torch.tensor([[0.3, 0.2]], requires_grad=True)
    assert retriever.scores(hits, live_BK, torch.eye(4)[:1]) is live_BK
    assert retriever.needs_vectors
    assert retriever.gradient_to == ("query_encoder", "passage_encoder")
    with pytest.raises(ConfigError, match="expected the hits' similarities, came none"):
        retriever.scores(hits, None, None)


def test_a_swap_changes_what_answers_and_old_hits_keep_their_texts(corpus, publish):
    retriever = DenseRetriever(publish(torch.eye(4), step=0), corpus)
    queries_BD = torch.eye(4)[:1]
    before = retriever.retrieve(["a"], queries_BD, 1)
    fresh = publish(torch.eye(4).flip(0), step=10)
    retriever.swap(fresh)
    after = retriever.retrieve(["a"], queries_BD, 1)
    assert (before.ids_BK.item(), after.ids_BK.item()) == (0, 3)
    assert (retriever.snapshot_id, after.snapshot_id) == (fresh.id, fresh.id)
    assert retriever.evidence(before).passages[0][0].title == "kismet"
    assert retriever.evidence(after).passages[0][0].title == "the mummy"
    assert torch.equal(retriever.vectors(after.ids_BK)[0], queries_BD)


def test_another_corpus_is_refused_with_both_hashes(corpus, publish):
    snapshot = publish(torch.eye(4))
    other = corpus_of(["another", *TEXTS[1:]])
    with pytest.raises(StaleIndexError, match=f"expected one of corpus {other.hash} .*corpus {corpus.hash}"):
        DenseRetriever(snapshot, other)
    retriever = DenseRetriever(snapshot, corpus)
    with pytest.raises(StaleIndexError, match=f"expected one of corpus {corpus.hash}.*came one of corpus elsewhere"):
        retriever.swap(publish(torch.eye(4), step=1, corpus_hash="elsewhere"))
    assert retriever.snapshot is snapshot


def test_a_snapshot_of_part_of_the_corpus_is_refused(corpus, publish):
    with pytest.raises(StaleIndexError, match=r"one vector for each of 4 passages .* came 3"):
        DenseRetriever(publish(torch.eye(4)[:3]), corpus)


@pytest.mark.parametrize("settings", [{"metric": "l2"}, {}])
def test_a_swap_to_another_dimension_or_metric_is_refused(corpus, publish, settings):
    snapshot = publish(torch.eye(4))
    retriever = DenseRetriever(snapshot, corpus)
    dimension = 4 if settings else 3
    with pytest.raises(ConfigError, match=r"expected dimension 4 and metric 'inner_product' .* came \d and '"):
        retriever.swap(publish(torch.eye(4)[:, :dimension], step=1, **settings))
    assert retriever.snapshot is snapshot


def test_bad_questions_are_refused(corpus, publish):
    retriever = DenseRetriever(publish(torch.eye(4)), corpus)
    with pytest.raises(ConfigError, match="expected query vectors, came none"):
        retriever.retrieve(["a"], None, 1)
    with pytest.raises(DataError, match="one query vector for each of 2 questions, came 1"):
        retriever.retrieve(["a", "b"], torch.eye(4)[:1], 1)
    with pytest.raises(ConfigError, match=r"expected 1 to 4, .* came 5"):
        retriever.retrieve(["a"], torch.eye(4)[:1], 5)


def test_hits_of_a_foreign_snapshot_are_refused(corpus, publish):
    retriever = DenseRetriever(publish(torch.eye(4)), corpus)
    other = DenseRetriever(publish(torch.eye(4), step=9), corpus)
    hits = other.retrieve(["a"], torch.eye(4)[:1], 1)
    with pytest.raises(StaleIndexError, match=f"came ones of {hits.snapshot_id}"):
        retriever.evidence(hits)
