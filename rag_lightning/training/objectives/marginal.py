"""Reading what was retrieved, alone or with losses that teach the retriever by the reader's judgement."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import EncodedContexts
from rag_lightning.losses.marginal import doc_log_prior, passage_log_likelihood
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import MarginalKind
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.training.examples import RETRIEVED_FOR, ExampleKind
from rag_lightning.training.objectives.base import Objective, Outcome, Reads, Sources, check_smoothing, read
from rag_lightning.training.objectives.pairs import batch_pairs, query_vectors
from rag_lightning.training.objectives.retriever_losses import Need, Reading, RetrieverLoss
from rag_lightning.types import QuestionBatch

RETRIEVER = ("query_encoder", "passage_encoder", "fusion")


class MarginalObjective:
    """RAG-Token or RAG-Sequence: retrieve, read each passage, sum the passages out (Lewis et al. 2020, §2.1).

    Or read all passages at once: by a decoder that attends to all of them (fusion-in-decoder, Izacard and Grave 2021b),
    or from one prompt (Ram et al. 2023). That likelihood does not look at ``p(z|x)``, so there the retriever learns
    from ``retriever_losses`` or not at all.

    With ``retriever_losses`` it is ``marginal_weight · -log p(y|x) + Σ weight · loss``. As in Atlas, the retriever then
    usually learns from those alone (``teaches_retriever=False``), and a reader that stays as it is, REPLUG's, has
    ``marginal_weight=0``.

    Args:
        kind: ``rag_token``, ``rag_sequence``, ``fid`` or ``stuffed``.
        label_smoothing: ε of the target distribution; the penalty is weighted by the passages' posterior.
        hf_compat: Prior placement and smoothing as in transformers.
        marginal_weight: What the marginal's part of the loss is multiplied by; 0 leaves the generator as it is.
        teaches_retriever: Whether the gradient of ``-log p(y|x)`` reaches the retriever.
        retriever_losses: Further terms by name, which are logged as ``train/<name>``.
        examples: What is trained on: ``questions``, or, to pre-train on the passages alone, ``salient_spans`` (REALM,
            Guu et al. 2020) or ``random_spans``; see :mod:`rag_lightning.training.pretraining_examples`. Validation
            and test are on questions all the same.

    Raises:
        ConfigError: A weight below 0, terms that would teach nothing, or examples that bring their own passage.
    """

    reads: Reads = "retrieved"
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
        examples: ExampleKind = "questions",
    ) -> None:
        check_smoothing(label_smoothing)
        if examples not in RETRIEVED_FOR:
            raise ConfigError(f"objective.examples: expected one of {', '.join(RETRIEVED_FOR)}, got {examples!r}")
        self.examples: ExampleKind = examples
        if marginal_weight < 0:
            raise ConfigError(f"objective.marginal_weight: expected 0 or more, got {marginal_weight}")
        self.kind: MarginalKind = kind
        self.label_smoothing = label_smoothing
        self.hf_compat = hf_compat
        self.marginal_weight = marginal_weight
        self.teaches_retriever = teaches_retriever
        self.retriever_losses = dict(retriever_losses or {})
        by_prior = teaches_retriever and marginal_weight > 0 and kind not in ("fid", "stuffed")
        weighing = [loss for loss in self.retriever_losses.values() if not {"evidence", "pairs"} & {*loss.needs}]
        self.weighs_null = kind != "stuffed" and (by_prior or bool(weighing))  # the others look at passages alone
        reaches_retriever = by_prior or bool(self.retriever_losses)
        self.trains: tuple[str, ...] = (
            *(RETRIEVER if reaches_retriever else ()),
            *(("generator",) if marginal_weight > 0 else ()),
        )
        if kind != "fid" and "attention" in self._needs():
            raise ConfigError(
                f"objective {kind}: attention distillation needs a reader that attends to all passages at once: "
                "expected objective=fid. With a marginal use retriever_loss=pdist, loop or emdr2."
            )
        if not self.trains:
            raise ConfigError("objective: marginal_weight=0 without retriever_losses teaches nothing: give one of them")

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the losses of a batch, with gradient to the parts in ``trains``; without teaching, the marginal's."""
        if sources.retriever is None:
            raise ConfigError(f"objective {self.kind}: expected a retriever, came none")
        texts = [question.question for question in batch.questions]
        losses = self.retriever_losses if sources.teaching else {}
        # encoded here, so that contrasting and retrieving share one pass
        queries_BD = query_vectors(model, batch) if losses and "pairs" in self._needs() else None
        hits, scores_BK = model.retrieve(
            batch.query,
            texts,
            sources.retriever,
            reencode=sources.reencode,
            forbidden_ids=batch.forbidden_ids,
            query_vectors_BD=queries_BD,
        )
        ids_BK, alone = hits.ids_BK.to(scores_BK.device), None
        contexts = sources.assembler.for_reading(ids_BK, batch.prompt, stuffed=self.kind == "stuffed")
        if self.kind == "stuffed" and losses:
            with torch.no_grad():
                alone = model.generator.encode(sources.assembler.contexts(ids_BK, batch.prompt))
            torch.clear_autocast_cache()  # before torch 2.11, weights cast without gradient were used again with it
        known_BK = scores_BK if self.teaches_retriever else scores_BK.detach()
        with nullcontext() if self.marginal_weight > 0 else torch.no_grad():
            outcome = read(
                model,
                contexts,
                known_BK,
                batch,
                self.kind,
                self.label_smoothing,
                self.hf_compat,
                hits,
                read_alone=bool(losses),
                alone=alone,
                keep_logits=sources.keep_logits,
            )
        outcome = replace(outcome, doc_scores_BK=scores_BK)
        if not losses and self.marginal_weight == 1.0:
            return outcome
        assert outcome.marginal is not None
        nll_B = outcome.marginal.nll_B
        outcome = replace(outcome, loss_B=self.marginal_weight * nll_B, terms={"nll": nll_B})
        if not losses:
            return outcome
        reading = self._reading(outcome, scores_BK, model, batch, sources)
        if queries_BD is not None:
            reading = replace(reading, pairs=batch_pairs(model, batch, sources, queries_BD, hits, scores_BK))
        return with_terms(outcome, losses, reading)

    def _reading(
        self,
        outcome: Outcome,
        scores_BK: Float[Tensor, "B K"],
        model: RagModel,
        batch: QuestionBatch,
        sources: Sources,
    ) -> Reading:
        assert outcome.marginal is not None
        assert outcome.encoded is not None
        alone_BK = outcome.marginal.passage_log_likelihood_BK
        assert alone_BK is not None
        prior_BK = doc_log_prior(scores_BK, model.settings.temperature)
        needs, found_BK = self._needs(), prior_BK > -torch.inf
        without_BK, attention_BK, evidence = None, None, None
        if "without" in needs and self.kind == "fid":
            without_BK = without_each(model, outcome.encoded, batch.labels, found_BK)
        if "without" in needs and self.kind == "stuffed" and outcome.hits is not None:
            without_BK = stuffed_without_each(model, sources.assembler, outcome.hits.ids_BK.to(found_BK.device), batch)
        if "attention" in needs:
            attention_BK = attention_to_each(model, outcome.encoded, batch.labels, found_BK)
        if "evidence" in needs and outcome.hits is not None:
            assert sources.retriever is not None
            evidence = sources.retriever.evidence(outcome.hits)
        questions = tuple(question.question for question in batch.questions)
        return Reading(
            log_likelihood_BK=alone_BK.detach(),
            num_tokens_B=outcome.marginal.num_tokens_B,
            log_prior_BK=prior_BK,
            without_BK=without_BK,
            attention_BK=attention_BK,
            questions=questions,
            evidence=evidence,
            has_null=outcome.hits is not None and outcome.hits.has_null,
        )

    def _needs(self) -> set[Need]:
        return {need for loss in self.retriever_losses.values() for need in loss.needs}


