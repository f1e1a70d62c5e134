"""Likelihoods of many outputs under many contexts, each prefix read once.

The candidates of thorough RAG-Sequence decoding come from beams, so most of them begin alike; and each is scored under
several contexts, so most contexts are read by several candidates. Outputs are therefore fed token by token: under each
context one row for each distinct prefix, which is divided where outputs part and dropped where they end. The output
layer, most of the work where the vocabulary is large, runs once for each (context, prefix) instead of once for each
position of each (output, context), for the tokens that were written and no others; and a context is not read at all,
since the beams have read it. The result is that of :meth:`rag_lightning.generators.base.Generator.score`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.decoding.first_step import FirstStep


@torch.no_grad()
def score_pairs(
    first: FirstStep,
    sequences_PT: Int[Tensor, "P T1"],
    contexts_P: Int[Tensor, "P"],
    *,
    num_unscored: int = 0,
    max_elements: int = 2**28,
) -> Float[Tensor, "P"]:
    """Returns ``log p(y | z)`` of P pairs of an output and a context, in float64.

    Args:
        first: The contexts, as a generator in evaluation mode has read them.
        sequences_PT: Start token first; positions that hold padding are not scored.
        contexts_P: The context of each.
        num_unscored: Tokens to leave out at the beginning.
        max_elements: Bounds the memory: largest number of logits (or of gathered encoder states) at a time.
    """
    _, num_tokens, num_hidden = first.encoded.hidden_NLH.shape
    chunk_size = max(1, max_elements // max(first.generator.vocab_size, num_tokens * num_hidden))
    log_probs_P = torch.zeros(len(contexts_P), dtype=torch.float64, device=contexts_P.device)
    order_P = contexts_P.argsort(stable=True)
    for start in range(0, len(order_P), chunk_size):
        pairs_C = order_P[start : start + chunk_size]
        log_probs_P[pairs_C] = _score_chunk(first, sequences_PT[pairs_C], contexts_P[pairs_C], num_unscored)
    return log_probs_P


def _score_chunk(
    first: FirstStep, sequences_PT: Int[Tensor, "P T1"], contexts_P: Int[Tensor, "P"], num_unscored: int
) -> Float[Tensor, "P"]:
    generator = first.generator
    numbers_T = torch.arange(sequences_PT.shape[1], device=sequences_PT.device)
    last_P = ((sequences_PT != generator.pad_token_id) * numbers_T).amax(dim=1)
    used_U, rows_P = torch.unique(contexts_P, return_inverse=True)
    first_UV, state = first.rows(used_U)
    num_rows = len(used_U)
    found_P = first_UV[rows_P, sequences_PT[:, 1]]
    log_probs_P = torch.zeros(len(contexts_P), dtype=torch.float64, device=contexts_P.device)
    open_P = torch.arange(len(contexts_P), device=contexts_P.device)
    for length in range(1, 1 + int(last_P.max())):
        written_P = sequences_PT[open_P, length]
        if length > num_unscored:
            log_probs_P[open_P] += found_P.masked_fill(written_P == generator.pad_token_id, 0.0).double()
        goes_on_P = last_P[open_P] > length
        open_P, rows_P, written_P = open_P[goes_on_P], rows_P[goes_on_P], written_P[goes_on_P]
        if len(open_P) == 0:
            break
        prefixes_M, rows_P = torch.unique(rows_P * generator.vocab_size + written_P, return_inverse=True)
        parents_M, tokens_M = prefixes_M // generator.vocab_size, prefixes_M % generator.vocab_size
        if not torch.equal(parents_M, torch.arange(num_rows, device=parents_M.device)):
            state = generator.reorder(state, parents_M)
        num_rows = len(parents_M)
        found_P, state = generator.score_step(tokens_M, state, rows_P, sequences_PT[open_P, length + 1])
    return log_probs_P
