"""A regression guard: ratios now beside ratios kept; seconds are never compared, since machines differ."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rag_lightning.benchmark.shape import Shape
from rag_lightning.errors import ConfigError

_FREE = ("repeats", "warmup", "seed", "num_encoded")
"""What may differ between two measurements of one shape."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One ratio that moved beyond the tolerance.

    Attributes:
        part: What was measured.
        name: Which ratio.
        kept: Then.
        now: Now; None where it could not be measured any more.
    """

    part: str
    name: str
    kept: float
    now: float | None

    @property
    def worse(self) -> bool:
        """Whether ours has lost: all ratios are ours through another's."""
        return self.now is None or self.now > self.kept

    def __str__(self) -> str:
        if self.now is None:
            return f"{self.part}: {self.name} was {self.kept:.3f}, and is not measured any more (worse)"
        change = 100 * (self.now / self.kept - 1)
        return (
            f"{self.part}: {self.name} {self.kept:.3f} -> {self.now:.3f} "
            f"({change:+.0f} %, {'worse' if self.worse else 'better'})"
        )


def check_comparable(kept: Any, shape: Any, texts: str | None, tolerance: float) -> None:
    """Refuses a comparison that says nothing; called before anything is measured, too.

    Args:
        kept: Results of before.
        shape: The sizes now, as a :class:`~rag_lightning.benchmark.shape.Shape` or as its record.
        texts: ``files`` or ``made up``, now.
        tolerance: See :func:`compare`.

    Raises:
        ConfigError: Not results, of another shape or other texts, or a tolerance that is not above 0.
    """
    if not tolerance > 0:
        raise ConfigError(f"benchmark: expected tolerance above 0, came {tolerance}. Noise alone moves ratios.")
    if not isinstance(kept, Mapping) or not {"ratios", "shape"} <= set(kept):
        raise ConfigError("benchmark: baseline: expected a results.json of this command, came something else.")
    now = asdict(shape) if isinstance(shape, Shape) else dict(shape)
    differing = [key for key in now if key not in _FREE and now[key] != kept["shape"].get(key)]
    differing += ["texts"] if texts != kept.get("texts") else []
    if differing:
        raise ConfigError(
            "benchmark: baseline: expected results of the same shape and texts, came ones that differ in "
            f"{', '.join(differing)}. Measure the baseline's shape, or give another baseline."
        )


def compare(now: Mapping[str, Any], kept: Mapping[str, Any], *, tolerance: float) -> list[Move]:
    """Returns the ratios that moved by more than a tolerance, of the parts that were measured both times.

    Args:
        now: Results.
        kept: Results of before.
        tolerance: As a share of the kept ratio.

    Raises:
        ConfigError: Not results, of another shape, or a tolerance that is not above 0.
    """
    check_comparable(kept, now.get("shape"), now.get("texts"), tolerance)
    moves = []
    for part, ratios in kept["ratios"].items():
        if part not in now["ratios"]:
            continue
        for name, before in ratios.items():
            after = now["ratios"][part].get(name)
            if after is None and not _asked(now, name):
                continue
            if after is None or abs(after - before) > tolerance * before:
                moves.append(Move(part=part, name=name, kept=before, now=after))
    return moves


def _asked(now: Mapping[str, Any], name: str) -> bool:
    """Returns whether a ratio was to be measured: not where its side or all memory was left out."""
    asked = now.get("asked", {})
    side = name.rpartition("/")[2]
    of_memory = name.startswith("peak ")
    return side in asked.get("sides", [side]) and (not of_memory or asked.get("memory", True))


def compared(now: Mapping[str, Any], kept: Mapping[str, Any]) -> int:
    """Returns how many ratios stand in both."""
    return sum(name in now["ratios"].get(part, {}) for part, ratios in kept["ratios"].items() for name in ratios)
