"""Exact search with torch: the index that needs nothing else, and the oracle for the others.

Use it up to some hundred thousand passages on a CPU and some ten million on a GPU (4 bytes x N x D of memory).
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import CorruptSnapshotError
from rag_lightning.index.base import (
    Metric,
    Vectors,
    as_metric,
    as_tensor,
    best_first,
    blocks,
    check_search,
    check_vectors,
    similarity,
    unit_length,
)
from rag_lightning.utils.io import existing_file, read_json, write_json

_EXTRA_CANDIDATES = 32
"""Candidates that are scored again beyond K: a matrix product's rounding must not decide the K-th place."""


class ExactIndex:
    """All N inner products, distances or cosines for each query, in blocks of rows.

    Candidates come from one matrix product a block; their scores are then computed again by
    :func:`~rag_lightning.index.base.similarity`, so they are the training side's scores, and equal scores are ordered
    by row: the result depends neither on the batch nor on the block size.

    Args:
        vectors_ND: The rows; a CPU tensor or a memory map is used in place, not copied.
        metric: What to rank by.
        device: Where to keep the rows and to search; None leaves them where they are.
        block_size: Rows scored at once; B x block_size x 4 bytes of working memory.

    Raises:
        ConfigError: Not a metric.
        DataError: No vectors, NaN or infinity among them, or a zero one under cosine.

    >>> index = ExactIndex(torch.eye(3))
    >>> index.search(torch.tensor([[0.1, 0.9, 0.5]]), num_passages=2)
    (tensor([[0.9000, 0.5000]]), tensor([[1, 2]]))
    """

    def __init__(
        self,
        vectors_ND: Vectors,
        *,
        metric: Metric = "inner_product",
        device: torch.device | str | None = None,
        block_size: int = 65_536,
    ) -> None:
        self._metric = as_metric(metric)
        self._block_size = block_size
        check_vectors(vectors_ND)
        self._vectors_ND = as_tensor(vectors_ND).detach().to(device=device, dtype=torch.float32)
        self._norms_N = self._row_norms(self._vectors_ND)

    @property
    def metric(self) -> Metric:
        """What ``search`` ranks by."""
        return self._metric

    @property
    def num_vectors(self) -> int:
        """N."""
        return self._vectors_ND.shape[0]

    @property
    def dimension(self) -> int:
        """D."""
        return self._vectors_ND.shape[1]

    @torch.no_grad()
    def search(
        self, queries_BD: Float[Tensor, "B D"], num_passages: int
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Finds the K best rows for each query; see :class:`~rag_lightning.index.base.Index`."""
        check_search(queries_BD, num_passages, self)
        home = queries_BD.device
        queries_BD = queries_BD.to(self._vectors_ND.device, torch.float32)
        num_candidates = min(num_passages + _EXTRA_CANDIDATES, self.num_vectors)
        scores_BM = queries_BD.new_empty(len(queries_BD), 0)
        ids_BM = torch.empty_like(scores_BM, dtype=torch.int64)
        with torch.autocast(queries_BD.device.type, enabled=False):
            for start in range(0, self.num_vectors, self._block_size):
                block_BM = self._score_rows(queries_BD, start, start + self._block_size)
                block_scores_BM, block_ids_BM = _top(block_BM, num_candidates)
                scores_BM, ids_BM = best_first(
                    torch.cat([scores_BM, block_scores_BM], dim=1),
                    torch.cat([ids_BM, block_ids_BM + start], dim=1),
                    num_candidates,
                )
        scores_BM = similarity(queries_BD, self._vectors_ND[ids_BM], self._metric)
        scores_BK, ids_BK = best_first(scores_BM, ids_BM, num_passages)
        return scores_BK.to(home), ids_BK.to(home)

    def add(self, vectors_ND: Vectors) -> None:
        """Appends rows; see :class:`~rag_lightning.index.base.Index`.

        Raises:
            DataError: Another dimension, NaN or infinity, or a zero vector under cosine.
        """
        check_vectors(vectors_ND, self.dimension)
        rows_MD = as_tensor(vectors_ND).detach().to(self._vectors_ND)
        norms_M = self._row_norms(rows_MD)
        self._vectors_ND = torch.cat([self._vectors_ND, rows_MD])
        if self._norms_N is not None and norms_M is not None:
            self._norms_N = torch.cat([self._norms_N, norms_M])

    def save(self, directory: Path) -> None:
        """Writes ``vectors.npy`` and ``index.json`` into an existing folder."""
        np.save(directory / "vectors.npy", self._vectors_ND.cpu().numpy(), allow_pickle=False)
        write_json(directory / "index.json", {"factory": "exact", "metric": self._metric})

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str | None = None) -> "ExactIndex":
        """Reads what ``save`` wrote; the vectors stay memory-mapped when ``device`` is None.

        Raises:
            MissingFileError: No index there.
            CorruptSnapshotError: The vectors are unreadable.
        """
        settings = read_json(directory / "index.json", "exact index")
        path = existing_file(directory / "vectors.npy", "exact index")
        try:
            vectors_ND = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CorruptSnapshotError(
                f"{path}: expected a whole .npy file: {error}. Build the index again."
            ) from error
        return cls(vectors_ND, metric=as_metric(settings["metric"]), device=device)

    def _score_rows(self, queries_BD: Float[Tensor, "B D"], start: int, stop: int) -> Float[Tensor, "B M"]:
        """Scores a block of rows up to rounding and, for l2, up to a constant of the query."""
        products_BM = queries_BD @ self._vectors_ND[start:stop].T
        if self._norms_N is None:
            return products_BM
        norms_M = self._norms_N[start:stop]
        return 2.0 * products_BM - norms_M.square() if self._metric == "l2" else products_BM / norms_M

    def _row_norms(self, rows_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N"] | None:
        """Euclidean norms, where the metric needs them."""
        if self._metric == "inner_product":
            return None
        norms = []
        for _, block_MD in blocks(rows_ND, self._block_size):
            if self._metric == "cosine":
                unit_length(block_MD, "passage vectors")
            norms.append(torch.linalg.vector_norm(block_MD, dim=1))
        return torch.cat(norms)


def _top(scores_BN: Float[Tensor, "B N"], num_passages: int) -> tuple[Float[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Top-k whose ties go to the lowest column; ``torch.topk`` leaves open which of equal scores it returns."""
    num_passages = min(num_passages, scores_BN.shape[1])
    top_BM, columns_BM = scores_BN.topk(num_passages, dim=1)
    crowded_B = (scores_BN >= top_BM[:, -1:]).sum(dim=1) > num_passages
    if bool(crowded_B.any()):
        sorted_scores, sorted_columns = scores_BN[crowded_B].sort(dim=1, descending=True, stable=True)
        top_BM[crowded_B] = sorted_scores[:, :num_passages]
        columns_BM[crowded_B] = sorted_columns[:, :num_passages]
    return top_BM, columns_BM