def with_terms(outcome: Outcome, losses: Mapping[str, RetrieverLoss], reading: Reading) -> Outcome:
    """Returns an outcome with weighted losses added to its own."""
    terms = {name: loss(reading) for name, loss in losses.items()}
    loss_B = outcome.loss_B
    for name, loss in losses.items():
        loss_B = loss_B + loss.weight * terms[name]
    return replace(outcome, loss_B=loss_B, terms={**outcome.terms, **terms})


def check_weighted(objective: Objective, weight: float, setting: str) -> None:
    """Refuses retriever losses in an objective whose loss counts nothing beside a teacher or a reward.

    Raises:
        ConfigError: Names them, and the setting that leaves them out.
    """
    if isinstance(objective, MarginalObjective) and objective.retriever_losses and weight == 0:
        raise ConfigError(
            f"retriever_loss: {', '.join(objective.retriever_losses)} would be computed and count nothing, as "
            f"{setting}=0 leaves out the whole objective. Raise it, or leave retriever_loss out."
        )


def attention_to_each(
    model: RagModel, encoded: EncodedContexts, labels_BT1: Int[Tensor, "B T1"], found_BK: Bool[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Returns how much a decoder that reads all passages at once takes from a token of each, on average."""
    attention_BL = model.generator.attention(encoded.fused(found_BK), labels_BT1)
    mask_BKL = encoded.attention_mask_NL.view(*found_BK.shape, -1)
    return attention_BL.view_as(mask_BKL).sum(dim=2) / mask_BKL.sum(dim=2)


@torch.no_grad()
def without_each(
    model: RagModel, encoded: EncodedContexts, labels_BT1: Int[Tensor, "B T1"], found_BK: Bool[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Returns ``log p(y | x, D without z_k)`` of a decoder that reads all passages at once, for each k.

    The encoder's work is done; the decoder reads K times. A question's only passage is left in: nothing would be read.

    Args:
        model: Its generator reads.
        encoded: The ``B * K`` contexts.
        labels_BT1: The targets.
        found_BK: False where a place holds no passage.
    """
    columns = []
    for place in range(found_BK.shape[1]):
        others_BK = found_BK.clone()
        others_BK[:, place] = False
        others_BK = torch.where(others_BK.any(dim=1, keepdim=True), others_BK, found_BK)
        output = model.generator.score(encoded.fused(others_BK), labels_BT1, 1)
        columns.append(passage_log_likelihood(output.token_log_probs_BKT, output.target_mask_BT)[:, 0])
    return torch.stack(columns, dim=1)


@torch.no_grad()
def stuffed_without_each(
    model: RagModel, assembler: ContextAssembler, ids_BK: Int[Tensor, "B K"], batch: QuestionBatch
) -> Float[Tensor, "B K"]:
    """Returns ``log p(y | x, D without z_k)`` of a reader with all passages in one prompt: K prompts, each without one.

    Args:
        model: Its generator reads.
        assembler: Writes the prompts.
        ids_BK: Passage numbers, ``-1`` where there is none. A question's only passage is left in.
        batch: Questions and targets.
    """
    columns = []
    for place in range(ids_BK.shape[1]):
        others_BK = ids_BK.clone()
        others_BK[:, place] = -1
        others_BK = torch.where((others_BK >= 0).any(dim=1, keepdim=True), others_BK, ids_BK)
        output = model.generator.score(
            model.generator.encode(assembler.stuffed(others_BK, batch.prompt)), batch.labels, 1
        )
        columns.append(passage_log_likelihood(output.token_log_probs_BKT, output.target_mask_BT)[:, 0])
    return torch.stack(columns, dim=1)
