import inspect

import numpy as np
import pytest
import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.build import build_index
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.quality import (
    IndexQuality,
    measure_quality,
    noisy_rows,
    recall_against_exact,
    recall_of_originals,
)
from rag_lightning.index.vector_files import encoded

METRICS = ("inner_product", "l2", "cosine")


def rows(num_rows: int, dimension: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, dimension)).astype(np.float32)


def naive_top(vectors: np.ndarray, query: np.ndarray, metric: str, num_passages: int) -> set[int]:
    """One row at a time in float64, sorted by Python: the oracle."""
    scored = []
    for number, row in enumerate(vectors.astype(np.float64)):
        product = float(row @ query)
        if metric == "l2":
            product = -float(((row - query) ** 2).sum())
        elif metric == "cosine":
            product /= float(np.linalg.norm(row) * np.linalg.norm(query))
        scored.append((-product, number))
    return {number for _, number in sorted(scored)[:num_passages]}


class Fixed:
    """An index that answers what it was told, whatever it is asked."""

    def __init__(self, answers_PK: torch.Tensor, vectors: np.ndarray, metric: str) -> None:
        self.metric = metric
        self.num_vectors, self.dimension = vectors.shape
        self._answers = iter(answers_PK)

    def search(self, queries_BD: torch.Tensor, num_passages: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BK = torch.stack([next(self._answers) for _ in queries_BD])
        return torch.zeros(ids_BK.shape), ids_BK

    def add(self, vectors_ND: object) -> None:
        raise NotImplementedError

    def save(self, directory: object) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_the_share_that_a_naive_search_finds_too(metric):
    vectors, queries = rows(300), rows(70, seed=1)  # 70 queries: a full batch and one that is not
    rng = np.random.default_rng(2)
    answers = torch.from_numpy(np.stack([rng.choice(300, 5, replace=False) for _ in queries]))
    expected = []
    for query, answer in zip(queries, answers, strict=True):
        best = naive_top(vectors, query, metric, 5)
        answer[0] = min(best)  # so that recall lies well above chance
        answer[1] = -1
        expected.append(len(best & set(answer.tolist())) / 5)
    found = recall_against_exact(Fixed(answers, vectors, metric), vectors, torch.from_numpy(queries), num_passages=5)
    assert found == pytest.approx(np.mean(expected), abs=1e-12)
    assert 0.2 <= found < 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_has_recall_one(metric):
    vectors, queries = rows(200), torch.from_numpy(rows(10, seed=1))
    assert recall_against_exact(ExactIndex(vectors, metric=metric), vectors, queries, num_passages=7) == 1.0


def test_what_a_storage_loses_counts_against_the_originals():
    unit = rows(1000, 24)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    queries = rows(70, 24, seed=1)
    stored = encoded(torch.from_numpy(unit), "int8")
    index = ExactIndex(stored)
    assert recall_against_exact(index, stored, torch.from_numpy(queries), num_passages=10) == 1.0
    expected = []
    for query in queries:
        found = index.search(torch.from_numpy(query[None]), 10)[1][0].tolist()
        expected.append(len(naive_top(unit, query, "inner_product", 10) & set(found)) / 10)
    blocks = torch.from_numpy(unit).split([7, 300, 693])
    found = recall_of_originals(index, blocks, torch.from_numpy(queries), num_passages=10)
    assert found == pytest.approx(np.mean(expected), abs=1e-12)
    assert 0.9 < found < 1
    assert recall_of_originals(ExactIndex(unit), blocks, torch.from_numpy(queries), num_passages=10) == 1.0


def test_a_bad_index_shows():
    """Of rows in another order, recall is that of chance; of too few lists visited, it is far from 1."""
    pytest.importorskip("faiss")
    vectors, queries = rows(2000), torch.from_numpy(rows(50, seed=1))
    reordered = build_index(vectors[::-1].copy(), factory="Flat")
    assert recall_against_exact(reordered, vectors, queries, num_passages=10) < 0.05
    good = build_index(vectors, factory="Flat")
    assert recall_against_exact(good, vectors, queries, num_passages=10) == 1.0
    narrow, wide = (build_index(vectors, factory="IVF32,Flat", nprobe=nprobe) for nprobe in (1, 32))
    assert recall_against_exact(narrow, vectors, queries, num_passages=10) < 0.6
    assert recall_against_exact(wide, vectors, queries, num_passages=10) == 1.0


def test_speed_is_given_beside_recall():
    vectors = rows(500)
    quality = measure_quality(ExactIndex(vectors), vectors, torch.from_numpy(rows(20)), num_passages=3, batch_size=8)
    assert (quality.num_queries, quality.num_passages, quality.batch_size) == (20, 3, 8)
    assert quality.ms_per_batch > 0
    assert quality.exact_ms_per_batch > 0
    made_up = IndexQuality(
        recall=1, num_passages=3, num_queries=64, batch_size=64, ms_per_batch=32, exact_ms_per_batch=1
    )
    assert made_up.queries_per_s == 2000


def test_noisy_rows_are_rows_moved_by_a_share_of_their_length():
    vectors = 3 * rows(50)
    queries = noisy_rows(vectors, 20, noise=0.25, seed=4)
    assert torch.equal(queries, noisy_rows(vectors, 20, noise=0.25, seed=4))
    assert not torch.equal(queries, noisy_rows(vectors, 20, noise=0.25, seed=5))
    nearest = [int(np.argmin(((vectors - query) ** 2).sum(1))) for query in queries.numpy()]
    assert len(set(nearest)) == 20
    for query, row in zip(queries.numpy(), nearest, strict=True):
        length = np.linalg.norm(vectors[row])
        assert np.linalg.norm(query - vectors[row]) == pytest.approx(0.25 * length, rel=1e-4)
    assert len(noisy_rows(vectors, 1000)) == 50


@pytest.mark.parametrize(("sample", "noise"), [(0, 0.1), (5, -0.1)])
def test_a_sample_that_cannot_be_drawn_is_refused(sample, noise):
    with pytest.raises(ConfigError, match=f"expected sample >= 1 and noise >= 0, came {sample} and {noise}"):
        noisy_rows(rows(5), sample, noise=noise)


def test_bad_input_is_refused():
    vectors = rows(10)
    index = ExactIndex(vectors)
    measure = inspect.unwrap(recall_against_exact)
    with pytest.raises(DataError, match="expected at least one query, came none"):
        measure(index, vectors, torch.empty(0, 12), num_passages=2)
    with pytest.raises(DataError, match="expected the 10 vectors that the index holds, came 9"):
        measure(index, vectors[:9], torch.from_numpy(rows(2)), num_passages=2)
    with pytest.raises(ConfigError, match="num_passages: expected 1 to 10, the passages in the index; came 11"):
        measure(index, vectors, torch.from_numpy(rows(2)), num_passages=11)
