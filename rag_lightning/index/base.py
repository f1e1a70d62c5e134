"""The similarity of questions and passages, and what every index promises about it.

The same function scores an index's answers with gradient during training and defines what the index searches for, so
that training can never optimise another similarity than the one that retrieval uses.
"""

from pathlib import Path
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingFileError
from rag_lightning.index.vectors import Vectors as Vectors
from rag_lightning.utils.io import read_json, write_json

Metric = Literal["inner_product", "l2", "cosine"]

SETTINGS_FILE = "index.json"

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


def write_settings(directory: Path, factory: str, metric: Metric) -> None:
    """Writes what an index's ``load`` needs to know beside its file."""
    write_json(directory / SETTINGS_FILE, {"factory": factory, "metric": metric})


def read_settings(directory: Path, what: str) -> tuple[str, Metric]:
    """Returns the factory and the metric that ``save`` wrote.

    Raises:
        MissingFileError: No index there; the message names ``what`` it was wanted for.
        CorruptSnapshotError: The file is not one of ours.
    """
    path = directory / SETTINGS_FILE
    try:
        settings = read_json(path, what)
    except MissingFileError:
        raise
    except DataError as error:
        raise CorruptSnapshotError(f"{error}. Build the index again.") from error
    names = {"factory", "metric"}
    if not isinstance(settings, dict) or not names <= set(settings) or settings["metric"] not in get_args(Metric):
        raise CorruptSnapshotError(
            f"{path}: expected a factory and a metric of {', '.join(get_args(Metric))}; came {str(settings)[:80]}. "
            "Build the index again."
        )
    return str(settings["factory"]), as_metric(str(settings["metric"]))
