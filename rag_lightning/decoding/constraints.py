"""Rules that forbid or force the next token, as pure functions of the scores and the tokens so far.

They act on the search alone: likelihoods are always those of the unconstrained model. Applied in the order of
transformers' logits processors, and meaning the same.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.decoding.options import DecodingOptions


def constrain(
    scores_NV: Float[Tensor, "N V"],
    prefixes_NT: Int[Tensor, "N T"],
    options: DecodingOptions,
    eos_token_id: int,
) -> Float[Tensor, "N V"]:
    """Returns the scores of the next token, ``-inf`` where it is forbidden and 0 where it is forced.

    Args:
        scores_NV: Log-probabilities of the next token.
        prefixes_NT: The tokens so far, start token included.
        options: Which rules apply.
        eos_token_id: The end token, which ``min_new_tokens`` holds back.
    """
    num_new_tokens = prefixes_NT.shape[1] - 1
    if options.no_repeat_ngram_size > 0:
        banned_NV = repeated_ngrams(prefixes_NT, options.no_repeat_ngram_size, scores_NV.shape[1])
        scores_NV = scores_NV.masked_fill(banned_NV, -torch.inf)
    if num_new_tokens < options.min_new_tokens:
        scores_NV = scores_NV.index_fill(1, scores_NV.new_tensor([eos_token_id], dtype=torch.long), -torch.inf)
    if num_new_tokens == 0 and options.forced_bos_token_id is not None:
        scores_NV = forced(scores_NV, options.forced_bos_token_id)
    if num_new_tokens == options.max_new_tokens - 1 and options.forced_eos_token_id is not None:
        scores_NV = forced(scores_NV, options.forced_eos_token_id)
    return scores_NV


def forced(scores_NV: Float[Tensor, "N V"], token_id: int) -> Float[Tensor, "N V"]:
    """Returns scores that leave one token only, at log-probability 0.

    >>> forced(torch.tensor([[-1.0, -2.0]]), 1)
    tensor([[-inf, 0.]])
    """
    only_NV = torch.full_like(scores_NV, -torch.inf)
    only_NV[:, token_id] = 0.0
    return only_NV


def repeated_ngrams(prefixes_NT: Int[Tensor, "N T"], size: int, vocab_size: int) -> Bool[Tensor, "N V"]:
    """Returns True on each next token that would complete an n-gram which the prefix already holds.

    >>> repeated_ngrams(torch.tensor([[2, 0, 1, 0]]), size=2, vocab_size=3)
    tensor([[False,  True, False]])
    """
    banned_NV = torch.zeros(prefixes_NT.shape[0], vocab_size, dtype=torch.bool, device=prefixes_NT.device)
    if prefixes_NT.shape[1] < size:
        return banned_NV
    ngrams_NWG = prefixes_NT.unfold(1, size, 1)
    last_tokens_NG = prefixes_NT[:, prefixes_NT.shape[1] - size + 1 :]
    repeats_NW = (ngrams_NWG[..., :-1] == last_tokens_NG[:, None]).all(dim=2)
    rows_M, windows_M = repeats_NW.nonzero(as_tuple=True)
    banned_NV[rows_M, ngrams_NWG[rows_M, windows_M, -1]] = True
    return banned_NV
