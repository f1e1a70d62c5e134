"""The similarity of questions and passages, and what every index promises about it.

The same function scores an index's answers with gradient during training and defines what the index searches for, so
that training can never optimise another similarity than the one that retrieval uses.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rag_lightning.errors import ConfigError, DataError

Metric = Literal["inner_product", "l2", "cosine"]
Vectors = Shaped[Tensor, "N D"] | Shaped[np.ndarray, "N D"]

MISSING_ID = -1
"""The passage number that stands where an index found nothing; its score is ``-inf``."""


@runtime_checkable
class Index(Protocol):
    """N vectors that can be searched; row numbers are passage numbers."""

    @property
    def metric(self) -> Metric:
        """What ``search`` ranks by."""
        ...

    @property
    def num_vectors(self) -> int:
        """N."""
        ...

    @property
    def dimension(self) -> int:
        """D."""
        ...

    def search(
        self, queries_BD: Float[Tensor, "B D"], num_passages: int
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Finds the K best rows for each query, in one call for the whole batch and without gradient.

        Returns:
            ``scores_BK`` (float32, larger is better, best first, equal scores by ascending row) and ``ids_BK`` (int64),
            both on the device of the queries; ``-inf`` and ``-1`` where nothing was found.

        Raises:
            ConfigError: More passages than rows, fewer than one, or queries of another dimension.
            DataError: NaN or infinite queries, or zero ones under cosine.
        """
        ...

    def add(self, vectors_ND: Vectors) -> None:
        """Appends rows; they take the numbers from ``num_vectors`` on."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the index into an existing folder, from where the class's ``load`` reads it."""
        ...


def as_metric(name: str) -> Metric:
    """Returns the name of a metric, checked.

    Raises:
        ConfigError: Not a metric.

    >>> as_metric("cosine")
    'cosine'
    """
    if name not in get_args(Metric):
        raise ConfigError(f"metric: expected one of {', '.join(get_args(Metric))}; came {name!r}. Choose one of them.")
    return cast(Metric, name)


def similarity(
    queries_BD: Float[Tensor, "B D"],
    vectors_BKD: Float[Tensor, "B K D"],
    metric: Metric,
    found_BK: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, "B K"]:
    """Returns the similarity of each query with its own K vectors; larger is better; differentiable in both.

    ``inner_product`` is DPR's and RAG's ``d(z)ᵀq(x)`` (Karpukhin et al. 2020, eq. 1; Lewis et al. 2020, §2.2); ``l2``
    is the negative squared distance; ``cosine`` is the inner product of the normalised vectors. Computed in float32 at
    least (float64 stays float64) with autocast off, as scores near 75 have a bfloat16 spacing of 0.5.

    Args:
        queries_BD: Query vectors.
        vectors_BKD: Passage vectors.
        metric: The similarity.
        found_BK: False where no passage was found; the score there is ``-inf`` and no gradient flows.

    Raises:
        ConfigError: Not a metric.
        DataError: A zero vector under cosine, whose direction is undefined.

    >>> q, v = torch.tensor([[3.0, 4.0]]), torch.tensor([[[6.0, 8.0], [3.0, 0.0]]])
    >>> similarity(q, v, "inner_product"), similarity(q, v, "l2"), similarity(q, v, "cosine")
    (tensor([[50.,  9.]]), tensor([[-25., -16.]]), tensor([[1.0000, 0.6000]]))
    """
    as_metric(metric)
    with torch.autocast(queries_BD.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(queries_BD.dtype, vectors_BKD.dtype), torch.float32)
        queries_B1D, vectors_BKD = queries_BD.to(dtype).unsqueeze(1), vectors_BKD.to(dtype)
        if found_BK is not None:
            # ones instead of what stands there: the gradient of a norm or of -inf must not reach a missing passage
            vectors_BKD = vectors_BKD.masked_fill(~found_BK.unsqueeze(-1), 1.0)
        if metric == "l2":
            scores_BK = -(queries_B1D - vectors_BKD).square().sum(-1)
        else:
            if metric == "cosine":
                queries_B1D = unit_length(queries_B1D, "query vectors")
                vectors_BKD = unit_length(vectors_BKD, "passage vectors")
            scores_BK = (queries_B1D * vectors_BKD).sum(-1)
    return scores_BK if found_BK is None else scores_BK.masked_fill(~found_BK, -torch.inf)


