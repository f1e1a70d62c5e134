import math

import pytest
import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import Index, as_metric, best_first, similarity
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.faiss import FaissIndex


def naive(query, vector, metric):
    """Plain Python floats, one pair at a time."""
    dot = math.fsum(a * b for a, b in zip(query, vector, strict=True))
    if metric == "inner_product":
        return dot
    if metric == "l2":
        return -math.fsum((a - b) ** 2 for a, b in zip(query, vector, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in query) * math.fsum(b * b for b in vector))


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_similarity_equals_the_naive_double_loop_and_has_its_gradient(metric):
    torch.manual_seed(0)
    queries_BD = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    vectors_BKD = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    scores_BK = similarity(queries_BD, vectors_BKD, metric)
    expected = [
        [naive(q, v, metric) for v in vs] for q, vs in zip(queries_BD.tolist(), vectors_BKD.tolist(), strict=True)
    ]
    torch.testing.assert_close(scores_BK, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q, v: similarity(q, v, metric), (queries_BD, vectors_BKD))


def test_similarity_is_float32_under_bfloat16_autocast():
    queries_BD, vectors_BKD = torch.full((1, 2), 6.0), torch.tensor([[[6.0, 6.25], [6.0, 6.3125]]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_BK = similarity(queries_BD, vectors_BKD, "inner_product")
    # in bfloat16 both would round to the same number near 73.5
    assert scores_BK.dtype == torch.float32
    assert scores_BK.tolist() == [[73.5, 73.875]]


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_a_missing_passage_scores_minus_infinity_and_gets_no_gradient(metric):
    queries_BD = torch.tensor([[1.0, 2.0]], requires_grad=True)
    vectors_BKD = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]], requires_grad=True)
    scores_BK = similarity(queries_BD, vectors_BKD, metric, found_BK=torch.tensor([[True, False]]))
    scores_BK.softmax(-1)[0, 0].backward()
    assert scores_BK[0, 1] == -torch.inf
    assert torch.isfinite(scores_BK[0, 0])
    assert torch.isfinite(queries_BD.grad).all()
    assert vectors_BKD.grad[0, 1].tolist() == [0.0, 0.0]


def test_a_zero_vector_has_no_cosine():
    ones = torch.ones(1, 2, 2)
    with pytest.raises(DataError, match=r"passage vectors of non-zero length, came 1 zero vector.*choose metric"):
        similarity(ones[0, :1], ones * torch.tensor([[[1.0], [0.0]]]), "cosine")
    with pytest.raises(DataError, match="query vectors of non-zero length"):
        similarity(torch.zeros(1, 2), ones, "cosine")
    assert similarity(torch.zeros(1, 2), ones, "inner_product").tolist() == [[0.0, 0.0]]


def test_an_unknown_metric_is_refused_by_name():
    with pytest.raises(ConfigError, match="expected one of inner_product, l2, cosine; came 'dot'"):
        as_metric("dot")


def test_best_first_orders_by_score_then_id_and_puts_missing_last():
    scores_BM = torch.tensor([[1.0, -torch.inf, 3.0, 1.0], [0.0, -0.0, 0.0, 0.0]])
    ids_BM = torch.tensor([[7, -1, 5, 2], [3, 2, 1, 0]])
    scores_BK, ids_BK = best_first(scores_BM, ids_BM, 4)
    assert ids_BK.tolist() == [[5, 2, 7, -1], [0, 1, 2, 3]]
    assert scores_BK[0].tolist() == [3.0, 1.0, 1.0, -math.inf]


def test_both_indexes_keep_the_protocol():
    pytest.importorskip("faiss")
    assert isinstance(ExactIndex(torch.eye(2)), Index)
    assert isinstance(FaissIndex.build(torch.eye(2)), Index)
