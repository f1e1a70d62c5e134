"""Cross-attention of several partial outputs to one context, without a copy of the context for each.

The hypotheses of a search read the same passages, so the keys and values of a passage, which are most of what decoding
keeps in memory, are the same for all of them. Here they are kept once for each context, ``[C, heads, L, d]``, and the R
outputs that read a context become R queries of one attention call: nothing of it is repeated, and nothing is moved when
beams are reordered.

It is an attention function of transformers (``AttentionInterface``), in place only while a decoder steps, so it works
for each family that takes its attention from there and its keys from an ``EncoderDecoderCache``. Whether a family does
is seen at its first step: :attr:`Reading.num_shared` counts the layers that came by.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rag_lightning.generators.attention_function import replaced_attention
from rag_lightning.types import TensorRecord

NAME = "sdpa_shared_contexts"
_sdpa: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward


@dataclass(frozen=True)
class Sharing(TensorRecord):
    """Which of N partial outputs read which of C contexts, at most R of them the same.

    Attributes:
        contexts_N: The context that each reads.
        rows_CR: The outputs that read each context; 0 where there are fewer than R.
        slots_N: Where each output stands in ``rows_CR`` when that is flat.
    """

    contexts_N: Int[Tensor, "N"]
    rows_CR: Int[Tensor, "C R"]
    slots_N: Int[Tensor, "N"]

    @classmethod
    def of(cls, contexts_N: Int[Tensor, "N"], num_contexts: int) -> "Sharing":
        """Finds the outputs of each context.

        >>> Sharing.of(torch.tensor([0, 1, 0]), num_contexts=2).rows_CR
        tensor([[0, 2],
                [1, 0]])
        """
        order_N = contexts_N.argsort(stable=True)
        count_C = torch.bincount(contexts_N, minlength=num_contexts)
        most = int(count_C.max())
        numbers_N = torch.arange(len(contexts_N), device=contexts_N.device)
        sorted_N = contexts_N[order_N]
        slots_N = torch.empty_like(order_N)
        slots_N[order_N] = sorted_N * most + numbers_N - (count_C.cumsum(dim=0) - count_C)[sorted_N]
        rows_X = torch.zeros(num_contexts * most, dtype=torch.long, device=contexts_N.device)
        rows_X[slots_N] = numbers_N
        return cls(contexts_N, rows_X.view(num_contexts, most), slots_N)


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
        return _sdpa(module, query_NHTD, key, value, attention_mask, **settings)
    reading.num_shared += 1
    settings["is_causal"] = False
    if reading.sharing is None:
        return _sdpa(module, query_NHTD, key, value, attention_mask, **settings)
    query_CHRD = query_NHTD[:, :, 0][reading.sharing.rows_CR].transpose(1, 2)
    read_CRHD, _ = _sdpa(module, query_CHRD, key, value, attention_mask, **settings)
    return read_CRHD.flatten(0, 1)[reading.sharing.slots_N][:, None], None


AttentionInterface.register(NAME, shared_context_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
