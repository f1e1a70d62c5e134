"""The few facts about processes that the stages need; everything works with one process and no launcher."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from rag_lightning.errors import DataError

T = TypeVar("T")

_SHARD_MARKS = ("_fsdp_flattened", "placements", "ds_id")
"""What only a parameter has that FSDP flattened, that is a distributed tensor, or that DeepSpeed divided."""


def world_size() -> int:
    """Returns the number of processes, 1 where no process group is running."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number, 0 where no process group is running."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_sharded(module: nn.Module) -> bool:
    """Returns whether a module's parameters are spread over the processes (FSDP, DeepSpeed's stage 3).

    Then only its own forward may use them, which gathers them, and must run equally often in every process.
    """
    parameters = list(module.parameters())
    if not parameters:  # FSDP has taken them into one of its own
        return world_size() > 1
    return any(hasattr(parameter, mark) for parameter in parameters for mark in _SHARD_MARKS)


def barrier() -> None:
    """Waits for every process."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Returns rank ``source``'s value of a small Python object on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Returns every rank's small Python object, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[T | None] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box  # type: ignore[return-value]


def all_gather_rows(rows: Shaped[Tensor, "n D"]) -> Shaped[Tensor, "N D"]:
    """Returns the rows of every process, in rank order, on every process, without gradient.

    Processes may have different numbers of rows, also none, but the same D and dtype. Every process must call it.

    Args:
        rows: This process's part, on the device of the process group (the GPU with NCCL, the CPU with Gloo).

    Raises:
        DataError: The processes' rows differ in width.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    return _gathered(rows, _row_counts(rows))


def all_gather_rows_with_grad(rows: Float[Tensor, "n D"]) -> Float[Tensor, "N D"]:
    """Returns the rows of every process as :func:`all_gather_rows`, with gradient to this process's own part.

    What this process's loss says of another's rows is sent to that process: the gradient of ``rows`` is the sum, over
    all processes, of the gradients of their losses. So the processes' losses together are differentiated as one
    process would differentiate their sum; with constants in place of others' rows, a passage would never hear of the
    questions that other processes contrast it with. ``backward`` is a collective: every process must call it too, also
    where its own loss is worth nothing.

    Args:
        rows: This process's part, on the device of the process group.

    Raises:
        DataError: The processes' rows differ in width.
    """
    if world_size() == 1:
        return rows
    counts = _row_counts(rows)
    gathered: Tensor = _GatherRows.apply(rows, counts)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    """A gather whose backward sums; torch's own (``torch.distributed.nn``) wants even parts and is deprecated."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        start = sum(counts[: rank()])
        ctx.mine = slice(start, start + len(rows))
        return _gathered(rows, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()  # autograd's own tensor may serve elsewhere
        dist.all_reduce(total)
        return total[ctx.mine], None


def _gathered(rows: Tensor, counts: list[int]) -> Tensor:
    padded = rows.new_zeros(max(counts), rows.shape[1])  # a collective wants one shape from all
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _row_counts(rows: Shaped[Tensor, "n D"]) -> list[int]:
    """Returns how many rows each process has, in rank order; every process must call it.

    Raises:
        DataError: The processes' rows differ in width; raised on all of them, so that none waits for another.
    """
    if world_size() == 1:
        return [len(rows)]
    mine = torch.tensor(rows.shape, dtype=torch.long, device=rows.device)
    shapes = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(shapes, mine)
    counts, widths = zip(*(shape.tolist() for shape in shapes), strict=True)
    if len(set(widths)) > 1:
        raise DataError(
            f"expected rows of one width from every process, came widths {list(widths)} in rank order: give all "
            "processes the same encoder"
        )
    return list(counts)


def shard(length: int, rank: int, world_size: int) -> range:
    """Returns the contiguous part of ``range(length)`` that belongs to ``rank``; parts differ by at most one.

    >>> [list(shard(5, r, 2)) for r in range(2)]
    [[0, 1, 2], [3, 4]]
    """
    small, extra = divmod(length, world_size)
    start = rank * small + min(rank, extra)
    return range(start, start + small + (rank < extra))


def first_error(errors: Sequence[str | None]) -> str | None:
    """Returns the first error text of the ranks, or None; lets all ranks fail together instead of hanging."""
    return next((error for error in errors if error is not None), None)
