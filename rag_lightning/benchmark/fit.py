"""Whether a training step fits into memory: an estimate, made before anything is built.

Weights and gradients in float32; activations of each layer, the logits, and what a process has anyway. It supposes that
every text is the longest: of the peaks measured in shape ``cpu``, with texts of all lengths, it is 1.2 to 1.4 times for
transformers' RAG and the bare models, and 2.1 times for ours, which pads less. It tells gigabytes from tens of them.
"""

from collections.abc import Iterable

import torch

from rag_lightning.benchmark.shape import Shape
from rag_lightning.errors import ConfigError
from rag_lightning.utils.memory import available_memory

OURS = "ours"
_PROCESS_BYTES = 600e6
_LOGIT_COPIES = {"ours": 3, "floor": 3, "hf_rag": 5, "hf_rag_longest": 5}
"""Of [B, K, T, V] held at once: transformers keeps logits, log-probabilities, their joint with the prior, gradients."""
_WIDTHS, _FFN_WIDTHS, _DECODER_WIDTHS = 14, 3, 22
"""Numbers of the hidden and of the feed-forward size that a layer keeps for each token; with a cross-attention more."""


def num_weights(shape: Shape) -> int:
    """Returns the weights of query encoder and generator, biases left out."""
    encoder = shape.encoder_width * (shape.vocab_size + 512 + 12 * shape.encoder_layers * shape.encoder_width)
    width, ffn = shape.generator_width, shape.generator_ffn
    layers = shape.generator_layers * (12 * width * width + 4 * width * ffn)
    return encoder + layers + width * (shape.vocab_size + 2 * shape.generator_positions)


def estimated_bytes(shape: Shape, side: str) -> int:
    """Returns what a training step of one side is estimated to take at most."""
    each = 4 if shape.dtype == "float32" else 3  # autocast keeps some of both
    num_contexts, width, ffn = shape.batch_size * shape.num_passages, shape.generator_width, shape.generator_ffn
    read, written = num_contexts * shape.max_combined_length, num_contexts * shape.max_target_tokens
    encoder = read * (_WIDTHS * width + _FFN_WIDTHS * ffn)
    decoder = written * (_DECODER_WIDTHS * width + _FFN_WIDTHS * ffn) + read * 2 * width
    question = shape.batch_size * shape.max_combined_length // 4
    questions = question * shape.encoder_layers * (_WIDTHS + 4 * _FFN_WIDTHS) * shape.encoder_width
    activations = each * (shape.generator_layers * (encoder + decoder) + questions)
    logits = 4 * _LOGIT_COPIES[side] * written * shape.vocab_size
    process = 0 if shape.device == "cuda" else _PROCESS_BYTES
    return int(8 * num_weights(shape) + activations + logits + process)


def free_bytes(shape: Shape) -> int:
    """Returns what the shape's device has left.

    Raises:
        ConfigError: There is no such device.
    """
    if shape.device == "cpu":
        return available_memory()
    if not torch.cuda.is_available():
        raise ConfigError(
            f"benchmark: expected a CUDA device for shape {shape.name}, came none. Run it on a machine with a GPU, or "
            "choose shape=cpu."
        )
    return int(torch.cuda.mem_get_info()[0])


def too_large(shape: Shape, sides: Iterable[str], *, available: int | None = None) -> dict[str, str]:
    """Returns why sides other than ours do not fit.

    Args:
        shape: The sizes.
        sides: Those wanted.
        available: Bytes; by default what the device has left.

    Raises:
        ConfigError: Ours does not fit, or the device is not there.
    """
    available = free_bytes(shape) if available is None else available
    needed = {side: estimated_bytes(shape, side) for side in {OURS, *sides}}
    said = {
        side: f"needs about {count / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
        for side, count in needed.items()
        if count > available
    }
    if OURS in said:
        raise ConfigError(
            f"benchmark: expected a shape that fits into memory, came {shape.name} with batch_size {shape.batch_size}, "
            f"num_passages {shape.num_passages} and max_combined_length {shape.max_combined_length}: a training step "
            f"{said[OURS]}. Nothing was built: lower one of them."
        )
    return said
