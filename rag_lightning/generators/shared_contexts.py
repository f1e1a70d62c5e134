"""Cross-attention of several partial outputs to one context, without a copy of the context for each.

The hypotheses of a search read the same passages, so the keys and values of a passage, which are most of what decoding
keeps in memory, are the same for all of them. Here they are kept once for each context, ``[C, heads, L, d]``, and the R
outputs that read a context become R queries of one attention call: nothing of it is repeated, and nothing is moved when
beams are reordered.

It is an attention function of transformers (``AttentionInterface``), in place only while a decoder steps, so it works
for each family that takes its attention from there and its keys from an ``EncoderDecoderCache``. Whether a family does
is seen at its first step: :attr:`Reading.num_shared` counts the layers that came by.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from rag_lightning.generators.attention_function import register, replaced_attention, sdpa
from rag_lightning.types import TensorRecord
from rag_lightning.utils.lengths import length_groups

NAME = "sdpa_shared_contexts"
_CALL_TOKENS = 64
"""What one more call of attention costs on a CPU, in tokens of contexts."""


@dataclass(frozen=True)
class Sharing(TensorRecord):
    """Which of N partial outputs read which of C contexts, at most R of them the same.

    Attributes:
        contexts_N: The context that each reads.
        rows_CR: The outputs that read each context; 0 where there are fewer than R.
        slots_N: Where each output stands in ``rows_CR`` when that is flat.
        groups: Contexts that are read together, adjacent and of like length: where each group ends, and its longest.
    """

    contexts_N: Int[Tensor, "N"]
    rows_CR: Int[Tensor, "C R"]
    slots_N: Int[Tensor, "N"]
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, contexts_N: Int[Tensor, "N"], lengths: Sequence[int]) -> "Sharing":
        """Finds the outputs of each context.

        Args:
            contexts_N: The context that each output reads.
            lengths: Tokens of each context; on a CPU, padding is not read where they ascend.

        >>> Sharing.of(torch.tensor([0, 1, 0]), lengths=[5, 5]).rows_CR
        tensor([[0, 2],
                [1, 0]])
        """
        num_contexts = len(lengths)
        order_N = contexts_N.argsort(stable=True)
        count_C = torch.bincount(contexts_N, minlength=num_contexts)
        most = int(count_C.max())
        numbers_N = torch.arange(len(contexts_N), device=contexts_N.device)
        sorted_N = contexts_N[order_N]
        slots_N = torch.empty_like(order_N)
        slots_N[order_N] = sorted_N * most + numbers_N - (count_C.cumsum(dim=0) - count_C)[sorted_N]
        rows_X = torch.zeros(num_contexts * most, dtype=torch.long, device=contexts_N.device)
        rows_X[slots_N] = numbers_N
        ascend = contexts_N.device.type == "cpu" and all(one <= other for one, other in pairwise(lengths))
        groups = adjacent_groups(lengths) if ascend else ((num_contexts, max(lengths)),)
        return cls(contexts_N, rows_X.view(num_contexts, most), slots_N, groups)


@dataclass
class Reading:
    """One step of a decoder.

    Attributes:
        cache: Keys and values; those of the contexts once for each.
        sharing: Who reads which; None where each output has a context of its own, in its place.
        num_shared: Layers of cross-attention that have been answered here.
    """

    cache: EncoderDecoderCache
    sharing: Sharing | None
    num_shared: int = 0


_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def shared_contexts(model: nn.Module, reading: Reading) -> Iterator[None]:
    """Lets the decoder of a model read shared contexts within the block; the model is left as it was.

    Args:
        model: A transformers model, possibly wrapped; of its parts those take part that use transformers' ``sdpa``.
        reading: The step to take.
    """
    token = _reading.set(reading)
    try:
        with replaced_attention(model, NAME):
            yield
    finally:
        _reading.reset(token)


def shared_context_attention(
    module: nn.Module,
    query_NHTD: Float[Tensor, "N H T D"],
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Answers for transformers' ``sdpa``, and for cross-attention with shared contexts; T is 1 there.

    Returns:
        What was read, ``[N, T, heads, d]``, and no weights.
    """
    reading = _reading.get()
    if reading is None or not any(key is layer.keys for layer in reading.cache.cross_attention_cache.layers):
        return sdpa(module, query_NHTD, key, value, attention_mask, **settings)
    reading.num_shared += 1
    settings["is_causal"] = False
    if reading.sharing is None:
        return sdpa(module, query_NHTD, key, value, attention_mask, **settings)
    query_CHRD = query_NHTD[:, :, 0][reading.sharing.rows_CR].transpose(1, 2)
    parts, start = [], 0
    for end, length in reading.sharing.groups:
        part = slice(start, end)
        own = {**settings, "position_bias": _cut(settings.get("position_bias"), part, length)}
        key_GHLD, value_GHLD = key[part, :, :length], value[part, :, :length]
        mask = _cut(attention_mask, part, length)
        parts.append(sdpa(module, query_CHRD[part], key_GHLD, value_GHLD, mask, **own)[0])
        start = end
    return torch.cat(parts).flatten(0, 1)[reading.sharing.slots_N][:, None], None


def _cut(added: Tensor | None, part: slice, length: int) -> Tensor | None:
    """Returns what is added to the scores of some contexts, ``[C or 1, H or 1, T, L]``."""
    if added is None:
        return None
    return (added if added.shape[0] == 1 else added[part])[..., :length]


def adjacent_groups(ascending: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Returns where each group of contexts ends and its longest.

    >>> adjacent_groups([10, 12, 980, 990])
    ((2, 12), (4, 990))
    """
    groups = length_groups(ascending, overhead_tokens=_CALL_TOKENS)
    ends = accumulate(len(ascending) if group.rows_M is None else len(group.rows_M) for group in groups)
    return tuple((end, group.length) for end, group in zip(ends, groups, strict=True))


register(NAME, shared_context_attention)
