"""Rows of like length together: how padding is kept out of a batch whose rows differ in length.

A block padded to its longest row spends the same work on padding as on words. Cut into a few groups of rows of like
length, each padded to its own longest, it costs less, and gives the same: padding is masked either way. What a further
group costs is a further run of the model, counted in tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_MAX_CUTS = 64
"""Where a batch of many rows may be cut: finer would gain nothing that can be measured."""


@dataclass(frozen=True)
class LengthGroup:
    """Rows that run together.

    Attributes:
        rows_M: Which; None for all of them, in their order.
        length: Tokens of the longest.
    """

    rows_M: Int[Tensor, "M"] | None
    length: int


def length_groups(lengths: Sequence[int], *, overhead_tokens: float, max_groups: int = 8) -> list[LengthGroup]:
    """Returns the groups that cost least: rows times longest row, and ``overhead_tokens`` for each group.

    Args:
        lengths: Tokens of each row, at least one row.
        overhead_tokens: What a run of the model costs besides its tokens.
        max_groups: At most so many.

    >>> [group.length for group in length_groups([9, 2, 9, 2], overhead_tokens=1)]
    [2, 9]
    >>> length_groups([9, 2, 9, 2], overhead_tokens=100)
    [LengthGroup(rows_M=None, length=9)]
    """
    by_length = np.asarray(lengths, dtype=np.int64)
    order = by_length.argsort(kind="stable")
    ascending = by_length[order]
    whole = LengthGroup(None, int(ascending[-1]))
    if ascending[0] == ascending[-1] or max_groups < 2:
        return [whole]
    ends = _cheapest_cuts(ascending, overhead_tokens, max_groups)
    if len(ends) == 1:
        return [whole]
    starts = [0, *ends[:-1]]
    return [
        LengthGroup(torch.from_numpy(order[start:end].copy()), int(ascending[end - 1]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _cheapest_cuts(ascending: np.ndarray, overhead: float, max_groups: int) -> list[int]:
    """Returns where each group of the cheapest partition ends, by dynamic programming over the number of groups."""
    places = np.unique(np.linspace(0, len(ascending), min(len(ascending), _MAX_CUTS) + 1).round().astype(np.int64))
    longest = ascending[places[1:] - 1]
    sizes = places[None, 1:] - places[:, None]  # from each place to each end
    costs = np.where(sizes > 0, sizes * longest[None, :] + overhead, np.inf)
    best = np.concatenate([[0.0], np.full(len(places) - 1, np.inf)])
    parents: list[np.ndarray] = []
    totals: list[float] = []
    for _ in range(min(max_groups, len(places) - 1)):
        through = best[:, None] + costs
        parents.append(through.argmin(axis=0))
        best = np.concatenate([[np.inf], through.min(axis=0)])
        totals.append(float(best[-1]))
    ends, place = [], len(places) - 1
    for parent in reversed(parents[: int(np.argmin(totals)) + 1]):
        ends.append(int(places[place]))
        place = int(parent[place - 1])
    return ends[::-1]


def real_lengths(attention_mask_NL: Int[Tensor, "N L"]) -> tuple[int, ...]:
    """Returns the tokens of each row up to its last real one, 1 at least.

    >>> real_lengths(torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]))
    (2, 3, 1)
    """
    places_L = torch.arange(1, attention_mask_NL.shape[1] + 1, device=attention_mask_NL.device)
    return tuple((attention_mask_NL.ne(0) * places_L).amax(dim=1).clamp(min=1).tolist())


def ordered_rows(groups: Sequence[LengthGroup], num_rows: int, device: torch.device) -> Int[Tensor, "N"]:
    """Returns all rows in the order of the groups."""
    parts = [group.rows_M for group in groups if group.rows_M is not None]
    return torch.cat(parts).to(device) if parts else torch.arange(num_rows, device=device)


def restored(parts: Sequence[Tensor], groups: Sequence[LengthGroup]) -> Tensor:
    """Returns the groups' results, one row for each of theirs, in the order of the batch.

    >>> groups = [LengthGroup(torch.tensor([0, 2]), 1), LengthGroup(torch.tensor([1]), 2)]
    >>> restored([torch.tensor([1, 3]), torch.tensor([2])], groups)
    tensor([1, 2, 3])
    """
    if len(parts) == 1:
        return parts[0]
    rows_N = ordered_rows(groups, 0, parts[0].device)
    return torch.cat(list(parts)).index_select(0, rows_N.argsort())


def widened(states_NLH: Float[Tensor, "N L H"], num_tokens: int) -> Float[Tensor, "N L2 H"]:
    """Returns states padded on the right with zeros to ``num_tokens``."""
    missing = num_tokens - states_NLH.shape[1]
    return torch.nn.functional.pad(states_NLH, (0, 0, 0, missing)) if missing else states_NLH
