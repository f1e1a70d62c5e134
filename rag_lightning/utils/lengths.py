"""Rows of like length together: how padding is kept out of a batch whose rows differ in length.

A block padded to its longest row spends the same work on padding as on words. Cut into a few groups of rows of like
length, each padded to its own longest, it costs less, and gives the same: padding is masked either way. What a further
group costs is a further run of the model, counted in tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.types import TokenBatch
from rag_lightning.utils.distributed import is_sharded

_MAX_CUTS = 64
"""Where a batch of many rows may be cut: finer would gain nothing that can be measured."""

_RUN_FLOPS = {"cpu": 1e9, "cuda": 3e12}
"""What one more run of a model costs besides its tokens, in operations that the device could have done meanwhile."""


@dataclass(frozen=True)
class LengthGroup:
    """Rows that run together.

    Attributes:
        rows_M: Which; None for all of them, in their order.
        length: Tokens of the longest.
    """

    rows_M: Int[Tensor, "M"] | None
    length: int

    def of(self, tokens: TokenBatch) -> TokenBatch:
        """Returns the group's rows of a batch padded on the right, cut to its length."""
        ids_NL, mask_NL = tokens.input_ids[:, : self.length], tokens.attention_mask[:, : self.length]
        return (
            TokenBatch(ids_NL, mask_NL)
            if self.rows_M is None
            else TokenBatch(ids_NL[self.rows_M], mask_NL[self.rows_M])
        )


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


def model_length_groups(
    model: nn.Module, lengths: Sequence[int], width: int, *, overhead_tokens: float | None = None, num_runs: float = 1.0
) -> list[LengthGroup]:
    """Returns the groups in which a model should read rows of these lengths.

    All rows at once where the model is spread over processes (each run gathers, so all must run equally often), and
    where it would change its attention for good after short rows.

    Args:
        model: What runs, whole or in part.
        lengths: Tokens of each row.
        width: Of the padded block.
        overhead_tokens: What a further run costs; None estimates it from the model's size.
        num_runs: How many runs, of so many operations for each token, a further group stands for.
    """
    parameters = list(model.parameters())
    switches = getattr(getattr(model, "config", None), "attention_type", None) == "block_sparse"  # to full, if short
    if not parameters or switches or is_sharded(model):
        return [LengthGroup(None, width)]
    if overhead_tokens is None:
        embedded = max(parameter.numel() for parameter in parameters)  # a token looks up one row of it
        flops_per_token = 6 * max(1, sum(parameter.numel() for parameter in parameters) - embedded)
        overhead_tokens = _RUN_FLOPS.get(parameters[0].device.type, _RUN_FLOPS["cuda"]) / flops_per_token
    return length_groups(lengths, overhead_tokens=overhead_tokens * num_runs)


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


def embedded_once(
    model: Any, ids_NL: Int[Tensor, "N L"], *, repeats: int = 1
) -> Callable[[LengthGroup], AbstractContextManager[None]]:
    """Looks up a batch's embeddings; returns contexts in which the model takes a group's rows of them.

    The gradient of an embedding is as large as the vocabulary: made for each group, and added up, it would cost as much
    as many tokens. Does nothing where it cannot be known with what a model looks up its input.

    Args:
        model: A transformers model.
        ids_NL: What it will read, in groups.
        repeats: Each row stands for so many of the groups' rows.
    """
    try:
        words: nn.Module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return lambda _group: nullcontext()
    embedded_NLH = words(ids_NL).repeat_interleave(repeats, dim=0)
    return lambda group: _rows_instead(words, embedded_NLH, group)


@contextmanager
def _rows_instead(words: nn.Module, embedded_NLH: Float[Tensor, "N L H"], group: LengthGroup) -> Iterator[None]:
    rows_MLH = embedded_NLH[:, : group.length]
    rows_MLH = rows_MLH if group.rows_M is None else rows_MLH.index_select(0, group.rows_M.to(rows_MLH.device))

    replaced = False

    def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        nonlocal replaced
        if replaced:  # some models look up further padding, or widen their input to whole windows of attention
            return None
        replaced = True
        further = output[:, rows_MLH.shape[1] :]
        return torch.cat([rows_MLH, further], dim=1) if further.shape[1] else rows_MLH

    handle = words.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def lengths_of(tokens: TokenBatch) -> tuple[int, ...]:
    """Returns the tokens of each row up to its last real one, 1 at least; asks the device only if nobody knows."""
    return tokens.lengths if tokens.lengths is not None else real_lengths(tokens.attention_mask)


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
