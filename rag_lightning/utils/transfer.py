"""From memory to the device without waiting for it."""

from typing import TypeVar

import torch

from rag_lightning.types import TensorRecord

RecordT = TypeVar("RecordT", bound=TensorRecord)


def to_device(record: RecordT, device: torch.device) -> RecordT:
    """Returns a record with its tensors on ``device``.

    To a GPU they go from pinned memory, so the copy waits for nothing that the GPU still has to do, and the next batch
    is prepared meanwhile. PyTorch keeps pinned memory until the copy is done.
    """
    if device.type != "cuda":
        return record.to(device)
    return record.pinned().to(device, non_blocking=True)
