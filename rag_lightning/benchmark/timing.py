"""Several sides timed in turn, so that what else the machine does meets all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rag_lightning.errors import ConfigError


@dataclass(frozen=True)
class Timing:
    """What was measured of one side.

    Attributes:
        seconds: One number for each repeat, in order; repeat r of every side did the same work.
    """

    seconds: Sequence[float]

    @property
    def median_s(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low)


def ratio(one: Timing, other: Timing) -> float:
    """Returns the median over the repeats of one side's time through the other's.

    Pairs are of the same batch and next to one another in time, so neither different batches nor a slow minute count.

    >>> ratio(Timing([1.0, 20.0, 3.0]), Timing([2.0, 40.0, 6.0]))
    0.5
    """
    return statistics.median(mine / theirs for mine, theirs in zip(one.seconds, other.seconds, strict=True))


def in_turn(
    runs: Mapping[str, Callable[[int], Any]],
    *,
    repeats: int,
    warmup: int = 1,
    synchronise: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times each side ``repeats`` times in turn, after ``warmup`` runs that are not timed.

    Which side comes first moves on by one with each repeat. A side that runs out of memory is left out.

    Args:
        runs: By side; called with the number of the repeat, which says which batch to take.
        repeats: Measurements of each side.
        warmup: Runs before.
        synchronise: Waits until the device has done what it was given.

    Returns:
        The timings, and the reason for each side that is missing.

    Raises:
        ConfigError: ``repeats`` below 1 or ``warmup`` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(
            f"benchmark: expected repeats of at least 1 and warmup of at least 0, came {repeats} and {warmup}."
        )
    left = dict(runs)
    seconds: dict[str, list[float]] = {name: [] for name in left}
    missing: dict[str, str] = {}
    gc.freeze()  # what is there already is not walked through before every run
    try:
        for number in range(-warmup, repeats):
            names = list(left)
            shift = max(number, 0) % max(1, len(names))
            for name in names[shift:] + names[:shift]:
                try:
                    taken = _timed(left[name], max(number, 0), synchronise)
                except (torch.OutOfMemoryError, MemoryError) as error:
                    missing[name] = f"ran out of memory: {str(error).splitlines()[0] if str(error) else 'no message'}"
                    del left[name], seconds[name]
                    continue
                if number >= 0:
                    seconds[name].append(taken)
    finally:
        gc.unfreeze()
    return {name: Timing(values) for name, values in seconds.items()}, missing


def synchroniser(device: str) -> Callable[[], None]:
    """Returns what waits for a device."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _timed(run: Callable[[int], Any], number: int, synchronise: Callable[[], None]) -> float:
    gc.collect()
    synchronise()
    start = time.perf_counter()
    run(number)
    synchronise()
    return time.perf_counter() - start
