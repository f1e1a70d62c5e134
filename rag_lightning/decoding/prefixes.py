"""Likelihoods of many outputs under many contexts, each prefix read once.

The candidates of thorough RAG-Sequence decoding come from beams, so most of them begin alike; and each is scored under
several contexts, so most contexts are read by several candidates. Outputs are therefore fed token by token: under each
context one row for each distinct prefix, which is divided where outputs part and dropped where they end. The output
layer, most of the work where the vocabulary is large, runs once for each (context, prefix) instead of once for each
position of each (output, context), and a context is read once instead of once for each of its outputs. The result is
that of :meth:`rag_lightning.generators.base.Generator.score`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.generators.base import EncodedContexts, Generator


@torch.no_grad()
def score_pairs(
    generator: Generator,
    encoded: EncodedContexts,
    sequences_PT: Int[Tensor, "P T1"],
    contexts_P: Int[Tensor, "P"],
    *,
    first: int = 0,
    max_elements: int = 2**28,
) -> Float[Tensor, "P"]:
    """Returns ``log p(y | z)`` of P pairs of an output and a context, in float64.

    Args:
        generator: Extends outputs; in evaluation mode.
        encoded: The contexts.
        sequences_PT: Start token first; positions that hold padding are not scored.
        contexts_P: The context of each.
        first: Scored tokens to leave out at the beginning.
        max_elements: Bounds the memory: largest number of logits (or of gathered encoder states) at a time.
    """
    _, num_tokens, num_hidden = encoded.hidden_NLH.shape
    chunk_size = max(1, max_elements // max(generator.vocab_size, num_tokens * num_hidden))
    log_probs_P = torch.zeros(len(contexts_P), dtype=torch.float64, device=contexts_P.device)
    order_P = contexts_P.argsort(stable=True)
    for start in range(0, len(order_P), chunk_size):
        pairs_C = order_P[start : start + chunk_size]
        log_probs_P[pairs_C] = _score_chunk(generator, encoded, sequences_PT[pairs_C], contexts_P[pairs_C], first)
    return log_probs_P


def _score_chunk(
    generator: Generator,
    encoded: EncodedContexts,
    sequences_PT: Int[Tensor, "P T1"],
    contexts_P: Int[Tensor, "P"],
    first: int,
) -> Float[Tensor, "P"]:
    numbers_T = torch.arange(sequences_PT.shape[1], device=sequences_PT.device)
    last_P = ((sequences_PT != generator.pad_token_id) * numbers_T).amax(dim=1)
    used_U, rows_P = torch.unique(contexts_P, return_inverse=True)
    state = generator.start(encoded.rows(used_U))
    tokens_N = sequences_PT.new_full((len(used_U),), generator.start_token_id)
    log_probs_P = torch.zeros(len(contexts_P), dtype=torch.float64, device=contexts_P.device)
    open_P = torch.arange(len(contexts_P), device=contexts_P.device)
    for length in range(1, 1 + int(last_P.max())):
        log_probs_NV, state = generator.step(tokens_N, state)
        written_P = sequences_PT[open_P, length]
        if length > first:
            token_P = log_probs_NV[rows_P, written_P].masked_fill(written_P == generator.pad_token_id, 0.0)
            log_probs_P[open_P] += token_P.double()
        goes_on_P = last_P[open_P] > length
        open_P, rows_P, written_P = open_P[goes_on_P], rows_P[goes_on_P], written_P[goes_on_P]
        if len(open_P) == 0:
            break
        prefixes_M, rows_P = torch.unique(rows_P * generator.vocab_size + written_P, return_inverse=True)
        parents_M, tokens_N = prefixes_M // generator.vocab_size, prefixes_M % generator.vocab_size
        if not torch.equal(parents_M, torch.arange(log_probs_NV.shape[0], device=parents_M.device)):
            state = generator.reorder(state, parents_M)
    return log_probs_P
