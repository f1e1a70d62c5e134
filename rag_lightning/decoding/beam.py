"""The one search loop: beam search over the next-token mixture of a group of passages.

Inputs: S independent searches, each over the mixture ``log Σ_k w_k p(y_t | x, z_k, y_<t)`` of its K passages.
RAG-Token is S = B questions with K passages weighted by the prior; RAG-Sequence is S = B·K searches over one
passage each. Greedy search is the case of one beam: when its likeliest token is the end token, the other candidate
is less likely at the same length, so that the search stops there.

The conventions are transformers' (version 5): ``2 · num_beams`` candidates at each step, of which only the first
``num_beams`` may finish; finished hypotheses compete by length-normalised score; see
:class:`rag_lightning.decoding.options.DecodingOptions`. Differences, none of which shows where there are enough live
candidates: a slot without a hypothesis holds ``-inf`` (there ``-1e9``, which can come back as an answer), outputs are
padded with the padding token for every model (there with the end token where the padding id is 0, as in T5), and
the first step runs once for each search instead of once for each beam. A search that is over leaves the batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.decoding.constraints import NO_RULES, OutputRules, constrain, ended
from rag_lightning.decoding.first_step import FirstStep
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.generators.base import EncodedContexts, Generator
from rag_lightning.types import TensorRecord

SMALLEST_SUM = 1e-30
"""Probabilities below it are added up in log space: float32 ends at 1e-38."""


@dataclass(frozen=True)
class Hypotheses(TensorRecord):
    """Partial or finished outputs of S searches (R of each).

    Attributes:
        sequences_SRT: Start token first, padded to ``1 + max_new_tokens``.
        scores_SR: What the search ranks by: constrained log-probability, divided by ``length ** length_penalty``
            once finished; ``-inf`` in an empty slot.
        log_probs_SR: Log-probability under the unconstrained mixture of the tokens that likelihoods count.
    """

    sequences_SRT: Int[Tensor, "S R T1"]
    scores_SR: Float[Tensor, "S R"]
    log_probs_SR: Float[Tensor, "S R"]

    def pick(self, index_SM: Int[Tensor, "S M"]) -> "Hypotheses":
        """Returns M of the R hypotheses of each search; they may repeat."""
        return Hypotheses(
            self.sequences_SRT.take_along_dim(index_SM[..., None], dim=1),
            self.scores_SR.gather(1, index_SM),
            self.log_probs_SR.gather(1, index_SM),
        )

    def searches(self, index_A: Int[Tensor, "A"]) -> "Hypotheses":
        """Returns those of some of the searches."""
        return Hypotheses(self.sequences_SRT[index_A], self.scores_SR[index_A], self.log_probs_SR[index_A])

    def replaced(self, index_A: Int[Tensor, "A"], others: "Hypotheses") -> "Hypotheses":
        """Returns the hypotheses with those of some searches replaced by others."""
        return Hypotheses(
            self.sequences_SRT.index_copy(0, index_A, others.sequences_SRT),
            self.scores_SR.to(others.scores_SR).index_copy(0, index_A, others.scores_SR),
            self.log_probs_SR.to(others.log_probs_SR).index_copy(0, index_A, others.log_probs_SR),
        )


@torch.no_grad()
def beam_search(
    generator: Generator,
    encoded: EncodedContexts,
    weights_SK: Float[Tensor, "S K"],
    options: DecodingOptions,
    rules: OutputRules = NO_RULES,
    first: FirstStep | None = None,
) -> Hypotheses:
    """Returns the ``num_beams`` best finished hypotheses of each search, best first.

    Args:
        generator: Extends outputs; should be in evaluation mode.
        encoded: ``S * K`` contexts, those of one search adjacent.
        weights_SK: ``log w_k``, a log-distribution over each search's passages.
        options: How to search.
        rules: What may be written, and where it stops.
        first: The contexts as they were read for another purpose too.

    Returns:
        Finished hypotheses with length-normalised scores and unnormalised log-probabilities; empty slots hold
        ``-inf`` in both and a bare start token.
    """
    log_probs_NV, state = (first if first is not None else FirstStep.of(generator, encoded)).all_rows()
    running = _first_hypotheses(generator, weights_SK, options)
    finished = _no_hypotheses(running, options.num_beams)
    open_A = torch.arange(weights_SK.shape[0], device=weights_SK.device)
    for length in range(1, options.max_new_tokens + 1):
        if length > 1:
            tokens_N = running.sequences_SRT[:, :, length - 1].flatten().repeat_interleave(weights_SK.shape[1])
            log_probs_NV, state = generator.step(tokens_N, state)
        mixture_ARV = mixture(log_probs_NV, weights_SK[open_A])
        candidates, parents_AC = _extend(running, mixture_ARV, length, options, rules, generator)
        written_NT = candidates.sequences_SRT[:, :, : length + 1].flatten(0, 1)
        ended_AC = ended(written_NT, options, rules, generator.eos_token_id).view_as(parents_AC)
        best = _finish(finished.searches(open_A), candidates, ended_AC, length, options)
        finished = finished.replaced(open_A, best)
        running, picks_AR = _keep_running(candidates, ended_AC, options.num_beams)
        going_A = _may_improve(running, best, length, options).nonzero()[:, 0]
        if length == options.max_new_tokens or len(going_A) == 0:
            break
        if options.num_beams > 1 or len(going_A) < len(open_A):
            groups_AR = going_A[:, None] * mixture_ARV.shape[1] + parents_AC.gather(1, picks_AR)[going_A]
            state = generator.reorder(state, _rows(groups_AR, weights_SK.shape[1]))
            running, open_A = running.searches(going_A), open_A[going_A]
    return _without_leftovers(finished, generator.pad_token_id)


def mixture(log_probs_NV: Float[Tensor, "N V"], weights_SK: Float[Tensor, "S K"]) -> Float[Tensor, "S R V"]:
    """Returns ``log Σ_k w_k p_k(v)`` of each search's R hypotheses; rows are ordered search, hypothesis, passage.

    Probabilities are summed as they are, which moves less memory than ``logsumexp``, and those too small for it in log
    space. The result may share memory with the input.

    >>> rows = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    >>> mixture(rows, torch.tensor([[0.25, 0.75]]).log()).exp()
    tensor([[[0.6000, 0.4000]]])
    """
    num_searches, num_passages = weights_SK.shape
    log_probs_SRKV = log_probs_NV.view(num_searches, -1, num_passages, log_probs_NV.shape[1])
    if num_passages == 1:
        return log_probs_SRKV[:, :, 0]  # the weight of an only passage is 1
    with torch.autocast(log_probs_NV.device.type, enabled=False):  # which would sum in half precision
        mixed_SRV = (weights_SK.to(log_probs_NV.dtype).exp()[:, None, None] @ log_probs_SRKV.exp())[:, :, 0]
        searches_M, hypotheses_M, tokens_M = (mixed_SRV < SMALLEST_SUM).nonzero(as_tuple=True)
        rare_MK = log_probs_SRKV[searches_M, hypotheses_M, :, tokens_M] + weights_SK[searches_M]
        log_mixed_SRV = mixed_SRV.log_()
        log_mixed_SRV[searches_M, hypotheses_M, tokens_M] = rare_MK.logsumexp(dim=1).to(log_mixed_SRV.dtype)
        return log_mixed_SRV


def _first_hypotheses(generator: Generator, weights_SK: Float[Tensor, "S K"], options: DecodingOptions) -> Hypotheses:
    shape_SRT = (weights_SK.shape[0], 1, 1 + options.max_new_tokens)
    sequences_SRT = torch.full(shape_SRT, generator.pad_token_id, dtype=torch.long, device=weights_SK.device)
    sequences_SRT[:, :, 0] = generator.start_token_id
    zeros_SR = torch.zeros(shape_SRT[:2], dtype=weights_SK.dtype, device=weights_SK.device)
    return Hypotheses(sequences_SRT, zeros_SR, zeros_SR)


def _no_hypotheses(first: Hypotheses, num_slots: int) -> Hypotheses:
    nothing_SR = torch.full_like(first.scores_SR, -torch.inf).expand(-1, num_slots)
    return Hypotheses(first.sequences_SRT.expand(-1, num_slots, -1), nothing_SR, nothing_SR)


def _extend(
    running: Hypotheses,
    mixture_SRV: Float[Tensor, "S R V"],
    length: int,
    options: DecodingOptions,
    rules: OutputRules,
    generator: Generator,
) -> tuple[Hypotheses, Int[Tensor, "S C"]]:
    """Returns the ``C = 2 * num_beams`` best one-token extensions, best first, and the hypothesis each extends."""
    _, num_running, vocab_size = mixture_SRV.shape
    prefixes_NT = running.sequences_SRT[:, :, :length].flatten(0, 1)
    allowed_NV = constrain(mixture_SRV.flatten(0, 1), prefixes_NT, options, generator.eos_token_id, rules)
    num_each = min(2 * options.num_beams, vocab_size)  # no hypothesis has more extensions among the best
    allowed_SRE, tokens_SRE = allowed_NV.view_as(mixture_SRV).topk(num_each, dim=2)
    scores_SX = (running.scores_SR[..., None] + allowed_SRE).flatten(1)
    num_missing = max(0, 2 * options.num_beams - scores_SX.shape[1])  # a vocabulary smaller than the beam
    scores_SX = torch.nn.functional.pad(scores_SX, (0, num_missing), value=-torch.inf)
    scores_SC, place_SC = scores_SX.topk(2 * options.num_beams, dim=1)
    place_SC = place_SC.clamp(max=num_running * num_each - 1)
    parents_SC, tokens_SC = place_SC // num_each, tokens_SRE.flatten(1).gather(1, place_SC)
    parents = running.pick(parents_SC)
    sequences_SCT = parents.sequences_SRT
    sequences_SCT[:, :, length] = tokens_SC
    counted = (tokens_SC != generator.pad_token_id) & (length > 1 or options.forced_bos_token_id is None)
    token_log_probs_SC = (
        mixture_SRV.flatten(1).gather(1, parents_SC * vocab_size + tokens_SC).masked_fill(~counted, 0.0)
    )
    return Hypotheses(sequences_SCT, scores_SC, parents.log_probs_SR + token_log_probs_SC), parents_SC


def _finish(
    finished: Hypotheses,
    candidates: Hypotheses,
    ended_SC: Bool[Tensor, "S C"],
    length: int,
    options: DecodingOptions,
) -> Hypotheses:
    """Returns the best ``num_beams`` of the finished hypotheses and of the candidates that just ended."""
    may_finish_SC = ended_SC.clone()
    may_finish_SC[:, options.num_beams :] = False
    scores_SC = (candidates.scores_SR / length**options.length_penalty).masked_fill(~may_finish_SC, -torch.inf)
    merged = Hypotheses(
        torch.cat([finished.sequences_SRT, candidates.sequences_SRT], dim=1),
        torch.cat([finished.scores_SR, scores_SC], dim=1),
        torch.cat([finished.log_probs_SR, candidates.log_probs_SR], dim=1),
    )
    return merged.pick(merged.scores_SR.topk(options.num_beams, dim=1).indices)


def _keep_running(
    candidates: Hypotheses, ended_SC: Bool[Tensor, "S C"], num_beams: int
) -> tuple[Hypotheses, Int[Tensor, "S R"]]:
    """Returns the best ``num_beams`` candidates that go on, and where they stand among the candidates."""
    scores_SC = candidates.scores_SR.masked_fill(ended_SC, -torch.inf)
    scores_SR, picks_SR = scores_SC.topk(num_beams, dim=1)
    kept = candidates.pick(picks_SR)
    return Hypotheses(kept.sequences_SRT, scores_SR, kept.log_probs_SR), picks_SR


def _may_improve(running: Hypotheses, finished: Hypotheses, length: int, options: DecodingOptions) -> Bool[Tensor, "S"]:
    """Returns whether a search should go on; an empty slot counts as a finished hypothesis of score ``-inf``."""
    worst_finished_S = finished.scores_SR.amin(dim=1)
    best_open_S = running.scores_SR[:, 0] / length**options.length_penalty
    may_improve_S: Tensor = best_open_S > worst_finished_S
    return may_improve_S & (worst_finished_S == -torch.inf) if options.early_stopping else may_improve_S


def _rows(groups_SR: Int[Tensor, "S R"], num_passages: int) -> Int[Tensor, "N"]:
    """Returns the generator rows (search, hypothesis, passage) of groups (search, hypothesis) of one row a passage."""
    return (groups_SR[..., None] * num_passages + torch.arange(num_passages, device=groups_SR.device)).flatten()


def _without_leftovers(finished: Hypotheses, pad_token_id: int) -> Hypotheses:
    """Returns the hypotheses with empty slots blanked."""
    empty_SR = finished.scores_SR == -torch.inf
    sequences_SRT = finished.sequences_SRT.clone()
    sequences_SRT[:, :, 1:] = sequences_SRT[:, :, 1:].masked_fill(empty_SR[..., None], pad_token_id)
    return Hypotheses(sequences_SRT, finished.scores_SR, finished.log_probs_SR.masked_fill(empty_SR, -torch.inf))
