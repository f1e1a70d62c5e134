"""Floating-point operations of an encoder-decoder in theory: what a step must compute, padding left out.

A multiplication and an addition are two. Only matrix products count, attention's included; the backward pass is twice
the forward pass (Chowdhery et al. 2022, "PaLM", appendix B: model FLOP utilisation).
"""

from collections.abc import Sequence

from rag_lightning.benchmark.shape import Shape


def generator_flops(
    shape: Shape, context_tokens: Sequence[int], target_tokens: Sequence[int], *, vocab_size: int | None = None
) -> int:
    """Returns the operations of the generator's forward and backward pass.

    Args:
        shape: Its layers and widths.
        context_tokens: Real tokens of each context.
        target_tokens: Scored tokens of each context's target, as many numbers.
        vocab_size: V; the shape's by default.
    """
    width, ffn, layers = shape.generator_width, shape.generator_ffn, shape.generator_layers
    vocab_size = shape.vocab_size if vocab_size is None else vocab_size
    total = 0
    for read, written in zip(context_tokens, target_tokens, strict=True):
        encoder = 2 * read * (4 * width**2 + 2 * width * ffn) + 4 * read**2 * width
        decoder = 2 * written * (6 * width**2 + 2 * width * ffn) + 4 * written**2 * width
        crossed = 2 * read * 2 * width**2 + 4 * written * read * width
        total += layers * (encoder + decoder + crossed) + 2 * written * width * vocab_size
    return 3 * total
