"""Decoded answers as records: with the passages behind them, and which passage each token came from."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rag_lightning.decoding.options import Decoded
from rag_lightning.decoding.texts import alternatives, answer_texts, tokens_with_posteriors
from rag_lightning.generators.base import EncodedContexts
from rag_lightning.generators.pretrained import PretrainedGenerator
from rag_lightning.losses.marginal import TokenPosteriorKind, passage_log_posterior, token_posteriors
from rag_lightning.types import Evidence, GeneratorOutput, Prediction, Question, RetrievedPassage, TokenPosteriors


def told(
    generator: PretrainedGenerator,
    records: Sequence[Question],
    decoded: Decoded,
    encoded: EncodedContexts,
    scores_BK: Float[Tensor, "B K"],
    prior_BK: Float[Tensor, "B K"],
    evidence: Evidence | None,
    posterior_kind: TokenPosteriorKind | None = None,
) -> list[Prediction]:
    """Returns decoded answers as records, each passage with its prior and its posterior given the answer.

    Args:
        generator: Wrote the answers.
        records: The questions.
        decoded: The answers.
        encoded: ``B * K`` contexts; or B, where all passages stand in one, and the posterior is then the prior.
        scores_BK: Similarities.
        prior_BK: ``log p(z|x)``.
        evidence: The passages; None for a closed-book model.
        posterior_kind: Also tell the posteriors token by token, where there are passages that were read apart.
    """
    posterior_BK, mask_BT, output = prior_BK, None, None
    if encoded.hidden_NLH.shape[0] == prior_BK.numel():
        output = generator.score(encoded, decoded.sequences_BT, prior_BK.shape[1])
        mask_BT = _scored(output)
        posterior_BK = passage_log_posterior(output.token_log_probs_BKT, prior_BK, mask_BT)
    tokenizer = generator.text_tokenizer
    by_token: list[TokenPosteriors | None] = [None] * len(records)
    if posterior_kind is not None and evidence is not None and output is not None and mask_BT is not None:
        by_token_BKT = token_posteriors(output.token_log_probs_BKT, prior_BK, mask_BT, posterior_kind)
        by_token[:] = tokens_with_posteriors(tokenizer, decoded.sequences_BT, by_token_BKT, generator.pad_token_id)
    answers = answer_texts(tokenizer, decoded.sequences_BT, decoded.stop)
    nbest = alternatives(tokenizer, decoded)
    numbers_BK3 = torch.stack([scores_BK, prior_BK.exp(), posterior_BK.exp()], dim=2).tolist()
    results = []
    for row, record in enumerate(records):
        passages = evidence.passages[row] if evidence is not None else ()
        found = tuple(
            RetrievedPassage(passage.id, passage.title, passage.text, *numbers)
            for passage, numbers in zip(passages, numbers_BK3[row], strict=False)  # closed-book: one place, no passage
        )
        likelihood = float(decoded.log_likelihood_B[row])
        results.append(
            Prediction(record.id, record.question, answers[row], likelihood, found, nbest[row], by_token[row])
        )
    return results


def _scored(output: GeneratorOutput) -> Bool[Tensor, "B T"]:
    """Returns what is scored; of an empty answer everything, at 0, which leaves the prior as it is."""
    return output.target_mask_BT | ~output.target_mask_BT.any(dim=1)[:, None]
