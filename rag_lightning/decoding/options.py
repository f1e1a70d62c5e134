"""What a decoder is asked for, and what it gives back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import EncodedContexts, Generator
from rag_lightning.types import TensorRecord

DecodingMode = Literal["rag_token", "rag_sequence_fast", "rag_sequence_thorough", "fid", "stuffed"]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How to search or to sample; the conventions are those of transformers' ``generate``.

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
        sample: Draw answers at random instead of searching for the likeliest; see
            :mod:`rag_lightning.decoding.sampling`.
        temperature: Divides log-probabilities before sampling; 1 is the model as it is.
        top_k: Sample from the k likeliest tokens only; 0 is all.
        top_p: Sample from the smallest set of tokens whose mass is at least this (the nucleus); 1 is all.
        seed: Of the random numbers, where the caller brings none.
        num_return: Answers returned for each question (n-best); with ``sample``, answers drawn for each.
        stop: Strings that end an answer as soon as its text holds one; the text is cut before it. They end no answer
            for the likelihood, which is that of the tokens written, the stop string's included.
        allowed: A file with one answer on each line (UTF-8); no other answer is ever given. A path, or ``bundled:…``.

    Raises:
        ConfigError: A value that cannot be decoded with, or two that contradict each other.

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
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_return: int = 1
    stop: Sequence[str] = ()
    allowed: str | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be decoded with."""
        self._check_search()
        self._check_sampling()
        self._check_text()
        object.__setattr__(self, "stop", tuple(self.stop))  # JSON and YAML bring lists; tuples compare and hash

    def _check_search(self) -> None:
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

    def _check_sampling(self) -> None:
        finite = math.isfinite(self.temperature) and self.temperature > 0
        _require(finite, "temperature", self.temperature, "a number > 0 (greedy search is sample=false)")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1 (all tokens)")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.num_return >= 1, "num_return", self.num_return, "at least 1")
        if self.sample and self.num_beams > 1:
            raise ConfigError(
                f"decoding options sample and num_beams exclude each other: got sample=True, num_beams={self.num_beams}"
                ". Set num_beams=1 to sample, or sample=false to search."
            )
        if not self.sample and self.num_return > self.num_beams:
            raise ConfigError(
                f"decoding option num_return: expected at most num_beams = {self.num_beams} answers of a search, got "
                f"{self.num_return}. Raise num_beams, or set sample=true."
            )
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ConfigError(
                f"decoding options temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: expected "
                "them with sample=true, got sample=False, where they would do nothing. Set sample=true, or leave them "
                "at 1, 0, 1."
            )

    def _check_text(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(
                f"decoding option stop: expected a list of non-empty strings, got {self.stop!r}. Write stop=['…']."
            )
        if self.allowed is not None and self.stop:
            raise ConfigError(
                "decoding options allowed and stop exclude each other: a stop string would cut allowed answers. Leave "
                f"one out; got allowed={self.allowed!r}, stop={list(self.stop)}."
            )


@dataclass(frozen=True)
class Decoded(TensorRecord):
    """The best answer of each question, and the n best where asked for.

    Attributes:
        sequences_BT: Start token first, then the answer, its end token (unless the length ran out or a stop string
            came) and padding: the form of ``labels``, so that they can be scored as they are.
        log_likelihood_B: ``log p(y | x)`` of the answer returned, marginalised over the passages as its decoder
            defines it, natural log, not normalised by length; float32 at least. As in ``labels``, a position that
            holds the padding id is not scored; neither is a forced first token. ``-inf`` where nothing was found.
        nbest_BRT: The ``num_return`` best answers in the decoder's order (RAG-Token's beam ranks by the normalised
            score, all others by likelihood), the best first; a bare start token where there are fewer. None where
            only the best was asked for.
        nbest_log_likelihood_BR: Their likelihoods; ``-inf`` where there are fewer.
        stop: The strings before which the answers' texts are cut.
    """

    sequences_BT: Int[Tensor, "B T1"]
    log_likelihood_B: Float[Tensor, "B"]
    nbest_BRT: Int[Tensor, "B R T2"] | None = None
    nbest_log_likelihood_BR: Float[Tensor, "B R"] | None = None
    stop: tuple[str, ...] = ()


def decoded_of(
    sequences_BRT: Int[Tensor, "B R T1"],
    log_likelihood_BR: Float[Tensor, "B R"],
    options: DecodingOptions,
    pad_token_id: int,
) -> Decoded:
    """Returns the answers of each question, best first, as a decoder gives them back.

    Args:
        sequences_BRT: At least ``num_return`` of each.
        log_likelihood_BR: Theirs.
        options: How many are wanted.
        pad_token_id: Padding, of which no more is kept than needed.
    """
    best = Decoded(trimmed(sequences_BRT[:, 0], pad_token_id), log_likelihood_BR[:, 0], stop=tuple(options.stop))
    if options.num_return == 1:
        return best
    batch_size = sequences_BRT.shape[0]
    kept_NT = trimmed(sequences_BRT[:, : options.num_return].flatten(0, 1), pad_token_id)
    return replace(
        best,
        nbest_BRT=kept_NT.view(batch_size, -1, kept_NT.shape[1]),
        nbest_log_likelihood_BR=log_likelihood_BR[:, : options.num_return],
    )


def trimmed(sequences_NT: Int[Tensor, "N T1"], pad_token_id: int) -> Int[Tensor, "N T2"]:
    """Returns the sequences without the columns at the end that hold padding only; at least two columns stay.

    >>> trimmed(torch.tensor([[2, 5, 1, 1], [2, 5, 6, 1]]), pad_token_id=1)
    tensor([[2, 5, 1],
            [2, 5, 6]])
    """
    used_T = (sequences_NT[:, 1:] != pad_token_id).any(dim=0).nonzero()
    length = int(used_T[-1]) + 2 if used_T.numel() > 0 else 2
    return sequences_NT[:, :length]


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
