"""Diagnostics against sets, SciPy's entropy and plain arithmetic; sums over two processes."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.metrics.diagnostics import (
    DiagnosticMetrics,
    distinct_passage_ratio,
    overlap_at_k,
    posterior_entropy,
    retrieval_utility,
)

CORPUS_SIZE = 12
passage_ids = hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(-1, 11))


def oracle_ratio(ids: np.ndarray) -> float:
    found = [one for one in ids.ravel().tolist() if one != -1]
    return len(set(found)) / len(found) if found else 0.0


@given(passage_ids)
def test_distinct_ratio_agrees_with_sets(ids):
    assert distinct_passage_ratio(torch.from_numpy(ids)) == pytest.approx(oracle_ratio(ids))


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-20, 20)), st.booleans())
def test_entropy_agrees_with_scipy(scores, missing):
    log_posterior_BK = torch.from_numpy(scores)
    if missing:
        log_posterior_BK[:, 1:] = -torch.inf
    posterior_BK = log_posterior_BK.softmax(dim=1)
    expected = entropy(posterior_BK.numpy(), axis=1)
    np.testing.assert_allclose(posterior_entropy(posterior_BK).numpy(), expected, atol=1e-12)


def test_entropy_is_float32_at_least_and_bounded():
    uniform_BK = torch.full((2, 8), 0.125, dtype=torch.bfloat16)
    assert posterior_entropy(uniform_BK).dtype == torch.float32
    torch.testing.assert_close(posterior_entropy(uniform_BK), torch.full((2,), math.log(8)))


@pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("-inf")])
def test_entropy_of_what_is_no_probability_is_refused(wrong):
    with pytest.raises(DataError, match="expected probabilities, came a negative or NaN value"):
        posterior_entropy(torch.tensor([[1.0, wrong]]))


distinct_rows = st.lists(st.permutations(range(7)).map(lambda row: row[:4]), min_size=3, max_size=3)


@given(distinct_rows, distinct_rows)
def test_overlap_agrees_with_sets(before, after):
    expected = [len(set(left) & set(right)) / 4 for left, right in zip(before, after, strict=True)]
    assert overlap_at_k(torch.tensor(before), torch.tensor(after)).tolist() == expected
    assert overlap_at_k(torch.tensor(after), torch.tensor(before)).tolist() == expected


def test_passages_not_found_are_no_overlap():
    assert overlap_at_k(torch.tensor([[3, -1]]), torch.tensor([[-1, 3]])).tolist() == [0.5]


def test_utility_is_a_difference_in_float32():
    utility_B = retrieval_utility(
        torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-3.5], dtype=torch.bfloat16)
    )
    assert utility_B.dtype == torch.float32
    assert utility_B.tolist() == [2.5]


def test_shapes_that_would_broadcast_are_refused():
    # unwrapped: the shape checker of the tests would speak first, users run without it
    with pytest.raises(ConfigError, match=r"expected one shape, came \(2, 3\) and \(2, 1\)"):
        inspect.unwrap(overlap_at_k)(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"expected one shape, came \(2,\) and \(1,\)"):
        inspect.unwrap(retrieval_utility)(torch.zeros(2), torch.zeros(1))


@given(passage_ids, st.data())
def test_metric_over_an_epoch_agrees_with_one_big_batch(ids, data):
    cut = data.draw(st.integers(0, len(ids)))
    posterior_BK = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    utility_B = torch.arange(len(ids), dtype=torch.float32)
    metric, other = DiagnosticMetrics(corpus_size=CORPUS_SIZE), DiagnosticMetrics(corpus_size=CORPUS_SIZE)
    metric.update(torch.from_numpy(ids[:cut]), posterior_BK[:cut], utility_B[:cut])
    other.update(torch.from_numpy(ids[cut:]), posterior_BK[cut:], utility_B[cut:])
    metric.merge_state(other)
    figures = {name: value.item() for name, value in metric.compute().items()}
    expected = {
        "posterior_entropy": posterior_entropy(posterior_BK).mean().item(),
        "retrieval_utility": (len(ids) - 1) / 2,
    }
    if (ids >= 0).any():
        expected["distinct_passage_ratio"] = oracle_ratio(ids)
    assert figures == pytest.approx(expected, rel=1e-5)


def test_metric_leaves_out_what_was_not_given_and_resets():
    metric = DiagnosticMetrics(corpus_size=CORPUS_SIZE)
    metric.update(torch.tensor([[0, 11]]))
    assert metric.compute() == {"distinct_passage_ratio": torch.tensor(1.0)}
    metric.reset()
    metric.update(torch.tensor([[-1, -1]]), None, torch.tensor([0.0]))
    assert metric.compute() == {"retrieval_utility": torch.tensor(0.0)}


def test_metric_refuses_another_corpus():
    with pytest.raises(DataError, match=r"below corpus_size = 12, came 12\. Give the size of the corpus"):
        DiagnosticMetrics(corpus_size=CORPUS_SIZE).update(torch.tensor([[12]]))
    with pytest.raises(ConfigError, match="at least 1; came 0"):
        DiagnosticMetrics(corpus_size=0)


def _one_of_two_processes(rank: int, meeting_point: str, results: str) -> None:
    import json

    from rag_lightning.metrics import AnswerMetrics, RetrievalMetrics
    from rag_lightning.types import Question

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    mine = slice(0, 1) if rank == 0 else slice(1, 4)  # uneven on purpose
    ids_BK = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3]])[mine]
    relevant_BK = torch.tensor([[True, False], [False, True], [False, False], [False, False]])[mine]
    diagnostics, retrieval, answers = DiagnosticMetrics(corpus_size=CORPUS_SIZE), RetrievalMetrics(), AnswerMetrics()
    diagnostics.update(ids_BK, torch.full(ids_BK.shape, 0.5), torch.tensor([4.0, 0.0, 0.0, 0.0])[mine])
    retrieval.update(relevant_BK, torch.tensor([True, True, True, False])[mine])
    answers.update(["red", "x", "y", "z"][mine], [Question("1", "?", ("red",))] * len(ids_BK))
    figures = diagnostics.compute() | retrieval.compute() | answers.compute()
    Path(results, str(rank)).write_text(json.dumps({name: value.item() for name, value in figures.items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_give_the_figures_of_one(tmp_path):
    import json

    multiprocessing.spawn(_one_of_two_processes, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    expected = {
        "distinct_passage_ratio": 4 / 8,
        "posterior_entropy": math.log(2),
        "retrieval_utility": 1.0,
        "recall@1": 1 / 3,
        "mrr": (1 + 0.5) / 3,
        "exact_match": 0.25,
        "f1": 0.25,
    }
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == pytest.approx(expected)
