"""How a refresh is carried out: in the training processes while they wait, or in a process of its own.

Both (:class:`SyncRefresher`, and :mod:`rag_lightning.training.async_refresh`) go through the same two moments, always
at the end of an optimiser step: ``begin`` takes the passage tower as it is, ``finish`` hands over the new snapshot in
all processes at once.
"""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.index.snapshot import Snapshot
from rag_lightning.training.live_index import LiveIndex


class Refresher(Protocol):
    """Carries refreshes out, one at a time."""

    @property
    def pending_step(self) -> int | None:
        """The step of the refresh under way, or None."""
        ...

    def begin(self, index: LiveIndex, step: int, probe_PD: Float[Tensor, "P D"] | None) -> None:
        """Starts a refresh with the passage tower as it is now."""
        ...

    def announce(self, device: torch.device) -> None:
        """Called before each batch: tells the other processes, without waiting, how far this one is."""
        ...

    def finish(self, index: LiveIndex, step: int) -> Snapshot | None:
        """Returns the new snapshot where all processes take it live now, at the end of ``step``; else None."""
        ...

    def close(self, index: LiveIndex | None = None) -> None:
        """Ends what runs beside training."""
        ...


class SyncRefresher:
    """Encodes and builds in the training processes, each its part of the corpus, while training waits."""

    pending_step: int | None = None

    def __init__(self) -> None:
        self._built: Snapshot | None = None

    def begin(self, index: LiveIndex, step: int, probe_PD: Float[Tensor, "P D"] | None) -> None:
        """Builds the new snapshot at once."""
        self._built = index.build(step, probe_PD=probe_PD)

    def announce(self, device: torch.device) -> None:
        """Nothing runs beside training."""

    def finish(self, index: LiveIndex, step: int) -> Snapshot | None:
        """Returns the snapshot just built."""
        built, self._built = self._built, None
        return built

    def close(self, index: LiveIndex | None = None) -> None:
        """Nothing runs beside training."""
