"""Approximate (and exact) search by FAISS, from a factory string; the only module that imports FAISS.

Use it when exact search is too slow: ``"HNSW32"`` for up to some million passages, ``"IVF4096,Flat"`` or
``"OPQ64,IVF16384,PQ64"`` beyond. Factory strings are FAISS's own (Johnson et al. 2017; its wiki, "The index factory").
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, CorruptSnapshotError, MissingExtraError
from rag_lightning.index.base import (
    MISSING_ID,
    Metric,
    as_metric,
    best_first,
    check_search,
    read_settings,
    unit_length,
    write_settings,
)
from rag_lightning.index.vectors import StoredVectors, Vectors, as_tensor, blocks, check_vectors, check_width
from rag_lightning.utils.io import existing_file

logger = logging.getLogger(__name__)

INDEX_FILE = "index.faiss"

_POINTS_PER_CENTROID = 256
"""FAISS draws no more than these for each centroid of a k-means by itself."""
_FEWEST_POINTS_PER_CENTROID = 39
"""FAISS warns below these."""
_TRAINING_BYTES = 160 * 1024 * 1024


class FaissIndex:
    """A FAISS index with the scores and the errors of this package; made by ``build`` or ``load``.

    Scores are larger-is-better under every metric (FAISS's squared distances are negated; cosine is an inner product of
    vectors normalised here). With a lossy factory (``PQ``, ``SQ``) they are approximate: the training side scores the
    snapshot's exact vectors instead.

    Args:
        index: The FAISS object, filled.
        metric: What it ranks by.
        factory: The factory string it was built from.
    """

    def __init__(self, index: Any, *, metric: Metric, factory: str) -> None:
        self._index = index
        self._metric = as_metric(metric)
        self.factory = factory
        self._gpu_resources: Any = None

    @classmethod
    def build(
        cls,
        vectors_ND: Vectors,
        *,
        factory: str = "Flat",
        metric: Metric = "inner_product",
        num_training_vectors: int | None = None,
        nprobe: int | None = None,
        ef_search: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> "FaissIndex":
        """Builds, trains where the factory needs it, and fills an index; row numbers are those of ``vectors_ND``.

        Args:
            vectors_ND: The rows; read in blocks, so a memory map serves. Those of
                :class:`~rag_lightning.index.vectors.StoredVectors` were checked when they were written.
            factory: FAISS's factory string.
            metric: What to rank by.
            num_training_vectors: Rows drawn to train clusters and codes; None is :func:`training_sample_size`.
            nprobe: Inverted lists visited for each query (IVF factories); None keeps FAISS's 1.
            ef_search: Breadth of the graph search (HNSW factories); None keeps FAISS's 16.
            seed: Seeds the draw of training rows and the clustering.
            device: Where to search, if FAISS can do it there (:meth:`on_device`).

        Raises:
            ConfigError: A factory that FAISS rejects or that does not fit the vectors, or a search parameter that the
                factory does not have.
            DataError: No vectors, NaN or infinity among them, or a zero one under cosine.
            MissingExtraError: FAISS is not installed.
        """
        faiss = _import_faiss(f"The index factory '{factory}' (factory 'exact' needs nothing)")
        as_metric(metric)
        check_width(vectors_ND)
        if num_training_vectors is not None and num_training_vectors < 1:
            raise ConfigError(f"num_training_vectors: expected at least 1, came {num_training_vectors}.")
        if not isinstance(vectors_ND, StoredVectors):
            check_vectors(vectors_ND)
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        try:
            raw = faiss.index_factory(int(vectors_ND.shape[1]), factory, kind)
        except RuntimeError as error:
            raise _refused(factory, vectors_ND, error, "Check the string against the FAISS wiki") from error
        index = cls(raw, metric=metric, factory=factory)
        index.set_search(nprobe=nprobe, ef_search=ef_search)
        try:
            index._train(faiss, vectors_ND, num_training_vectors, seed)
            _reserve(faiss, raw, len(vectors_ND))
            index._append(vectors_ND)
        except RuntimeError as error:
            hint = "Use fewer clusters or codes for so few vectors, or another factory"
            raise _refused(factory, vectors_ND, error, hint) from error
        return index.on_device(device)

    def set_search(self, *, nprobe: int | None = None, ef_search: int | None = None) -> None:
        """Changes how widely is searched; None leaves a setting as it is.

        Args:
            nprobe: Inverted lists visited for each query (IVF factories).
            ef_search: Breadth of the graph search (HNSW factories).

        Raises:
            ConfigError: Below 1, or of another kind of index.
        """
        faiss = _import_faiss("Searching a FAISS index")
        space = faiss.ParameterSpace() if self._gpu_resources is None else faiss.GpuParameterSpace()
        for name, value in (("nprobe", nprobe), ("efSearch", ef_search)):
            if value is not None:
                _set_search_parameter(space, self._index, name, value, self.factory)

    @property
    def metric(self) -> Metric:
        """What ``search`` ranks by."""
        return self._metric

    @property
    def num_vectors(self) -> int:
        """N."""
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._index.d)

    @torch.no_grad()
    def search(
        self, queries_BD: Float[Tensor, "B D"], num_passages: int
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Finds K rows for each query; see :class:`~rag_lightning.index.base.Index`.

        An inverted-file index finds fewer than K where the ``nprobe`` lists visited hold fewer rows.
        """
        check_search(queries_BD, num_passages, self)
        home = queries_BD.device
        scores, ids = self._index.search(self._rows(queries_BD, "query vectors"), num_passages)
        scores_BK, ids_BK = torch.from_numpy(scores), torch.from_numpy(ids)
        if self._metric == "l2":
            scores_BK = -scores_BK
        scores_BK = scores_BK.masked_fill(ids_BK == MISSING_ID, -torch.inf)
        scores_BK, ids_BK = best_first(scores_BK, ids_BK, num_passages)
        return scores_BK.to(home), ids_BK.to(home)

    def add(self, vectors_ND: Vectors) -> None:
        """Appends rows without training again; see :class:`~rag_lightning.index.base.Index`.

        Raises:
            DataError: Another dimension, NaN or infinity, or a zero vector under cosine.
        """
        check_vectors(vectors_ND, self.dimension)
        self._append(vectors_ND)

    def on_device(self, device: torch.device | str | None) -> "FaissIndex":
        """Returns a copy on a GPU where FAISS can search there, and otherwise this index, which the CPU searches.

        FAISS's usual build has no GPU support, and graphs have no GPU form: that is logged, and no error.
        """
        if device is None or torch.device(device).type != "cuda":
            return self
        try:
            return self.to_gpu(device)
        except (MissingExtraError, ConfigError) as error:
            logger.warning("the index is searched on the CPU: %s", error)
            return self

    def to_gpu(self, device: torch.device | str = "cuda") -> "FaissIndex":
        """Returns a copy on one GPU: with several processes, each has its index or shard on its own.

        Raises:
            MissingExtraError: This FAISS has no GPU support.
            ConfigError: FAISS does not see that GPU, or the factory has no GPU form.
        """
        faiss = _import_faiss("Searching on a GPU")
        if not hasattr(faiss, "StandardGpuResources"):
            raise MissingExtraError("faiss-gpu", "gpu", "Searching a FAISS index on a GPU")
        number = torch.device(device).index
        number = number if number is not None else torch.cuda.current_device()
        if number >= faiss.get_num_gpus():
            raise ConfigError(
                f"device {device}: expected one of the {faiss.get_num_gpus()} GPUs that FAISS sees. "
                "Leave the index on the CPU, or check CUDA_VISIBLE_DEVICES."
            )
        resources = faiss.StandardGpuResources()
        try:
            raw = faiss.index_cpu_to_gpu(resources, number, self._index)
        except RuntimeError as error:
            raise ConfigError(
                f"index factory {self.factory!r}: FAISS has no GPU form of it: {_brief(error)}"
            ) from error
        moved = FaissIndex(raw, metric=self._metric, factory=self.factory)
        moved._gpu_resources = resources  # FAISS does not keep them alive
        return moved

    def save(self, directory: Path) -> None:
        """Writes ``index.faiss`` and ``index.json`` into an existing folder.

        Raises:
            OSError: The files could not be written whole, for instance because the disk is full.
        """
        faiss = _import_faiss("Saving a FAISS index")
        index = faiss.index_gpu_to_cpu(self._index) if self._gpu_resources is not None else self._index
        try:
            faiss.write_index(index, str(directory / INDEX_FILE))
        except RuntimeError as error:
            raise OSError(f"{directory / INDEX_FILE}: FAISS could not write the index: {_brief(error)}") from error
        write_settings(directory, self.factory, self._metric)

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str | None = None) -> "FaissIndex":
        """Reads what ``save`` wrote.

        Args:
            directory: Where.
            device: Where to search, if FAISS can do it there (:meth:`on_device`).

        Raises:
            MissingFileError: No index there.
            CorruptSnapshotError: FAISS cannot read the file, or it ranks by another metric than the settings say.
            MissingExtraError: FAISS is not installed.
        """
        factory, metric = read_settings(directory, "FAISS index settings")
        faiss = _import_faiss(f"An index of factory '{factory}'")
        path = existing_file(directory / INDEX_FILE, "FAISS index")
        try:
            raw = faiss.read_index(str(path))
        except (RuntimeError, MemoryError) as error:
            raise CorruptSnapshotError(
                f"{path}: expected a whole FAISS index; FAISS says: {_brief(error)}. Build the index again."
            ) from error
        if (raw.metric_type == faiss.METRIC_L2) != (metric == "l2"):
            raise CorruptSnapshotError(f"{path}: expected an index of metric {metric!r}, came another. Build it again.")
        index = cls(raw, metric=metric, factory=factory)
        return index.on_device(device)

    def _train(self, faiss: Any, vectors_ND: Vectors, num_training_vectors: int | None, seed: int) -> None:
        if self._index.is_trained:
            return
        inverted_file = faiss.try_extract_index_ivf(self._index)
        if inverted_file is not None:
            inverted_file.cp.seed = seed
        num_vectors, dimension = (int(size) for size in vectors_ND.shape)
        if num_training_vectors is None:
            num_lists = 0 if inverted_file is None else int(inverted_file.nlist)
            num_training_vectors = training_sample_size(num_vectors, dimension, num_lists)
        drawn_M = np.arange(num_vectors)
        if num_training_vectors < num_vectors:
            drawn_M = np.sort(np.random.default_rng(seed).choice(num_vectors, num_training_vectors, replace=False))
        rows_ND = vectors_ND if isinstance(vectors_ND, StoredVectors) else as_tensor(vectors_ND)
        self._index.train(self._rows(rows_ND[torch.from_numpy(drawn_M)], "passage vectors"))

    def _append(self, vectors_ND: Vectors) -> None:
        for _, block_MD in blocks(vectors_ND):
            self._index.add(self._rows(block_MD, "passage vectors"))

    def _rows(self, rows_MD: Float[Tensor, "M D"], what: str) -> Float[np.ndarray, "M D"]:
        rows_MD = rows_MD.detach().to("cpu", torch.float32)
        if self._metric == "cosine":
            rows_MD = unit_length(rows_MD, what)
        return np.ascontiguousarray(rows_MD.numpy())


