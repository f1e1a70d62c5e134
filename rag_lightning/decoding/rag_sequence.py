"""RAG-Sequence decoding, fast and thorough (Lewis et al. 2020, §2.5).

Inputs: B·K encoded contexts and the log prior of each question's K passages. The likelihood of RAG-Sequence does not
factor into next-token distributions, so a beam search runs for each passage, and the union Y of their hypotheses is
ranked by the marginal ``p(y|x) = Σ_k p(z_k|x) p(y|x,z_k)``:

- *thorough*: ``p(y|x,z_k)`` is computed for each candidate under each passage. Better, and costs one more pass of the
  decoder over the pairs that no beam has scored yet, each prefix once; contexts are never read again.
- *fast*: ``p(y|x,z_k) ≈ 0`` where ``y`` was not among passage k's own hypotheses. Costs nothing beyond the search.

So both rank by one table [candidates, passages] that the beams fill in part: thorough completes it, fast leaves the
holes at ``-inf``. Use it with models trained by the RAG-Sequence objective.

transformers' ``RagSequenceForGeneration.generate`` is thorough decoding, one question at a time. The two agree where
contexts have no padding and candidates have two scored tokens or more. There (version 5.23), and not here:

1. the prior is added at the second scored token, so that a candidate with a single one loses it (design §8.1);
2. the search of each passage attends to the padding of its context (the mask is used for scoring only);
3. T5's beams are padded with the end token, because its padding id is 0, and the repeated end tokens are scored;
4. the first token is left out of the score when every candidate starts with ``<s>``, forced or not; here when forced;
5. candidates are ranked by the smoothed loss if the configuration trains with label smoothing;
6. K is taken from the configuration for scoring, whatever ``n_docs`` is given.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.decoding.beam import Hypotheses, beam_search
from rag_lightning.decoding.constraints import NO_RULES, OutputRules
from rag_lightning.decoding.first_step import FirstStep
from rag_lightning.decoding.options import Decoded, DecodingOptions, check_inputs, decoded_of, trimmed
from rag_lightning.decoding.prefixes import score_pairs
from rag_lightning.generators.base import EncodedContexts, Generator
from rag_lightning.losses.marginal import rag_sequence_log_likelihood


@torch.no_grad()
def decode_rag_sequence(
    generator: Generator,
    encoded: EncodedContexts,
    doc_log_probs_BK: Float[Tensor, "B K"],
    options: DecodingOptions,
    rules: OutputRules = NO_RULES,
    *,
    thorough: bool,
    max_scored_elements: int = 2**28,
) -> Decoded:
    """Returns the candidate of the largest marginal likelihood, with that likelihood's log.

    Args:
        generator: Extends and scores outputs; in evaluation mode.
        encoded: ``B * K`` contexts, passages of one question adjacent.
        doc_log_probs_BK: ``log p(z_k | x)``; ``-inf`` for a missing passage, which then proposes nothing.
        options: How to search for each passage; ``num_beams`` hypotheses of each are candidates.
        rules: What may be written, and where it stops.
        thorough: Score every candidate under every passage; otherwise fast decoding, whose likelihood is a lower
            bound of the true one.
        max_scored_elements: Bounds the memory of thorough scoring, see
            :func:`rag_lightning.decoding.prefixes.score_pairs`.

    Raises:
        ConfigError: Contexts, prior and options that do not fit together.
    """
    check_inputs(generator, encoded, doc_log_probs_BK, options)
    num_passages = doc_log_probs_BK.shape[1]
    first = FirstStep.of(generator, encoded)
    found = beam_search(generator, encoded, torch.zeros_like(doc_log_probs_BK).view(-1, 1), options, rules, first)
    sequences_UT, questions_U, table_UK = candidate_table(found, doc_log_probs_BK)
    sequences_UT = trimmed(sequences_UT, generator.pad_token_id)
    prior_UK = doc_log_probs_BK[questions_U]
    if thorough:
        bare_U = table_UK.isneginf().all(dim=1) & (sequences_UT[:, 1:] == generator.pad_token_id).all(dim=1)
        holes_UK = table_UK.isneginf() & ~prior_UK.isneginf() & ~bare_U[:, None]
        rows_P, passages_P = holes_UK.nonzero(as_tuple=True)
        contexts_P = questions_U[rows_P] * num_passages + passages_P
        table_UK[rows_P, passages_P] = score_pairs(
            first,
            sequences_UT[rows_P],
            contexts_P,
            num_unscored=0 if options.forced_bos_token_id is None else 1,
            max_elements=max_scored_elements,
        ).to(table_UK.dtype)
    whole_U1 = torch.ones_like(questions_U, dtype=torch.bool)[:, None]
    marginal_U = rag_sequence_log_likelihood(table_UK[..., None], prior_UK, whole_U1)
    best_BR, there_BR = best_of_each(marginal_U, questions_U, doc_log_probs_BK.shape[0], options.num_return)
    sequences_BRT = sequences_UT[best_BR]
    sequences_BRT[..., 1:] = sequences_BRT[..., 1:].masked_fill(~there_BR[..., None], generator.pad_token_id)
    return decoded_of(
        sequences_BRT, marginal_U[best_BR].masked_fill(~there_BR, -torch.inf), options, generator.pad_token_id
    )


def candidate_table(
    found: Hypotheses, doc_log_probs_BK: Float[Tensor, "B K"]
) -> tuple[Int[Tensor, "U T1"], Int[Tensor, "U"], Float[Tensor, "U K"]]:
    """Returns the distinct candidates of all questions, whose each is, and what the beams know of them.

    Args:
        found: The hypotheses of ``B * K`` searches, passages of one question adjacent.
        doc_log_probs_BK: ``log p(z_k | x)``.

    Returns:
        U sequences, ordered by question; the question of each; and ``log p(y | x, z_k)`` where passage k's beam
        ended with y, ``-inf`` elsewhere. Every question has a candidate, a bare start token if nothing was found.
    """
    num_passages = doc_log_probs_BK.shape[1]
    num_beams = found.scores_SR.shape[1]
    missing_S1 = doc_log_probs_BK.isneginf().view(-1, 1)
    filled_SR = ~found.scores_SR.isneginf() & ~missing_S1
    filled_SR[:, 0] |= ~missing_S1[:, 0]
    filled_N = filled_SR.flatten()
    searches_N = torch.arange(filled_SR.shape[0], device=filled_N.device).repeat_interleave(num_beams)[filled_N]
    questions_N1 = (searches_N // num_passages)[:, None]
    keyed_NT = torch.cat([questions_N1, found.sequences_SRT.flatten(0, 1)[filled_N]], dim=1)
    keyed_UT, candidates_N = torch.unique(keyed_NT, dim=0, return_inverse=True)
    log_probs_N = found.log_probs_SR.flatten()[filled_N]
    table_UK = log_probs_N.new_full((keyed_UT.shape[0], num_passages), -torch.inf)
    table_UK[candidates_N, searches_N % num_passages] = log_probs_N
    return keyed_UT[:, 1:], keyed_UT[:, 0], table_UK


def best_of_each(
    scores_U: Float[Tensor, "U"], questions_U: Int[Tensor, "U"], num_questions: int, num_best: int
) -> tuple[Int[Tensor, "B R"], Bool[Tensor, "B R"]]:
    """Returns the rows of each question's best candidates, best first, the first of equals, and which there are.

    Args:
        scores_U: Larger is better.
        questions_U: Whose each is, in order; every question has one.
        num_questions: B.
        num_best: R.

    >>> best_of_each(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1]), num_questions=2, num_best=2)
    (tensor([[1, 0],
            [2, 2]]), tensor([[ True,  True],
            [ True, False]]))
    """
    order_U = scores_U.argsort(descending=True, stable=True)
    order_U = order_U[questions_U[order_U].argsort(stable=True)]
    count_B1 = torch.bincount(questions_U, minlength=num_questions)[:, None]
    ranks_R = torch.arange(num_best, device=questions_U.device)
    first_B1 = count_B1.cumsum(dim=0) - count_B1
    return order_U[first_B1 + ranks_R.minimum(count_B1 - 1)], ranks_R < count_B1
