"""How long an index will take to build here, extrapolated from small builds of the same factory on this machine.

Training is ``p min(n, 65536) + q min(n, 256 L) L`` seconds for n training vectors and L lists: codes are trained on at
most 65,536 vectors, k-means on 256 a list, and it compares every vector with every list. Adding a vector costs
``a + b L`` seconds with lists and ``a`` without. In an HNSW graph of n nodes it costs ``a n^b``: the logarithm of the
theory, and a memory that answers more slowly the more of it there is, which a small graph does not show. So the graph
is grown, by doubling, to a quarter of what is wanted, or for some forty seconds; the last two doublings give a and b.
The others take 40,000 vectors, with lists for two numbers of them (fewer would not do: below some 20,000 FAISS trains
codes in another way, ten times slower). All are generated vectors (:mod:`~rag_lightning.index.generated`), so nothing
of the corpus needs to be encoded. Expect some fifteen percent, more on a machine that is busy with other things.
"""

import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.index.base import Index, Metric
from rag_lightning.index.build import build_index
from rag_lightning.index.factory import IndexSize, index_size
from rag_lightning.index.faiss import training_sample_size
from rag_lightning.index.generated import GeneratedVectors
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.index.vectors import Storage

CODE_TRAINING_ROWS = 65_536
LIST_TRAINING_ROWS = 256
Pair = tuple[float, float]
_ROWS = 40_000
_WRITTEN_BYTES = 256 * 2**20
_LISTS = (32, 128)
_FIRST_GRAPH_ROWS = 5_000
_GRAPH_SECONDS = 40.0
_GRAPH_BYTES = 512 * 2**20
_MAX_EXPONENT = 0.5
"""Of a graph's cost a row. Measured ones are 0.1 to 0.3; more is a busy machine, which extrapolation would multiply."""


@dataclass(frozen=True, kw_only=True)
class BuildSpeed:
    """What building takes on this machine.

    Attributes:
        write_s: Seconds to write, hash and read back a vector.
        byte_s: The same for a byte of an index file.
        train: ``(p, q)`` of the module's formula.
        add: ``(a, b)`` of it.
    """

    write_s: float
    byte_s: float
    train: Pair = (0.0, 0.0)
    add: Pair = (0.0, 0.0)

    def build_s(
        self, num_vectors: int, dimension: int, factory: str, *, num_training_vectors: int | None = None
    ) -> float:
        """Returns the seconds to build a snapshot, without encoding."""
        seconds = self.write_s * num_vectors
        if factory == "exact":
            return seconds
        size = index_size(factory, dimension)
        seconds += self.byte_s * size.bytes_for(num_vectors)
        rows = num_training_vectors or training_sample_size(num_vectors, dimension, size.num_lists)
        if size.trains:
            seconds += float(np.dot(self.train, _training_terms(min(rows, num_vectors), size.num_lists)))
        a, b = self.add
        if size.graph_links > 0:  # the integral of a n^b
            return seconds + a * math.exp((b + 1) * math.log(num_vectors)) / (b + 1)
        return seconds + num_vectors * (a + b * size.num_lists)


