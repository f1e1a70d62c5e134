"""One index over W processes: each holds 1/W of the vectors, and only questions, scores and row numbers travel.

Use it when the vectors do not fit one process's memory (21 million passages of 768 dimensions are 60 GiB in float32),
or to divide the time of exact search by W. The result is that of one index: the best K of all rows are among the best K
of each shard, with equal scores by ascending row as anywhere else.

A search has three collectives, whatever W and K:

1. a gather of eight numbers from each process: its questions' number, its shard, and whether it has to give up;
2. a gather of the questions' vectors, padded to the largest batch: ``W x B x D x 4`` bytes arrive at each process;
3. an exchange in which each process receives the candidates of its own questions only: at most ``W x B x K x 8`` bytes
   (a float32 score and an int32 row of the shard; the sender's first row is known from 1), 80 KiB for 8 processes with
   64 questions and K = 20. No passage vector and no text travels.

It uses ``torch.distributed``'s default process group alone, so it works under any Lightning strategy: CPU tensors with
Gloo, CUDA tensors with NCCL. The shard itself is any index: torch on CPU or GPU, or FAISS on CPU or GPU.
"""

import itertools
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.index.base import Index, Metric, as_metric, best_first, check_search, unit_length
from rag_lightning.index.build import build_index
from rag_lightning.index.exchange import (
    exchange,
    gather,
    gather_rows,
    pack_replies,
    raise_together,
    unpack_replies,
    wire_device,
)
from rag_lightning.index.vectors import Vectors
from rag_lightning.utils import distributed

_MAX_ROWS = 2**31 - 1


class _Call(NamedTuple):
    """What each process tells the others before a search."""

    failed: int
    num_queries: int
    num_passages: int
    first_row: int
    num_rows: int
    num_vectors: int
    dimension: int
    metric: int


