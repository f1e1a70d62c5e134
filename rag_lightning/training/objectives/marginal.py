"""The marginal likelihoods, alone or with losses that teach the retriever by the reader's judgement."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.rag import Marginal, RagModel
from rag_lightning.rag_parts import MarginalKind
from rag_lightning.training.examples import ExampleKind
from rag_lightning.training.objectives.base import Outcome, Reads, Sources, check_smoothing, read
from rag_lightning.training.objectives.retriever_losses import Reading, RetrieverLoss
from rag_lightning.types import QuestionBatch

READER = ("generator",)
RETRIEVER = ("query_encoder", "passage_encoder", "fusion")
PARTS = ("query_encoder", "passage_encoder", "generator", "fusion")
"""In the order in which optimisers keep them."""


class MarginalObjective:
    """RAG-Token or RAG-Sequence: retrieve, read each passage, sum the passages out (Lewis et al. 2020, §2.1).

    With ``retriever_losses`` it is ``marginal_weight · -log p(y|x) + Σ weight · loss``. As in Atlas, the retriever then
    usually learns from those alone (``teaches_retriever=False``), and a reader that stays as it is, REPLUG's, has
    ``marginal_weight=0``.

    Args:
        kind: ``rag_token`` or ``rag_sequence``.
        label_smoothing: ε of the target distribution; the penalty is weighted by the passages' posterior.
        hf_compat: Prior placement and smoothing as in transformers.
        marginal_weight: What the marginal's part of the loss is multiplied by; 0 leaves the generator as it is.
        teaches_retriever: Whether the gradient of ``-log p(y|x)`` reaches the retriever.
        retriever_losses: Further terms by name, which are logged as ``train/<name>``.

    Raises:
        ConfigError: A weight below 0, or terms that would teach nothing.
    """

    reads: Reads = "retrieved"
    examples: ExampleKind = "questions"
    eval_examples: ExampleKind = "questions"
    num_negatives: int = 0
    cross_process: bool = False

    def __init__(
        self,
        *,
        kind: MarginalKind,
        label_smoothing: float = 0.0,
        hf_compat: bool = False,
        marginal_weight: float = 1.0,
        teaches_retriever: bool = True,
        retriever_losses: Mapping[str, RetrieverLoss] | None = None,
    ) -> None:
        check_smoothing(label_smoothing)
        if marginal_weight < 0:
            raise ConfigError(f"objective.marginal_weight: expected 0 or more, got {marginal_weight}")
        self.kind: MarginalKind = kind
        self.label_smoothing = label_smoothing
        self.hf_compat = hf_compat
        self.marginal_weight = marginal_weight
        self.teaches_retriever = teaches_retriever
        self.retriever_losses = dict(retriever_losses or {})
        taught = {*READER} if marginal_weight > 0 else set[str]()
        if (teaches_retriever and marginal_weight > 0) or self.retriever_losses:
            taught |= {*RETRIEVER}
        self.trains: tuple[str, ...] = tuple(part for part in PARTS if part in taught)
        if not self.trains:
            raise ConfigError("objective: marginal_weight=0 without retriever_losses teaches nothing: give one of them")

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the losses of a batch, with gradient to the parts in ``trains``."""
        if sources.retriever is None:
            raise ConfigError(f"objective {self.kind}: expected a retriever, came none")
        texts = [question.question for question in batch.questions]
        hits, scores_BK = model.retrieve(batch.query, texts, sources.retriever, reencode=sources.reencode)
        contexts = sources.assembler.contexts(hits.ids_BK.to(scores_BK.device), batch.prompt)
        known_BK = scores_BK if self.teaches_retriever else scores_BK.detach()
        with nullcontext() if self.marginal_weight > 0 else torch.no_grad():
            outcome = read(model, contexts, known_BK, batch, self.kind, self.label_smoothing, self.hf_compat, hits)
        return self._with_retriever_losses(outcome, scores_BK, model)

    def _with_retriever_losses(self, outcome: Outcome, scores_BK: Float[Tensor, "B K"], model: RagModel) -> Outcome:
        if not self.retriever_losses and self.marginal_weight == 1.0:
            return outcome
        assert isinstance(outcome.marginal, Marginal)
        prior_BK = doc_log_prior(scores_BK, model.settings.temperature)
        reading = Reading(outcome.marginal.passage_log_likelihood_BK.detach(), outcome.marginal.num_tokens_B, prior_BK)
        terms = {"nll": outcome.marginal.nll_B}
        loss_B = self.marginal_weight * outcome.marginal.nll_B
        for name, term in self.retriever_losses.items():
            terms[name] = term(reading)
            loss_B = loss_B + term.weight * terms[name]
        return replace(outcome, loss_B=loss_B, terms=terms)
