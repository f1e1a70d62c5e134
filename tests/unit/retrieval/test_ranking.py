"""Ranks of one passage among all, against a naive loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import DataError
from rag_lightning.index.base import similarity
from rag_lightning.index.vectors import StoredVectors
from rag_lightning.retrieval.ranking import bm25_scores, dense_scores, gold_counts, rank_of
from rag_lightning.types import Passage, Question


@given(
    st.integers(2, 7).flatmap(
        lambda n: st.lists(
            st.tuples(
                st.lists(st.integers(0, 3), min_size=n, max_size=n),
                st.integers(0, n - 1),
                st.sets(st.integers(0, n - 1)),
            ),
            min_size=1,
            max_size=5,
        )
    )
)
def test_ranks_agree_with_a_loop(cases):
    scores, targets, excluded = zip(*cases, strict=True)
    expected = [
        1 + sum(score >= row[target] for n, score in enumerate(row) if n != target and n not in left_out)
        for row, target, left_out in cases
    ]
    came = rank_of(torch.tensor(scores).float(), torch.tensor(targets), [sorted(one) for one in excluded])
    assert came.tolist() == expected


def test_equal_scores_rank_the_target_last():
    assert rank_of(torch.zeros(2, 5), torch.tensor([0, 4])).tolist() == [5, 5]
    assert rank_of(torch.zeros(1, 5), torch.tensor([0]), [[1, 2]]).tolist() == [3]


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="expected numbers as scores, came NaN"):
        rank_of(torch.tensor([[1.0, torch.nan]]), torch.tensor([0]))
    with pytest.raises(DataError, match="each of 2 questions, came 1 lists"):
        rank_of(torch.zeros(2, 3), torch.tensor([0, 1]), [[]])


@pytest.mark.parametrize("metric", ["inner_product", "cosine", "l2"])
def test_dense_scores_are_the_similarities_whatever_the_block(metric):
    generator = torch.Generator().manual_seed(0)
    queries_BD, vectors_ND = torch.randn(4, 6, generator=generator), torch.randn(11, 6, generator=generator)
    expected = similarity(queries_BD, vectors_ND.expand(4, -1, -1), metric)
    for block_size in (None, 1, 4):
        for vectors in (vectors_ND, StoredVectors(vectors_ND)):
            came = dense_scores(queries_BD, vectors, metric, block_size=block_size)
            torch.testing.assert_close(came, expected, atol=1e-5, rtol=1e-5)


def test_bm25_scores_are_those_of_a_search_and_zero_elsewhere():
    pytest.importorskip("bm25s")
    from rag_lightning.index.bm25 import Bm25Index

    corpus = PassageCorpus.from_passages(
        [Passage(word, word, f"{word} harbour" * n) for n, word in enumerate("abcd", 1)]
    )
    index = Bm25Index.build(corpus)
    texts = ["b harbour", "d", "nothing"]
    expected = index.scores_of(texts, torch.arange(4).expand(3, -1))
    torch.testing.assert_close(bm25_scores(index, texts), expected)
    assert bm25_scores(index, texts)[2].tolist() == [0.0] * 4


def test_popularity_is_counted_by_hand():
    corpus = PassageCorpus.from_passages([Passage(word, "", word) for word in "abc"])
    asked = [Question(str(n), "?", (), (gold,), excluded_passage_ids=("a",)) for n, gold in enumerate("ccb")]
    assert gold_counts(asked, corpus).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="'z' is not among the 3 passages"):
        gold_counts([Question("1", "?", (), ("z",))], corpus)
