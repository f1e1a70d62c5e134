"""RAG-Token decoding: one greedy or beam search over the mixture of the passages (Lewis et al. 2020, §2.5).

Inputs: B·K encoded contexts and the log prior of each question's K passages. The mixture
``p'(y_t | x, y_<t) = Σ_k p(z_k|x) p(y_t | x, z_k, y_<t)`` is an ordinary next-token distribution, so ordinary beam
search applies. Use it with models trained by the RAG-Token objective; its sibling for RAG-Sequence is
:mod:`rag_lightning.decoding.rag_sequence`. Equals transformers' ``RagTokenForGeneration.generate``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.decoding.beam import beam_search
from rag_lightning.decoding.constraints import NO_RULES, OutputRules
from rag_lightning.decoding.options import Decoded, DecodingOptions, check_inputs, decoded_of
from rag_lightning.generators.base import EncodedContexts, Generator


@torch.no_grad()
def decode_rag_token(
    generator: Generator,
    encoded: EncodedContexts,
    doc_log_probs_BK: Float[Tensor, "B K"],
    options: DecodingOptions,
    rules: OutputRules = NO_RULES,
) -> Decoded:
    """Returns the answer that the search ranks first, with ``Σ_t log Σ_k p(z_k|x) p(y_t|x,z_k,y_<t)``.

    Args:
        generator: Extends outputs; in evaluation mode.
        encoded: ``B * K`` contexts, passages of one question adjacent.
        doc_log_probs_BK: ``log p(z_k | x)``; ``-inf`` for a missing passage.
        options: How to search.
        rules: What may be written, and where it stops.

    Raises:
        ConfigError: Contexts, prior and options that do not fit together.
    """
    check_inputs(generator, encoded, doc_log_probs_BK, options)
    found = beam_search(generator, encoded, doc_log_probs_BK, options, rules)
    return decoded_of(found.sequences_SRT, found.log_probs_SR, options, generator.pad_token_id)
