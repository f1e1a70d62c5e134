"""Rules that forbid or force the next token, as pure functions of the scores and the tokens so far.

They act on the search alone: likelihoods are always those of the unconstrained model. Applied in the order of
transformers' logits processors, and meaning the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.decoding.trie import TokenTrie
from rag_lightning.types import TensorRecord


@dataclass(frozen=True)
class OutputRules(TensorRecord):
    """What an output may be, in tokens: the options that name texts and files, made ready for one tokenizer.

    Attributes:
        allowed: The only outputs there are; None allows all.
        stops: Says which partial outputs, start token first, hold a stop string; None where there is no such string.
    """

    allowed: TokenTrie | None = None
    stops: Callable[[Tensor], Tensor] | None = None


NO_RULES = OutputRules()


def constrain(
    scores_NV: Float[Tensor, "N V"],
    prefixes_NT: Int[Tensor, "N T"],
    options: DecodingOptions,
    eos_token_id: int,
    rules: OutputRules = OutputRules(),
) -> Float[Tensor, "N V"]:
    """Returns the scores of the next token, ``-inf`` where it is forbidden and 0 where it is forced.

    Args:
        scores_NV: Log-probabilities of the next token.
        prefixes_NT: The tokens so far, start token included.
        options: Which rules apply.
        eos_token_id: The end token, which ``min_new_tokens`` holds back.
        rules: What may be written at all; not even a forced token leaves it.
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
    if rules.allowed is not None:
        scores_NV = scores_NV.masked_fill(~rules.allowed.next_tokens(prefixes_NT, scores_NV.shape[1]), -torch.inf)
    return scores_NV


def ended(
    written_NT: Int[Tensor, "N T"], options: DecodingOptions, rules: OutputRules, eos_token_id: int
) -> Bool[Tensor, "N"]:
    """Returns which outputs are finished with their last token: end token, stop string or greatest length.

    Args:
        written_NT: The tokens so far, start token included.
        options: The greatest length.
        rules: The stop strings.
        eos_token_id: The end token.
    """
    ended_N = written_NT[:, -1] == eos_token_id
    if written_NT.shape[1] == 1 + options.max_new_tokens:
        return torch.ones_like(ended_N)
    return ended_N if rules.stops is None else ended_N | rules.stops(written_NT)


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
