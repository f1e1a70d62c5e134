"""How much of exact search an index gives up for its speed, measured on a sample of queries."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import Index, best_first
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.vectors import Vectors, as_stored

BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class IndexQuality:
    """An index beside exact search over the same vectors.

    Attributes:
        recall: Mean share of the exact top K that the index returns.
        num_passages: K.
        num_queries: P, on which it was measured.
        batch_size: Queries at a time.
        ms_per_batch: Milliseconds for a search of the index.
        exact_ms_per_batch: Milliseconds for the exact search.
    """

    recall: float
    num_passages: int
    num_queries: int
    batch_size: int
    ms_per_batch: float
    exact_ms_per_batch: float

    @property
    def queries_per_s(self) -> float:
        """Queries that the index answers in a second at this batch size."""
        return 1000.0 * self.batch_size / self.ms_per_batch


def recall_against_exact(index: Index, vectors: Vectors, queries: Float[Tensor, "P D"], *, num_passages: int) -> float:
    """Returns the mean share of the exact top K that an index returns: recall@K against exact search.

    An index built over vectors of another order, or with too few lists visited, shows here and not in a checksum: one
    of poor recall cost a published model 17 points of exact match.

    Args:
        index: What to judge; it ranks by ``index.metric``.
        vectors: The rows that it was built over, in its order; read in blocks.
        queries: Where possible vectors of real questions: a passage's own vector is easier to find than a question's.
        num_passages: K.

    Raises:
        ConfigError: K out of 1..N, or queries of another dimension.
        DataError: No queries, or another number of vectors than the index has.

    >>> from rag_lightning.index.build import build_index
    >>> recall_against_exact(build_index(torch.eye(4)), torch.eye(4), torch.eye(4), num_passages=1)
    1.0
    """
    return measure_quality(index, vectors, queries, num_passages=num_passages).recall


def measure_quality(
    index: Index,
    vectors: Vectors,
    queries: Float[Tensor, "P D"],
    *,
    num_passages: int,
    batch_size: int = BATCH_SIZE,
) -> IndexQuality:
    """Returns recall and speed of an index beside exact search; see :func:`recall_against_exact`.

    Rows are compared by number, so among equal scores at the K-th place the index's choice counts as it is. The time
    leaves out the first batch, which warms caches, where there are several; a last batch that is not full is not timed.
    """
    if len(queries) == 0:
        raise DataError("index quality: expected at least one query, came none. Give questions, or sample passages.")
    if len(vectors) != index.num_vectors:
        raise DataError(
            f"index quality: expected the {index.num_vectors} vectors that the index holds, came {len(vectors)}. "
            "Compare an index with the vectors of its own snapshot."
        )
    exact = ExactIndex(vectors, metric=index.metric)
    shares, times, exact_times = [], [], []
    for first in range(0, len(queries), batch_size):
        queries_BD = queries[first : first + batch_size]
        ids_BK, seconds = _timed_search(index, queries_BD, num_passages)
        exact_ids_BK, exact_seconds = _timed_search(exact, queries_BD, num_passages)
        shares.append(_share_found(exact_ids_BK, ids_BK))
        times.append(seconds)
        exact_times.append(exact_seconds)
    return IndexQuality(
        recall=float(torch.cat(shares).mean()),
        num_passages=num_passages,
        num_queries=len(queries),
        batch_size=min(batch_size, len(queries)),
        ms_per_batch=_typical_ms(times, len(queries), batch_size),
        exact_ms_per_batch=_typical_ms(exact_times, len(queries), batch_size),
    )


@torch.no_grad()
def recall_of_originals(
    index: Index, blocks: Iterable[Float[Tensor, "_ D"]], queries: Float[Tensor, "P D"], *, num_passages: int
) -> float:
    """Returns the mean share of the top K among the vectors as they were before they were stored.

    So what a storage of float16 or int8 loses counts too. The rows are ranked by inner product, which for vectors of
    length 1 is the order of every metric; they are streamed, and never stand in memory together.

    Args:
        index: What to judge.
        blocks: The original rows in order, of length 1.
        queries: What to search for.
        num_passages: K.
    """
    scores_PK = queries.new_empty(len(queries), 0)
    ids_PK = torch.empty_like(scores_PK, dtype=torch.int64)
    start = 0
    for block_MD in blocks:
        block_PK, columns_PK = (queries @ block_MD.T).topk(min(num_passages, len(block_MD)), dim=1)
        scores_PK, ids_PK = best_first(
            torch.cat([scores_PK, block_PK], dim=1), torch.cat([ids_PK, columns_PK + start], dim=1), num_passages
        )
        start += len(block_MD)
    found = [
        _share_found(
            ids_PK[first : first + BATCH_SIZE], index.search(queries[first : first + BATCH_SIZE], num_passages)[1]
        )
        for first in range(0, len(queries), BATCH_SIZE)
    ]
    return float(torch.cat(found).mean())


def noisy_rows(vectors: Vectors, num_queries: int, *, noise: float = 0.1, seed: int = 0) -> Float[Tensor, "P D"]:
    """Returns sampled rows, each moved by ``noise`` of its length at random: queries where none are at hand.

    They flatter an index: a question's vector lies further from the passages than a passage moved a little.

    Args:
        vectors: The rows to sample from, without replacement.
        num_queries: P; at most N are drawn.
        noise: Length of the displacement, relative to the row's.
        seed: Seeds the draw and the directions.

    Raises:
        ConfigError: Fewer than one query asked for, or a negative noise.
    """
    if num_queries < 1 or noise < 0:
        raise ConfigError(f"index quality: expected sample >= 1 and noise >= 0, came {num_queries} and {noise}.")
    rng = np.random.default_rng(seed)
    stored = as_stored(vectors)
    drawn_P = np.sort(rng.choice(len(stored), min(num_queries, len(stored)), replace=False))
    rows_PD = stored.rows(drawn_P).cpu().numpy()
    directions_PD = rng.standard_normal(rows_PD.shape, dtype=np.float32)
    directions_PD /= np.linalg.norm(directions_PD, axis=1, keepdims=True)
    lengths_P1 = np.linalg.norm(rows_PD, axis=1, keepdims=True)
    return torch.from_numpy(rows_PD + noise * lengths_P1 * directions_PD)


def _share_found(best_BK: Int[Tensor, "B K"], found_BK: Int[Tensor, "B K"]) -> Float[Tensor, "B"]:
    share_B: Tensor = (best_BK.unsqueeze(2) == found_BK.unsqueeze(1)).any(dim=2).double().mean(dim=1)
    return share_B


def _timed_search(index: Index, queries_BD: Float[Tensor, "B D"], num_passages: int) -> tuple[Tensor, float]:
    start = time.perf_counter()
    ids_BK = index.search(queries_BD, num_passages)[1].cpu()
    return ids_BK, time.perf_counter() - start


def _typical_ms(seconds: list[float], num_queries: int, batch_size: int) -> float:
    """Returns the median of the full batches after the first, or of what there is."""
    full = seconds[: num_queries // batch_size] or seconds
    return 1000.0 * float(np.median(full[1:] or full))
