"""What reinforced policies do in a step: draw passages, answer, and have it judged.

All functions work on S sets of K passages for each question, drawn from C candidates whose contexts are encoded once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.decoding.constraints import OutputRules
from rag_lightning.decoding.decode import decode
from rag_lightning.decoding.options import DecodingMode, DecodingOptions
from rag_lightning.decoding.sampling import sample
from rag_lightning.generators.base import EncodedContexts
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import MarginalKind
from rag_lightning.rag_reading import Marginal
from rag_lightning.training.rewards import Attempt
from rag_lightning.types import Question, RagBatch, TokenBatch

MODES: dict[MarginalKind, DecodingMode] = {
    "rag_token": "rag_token",
    "rag_sequence": "rag_sequence_fast",
    "fid": "fid",
}


def chosen(
    encoded: EncodedContexts, scores_BC: Float[Tensor, "B C"], picked_BSK: Int[Tensor, "B S K"]
) -> tuple[EncodedContexts, Float[Tensor, "N K"]]:
    """Returns the contexts of the passages drawn, ``B * S * K``, and their scores, ``N = B * S``.

    Args:
        encoded: ``B * C`` contexts.
        scores_BC: Of the candidates.
        picked_BSK: Columns of the candidates drawn.
    """
    batch_size, num_candidates = scores_BC.shape
    first_B11 = torch.arange(batch_size, device=picked_BSK.device)[:, None, None] * num_candidates
    scores_BSC = scores_BC[:, None].expand(-1, picked_BSK.shape[1], -1)
    return encoded.rows((first_B11 + picked_BSK).flatten()), scores_BSC.gather(2, picked_BSK).flatten(0, 1)


@torch.no_grad()
def answers_to(
    model: RagModel,
    kind: MarginalKind,
    contexts: EncodedContexts,
    scores_NK: Float[Tensor, "N K"],
    rng: torch.Generator | None,
) -> Int[Tensor, "N T1"]:
    """Returns an answer to each set of passages: drawn from the model as it is, or without ``rng`` the greedy one.

    Stop strings end an answer, as they do in evaluation. Other rules would make tokens certain that ``log π`` counts.
    """
    prior_NK = doc_log_prior(scores_NK, model.settings.temperature)
    options, rules = stopping(model)
    if rng is None:
        return decode(model.generator, contexts, prior_NK, options, mode=MODES[kind], rules=rules).sequences_BT
    if kind == "fid":
        contexts, prior_NK = contexts.fused(prior_NK > -torch.inf), torch.zeros_like(prior_NK[:, :1])
    mode: Literal["rag_token", "rag_sequence"] = "rag_sequence" if kind == "rag_sequence" else "rag_token"
    drawn = sample(model.generator, contexts, prior_NK, options, mode=mode, num_samples=1, rng=rng, rules=rules)
    return drawn.sequences_BST[:, 0]


def stopping(model: RagModel) -> tuple[DecodingOptions, OutputRules]:
    """Returns the model's limits on an answer without its other rules."""
    given = model.decoding_options
    options = DecodingOptions(max_new_tokens=given.max_new_tokens, stop=given.stop)
    return options, model.output_rules(options).to(next(model.parameters()).device)


def said_of(
    model: RagModel,
    kind: MarginalKind,
    contexts: EncodedContexts,
    scores_NK: Float[Tensor, "N K"],
    labels_NT1: Int[Tensor, "N T1"],
) -> Marginal:
    """Returns what the model says of each answer, given the passages drawn for it."""
    mask_NL = contexts.attention_mask_NL  # the contexts are encoded already: their ids are not looked at
    return model.marginal(
        RagBatch(TokenBatch(mask_NL, mask_NL), scores_NK, labels_NT1), encoded=contexts, objective=kind
    )


def attempts_of(
    questions: tuple[Question, ...],
    answers: list[str],
    log_posterior_NK: Float[Tensor, "N K"],
    passages_BSK: Int[Tensor, "B S K"],
    corpus: PassageCorpus,
) -> list[Attempt]:
    """Returns the answers with the passage that each came from most likely.

    Args:
        questions: B of them.
        answers: ``B * S`` texts.
        log_posterior_NK: ``log p(z|x,y)``.
        passages_BSK: Passage numbers, -1 where nothing was found.
        corpus: Names them.
    """
    num_draws = passages_BSK.shape[1]
    cited_BS1 = log_posterior_NK.argmax(dim=1).view(-1, num_draws, 1).to(passages_BSK.device)
    rows_N = passages_BSK.gather(2, cited_BS1).flatten().tolist()
    return [
        Attempt(questions[place // num_draws], answer, corpus[row].id if row >= 0 else "")
        for place, (answer, row) in enumerate(zip(answers, rows_N, strict=True))
    ]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while, so that what is drawn and what is scored are of one distribution."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