class ShardedIndex:
    """The rows of one process, and a search over those of all.

    Every process must call ``search`` equally often, in the same order and with the same K; one without questions
    calls it with ``[0, D]``. So it belongs in the training, validation or test step, where processes keep in step, and
    neither in a thread nor in what rank 0 does alone. Errors are collective: where one process's questions are refused
    or its shard fails, all raise and none waits.

    Args:
        local: This process's rows as an index; None where it holds none (fewer rows than processes).
        offset: Number of its first row among all rows.
        num_vectors: N, over all processes.
        dimension: D.
        metric: What to rank by.

    Raises:
        ConfigError: A shard of another dimension or metric, or one that does not lie within the N rows.

    >>> index = ShardedIndex(build_index(torch.eye(3)), offset=0, num_vectors=3, dimension=3, metric="inner_product")
    >>> index.search(torch.tensor([[0.1, 0.9, 0.5]]), num_passages=2)
    (tensor([[0.9000, 0.5000]]), tensor([[1, 2]]))
    """

    def __init__(self, local: Index | None, *, offset: int, num_vectors: int, dimension: int, metric: Metric) -> None:
        self._metric = as_metric(metric)
        self._num_rows = 0 if local is None else local.num_vectors
        if local is not None and (local.dimension, local.metric) != (dimension, metric):
            raise ConfigError(
                f"sharded index: expected a shard of dimension {dimension} and metric '{metric}', came one of "
                f"{local.dimension} and '{local.metric}'. Build all shards with the same settings."
            )
        if num_vectors < 1 or offset < 0 or offset + self._num_rows > num_vectors:
            raise ConfigError(
                f"sharded index: expected a shard within rows 0 to {num_vectors}, came {self._num_rows} rows from row "
                f"{offset}. Cut the rows with utils.distributed.shard."
            )
        if self._num_rows > _MAX_ROWS:
            raise ConfigError(
                f"sharded index: expected at most {_MAX_ROWS} rows in a shard, as row numbers travel in 32 bits; "
                f"came {self._num_rows}. Use more processes."
            )
        self._local, self._offset = local, offset
        self._num_vectors, self._dimension = num_vectors, dimension

    @property
    def metric(self) -> Metric:
        """What ``search`` ranks by."""
        return self._metric

    @property
    def num_vectors(self) -> int:
        """N, over all processes."""
        return self._num_vectors

    @property
    def dimension(self) -> int:
        """D."""
        return self._dimension

    @property
    def rows(self) -> range:
        """The rows that this process holds."""
        return range(self._offset, self._offset + self._num_rows)

    @torch.no_grad()
    def search(
        self, queries_BD: Float[Tensor, "B D"], num_passages: int
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Finds the K best of all rows for this process's queries; see :class:`~rag_lightning.index.base.Index`.

        A collective: all processes must enter it together; B may differ between them, K may not.

        Raises:
            ConfigError: On every process, where one asks for K out of 1..N, has queries of another dimension, or where
                the processes' K or shards do not fit together.
            DataError: On every process, where one has NaN or infinite queries, or zero ones under cosine.
            RagError: Another process's search failed; that one raises its own error.
        """
        if distributed.world_size() == 1:
            return self._whole().search(queries_BD, num_passages)
        calls = self._agree(queries_BD, num_passages)
        counts = [call.num_queries for call in calls]
        widths = [min(num_passages, call.num_rows) for call in calls]
        me = distributed.rank()
        questions_QD = gather_rows(queries_BD.detach().to(wire_device(), torch.float32), counts)
        scores_QK, rows_QK, error = self._search_shard(questions_QD, widths[me])
        outgoing = pack_replies(scores_QK, rows_QK, counts, failed=error is not None)
        incoming = exchange(outgoing, counts, widths, me)
        first_rows = [call.first_row for call in calls]
        scores_BM, ids_BM, failed = unpack_replies(incoming, counts[me], widths, first_rows)
        if failed:
            raise_together(error)
        scores_BK, ids_BK = best_first(scores_BM, ids_BM, num_passages)
        return scores_BK.to(queries_BD.device), ids_BK.to(queries_BD.device)

    def add(self, vectors_ND: Vectors) -> None:
        """Refuses: the shards would no longer be the rows of a snapshot, cut evenly.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"sharded index: expected to be searched only, came {len(vectors_ND)} rows to add. Publish a snapshot of "
            "all rows and open its shards."
        )

    def save(self, directory: Path) -> None:
        """Refuses: the snapshot that the shards were cut from keeps the whole vectors.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"sharded index: expected not to be saved, came folder {directory}: this process holds {self._num_rows} of "
            f"{self._num_vectors} rows. The snapshot keeps all vectors: publish that, and open its shards again."
        )

    def _whole(self) -> Index:
        if self._local is None or self._num_rows != self._num_vectors:
            raise ConfigError(
                f"sharded index: expected all {self._num_vectors} rows in the one process that runs, came "
                f"{self._num_rows}. Open the shards with the number of processes that search them."
            )
        return self._local

    def _agree(self, queries_BD: Float[Tensor, "B D"], num_passages: int) -> list[_Call]:
        """Tells the others this process's part; either all processes go on, or all raise."""
        error, num_queries = None, 0
        try:
            queries_BD = queries_BD.detach().to(torch.float32)
            check_search(queries_BD, num_passages, self)
            if self._metric == "cosine":  # here: a process without rows would not see what the others refuse
                unit_length(queries_BD, "query vectors")
            num_queries = len(queries_BD)
        except Exception as caught:
            error = caught
        mine = _Call(
            failed=int(error is not None),
            num_queries=num_queries,
            num_passages=num_passages,
            first_row=self._offset,
            num_rows=self._num_rows,
            num_vectors=self._num_vectors,
            dimension=self._dimension,
            metric=get_args(Metric).index(self._metric),
        )
        numbers = torch.stack(gather(torch.tensor(mine, dtype=torch.int64, device=wire_device())))
        calls = [_Call(*row) for row in numbers.tolist()]
        if any(call.failed for call in calls):
            raise_together(error)
        check_agreement(calls)
        return calls

    def _search_shard(
        self, questions_QD: Float[Tensor, "Q D"], width: int
    ) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"], Exception | None]:
        """Searches this process's rows; an error is returned, as the others wait for an answer whatever it is."""
        nothing_QK, error = questions_QD.new_zeros(len(questions_QD), width), None
        if self._local is not None and len(questions_QD) > 0:
            try:
                return *self._local.search(questions_QD, width), None
            except Exception as caught:
                error = caught
        return nothing_QK, nothing_QK.to(torch.int64), error


