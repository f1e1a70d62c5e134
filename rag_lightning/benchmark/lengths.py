"""Lengths of passages, questions and answers, drawn from kept quantiles: a text's cost is its number of tokens.

A table of quantiles lies in the configuration (``conf/benchmark.yaml`` names its source), so no data set is needed to
measure on one's lengths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rag_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LengthTables:
    """Numbers of tokens at evenly spaced quantiles from 0 to 1.

    Attributes:
        passages: Title, separator and text.
        questions: With what separates them from a passage.
        answers: Without special tokens.

    Raises:
        ConfigError: Fewer than two quantiles, a falling row, or a length below 1.
    """

    passages: Sequence[int]
    questions: Sequence[int]
    answers: Sequence[int]

    def __post_init__(self) -> None:
        """Refuses what is no table of quantiles."""
        for name in ("passages", "questions", "answers"):
            row = list(getattr(self, name))
            if len(row) < 2 or row[0] < 1 or any(later < earlier for earlier, later in pairwise(row)):
                raise ConfigError(
                    f"benchmark: token_lengths.{name}: expected at least two quantiles, rising from 1 or more, came "
                    f"{row}. Give the numbers of tokens at evenly spaced quantiles."
                )

    @classmethod
    def of(cls, settings: Mapping[str, Sequence[int]]) -> "LengthTables":
        """Returns the tables of a configuration.

        Raises:
            ConfigError: A table is missing or unknown, or as the class.
        """
        wanted = {"passages", "questions", "answers"}
        if set(settings) != wanted:
            raise ConfigError(f"benchmark: token_lengths: expected {sorted(wanted)}, came {sorted(settings)}.")
        return cls(**{name: tuple(row) for name, row in settings.items()})


def drawn_lengths(
    quantiles: Sequence[int], count: int, *, shortest: int, longest: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Returns lengths drawn through the inverse of the distribution function, straight between the quantiles.

    Args:
        quantiles: At evenly spaced places from 0 to 1.
        count: How many.
        shortest: Lower ones are raised to it.
        longest: Higher ones are cut to it.
        rng: Draws.

    >>> drawn_lengths([10, 10, 10], 3, shortest=1, longest=7, rng=np.random.default_rng(0)).tolist()
    [7, 7, 7]
    """
    places = np.linspace(0.0, 1.0, len(quantiles))
    lengths = np.interp(rng.uniform(size=count), places, np.asarray(quantiles, dtype=np.float64))
    return np.clip(lengths.round().astype(np.int64), shortest, longest)
