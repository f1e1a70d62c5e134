"""The one door to all decoders: which search or sample a mode and its options ask for."""

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.decoding.constraints import NO_RULES, OutputRules
from rag_lightning.decoding.options import Decoded, DecodingMode, DecodingOptions
from rag_lightning.decoding.rag_sequence import decode_rag_sequence
from rag_lightning.decoding.rag_token import decode_rag_token
from rag_lightning.decoding.sampling import decoded_samples, sample
from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import EncodedContexts, Generator


def decode(
    generator: Generator,
    encoded: EncodedContexts,
    doc_log_probs_BK: Float[Tensor, "B K"],
    options: DecodingOptions,
    *,
    mode: str,
    rules: OutputRules = NO_RULES,
    rng: torch.Generator | None = None,
) -> Decoded:
    """Returns the answers that a mode gives over the K passages of each question.

    Args:
        generator: Extends outputs; in evaluation mode.
        encoded: ``B * K`` contexts, passages of one question adjacent; ``fid`` fuses them here, and ``stuffed`` ones
            are one for each question with all passages in it.
        doc_log_probs_BK: ``log p(z_k | x)``; ``-inf`` for a missing passage.
        options: How to search, or how to sample.
        mode: A ``DecodingMode``; of the two of RAG-Sequence, sampling knows no difference.
        rules: What may be written, and where it stops.
        rng: For sampling; by default one seeded by ``options.seed``, so that the same call draws the same.

    Raises:
        ConfigError: An unknown mode, or inputs that do not fit together.
    """
    if mode not in get_args(DecodingMode):
        raise ConfigError(f"expected decoding {', '.join(get_args(DecodingMode))}, got {mode!r}")
    sequence = mode in ("rag_sequence_fast", "rag_sequence_thorough")
    if mode in ("fid", "stuffed"):
        encoded = encoded.fused(doc_log_probs_BK > -torch.inf) if mode == "fid" else encoded
        doc_log_probs_BK = torch.zeros_like(doc_log_probs_BK[:, :1])
    if options.sample:
        device = doc_log_probs_BK.device
        samples = sample(
            generator,
            encoded,
            doc_log_probs_BK,
            options,
            mode="rag_sequence" if sequence else "rag_token",
            num_samples=options.num_return,
            rng=rng if rng is not None else torch.Generator(device).manual_seed(options.seed),
            rules=rules,
        )
        return decoded_samples(samples, options, generator.pad_token_id)
    if sequence:
        thorough = mode == "rag_sequence_thorough"
        return decode_rag_sequence(generator, encoded, doc_log_probs_BK, options, rules, thorough=thorough)
    return decode_rag_token(generator, encoded, doc_log_probs_BK, options, rules)
