"""Exact search with torch: the index that needs nothing else, and the oracle for the others.

Use it up to some hundred thousand passages on a CPU, and on a GPU as far as its memory holds the rows in their storage:
4 N D bytes of float32, half of that of float16, a quarter of int8 (:mod:`~rag_lightning.index.vectors`).
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.index.base import (
    Metric,
    as_metric,
    best_first,
    check_search,
    read_settings,
    similarity,
    unit_length,
    write_settings,
)
from rag_lightning.index.vector_files import VECTORS_FILE, in_storage, write_vectors
from rag_lightning.index.vectors import (
    StoredVectors,
    Vectors,
    as_stored,
    block_rows,
    check_vectors,
    check_width,
    open_vectors,
)
from rag_lightning.utils.io import existing_file

_EXTRA_CANDIDATES = 32
"""Candidates that are scored again beyond K: a matrix product's rounding must not decide the K-th place."""

_DEVICE_BLOCK_ROWS = 131_072
"""A GPU is kept waiting by many small blocks."""


class ExactIndex:
    """All N inner products, distances or cosines for each query, in blocks of rows.

    Candidates come from one matrix product a block; their scores are then computed again by
    :func:`~rag_lightning.index.base.similarity`, so they are the training side's scores, and equal scores are ordered
    by row: the result depends neither on the batch nor on the block size. Rows in float16 or int8 are widened to
    float32 block by block, so scores are the similarities of the stored rows.

    Args:
        vectors_ND: The rows; a float32 CPU tensor or a memory map is used in place, not copied.
            :class:`~rag_lightning.index.vectors.StoredVectors` were checked when they were written: not read now.
        metric: What to rank by.
        device: Where to keep the rows, in their storage, and to search; None leaves them where they are.
        block_size: Rows scored at once; B x block_size x 4 bytes of working memory beside the block's own. None is
            32 MiB of float32 rows on the CPU and 131,072 rows elsewhere.

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
        block_size: int | None = None,
    ) -> None:
        self._metric = as_metric(metric)
        check_width(vectors_ND)
        trusted = isinstance(vectors_ND, StoredVectors)
        if not trusted:
            check_vectors(vectors_ND)
        self._vectors = as_stored(vectors_ND).to(device)
        if block_size is None:
            block_size = block_rows(self.dimension) if self._vectors.device.type == "cpu" else _DEVICE_BLOCK_ROWS
        self._block_size = block_size
        self._norms_N = None if trusted else self._row_norms(self._vectors)

    @property
    def metric(self) -> Metric:
        """What ``search`` ranks by."""
        return self._metric

    @property
    def num_vectors(self) -> int:
        """N."""
        return self._vectors.num_vectors

    @property
    def dimension(self) -> int:
        """D."""
        return self._vectors.dimension

    @torch.no_grad()
    def search(
        self, queries_BD: Float[Tensor, "B D"], num_passages: int
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Finds the K best rows for each query; see :class:`~rag_lightning.index.base.Index`."""
        check_search(queries_BD, num_passages, self)
        home = queries_BD.device
        queries_BD = queries_BD.to(self._vectors.device, torch.float32)
        if self._norms_N is None:
            self._norms_N = self._row_norms(self._vectors)
        num_candidates = min(num_passages + _EXTRA_CANDIDATES, self.num_vectors)
        scores_BM = queries_BD.new_empty(len(queries_BD), 0)
        ids_BM = torch.empty_like(scores_BM, dtype=torch.int64)
        with torch.autocast(queries_BD.device.type, enabled=False):
            for start, rows_MD in self._vectors.blocks(self._block_size):
                block_scores_BM, block_ids_BM = _top(self._score_rows(queries_BD, rows_MD, start), num_candidates)
                scores_BM, ids_BM = best_first(
                    torch.cat([scores_BM, block_scores_BM], dim=1),
                    torch.cat([ids_BM, block_ids_BM + start], dim=1),
                    num_candidates,
                )
        scores_BM = similarity(queries_BD, self._vectors.rows(ids_BM), self._metric)
        scores_BK, ids_BK = best_first(scores_BM, ids_BM, num_passages)
        return scores_BK.to(home), ids_BK.to(home)

    def add(self, vectors_ND: Vectors) -> None:
        """Appends rows, encoded in the storage of those there; see :class:`~rag_lightning.index.base.Index`.

        Memory-mapped rows are read into memory with them.

        Raises:
            DataError: Another dimension, NaN or infinity, a zero vector under cosine, or too large for float16.
        """
        check_width(vectors_ND, self.dimension)
        added = list(in_storage(vectors_ND, self._vectors.storage))
        for block in added:
            self._row_norms(block)  # refuses zero vectors before anything is changed
        parts = [self._vectors, *(block.to(self._vectors.device) for block in added)]
        scales = [part.scales_N for part in parts if part.scales_N is not None]
        self._vectors = StoredVectors(
            torch.cat([part.stored_ND for part in parts]), torch.cat(scales) if scales else None
        )
        self._norms_N = None

    def save(self, directory: Path) -> None:
        """Writes the rows in their storage and ``index.json`` into an existing folder."""
        write_vectors(directory / VECTORS_FILE, self._vectors)
        write_settings(directory, "exact", self._metric)

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str | None = None) -> "ExactIndex":
        """Reads what ``save`` wrote; the vectors stay memory-mapped when ``device`` is None.

        Raises:
            MissingFileError: No index there.
            CorruptSnapshotError: The vectors or the settings are unreadable.
        """
        _, metric = read_settings(directory, "exact index")
        path = existing_file(directory / VECTORS_FILE, "exact index")
        return cls(open_vectors(path), metric=metric, device=device)

    def check_rows(self) -> None:
        """Reads all rows once and refuses those that cannot be searched.

        Raises:
            DataError: A zero vector under cosine (in float16 or int8 also one that was rounded to zero).
        """
        self._norms_N = self._row_norms(self._vectors)

    def _score_rows(
        self, queries_BD: Float[Tensor, "B D"], rows_MD: Float[Tensor, "M D"], start: int
    ) -> Float[Tensor, "B M"]:
        """Scores a block of rows up to rounding and, for l2, up to a constant of the query."""
        products_BM = queries_BD @ rows_MD.T
        if self._norms_N is None:
            return products_BM
        norms_M = self._norms_N[start : start + len(rows_MD)]
        return 2.0 * products_BM - norms_M.square() if self._metric == "l2" else products_BM / norms_M

    def _row_norms(self, vectors: StoredVectors) -> Float[Tensor, "N"] | None:
        """Euclidean norms, where the metric needs them."""
        if self._metric == "inner_product":
            return None
        norms = []
        for _, block_MD in vectors.blocks():
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