def unit_length(vectors: Float[Tensor, "*rows D"], what: str) -> Float[Tensor, "*rows D"]:
    """Returns vectors scaled to Euclidean norm 1.

    Raises:
        DataError: A vector of norm 0; the message names ``what``.
    """
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        raise DataError(
            f"metric 'cosine': expected {what} of non-zero length, came {int((norms == 0).sum())} zero vector(s) of "
            f"{norms.numel()}. Look for empty texts or a dead encoder, or choose metric 'inner_product' or 'l2'."
        )
    unit: Tensor = vectors / norms
    return unit


def best_first(
    scores_BM: Float[Tensor, "B M"], ids_BM: Int[Tensor, "B M"], num_passages: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Returns the best ``num_passages`` candidates by descending score, equal scores by ascending id.

    >>> best_first(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[3, 9, 4]]), 2)
    (tensor([[2., 2.]]), tensor([[4, 9]]))
    """
    by_id_BM = ids_BM.argsort(dim=1)
    scores_BM, ids_BM = scores_BM.gather(1, by_id_BM), ids_BM.gather(1, by_id_BM)
    by_score_BM = scores_BM.argsort(dim=1, descending=True, stable=True)[:, :num_passages]
    return scores_BM.gather(1, by_score_BM), ids_BM.gather(1, by_score_BM)


def check_search(queries_BD: Float[Tensor, "B D"], num_passages: int, index: Index) -> None:
    """Refuses a search that no index can answer.

    Raises:
        ConfigError: K out of 1..N, or queries of another dimension than the index's.
        DataError: NaN or infinite queries.
    """
    if not 1 <= num_passages <= index.num_vectors:
        raise ConfigError(
            f"num_passages: expected 1 to {index.num_vectors}, the passages in the index; came {num_passages}. "
            "Ask for fewer passages, or index a larger corpus."
        )
    if queries_BD.shape[1] != index.dimension:
        raise ConfigError(
            f"query vectors: expected dimension {index.dimension}, that of the index; came {queries_BD.shape[1]}. "
            "Both towers need the same output dimension: check the encoder's projection."
        )
    bad_B = ~torch.isfinite(queries_BD).all(dim=1)
    if bool(bad_B.any()):
        rows = bad_B.nonzero().flatten().tolist()
        raise DataError(
            f"query vectors: expected finite numbers, came NaN or infinity in {len(rows)} of {len(bad_B)} queries "
            f"(rows {rows[:10]}). The query encoder has diverged: lower its learning rate, or resume from before."
        )


def check_vectors(vectors_ND: Vectors, dimension: int | None = None) -> None:
    """Refuses vectors that would train wrong without a word.

    Raises:
        DataError: No rows, no columns, NaN or infinity, or another dimension than ``dimension``.
    """
    num_vectors, columns = vectors_ND.shape
    if num_vectors == 0 or columns == 0:
        raise DataError(f"passage vectors: expected at least one row and one column, came {num_vectors} x {columns}.")
    if dimension is not None and columns != dimension:
        raise DataError(f"passage vectors: expected dimension {dimension}, came {columns}. Re-encode with one encoder.")
    for start, block_MD in blocks(vectors_ND):
        bad_M = ~torch.isfinite(block_MD).all(dim=1)
        if bool(bad_M.any()):
            raise DataError(
                f"passage vectors: expected finite numbers, came NaN or infinity in row "
                f"{start + int(bad_M.nonzero()[0])}. The passage encoder has diverged, or overflowed in half precision."
            )


def blocks(vectors_ND: Vectors, block_size: int = 65_536) -> Iterator[tuple[int, Float[Tensor, "M D"]]]:
    """Yields (first row, float32 rows) in order, so that memory-mapped vectors are never read whole."""
    vectors_ND = as_tensor(vectors_ND)
    for start in range(0, vectors_ND.shape[0], block_size):
        yield start, vectors_ND[start : start + block_size].detach().to(torch.float32)


def as_tensor(vectors_ND: Vectors) -> Shaped[Tensor, "N D"]:
    """Returns a tensor over the same memory; a read-only memory map must not be written through it."""
    if isinstance(vectors_ND, Tensor):
        return vectors_ND
    with warnings.catch_warnings():
        # torch warns that a read-only map must not be written to; nothing here writes
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(cast(Any, vectors_ND))
