"""Encoding a large batch with the memory of a small one: gradient caching (Gao et al. 2021, arXiv:2101.06983).

A contrastive loss wants many texts in one batch, and its memory goes into the towers' activations, not into the
vectors. Gao et al. encode without keeping activations, take the loss's gradient with respect to the vectors, and encode
again, a part at a time, to carry it on to the weights. ``torch.utils.checkpoint`` does exactly this when each part is
checkpointed: its backward encodes a part again with the random state of the first time, and drops it before the next.
The library's function is used rather than a backward of our own, since autocast, dropout and distributed training's
hooks are its business. The price is one more forward pass.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rag_lightning.errors import ConfigError
from rag_lightning.types import TokenBatch


def encode_in_chunks(
    tower: Callable[[TokenBatch], Float[Tensor, "n D"]], tokens: TokenBatch, chunk_size: int
) -> Float[Tensor, "N D"]:
    """Returns the vectors of N texts in order, with gradient, holding one chunk's activations at a time.

    Vectors and gradients are those of ``tower(tokens)`` up to rounding. Where the tower has dropout, they are those of
    encoding the chunks one after the other: the second pass drops what the first one dropped.

    Args:
        tower: One vector for each text, whatever else is in the batch.
        tokens: The N texts.
        chunk_size: Texts at a time.

    Raises:
        ConfigError: ``chunk_size`` below 1.
    """
    if chunk_size < 1:
        raise ConfigError(f"chunk_size: expected at least 1 text at a time, got {chunk_size}")

    def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return tower(TokenBatch(input_ids, attention_mask))

    parts = [
        # bare tensors, not the record: checkpoint looks among its arguments for the device whose random state to keep
        checkpoint(encode, input_ids, attention_mask, use_reentrant=False, preserve_rng_state=True)
        for input_ids, attention_mask in zip(
            torch.split(tokens.input_ids, chunk_size), torch.split(tokens.attention_mask, chunk_size), strict=True
        )
    ]
    return torch.cat(parts)
