"""Runs that differ in their seed alone are one row: mean and standard deviation."""

import math
from dataclasses import dataclass
from typing import Any

from rag_lightning.errors import DataError


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds.

    Attributes:
        mean: Arithmetic mean.
        sd: Sample standard deviation (n - 1); NaN of a single run.
        num_runs: n.
    """

    mean: float
    sd: float
    num_runs: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Returns the spread of some values, at least one.

        >>> Spread.of([1.0, 3.0])
        Spread(mean=2.0, sd=1.4142135623730951, num_runs=2)
        """
        mean = sum(values) / len(values)
        if len(values) < 2:
            return cls(mean, math.nan, len(values))
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)), len(values))

    def __str__(self) -> str:
        """Returns it as a percentage.

        >>> str(Spread.of([0.5, 0.52])), str(Spread.of([0.5]))
        ('51.0 ± 1.4', '50.0')
        """
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.sd) else f" ± {100 * self.sd:.1f}")


def by_setting(runs: dict[str, dict[str, Any]], setting: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the runs of a sweep by the value of one setting, in the order in which the values come.

    Args:
        runs: Metrics by a run's name, as a sweep gives it: ``reindex.schedule=20,seed=1``.
        setting: The setting's key.

    Raises:
        DataError: A run whose name does not tell the setting, or differs in another one than the seed.

    >>> by_setting({"k=5,seed=0": {"f1": 0.1}, "k=5,seed=1": {"f1": 0.2}}, "k")
    {'5': [{'f1': 0.1}, {'f1': 0.2}]}
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, metrics in runs.items():
        told = dict(part.partition("=")[::2] for part in name.split(","))
        others = sorted(set(told) - {setting, "seed"})
        if setting not in told or others:
            raise DataError(
                f"run {name!r}: expected a name that tells {setting} and at most seed besides, such as "
                f"'{setting}=20,seed=1'. Sweep these two alone: rag-lightning train -m {setting}=… seed=0,1,2"
            )
        groups.setdefault(told[setting], []).append(metrics)
    return groups


def spreads(groups: dict[str, list[dict[str, Any]]], metric: str) -> dict[str, Spread]:
    """Returns a metric's spread in each group that measured it."""
    measured = {name: [float(run[metric]) for run in runs if metric in run] for name, runs in groups.items()}
    return {name: Spread.of(values) for name, values in measured.items() if values}
