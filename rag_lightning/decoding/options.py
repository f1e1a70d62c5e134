"""What a decoder is asked for, and what it gives back."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import EncodedContexts, Generator
from rag_lightning.types import TensorRecord


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How to search; the conventions are those of transformers' ``generate``.

    Attributes:
        num_beams: Hypotheses kept for each search; 1 is greedy.
        max_new_tokens: Most tokens after the start token, a forced first token and the end token included.
        min_new_tokens: Tokens after the start token before the end token is allowed.
        length_penalty: Finished hypotheses of one search compete by ``log p / length ** length_penalty``, where
            length counts the tokens after the start token, the end token included. It never enters a likelihood.
        early_stopping: Stop a search as soon as ``num_beams`` hypotheses are finished. Otherwise it goes on while
            the best open one, normalised at its present length, beats the worst finished one. Greedy search always
            stops at the first end token.
        forced_bos_token_id: The first token after the start token, in every output. It is given, not predicted,
            so likelihoods leave it out (BART generates from ``</s>`` and is then made to say ``<s>``, while its
            training targets begin with ``<s>``).
        forced_eos_token_id: The token at position ``max_new_tokens``. The search takes it for certain; likelihoods
            count what the model says of it.
        no_repeat_ngram_size: No n-gram of this size occurs twice in an output; 0 allows all.

    Raises:
        ConfigError: A value that cannot be searched with.

    >>> DecodingOptions(num_beams=4, max_new_tokens=16).length_penalty
    1.0
    """

    num_beams: int = 1
    max_new_tokens: int = 32
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        """Refuses values that cannot be searched with."""
        _require(self.num_beams >= 1, "num_beams", self.num_beams, "at least 1 (1 is greedy search)")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"0 to max_new_tokens = {self.max_new_tokens}",
        )
        _require(math.isfinite(self.length_penalty), "length_penalty", self.length_penalty, "a finite number")
        _require(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", self.no_repeat_ngram_size, "0 or more")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            token = getattr(self, name)
            _require(token is None or token >= 0, name, token, "a token id, or None to force nothing")
        _require(
            self.forced_bos_token_id is None or self.max_new_tokens >= 2,
            "max_new_tokens",
            self.max_new_tokens,
            "at least 2 where forced_bos_token_id is set (the forced token takes the first position)",
        )


@dataclass(frozen=True)
class Decoded(TensorRecord):
    """The best answer of each question.

    Attributes:
        sequences_BT: Start token first, then the answer, its end token (unless the length ran out) and padding:
            the form of ``labels``, so that they can be scored as they are.
        log_likelihood_B: ``log p(y | x)`` of the answer returned, marginalised over the passages as its decoder
            defines it, natural log, not normalised by length; float32 at least. As in ``labels``, a position that
            holds the padding id is not scored; neither is a forced first token. ``-inf`` where nothing was found.
    """

    sequences_BT: Int[Tensor, "B T1"]
    log_likelihood_B: Float[Tensor, "B"]


def _require(fine: bool, name: str, value: object, expected: str) -> None:
    if not fine:
        raise ConfigError(f"decoding option {name}: expected {expected}, got {value!r}")


def check_inputs(
    generator: Generator,
    encoded: EncodedContexts,
    doc_log_probs_BK: Float[Tensor, "B K"],
    options: DecodingOptions,
) -> None:
    """Refuses inputs that would decode without complaint and mean nothing.

    Raises:
        ConfigError: The number of contexts is not B·K, the prior is not a distribution (raw scores?), or a forced
            token lies outside the generator's vocabulary.
    """
    batch_size, num_passages = doc_log_probs_BK.shape
    num_contexts = encoded.hidden_NLH.shape[0]
    if num_contexts != batch_size * num_passages:
        raise ConfigError(
            f"expected {batch_size} questions x {num_passages} passages = {batch_size * num_passages} contexts, "
            f"got {num_contexts}: doc_log_probs must be [B, K] of the K passages that were encoded"
        )
    total_B = doc_log_probs_BK.logsumexp(dim=1)
    if not bool((total_B.abs() < 1e-2).all()):
        raise ConfigError(
            "expected doc_log_probs to be the log of a distribution over each question's passages, but their "
            f"exponentials sum to {torch.exp(total_B).tolist()}: pass losses.marginal.doc_log_prior(doc_scores)"
        )
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        token = getattr(options, name)
        if token is not None and token >= generator.vocab_size:
            raise ConfigError(f"{name} = {token} is outside the generator's vocabulary of {generator.vocab_size}")
