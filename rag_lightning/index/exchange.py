"""What the processes of a sharded search say to each other: collectives of ``torch.distributed``'s default group.

All functions but the pure :func:`pack_replies` and :func:`unpack_replies` are collectives: every process calls them.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, RagError
from rag_lightning.index.base import MISSING_ID
from rag_lightning.utils import distributed

_SHARED_KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, CorruptSnapshotError)}


def pack_replies(
    scores_QK: Float[Tensor, "Q K"], rows_QK: Int[Tensor, "Q K"], counts: Sequence[int], *, failed: bool = False
) -> Int[Tensor, "sent"]:
    """Writes what a shard found as one int32 message for each process, one after the other.

    A message is ``failed``, then a pair (the bits of the score, the row of the shard) for each candidate of that
    process's questions.

    Args:
        scores_QK: Of the questions of all processes, in rank order.
        rows_QK: Rows of the shard, -1 where nothing was found.
        counts: Questions of each process; they sum to Q.
        failed: Whether the shard's search failed, so that the pairs mean nothing.
    """
    pairs_QK2 = torch.stack([scores_QK.contiguous().view(torch.int32), rows_QK.to(torch.int32)], dim=-1)
    head = pairs_QK2.new_full((1,), int(failed))
    return torch.cat([part for block in torch.split(pairs_QK2, list(counts)) for part in (head, block.flatten())])


def unpack_replies(
    incoming: Int[Tensor, "received"], num_queries: int, widths: Sequence[int], first_rows: Sequence[int]
) -> tuple[Float[Tensor, "B M"], Int[Tensor, "B M"], bool]:
    """Reads one message from each shard.

    Args:
        incoming: As :func:`pack_replies` writes them, in the order of the shards.
        num_queries: B, the questions of this process.
        widths: Candidates for each question from each shard.
        first_rows: Number of each shard's first row among all rows.

    Returns:
        Scores and passage numbers of all candidates (-1 where a shard found nothing), and whether a shard failed.
    """
    messages = torch.split(incoming, _sizes([num_queries] * len(widths), widths))
    scores, ids = [], []
    for message, width, first_row in zip(messages, widths, first_rows, strict=True):
        pairs_BK2 = message[1:].view(num_queries, width, 2)
        rows_BK = pairs_BK2[..., 1].to(torch.int64)
        scores.append(pairs_BK2[..., 0].contiguous().view(torch.float32))
        ids.append(torch.where(rows_BK == MISSING_ID, MISSING_ID, rows_BK + first_row))
    failed = bool(torch.stack([message[0] for message in messages]).any())
    return torch.cat(scores, dim=1), torch.cat(ids, dim=1), failed


def _sizes(counts: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Lengths of messages with ``width`` candidates for each of ``count`` questions."""
    return [1 + 2 * count * width for count, width in zip(counts, widths, strict=True)]


def exchange(
    outgoing: Int[Tensor, "sent"], counts: Sequence[int], widths: Sequence[int], me: int
) -> Int[Tensor, "received"]:
    """Sends each process its message of :func:`pack_replies`; returns those that came, in rank order.

    Args:
        outgoing: One message for each process.
        counts: Questions of each process.
        widths: Candidates for each question from each process.
        me: This process's rank.
    """
    world_size = len(counts)
    received = _sizes([counts[me]] * world_size, widths)
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, _sizes(counts, [widths[me]] * world_size))
    return incoming


def gather_rows(rows_BD: Float[Tensor, "B D"], counts: Sequence[int]) -> Float[Tensor, "Q D"]:
    """Rows of all processes in rank order, where ``counts`` of them are known to come.

    :func:`~rag_lightning.utils.distributed.all_gather_rows` would spend another gather on the counts.
    """
    padded_BD = rows_BD.new_zeros(max(counts), rows_BD.shape[1])
    padded_BD[: len(rows_BD)] = rows_BD
    return torch.cat([part[:count] for part, count in zip(gather(padded_BD), counts, strict=True)])


def gather(tensor: Tensor) -> list[Tensor]:
    """Tensors of one shape and dtype of all processes, in rank order; on :func:`wire_device`."""
    parts = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
    dist.all_gather(parts, tensor)
    return parts


def wire_device() -> torch.device:
    """Where the process group's collectives want their tensors: the same answer on every process."""
    if torch.cuda.is_available() and "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def raise_together(error: Exception | None) -> None:
    """Raises on every process where one has an error: its own, or the first other's in words. A collective."""
    own = None if error is None else f"{type(error).__name__}: {error}"
    texts = distributed.gather_objects(own)
    text = distributed.first_error(texts)
    if error is not None:
        raise error
    if text is not None:
        kind = _SHARED_KINDS.get(text.partition(":")[0], RagError)
        raise kind(f"sharded index: process {texts.index(text)} failed, and with it all others: {text}")
