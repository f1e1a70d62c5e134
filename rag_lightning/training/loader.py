"""Batches of examples: shuffled by seed and epoch, divided among processes, resumable at any batch."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from rag_lightning.errors import ConfigError
from rag_lightning.utils.distributed import shard
from rag_lightning.utils.seeding import derived_seed, rng_at

ExampleT = TypeVar("ExampleT")
DrawnT = TypeVar("DrawnT", covariant=True)
BatchT = TypeVar("BatchT")


@runtime_checkable
class Drawn(Protocol[DrawnT]):
    """A sequence of examples, some of them perhaps drawn anew at each visit."""

    def __len__(self) -> int:
        """How many there are in an epoch."""
        ...

    def draw(self, position: int, rng: random.Random) -> DrawnT:
        """Returns the example at a position; ``rng`` decides what is random in it."""
        ...


class BatchLoader(Generic[ExampleT, BatchT]):
    """Yields this process's part of each batch.

    A batch has ``batch_size`` questions over all processes, so results do not depend on their number. Where a part
    is empty (a last batch smaller than the number of processes), a filler of weight 0 keeps the process in step.

    Args:
        examples: What to draw from.
        collate: Turns examples and their weights into a batch.
        batch_size: Questions in a batch, over all processes.
        seed: Seeds the order and the draws.
        shuffle: A new order each epoch.
        current_epoch: Tells the epoch when a pass begins; by default always 0.
        num_processed: Tells how many batches of this pass have done their work; a batch that failed is met again after
            a resume. By default every batch that was yielded.
        rank: This process.
        world_size: Processes.

    Raises:
        ConfigError: ``batch_size`` is not positive or smaller than the number of processes.
    """

    def __init__(
        self,
        examples: Drawn[ExampleT],
        collate: Callable[[Sequence[ExampleT], Sequence[float]], BatchT],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        current_epoch: Callable[[], int] = lambda: 0,
        num_processed: Callable[[], int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < world_size:
            raise ConfigError(
                f"batch_size: expected at least one question for each of {world_size} processes, got {batch_size} "
                "(it counts the questions of a step over all processes)"
            )
        self.examples = examples
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._current_epoch = current_epoch
        self._num_processed = num_processed
        self._num_yielded = 0
        self._resume_at: tuple[int, int] | None = None

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[BatchT]:
        self.epoch = self._current_epoch()
        order = self._order()
        first = 0
        if self._resume_at is not None and self._resume_at[0] == self.epoch:
            first = self._resume_at[1]
        self._resume_at = None
        for number in range(first, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            mine = [whole[place] for place in shard(len(whole), self.rank, self.world_size)]
            weights = [1.0] * len(mine) or [0.0]
            drawn = [self._draw(position) for position in mine or whole[:1]]
            self._num_yielded = number + 1
            yield self.collate(drawn, weights)

    def state_dict(self) -> dict[str, Any]:
        """Returns how far this epoch has come; Lightning keeps it in the checkpoint."""
        done = self._num_yielded if self._num_processed is None else min(self._num_yielded, self._num_processed())
        return {"epoch": self.epoch, "num_yielded": done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the same epoch after the batches already seen; nothing is left of one that was seen whole."""
        self.epoch = state["epoch"]
        self._num_yielded = state["num_yielded"]
        self._resume_at = (state["epoch"], state["num_yielded"])

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.examples)))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
        order: list[int] = torch.randperm(len(self.examples), generator=generator).tolist()
        return order

    def _draw(self, position: int) -> ExampleT:
        return self.examples.draw(position, rng_at(self.seed, "draw", self.epoch, position))
