import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, StaleIndexError
from rag_lightning.index.bm25 import Bm25Index, Bm25Settings
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.retrieval.base import MISSING_PASSAGE, Retriever
from rag_lightning.retrieval.sparse import SparseRetriever
from rag_lightning.types import Passage

pytest.importorskip("bm25s")

TEXTS = ["amber was made by ada", "quartz was made by eve", "winter came out late", "amber amber"]


def corpus_of(texts=TEXTS):
    return PassageCorpus.from_passages([Passage(f"p{n}", "", text) for n, text in enumerate(texts)])


@pytest.fixture
def retriever():
    corpus = corpus_of()
    return SparseRetriever(Bm25Index.build(corpus), corpus)


def test_questions_find_passages_by_their_words_without_vectors(retriever):
    assert isinstance(retriever, Retriever)
    hits = retriever.retrieve(["who made amber", "winter"], None, 3)
    assert hits.ids_BK.tolist() == [[0, 3, 1], [2, -1, -1]]
    assert torch.equal(hits.scores_BK, retriever.index.search(["who made amber", "winter"], 3)[0])
    assert hits.snapshot_id == retriever.snapshot_id == retriever.index.id
    assert hits.fusion is None
    first, second = retriever.evidence(hits).passages
    assert [passage.id for passage in first] == ["p0", "p3", "p1"]
    assert second == (retriever.corpus[2], MISSING_PASSAGE, MISSING_PASSAGE)
    same = retriever.retrieve(["who made amber"], torch.randn(1, 3), 3)  # vectors are not looked at
    assert torch.equal(same.ids_BK[0], hits.ids_BK[0])


def test_it_needs_no_encoder_and_teaches_none(retriever):
    assert retriever.needs_vectors is False
    assert retriever.gradient_to == ()
    with pytest.raises(ConfigError, match="retriever 'sparse': .* has no passage vectors. Use retriever 'dense'"):
        retriever.vectors(torch.tensor([[0]]))


def test_the_prior_is_the_softmax_of_bm25(retriever):
    hits = retriever.retrieve(["who made amber", "winter", "nothing shared"], None, 3)
    prior_BK = doc_log_prior(retriever.scores(hits, None, None), 2.0).exp()
    expected = (hits.scores_BK[0] / 2.0).exp()
    torch.testing.assert_close(prior_BK[0], expected / expected.sum())
    assert prior_BK[1].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(prior_BK[2], torch.full((3,), 1 / 3))  # the question alone, three times


def test_an_index_of_another_corpus_is_refused(retriever):
    other = corpus_of(["other", *TEXTS[1:]])
    with pytest.raises(StaleIndexError, match=f"one of corpus {other.hash} .*of corpus {retriever.corpus.hash}"):
        SparseRetriever(retriever.index, other)


def test_hits_of_another_index_are_refused(retriever):
    other = SparseRetriever(Bm25Index.build(retriever.corpus, Bm25Settings(k1=2.0)), retriever.corpus)
    with pytest.raises(StaleIndexError, match=f"came ones of {other.snapshot_id}"):
        retriever.evidence(other.retrieve(["amber"], None, 1))


def test_too_many_passages_are_refused(retriever):
    with pytest.raises(ConfigError, match="expected 1 to 4, .* came 5"):
        retriever.retrieve(["amber"], None, 5)