def training_sample_size(num_vectors: int, dimension: int, num_lists: int) -> int:
    """Returns how many rows train an index by default, so that the sample stays small beside a large corpus.

    It is 256 rows for each inverted list, at least the 65,536 that the 256 codes of a product quantizer take; cut to
    160 MiB of float32, but not below the 39 rows a list under which FAISS warns; and at most all.

    >>> training_sample_size(1_000, 384, 16), training_sample_size(1_000_000, 384, 256)
    (1000, 65536)
    >>> training_sample_size(1_000_000, 384, 4096), training_sample_size(21_000_000, 768, 16384)
    (159744, 638976)
    """
    wanted = _POINTS_PER_CENTROID * max(num_lists, 256)
    affordable = max(_TRAINING_BYTES // (4 * dimension), _FEWEST_POINTS_PER_CENTROID * num_lists)
    return min(num_vectors, wanted, affordable)


def _import_faiss(purpose: str) -> Any:
    try:
        with warnings.catch_warnings():
            # SWIG's generated types warn on Python 3.12 and later
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "faiss", purpose) from error
    return faiss


def _reserve(faiss: Any, index: Any, num_vectors: int) -> None:
    """Makes room for all codes at once: growing, an array is copied into one twice as large, and both are in memory."""
    index = faiss.downcast_index(index)
    for inner in ("index", "base_index", "refine_index", "storage"):  # behind a transform, a refinement, a graph
        if getattr(index, inner, None) is not None:
            _reserve(faiss, getattr(index, inner), num_vectors)
    if isinstance(index, faiss.IndexFlatCodes):
        index.codes.resize(num_vectors * index.code_size)
        index.codes.resize(0)  # which keeps the room


def _set_search_parameter(space: Any, index: Any, name: str, value: int, factory: str) -> None:
    ours = {"nprobe": "nprobe", "efSearch": "ef_search"}[name]
    if value < 1:
        raise ConfigError(f"{ours}: expected at least 1, came {value}.")
    try:
        space.set_index_parameter(index, name, value)
    except RuntimeError as error:
        needed = "inverted lists (IVF…)" if name == "nprobe" else "a graph (HNSW…)"
        raise ConfigError(
            f"{ours}: expected an index factory with {needed}, came {factory!r}. Leave {ours} unset, or change it."
        ) from error


def _refused(factory: str, vectors_ND: Vectors, error: RuntimeError, hint: str) -> ConfigError:
    num_vectors, dimension = vectors_ND.shape
    return ConfigError(
        f"index factory {factory!r}: expected one that FAISS accepts for {num_vectors} x {dimension} vectors; "
        f"FAISS says: {_brief(error)}. {hint}, or use factory 'exact'."
    )


def _brief(error: Exception) -> str:
    """FAISS's own words without the C++ function and line before them."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split("' failed: ")[-1].split("Error: ")[-1].rstrip(".")
