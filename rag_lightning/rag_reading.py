"""What a generator says of given targets: each passage read apart and summed out, or all of them read together."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.generators.base import EncodedContexts, Generator
from rag_lightning.losses.marginal import (
    hf_smoothed_nll,
    passage_log_likelihood,
    passage_log_posterior,
    rag_sequence_log_likelihood,
    rag_token_log_likelihood,
    smoothing_penalty,
)
from rag_lightning.rag_parts import MarginalKind
from rag_lightning.types import TensorRecord


@dataclass(frozen=True)
class Marginal(TensorRecord):
    """What the marginal says of a batch.

    Attributes:
        nll_B: The training loss of each example: ``-log p(y|x)``, label-smoothed if asked.
        log_likelihood_B: ``log p(y|x)`` without smoothing.
        log_prior_BK: ``log p(z|x)``.
        log_posterior_BK: ``log p(z|x,y)``.
        passage_log_likelihood_BK: ``log p(y|x,z)``, of the whole answer from each passage alone; None for
            fusion-in-decoder where it was not asked for, and then the posterior is the prior.
        num_tokens_B: Scored target tokens.
        logits_BRTV: The decoder's logits, only when asked for: R is K, or 1 for fusion-in-decoder, which reads once.
    """

    nll_B: Float[Tensor, "B"]
    log_likelihood_B: Float[Tensor, "B"]
    log_prior_BK: Float[Tensor, "B K"]
    log_posterior_BK: Float[Tensor, "B K"]
    passage_log_likelihood_BK: Float[Tensor, "B K"] | None
    num_tokens_B: Int[Tensor, "B"]
    logits_BRTV: Float[Tensor, "B R T V"] | None = None


def read_apart(
    generator: Generator,
    labels: Int[Tensor, "B T1"],
    prior_BK: Float[Tensor, "B K"],
    encoded: EncodedContexts,
    *,
    kind: MarginalKind,
    label_smoothing: float,
    hf_compat: bool,
    keep_logits: bool,
) -> Marginal:
    """Returns the marginal likelihood of the targets: each is scored under each passage, the passages are summed out.

    Args:
        generator: The reader.
        labels: The targets.
        prior_BK: ``log p(z|x)``.
        encoded: ``B * K`` contexts.
        kind: ``rag_token`` or ``rag_sequence``.
        label_smoothing: ε.
        hf_compat: Prior placement and smoothing as in transformers.
        keep_logits: Also return the logits.
    """
    hf_smoothing = hf_compat and label_smoothing > 0
    output = generator.score(
        encoded,
        labels,
        prior_BK.shape[1],
        vocab_mean=label_smoothing > 0 and not hf_compat,
        keep_logits=hf_smoothing or keep_logits,
    )
    arguments = (output.token_log_probs_BKT, prior_BK, output.target_mask_BT)
    if kind == "rag_sequence":
        log_likelihood_B = rag_sequence_log_likelihood(*arguments, hf_compat=hf_compat)
    else:
        assert kind == "rag_token"
        log_likelihood_B = rag_token_log_likelihood(*arguments)
    posterior_BK = passage_log_posterior(*arguments)
    nll_B = -log_likelihood_B
    if hf_smoothing and output.logits_BKTV is not None:
        sequence = kind == "rag_sequence"
        nll_B = hf_smoothed_nll(
            output.logits_BKTV, prior_BK, labels[:, 1:], output.target_mask_BT, label_smoothing, sequence=sequence
        )
    elif output.vocab_mean_BKT is not None:
        penalty_B = smoothing_penalty(output.vocab_mean_BKT, posterior_BK, output.target_mask_BT)
        nll_B = (1 - label_smoothing) * nll_B + label_smoothing * penalty_B
    alone_BK = passage_log_likelihood(output.token_log_probs_BKT, output.target_mask_BT)
    logits_BRTV = output.logits_BKTV if keep_logits else None
    num_tokens_B = output.target_mask_BT.sum(dim=1)
    return Marginal(nll_B, log_likelihood_B, prior_BK, posterior_BK, alone_BK, num_tokens_B, logits_BRTV)


def read_together(
    generator: Generator,
    labels: Int[Tensor, "B T1"],
    prior_BK: Float[Tensor, "B K"],
    together: EncodedContexts,
    alone: EncodedContexts | None,
    label_smoothing: float,
    *,
    keep_logits: bool,
) -> Marginal:
    """Returns what a reader says of the targets that reads all passages at once; it does not look at ``p(z|x)``.

    Args:
        generator: The reader.
        labels: The targets.
        prior_BK: ``log p(z|x)``.
        together: One context for each question.
        alone: ``B * K`` contexts, to score the targets from each passage alone too, without gradient.
        label_smoothing: ε.
        keep_logits: Also return the logits.
    """
    output = generator.score(together, labels, 1, vocab_mean=label_smoothing > 0, keep_logits=keep_logits)
    log_likelihood_B = passage_log_likelihood(output.token_log_probs_BKT, output.target_mask_BT)[:, 0]
    nll_B = -log_likelihood_B
    if output.vocab_mean_BKT is not None:
        certain_B1 = torch.zeros_like(nll_B)[:, None]
        penalty_B = smoothing_penalty(output.vocab_mean_BKT, certain_B1, output.target_mask_BT)
        nll_B = (1 - label_smoothing) * nll_B + label_smoothing * penalty_B
    alone_BK, posterior_BK = None, prior_BK
    if alone is not None:
        with torch.no_grad():
            each = generator.score(alone, labels, prior_BK.shape[1])
        alone_BK = passage_log_likelihood(each.token_log_probs_BKT, each.target_mask_BT)
        posterior_BK = passage_log_posterior(each.token_log_probs_BKT, prior_BK.detach(), each.target_mask_BT)
    num_tokens_B = output.target_mask_BT.sum(dim=1)
    return Marginal(nll_B, log_likelihood_B, prior_BK, posterior_BK, alone_BK, num_tokens_B, output.logits_BKTV)