def open_shard(
    vectors_ND: Vectors,
    *,
    rank: int,
    world_size: int,
    factory: str = "exact",
    metric: Metric = "inner_product",
    device: torch.device | str | None = None,
    num_training_vectors: int | None = None,
    nprobe: int | None = None,
    ef_search: int | None = None,
    seed: int = 0,
) -> ShardedIndex:
    """Builds the index of one process's rows; with several processes running, all must call it together.

    The rows are cut by :func:`~rag_lightning.utils.distributed.shard`. ``exact`` on the CPU searches their memory map
    in place. Any other factory is FAISS's, trained and built here and now over the shard. Each shard has clusters of
    its own and visits ``nprobe`` of them, or has a graph of its own, so the approximation is another than that of one
    index over all rows. With ``exact`` and ``Flat`` the result is that of one index.

    Args:
        vectors_ND: All rows, such as a snapshot's (:func:`~rag_lightning.index.vectors.open_vectors`); only this
            process's part of them is read.
        rank: The shard wanted.
        world_size: Number of shards.
        factory: ``exact`` or a FAISS factory string.
        metric: What to rank by.
        device: Where to keep and search the shard, such as this process's GPU; None is the CPU.
        num_training_vectors: Rows of the shard that train clusters and codes; None is
            :func:`~rag_lightning.index.faiss.training_sample_size` of them.
        nprobe: Inverted lists visited in each shard for each query.
        ef_search: Breadth of the graph search in each shard.
        seed: Seeds what FAISS draws.

    Raises:
        ConfigError: A factory, metric or search parameter that cannot be run as asked, on this process's rows or on
            another's; a rank outside 0..W-1; other processes running than the shards are cut for.
        DataError: Vectors that cannot be searched.
        MissingExtraError: A FAISS factory without FAISS.

    >>> [open_shard(torch.eye(5), rank=rank, world_size=2).rows for rank in range(2)]
    [range(0, 3), range(3, 5)]
    """
    index, error = None, None
    try:
        _check_processes(rank, world_size)
        num_vectors, dimension = (int(size) for size in vectors_ND.shape)
        rows = distributed.shard(num_vectors, rank, world_size)
        local = None
        if len(rows) > 0:
            local = build_index(
                vectors_ND[rows.start : rows.stop],
                factory=factory,
                metric=metric,
                device=device,
                num_training_vectors=num_training_vectors,
                nprobe=nprobe,
                ef_search=ef_search,
                seed=seed,
            )
        index = ShardedIndex(local, offset=rows.start, num_vectors=num_vectors, dimension=dimension, metric=metric)
    except Exception as caught:  # the others would wait at the first search
        error = caught
    raise_together(error)
    assert index is not None
    return index


def check_agreement(calls: list[_Call]) -> None:
    """Refuses a search whose processes do not speak of one index; all of them see the same numbers.

    Raises:
        ConfigError: Different K, N, D or metrics, or shards that are not all rows, each once, in rank order.
    """
    for name in ("num_passages", "num_vectors", "dimension", "metric"):
        came = [getattr(call, name) for call in calls]
        if len(set(came)) > 1:
            came = [get_args(Metric)[number] for number in came] if name == "metric" else came
            raise ConfigError(
                f"sharded search: expected the same {name} from every process, came {came} in rank order. Give all "
                "processes the same settings and the same snapshot."
            )
    starts = [0, *itertools.accumulate(call.num_rows for call in calls)]
    if [call.first_row for call in calls] != starts[:-1] or starts[-1] != calls[0].num_vectors:
        parts = [f"{call.first_row}..{call.first_row + call.num_rows - 1}" for call in calls]
        raise ConfigError(
            f"sharded search: expected the shards of {len(calls)} processes to be rows 0..{calls[0].num_vectors - 1}, "
            f"each once and in rank order; came {', '.join(parts)}. Open them with open_shard on every process."
        )


def _check_processes(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"shard: expected a rank within 0..{world_size - 1}, came {rank}. Pass this process's rank.")
    running = distributed.world_size()
    if running > 1 and (rank, world_size) != (distributed.rank(), running):
        raise ConfigError(
            f"shard: expected rank {distributed.rank()} of the {running} processes that run, came rank {rank} of "
            f"{world_size}. Cut the rows for the processes that search them."
        )
