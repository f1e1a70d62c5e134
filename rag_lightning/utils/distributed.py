"""The few facts about processes that the stages need; everything works with one process and no launcher."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """Returns the number of processes, 1 where no process group is running."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number, 0 where no process group is running."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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
