"""Hit@k, nDCG@k and MRR of one item against a loop and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.metrics.passages import recall_at, reciprocal_rank
from rag_lightning.metrics.ranking import RankMetrics, hit_at, ndcg_at, reciprocal

ranks = st.lists(st.integers(0, 12), min_size=1, max_size=12)


@given(ranks, st.integers(1, 13))
def test_figures_agree_with_a_loop(ranks, k):
    tensor = torch.tensor(ranks)
    hits = [1.0 if 1 <= rank <= k else 0.0 for rank in ranks]
    gains = [1 / math.log2(1 + rank) if 1 <= rank <= k else 0.0 for rank in ranks]
    reciprocals = [1 / rank if rank else 0.0 for rank in ranks]
    assert hit_at(tensor, k).tolist() == hits
    assert ndcg_at(tensor, k).tolist() == pytest.approx(gains)
    assert reciprocal(tensor).tolist() == pytest.approx(reciprocals)
    metric = RankMetrics(ks=(k,))
    metric.update(tensor)
    expected = {f"hit@{k}": np.mean(hits), f"ndcg@{k}": np.mean(gains), "mrr": np.mean(reciprocals)}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected)


def test_figures_agree_with_sklearn():
    generator = np.random.default_rng(0)
    scores_NC, gold_N = generator.permuted(np.tile(np.arange(9.0), (60, 1)), axis=1), generator.integers(0, 9, 60)
    ranks_N = torch.from_numpy(1 + (scores_NC > np.take_along_axis(scores_NC, gold_N[:, None], axis=1)).sum(axis=1))
    relevant_NC = np.eye(9, dtype=int)[gold_N]
    metric = RankMetrics(ks=(1, 5))
    metric.update(ranks_N)
    expected = {"mrr": label_ranking_average_precision_score(relevant_NC, scores_NC)}
    for k in (1, 5):
        expected[f"hit@{k}"] = top_k_accuracy_score(gold_N, scores_NC, k=k, labels=np.arange(9))
        expected[f"ndcg@{k}"] = ndcg_score(relevant_NC, scores_NC, k=k)
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected)


@given(ranks, st.integers(1, 12))
def test_they_are_the_figures_of_passages_of_which_one_is_relevant(ranks, k):
    relevant_NK = torch.tensor([[place == rank for place in range(1, 13)] for rank in ranks])
    assert torch.equal(hit_at(torch.tensor(ranks), k), recall_at(relevant_NK, k))
    torch.testing.assert_close(reciprocal(torch.tensor(ranks)), reciprocal_rank(relevant_NK))


@given(ranks, st.integers(1, 12))
def test_gain_lies_between_the_first_place_and_a_hit(ranks, k):
    tensor = torch.tensor(ranks)
    assert (hit_at(tensor, 1) <= ndcg_at(tensor, k)).all()
    assert (ndcg_at(tensor, k) <= hit_at(tensor, k)).all()


def test_batches_and_merging_change_nothing():
    whole, parts, other = RankMetrics(), RankMetrics(), RankMetrics()
    whole.update(torch.tensor([1, 0, 7, 2]))
    parts.update(torch.tensor([1]))
    other.update(torch.tensor([0, 7, 2]))
    parts.merge_state(other)
    torch.testing.assert_close(parts.compute(), whole.compute())


def test_figures_without_questions_are_left_out():
    metric = RankMetrics()
    metric.update(torch.zeros(0, dtype=torch.long))
    assert metric.compute() == {}


@pytest.mark.parametrize("ks", [(), (0, 1), (5, 5)])
def test_bad_cutoffs_are_refused(ks):
    with pytest.raises(ConfigError, match="ks: expected cut-offs of at least 1, each once"):
        RankMetrics(ks=ks)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="expected a cut-off k of at least 1, came 0"):
        hit_at(torch.tensor([1]), 0)
    with pytest.raises(ConfigError, match="expected a cut-off k of at least 1, came -1"):
        ndcg_at(torch.tensor([1]), -1)
    with pytest.raises(DataError, match="expected ranks from 1, or 0 for an item that was not ranked, came -2"):
        RankMetrics().update(torch.tensor([1, -2]))
