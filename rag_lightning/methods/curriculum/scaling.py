"""Rewards on one scale: what an improvement is worth beside the recent ones, as a number from 0 to 1."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from rag_lightning.errors import ConfigError


class RewardScale:
    """Maps rewards onto [0, 1] by running quantiles, as Graves et al. 2017 (arXiv 1704.03003; onto [-1, 1] there).

    With ``q`` the quantiles at ``tail`` and ``1 - tail`` of the last ``window`` rewards, the present one included, a
    reward ``r`` becomes ``(r - q_low) / (q_high - q_low)``, cut off at 0 and 1. As long as both are equal, it becomes
    1/2.

    Args:
        tail: The share of rewards cut off at each end; 0 scales by the smallest and largest.
        window: How many rewards are remembered.

    Raises:
        ConfigError: A tail outside [0, 0.5), or a window of fewer than 2 rewards.

    >>> scale = RewardScale(tail=0.0)
    >>> [scale(reward) for reward in (1.0, 3.0, 2.0, -5.0)]
    [0.5, 1.0, 0.5, 0.0]
    """

    def __init__(self, *, tail: float = 0.2, window: int = 1000) -> None:
        if not 0.0 <= tail < 0.5:
            raise ConfigError(
                f"curriculum.policy.rescale_tail: expected a share of at least 0 and below 0.5, got {tail}."
            )
        if window < 2:
            raise ConfigError(f"curriculum.policy.rescale_window: expected at least 2 rewards, got {window}.")
        self.tail = tail
        self.recent: deque[float] = deque(maxlen=window)

    def __call__(self, reward: float) -> float:
        """Remembers a reward, which has to be finite, and returns it on the scale."""
        self.recent.append(reward)
        low, high = np.quantile(np.fromiter(self.recent, dtype=np.float64), [self.tail, 1.0 - self.tail])
        if not high > low:
            return 0.5
        return float(min(max((reward - low) / (high - low), 0.0), 1.0))

    def state(self) -> list[float]:
        """Returns the remembered rewards, oldest first."""
        return list(self.recent)

    def load_state(self, rewards: Sequence[float]) -> None:
        """Replaces the remembered rewards."""
        self.recent = deque(rewards, maxlen=self.recent.maxlen)