def calibrate(
    factory: str,
    dimension: int,
    *,
    num_vectors: int,
    metric: Metric = "inner_product",
    storage: Storage = "float32",
    folder: Path,
    seed: int = 0,
) -> BuildSpeed:
    """Measures small builds of a factory; takes seconds, or minutes with product quantizers of many dimensions.

    Args:
        factory: ``exact`` or a FAISS factory string.
        dimension: D.
        num_vectors: How many are planned.
        metric: What to rank by.
        storage: How vectors are stored.
        folder: On the disk that the snapshot will be written to; what is written there is removed.
        seed: Seeds the vectors.

    Raises:
        ConfigError: A factory that FAISS rejects, or one that cannot be planned.
        MissingExtraError: A FAISS factory without FAISS.
    """
    size = index_size(factory, dimension) if factory != "exact" else None
    most = max(_ROWS, min(4 * _ROWS, _WRITTEN_BYTES // (4 * dimension)))  # a disk is slower the more it is given
    written_ND = _generated(range(most), dimension, seed)
    rows_ND = written_ND[:_ROWS]
    _write_seconds(rows_ND[: _ROWS // 10], storage, folder)  # the first finds everything cold
    write_s = _write_seconds(written_ND, storage, folder)
    plain_s = write_s if storage == "float32" else _write_seconds(written_ND, "float32", folder)
    byte_s = plain_s / (4 * dimension)
    if size is None:
        return BuildSpeed(write_s=write_s, byte_s=byte_s)
    if size.graph_links > 0:
        train, add = _graph_speed(factory, size, dimension, metric, num_vectors, seed)
    else:
        train, add = _train_and_add(factory, size, rows_ND, metric)
    return BuildSpeed(write_s=write_s, byte_s=byte_s, train=train, add=add)


def _generated(rows: range, dimension: int, seed: int) -> Float[Tensor, "N D"]:
    return torch.cat(list(GeneratedVectors(num_vectors=rows.stop, dimension=dimension, seed=seed).blocks(rows)))


def _train_and_add(factory: str, size: IndexSize, rows_ND: Float[Tensor, "N D"], metric: Metric) -> tuple[Pair, Pair]:
    train_terms, add_terms, trained, added = [], [], [], []
    for num_lists in _LISTS if size.num_lists > 0 else (0,):
        named = re.sub(r"IVF\d+", f"IVF{num_lists}", factory)
        index, seconds = _built(rows_ND, named, metric)
        added.append(_seconds_a_row(index, rows_ND))
        add_terms.append((1.0, float(num_lists)))
        trained.append(max(0.0, seconds - len(rows_ND) * added[-1]))
        train_terms.append(_training_terms(len(rows_ND), num_lists))
    return _solve(train_terms, trained) if size.trains else (0.0, 0.0), _solve(add_terms, added)


def _graph_speed(
    factory: str, size: IndexSize, dimension: int, metric: Metric, num_vectors: int, seed: int
) -> tuple[Pair, Pair]:
    begun = time.perf_counter()
    rows = _ROWS if size.trains else _FIRST_GRAPH_ROWS
    first = rows
    index, built_s = _built(_generated(range(rows), dimension, seed), factory, metric)
    costs: list[Pair] = []
    most = min(num_vectors // 4, _GRAPH_BYTES // (4 * dimension))
    while len(costs) < 2 or (rows < most and time.perf_counter() - begun < _GRAPH_SECONDS):
        costs.append((1.5 * rows, _seconds_a_row(index, _generated(range(rows, 2 * rows), dimension, seed))))
        rows *= 2
    (before, before_s), (last, last_s) = costs[-2:]
    exponent = min(_MAX_EXPONENT, max(0.0, math.log(last_s / before_s) / math.log(last / before)))
    per_row = max(0.0, built_s / first - costs[0][1]) if size.trains else 0.0
    return (per_row, 0.0), (last_s / last**exponent, exponent)


def _training_terms(rows: int, num_lists: int) -> Pair:
    return float(min(rows, CODE_TRAINING_ROWS)), float(min(rows, LIST_TRAINING_ROWS * num_lists) * num_lists)


def _solve(terms: list[Pair], seconds: list[float]) -> Pair:
    """Least squares for two constants, neither below zero: noise must not make a larger build take less."""
    matrix, wanted = np.asarray(terms), np.asarray(seconds)
    if np.linalg.matrix_rank(matrix) == 2:
        first, second = (float(value) for value in np.linalg.lstsq(matrix, wanted, rcond=None)[0])
        if min(first, second) >= 0:
            return first, second
    # one constant explains it, the one that leaves less unexplained
    alone = [float(column @ wanted / max(column @ column, 1e-30)) for column in matrix.T]
    unexplained = [float(np.square(matrix[:, i] * alone[i] - wanted).sum()) for i in range(2)]
    return (alone[0], 0.0) if unexplained[0] <= unexplained[1] else (0.0, alone[1])


def _built(rows_MD: Float[Tensor, "M D"], factory: str, metric: Metric) -> tuple[Index, float]:
    start = time.perf_counter()
    index = build_index(rows_MD, factory=factory, metric=metric, num_training_vectors=len(rows_MD))
    return index, time.perf_counter() - start


def _seconds_a_row(index: Index, rows_MD: Float[Tensor, "M D"]) -> float:
    start = time.perf_counter()
    index.add(rows_MD)
    return (time.perf_counter() - start) / len(rows_MD)


def _write_seconds(rows_ND: Float[Tensor, "N D"], storage: Storage, folder: Path) -> float:
    """Seconds for a row through a whole publication: write, sync, hash, read back."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".calibration.") as place:
        start = time.perf_counter()
        SnapshotStore(place, storage=storage).publish(rows_ND, encoder_hash="-", corpus_hash="-", pooling="-")
        return (time.perf_counter() - start) / len(rows_ND)
