"""A generator that is a table of probabilities, and the exhaustive search over its outputs: the decoders' oracle."""

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rag_lightning.generators.base import DecoderState, EncodedContexts
from rag_lightning.types import GeneratorOutput, TokenBatch

PAD, START, EOS = 0, 1, 2


@dataclass
class TableGenerator:
    """``log p(next | context, prefix)`` is a row of ``table[context, prefix number]``.

    Prefixes are numbered as nodes of a tree: the empty one is 0, and ``prefix + [v]`` is ``number * V + v + 1``.
    Padding and start have probability 0 everywhere, as a trained model would have it. Counts the rows of its steps.
    """

    table_CNV: Tensor
    max_tokens: int
    num_rows: list[int] = field(default_factory=list)
    pad_token_id: int = PAD
    start_token_id: int = START
    eos_token_id: int = EOS

    @property
    def vocab_size(self) -> int:
        return self.table_CNV.shape[2]

    @property
    def num_steps(self) -> int:
        return len(self.num_rows)

    @classmethod
    def random(
        cls, num_contexts: int, vocab_size: int, max_tokens: int, seed: int, sharpness: float = 1.5
    ) -> "TableGenerator":
        rng = torch.Generator().manual_seed(seed)
        num_prefixes = sum(vocab_size**length for length in range(max_tokens + 1))
        logits = sharpness * torch.randn(num_contexts, num_prefixes, vocab_size, generator=rng, dtype=torch.float64)
        logits[..., [PAD, START]] = -torch.inf
        return cls(logits.log_softmax(dim=2), max_tokens)

    @property
    def contexts(self) -> EncodedContexts:
        """The encoded contexts 0, 1, 2, …; their only hidden feature is their number."""
        numbers_N = torch.arange(self.table_CNV.shape[0], dtype=torch.float64)
        return EncodedContexts(numbers_N[:, None, None], torch.ones(len(numbers_N), 1, dtype=torch.long))

    def encode(self, contexts: TokenBatch) -> EncodedContexts:
        raise AssertionError("decoders must not run the encoder")

    def start(self, encoded: EncodedContexts) -> DecoderState:
        return DecoderState(encoded, None)

    def step(self, tokens_N: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        self.num_rows.append(tokens_N.shape[0])
        assert tokens_N.shape[0] == state.encoded.hidden_NLH.shape[0]
        numbers_N = torch.zeros_like(tokens_N) if state.cache is None else state.cache * self.vocab_size + tokens_N + 1
        rows_NV = self.table_CNV[state.encoded.hidden_NLH[:, 0, 0].long(), numbers_N]
        return rows_NV, DecoderState(state.encoded, numbers_N)

    def score_step(
        self, tokens_N: Tensor, state: DecoderState, rows_P: Tensor, next_P: Tensor
    ) -> tuple[Tensor, DecoderState]:
        log_probs_NV, state = self.step(tokens_N, state)
        return log_probs_NV[rows_P, next_P], state

    def fork(self, state: DecoderState) -> DecoderState:
        return state

    def reorder(self, state: DecoderState, rows_M: Tensor) -> DecoderState:
        encoded = EncodedContexts(state.encoded.hidden_NLH[rows_M], state.encoded.attention_mask_NL[rows_M])
        return DecoderState(encoded, state.cache[rows_M])

    def score(
        self,
        encoded: EncodedContexts,
        labels_BT1: Tensor,
        num_passages: int,
        *,
        vocab_mean: bool = False,
        keep_logits: bool = False,
    ) -> GeneratorOutput:
        contexts_N = encoded.hidden_NLH[:, 0, 0].long().tolist()
        targets_BT = labels_BT1[:, 1:]
        log_probs_BKT = torch.zeros(len(labels_BT1), num_passages, targets_BT.shape[1], dtype=torch.float64)
        for row, context in enumerate(contexts_N):
            question, passage = divmod(row, num_passages)
            tokens = tuple(token for token in targets_BT[question].tolist() if token != PAD)
            log_probs_BKT[question, passage, : len(tokens)] = torch.tensor(self.token_log_probs(context, tokens))
        return GeneratorOutput(token_log_probs_BKT=log_probs_BKT, target_mask_BT=targets_BT != PAD)

    def token_log_probs(self, context: int, tokens: tuple[int, ...]) -> list[float]:
        number, found = 0, []
        for token in tokens:
            found.append(float(self.table_CNV[context, number, token]))
            number = number * self.vocab_size + token + 1
        return found

    def outputs(self, max_tokens: int, min_tokens: int = 0) -> list[tuple[int, ...]]:
        """Every output of at most ``max_tokens``: words then the end token, or ``max_tokens`` words."""
        words = range(EOS + 1, self.vocab_size)
        ended = [
            (*body, EOS) for length in range(min_tokens, max_tokens) for body in itertools.product(words, repeat=length)
        ]
        return ended + list(itertools.product(words, repeat=max_tokens))

    def rag_token_log_prob(self, contexts: range, prior: Tensor, tokens: tuple[int, ...]) -> float:
        """``Σ_t log Σ_k p(z_k) p(y_t | z_k, y_<t)`` by loops over plain numbers."""
        per_passage = [self.token_log_probs(context, tokens) for context in contexts]
        return sum(
            math.log(sum(math.exp(float(prior[k]) + per_passage[k][t]) for k in range(len(contexts))))
            for t in range(len(tokens))
        )

    def rag_sequence_log_prob(self, contexts: range, prior: Tensor, tokens: tuple[int, ...]) -> float:
        """``log Σ_k p(z_k) Π_t p(y_t | z_k, y_<t)`` by loops over plain numbers."""
        return math.log(
            sum(
                math.exp(float(prior[k]) + sum(self.token_log_probs(context, tokens)))
                for k, context in enumerate(contexts)
            )
        )


def answer(sequence: Tensor) -> tuple[int, ...]:
    """A decoded row without its start token and padding."""
    tokens = sequence.tolist()
    assert tokens[0] == START
    return tuple(token for token in tokens[1:] if token != PAD)


def random_prior(num_questions: int, num_passages: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num_questions, num_passages, generator=rng, dtype=torch.float64).log_softmax(dim=1)
