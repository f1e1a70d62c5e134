"""Decoded tokens as texts: answers, the n best of them, and the tokens with the passages that they come from."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.decoding.options import Decoded
from rag_lightning.decoding.text_rules import cut_before
from rag_lightning.types import Alternative, TokenPosteriors


def answer_texts(tokenizer: Any, sequences_NT: Int[Tensor, "N T1"], stop: Sequence[str]) -> list[str]:
    """Returns the texts of decoded sequences, cut before their stop strings."""
    texts = tokenizer.batch_decode(sequences_NT, skip_special_tokens=True)
    return [cut_before(text, stop).strip() for text in texts]


def alternatives(tokenizer: Any, decoded: Decoded) -> list[tuple[Alternative, ...]]:
    """Returns the n best answers of each question; none where they were not asked for."""
    if decoded.nbest_BRT is None or decoded.nbest_log_likelihood_BR is None:
        return [()] * len(decoded.sequences_BT)
    found = []
    for sequences_RT, likelihoods in zip(decoded.nbest_BRT, decoded.nbest_log_likelihood_BR.tolist(), strict=True):
        texts = answer_texts(tokenizer, sequences_RT, decoded.stop)
        pairs = zip(texts, likelihoods, strict=True)
        found.append(tuple(Alternative(text, value) for text, value in pairs if value > -torch.inf))
    return found


def tokens_with_posteriors(
    tokenizer: Any, sequences_BT: Int[Tensor, "B T1"], posteriors_BKT: Float[Tensor, "B K T"], pad_token_id: int
) -> list[TokenPosteriors]:
    """Returns the texts of each answer's tokens with the posteriors of its passages; padding is left out.

    Args:
        tokenizer: The generator's.
        sequences_BT: Start token first.
        posteriors_BKT: Of the tokens after it.
        pad_token_id: Padding.
    """
    records = []
    for tokens_T, posteriors_KT in zip(sequences_BT[:, 1:], posteriors_BKT, strict=True):
        written_T = tokens_T != pad_token_id
        texts = tokenizer.batch_decode(tokens_T[written_T][:, None])
        records.append(TokenPosteriors(tuple(texts), tuple(map(tuple, posteriors_KT[:, written_T].tolist()))))
    return records
