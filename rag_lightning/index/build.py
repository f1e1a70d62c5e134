"""The one place that chooses an index class: factory ``exact`` is torch, every other factory string is FAISS's."""

import torch

from rag_lightning.errors import ConfigError
from rag_lightning.index.base import Index, Metric
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.faiss import FaissIndex
from rag_lightning.index.vectors import Vectors


def build_index(
    vectors_ND: Vectors,
    *,
    factory: str = "exact",
    metric: Metric = "inner_product",
    device: torch.device | str | None = None,
    num_training_vectors: int | None = None,
    nprobe: int | None = None,
    ef_search: int | None = None,
    seed: int = 0,
) -> Index:
    """Builds an index over rows.

    Args:
        vectors_ND: The rows; a memory map is not read whole.
        factory: ``exact``, or a FAISS factory string.
        metric: What to rank by.
        device: Where to search; FAISS searches on the CPU what it cannot search there. None is the CPU.
        num_training_vectors: See :meth:`FaissIndex.build`, as for those that follow.
        nprobe: Inverted lists visited for each query.
        ef_search: Breadth of the graph search.
        seed: Seeds what FAISS draws.

    Raises:
        ConfigError: A factory, metric or search parameter that cannot be run as asked.
        DataError: Vectors that cannot be searched.
        MissingExtraError: A FAISS factory without FAISS.

    >>> build_index(torch.eye(2), factory="exact").search(torch.tensor([[0.0, 1.0]]), 1)
    (tensor([[1.]]), tensor([[1]]))
    """
    if factory == "exact":
        for name, value in (
            ("nprobe", nprobe),
            ("ef_search", ef_search),
            ("num_training_vectors", num_training_vectors),
        ):
            if value is not None:
                raise ConfigError(f"{name}: came {value}, but factory 'exact' has no such setting. Leave {name} unset.")
        return ExactIndex(vectors_ND, metric=metric, device=device)
    return FaissIndex.build(
        vectors_ND,
        factory=factory,
        metric=metric,
        num_training_vectors=num_training_vectors,
        nprobe=nprobe,
        ef_search=ef_search,
        seed=seed,
        device=device,
    )
