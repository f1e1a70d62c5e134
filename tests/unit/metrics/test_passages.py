"""Recall@k and MRR against NumPy and scikit-learn; relevance by gold id and by answer string."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.metrics.passages import (
    RetrievalMetrics,
    recall_at,
    reciprocal_rank,
    relevant_by_answer,
    relevant_by_gold,
)
from rag_lightning.types import Passage, Question

relevances = hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 7)))


@given(relevances, st.data())
def test_recall_and_rank_agree_with_a_loop(relevant, data):
    k = data.draw(st.integers(1, relevant.shape[1]))
    recalls, reciprocals = [], []
    for row in relevant.tolist():
        first = row.index(True) + 1 if True in row else None
        recalls.append(1.0 if first is not None and first <= k else 0.0)
        reciprocals.append(1 / first if first is not None else 0.0)
    assert recall_at(torch.from_numpy(relevant), k).tolist() == recalls
    assert reciprocal_rank(torch.from_numpy(relevant)).tolist() == pytest.approx(reciprocals)


def test_one_relevant_passage_agrees_with_sklearn():
    generator = np.random.default_rng(0)
    scores_BK, gold_B = generator.permuted(np.tile(np.arange(6.0), (50, 1)), axis=1), generator.integers(0, 6, 50)
    order_BK = np.argsort(-scores_BK, axis=1)
    relevant_BK = torch.from_numpy(order_BK == gold_B[:, None])
    metric = RetrievalMetrics(ks=(1, 3))
    metric.update(relevant_BK, torch.ones(50, dtype=torch.bool))
    figures = metric.compute()
    for k in (1, 3):
        expected = top_k_accuracy_score(gold_B, scores_BK, k=k, labels=np.arange(6))
        assert figures[f"recall@{k}"].item() == pytest.approx(expected)
    # with one relevant passage the average precision is the reciprocal rank
    expected = label_ranking_average_precision_score(np.eye(6, dtype=int)[gold_B], scores_BK)
    assert figures["mrr"].item() == pytest.approx(expected)


@given(relevances)
def test_recall_grows_with_k_and_bounds_the_reciprocal_rank(relevant):
    tensor = torch.from_numpy(relevant)
    recalls = torch.stack([recall_at(tensor, k) for k in range(1, tensor.shape[1] + 1)])
    assert (recalls.diff(dim=0) >= 0).all()
    reciprocal = reciprocal_rank(tensor)
    assert (recalls[0] <= reciprocal).all()
    assert (reciprocal <= recalls[-1]).all()


@given(relevances, st.data())
def test_batches_merging_and_uncounted_questions(relevant, data):
    num_questions = relevant.shape[0]
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_questions, max_size=num_questions)))
    cut = data.draw(st.integers(0, num_questions))
    tensor = torch.from_numpy(relevant)
    whole, parts, other = (RetrievalMetrics(ks=(1, 2, 20)) for _ in range(3))
    whole.update(tensor, counted)
    parts.update(tensor[:cut], counted[:cut])
    other.update(tensor[cut:], counted[cut:])
    parts.merge_state(other)
    expected = {}
    if counted.any():
        expected = {f"recall@{k}": recall_at(tensor[counted], k).mean() for k in (1, 2) if k <= relevant.shape[1]}
        expected["mrr"] = reciprocal_rank(tensor[counted]).mean()
    for metric in (whole, parts):
        figures = metric.compute()
        assert list(figures) == list(expected)
        torch.testing.assert_close(figures, expected)


def test_a_k_that_some_batch_did_not_reach_is_left_out():
    metric = RetrievalMetrics(ks=(1, 3))
    metric.update(torch.tensor([[True, False, False]]), torch.tensor([True]))
    assert set(metric.compute()) == {"recall@1", "recall@3", "mrr"}
    metric.update(torch.tensor([[True, False]]), torch.tensor([True]))
    assert set(metric.compute()) == {"recall@1", "mrr"}
    metric.reset()
    metric.update(torch.zeros(1, 0, dtype=torch.bool), torch.tensor([True]))
    assert metric.compute() == {"mrr": torch.tensor(0.0)}


PASSAGES = [
    Passage("a", "Rio 2", "Rio 2 is a film directed by Carlos Saldanha."),
    Passage("b", "Kismet", "It was released in 1944."),
    Passage("c", "Carlos", "Saldanha is a city."),
]
BY_ID = {passage.id: passage for passage in PASSAGES}


def rows(*ids: str) -> list[list[Passage]]:
    return [[BY_ID[one] for one in row] for row in ids]


def test_relevance_by_gold_id():
    questions = [Question("1", "?", ("x",), ("b", "a")), Question("2", "?", ("x",)), Question("3", "?", ("x",), ("z",))]
    relevant_BK, counted_B = relevant_by_gold(rows("cab", "ab", ""), questions)
    assert relevant_BK.tolist() == [[False, True, True], [False, False, False], [False, False, False]]
    assert counted_B.tolist() == [True, False, True]


def test_relevance_by_answer_string_and_by_expression():
    questions = [
        Question("1", "?", ("CARLOS SALDANHA", "nobody")),
        Question("2", "?", ("rio",)),
        Question("3", "?", (), answer_regex=r"19\d\d"),
        Question("4", "?", ("io",)),
    ]
    relevant_BK, counted_B = relevant_by_answer(rows("abc", "bac", "abc", "a"), questions)
    assert relevant_BK.tolist() == [
        [True, False, False],  # not "c", whose title ends with Carlos and whose text begins with Saldanha
        [False, True, False],
        [False, True, False],
        [False, False, False],  # words, not letters
    ]
    assert counted_B.all()


def test_rows_are_filled_up_to_the_number_asked_for():
    question = [Question("1", "?", ("rio",), ("a",))]
    for build in (relevant_by_gold, relevant_by_answer):
        relevant_BK, _ = build(rows("a"), question, num_passages=3)
        assert relevant_BK.tolist() == [[True, False, False]]
        with pytest.raises(DataError, match="at most 1 passages for each question, came 2"):
            build(rows("ab"), question, num_passages=1)
        with pytest.raises(DataError, match="passages for each of 1 questions, came 2 rows"):
            build(rows("a", "b"), question)
        assert build([], [])[0].shape == (0, 0)


@pytest.mark.parametrize("k", [0, 3])
def test_recall_outside_the_passages_is_refused(k):
    with pytest.raises(ConfigError, match=f"1 <= k <= K = 2 passages, came k = {k}"):
        recall_at(torch.tensor([[True, False]]), k)


@pytest.mark.parametrize("ks", [(), (0, 1), (5, 5)])
def test_cut_offs_are_checked(ks):
    with pytest.raises(ConfigError, match="ks: expected cut-offs of at least 1, each once"):
        RetrievalMetrics(ks=ks)
