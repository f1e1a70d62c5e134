"""The retriever on gold passages and negatives alone: its warm-up."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.encoders.bi_encoder import Tower
from rag_lightning.encoders.cached import encode_in_chunks
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.losses.retriever import false_negatives, in_batch_contrastive
from rag_lightning.rag import RagModel
from rag_lightning.training.examples import ExampleKind
from rag_lightning.training.objectives.base import Outcome, Reads, Sources
from rag_lightning.training.objectives.pairs import all_pairs, gold_rows
from rag_lightning.types import QuestionBatch, TokenBatch
from rag_lightning.utils import distributed


class Contrastive:
    """Warm-up of the retriever with in-batch and hard negatives (Karpukhin et al. 2020, DPR §3.2).

    A question's negatives are the other passages of the batch: the other questions' gold passages, and the hard
    negatives of all questions. A passage that is also gold for a question is no negative for it, nor is a filler's.

    With several processes, each one's questions are contrasted with the passages of all. The vectors are gathered so
    that each process's own part keeps its gradient, and what other processes' losses say of it is added
    (:func:`~rag_lightning.utils.distributed.all_gather_rows_with_grad`). As the module scales losses by the number of
    processes and DDP averages gradients, W processes take exactly the step of one with the same batch; without that
    sum, a passage would learn from one question in W only.

    Args:
        examples: ``gold_passages`` (questions with gold passages), ``inverse_cloze`` (passages alone) or ``denoising``
            (both, with renamed entities and spans as questions; settings under ``data.denoising``).
        hard_negatives: How many of each question's ``negative_passage_ids`` to add, drawn anew at each visit.
        cross_process: False contrasts each process's questions with its own passages only, so that a step depends on
            the number of processes.
        cache_chunk: Encode with gradient so many texts at a time and again in the backward pass: large batches in
            little memory (:mod:`rag_lightning.encoders.cached`). None encodes them all at once.
    """

    reads: Reads = "retrieved"
    eval_examples: ExampleKind = "questions"
    trains: tuple[str, ...] = ("query_encoder", "passage_encoder")

    def __init__(
        self,
        *,
        examples: Literal["gold_passages", "inverse_cloze", "denoising"] = "gold_passages",
        hard_negatives: int = 0,
        cross_process: bool = True,
        cache_chunk: int | None = None,
    ) -> None:
        if examples not in ("gold_passages", "inverse_cloze", "denoising"):
            raise ConfigError(
                f"objective.examples: expected gold_passages, inverse_cloze or denoising, got {examples!r}"
            )
        if hard_negatives < 0 or (hard_negatives > 0 and examples != "gold_passages"):
            raise ConfigError(
                "objective.hard_negatives: expected 0, or more with objective.examples=gold_passages (other examples "
                f"alter their passages, and an unaltered negative would be told apart by that), got {hard_negatives} "
                f"with {examples}"
            )
        if cache_chunk is not None and cache_chunk < 1:
            raise ConfigError(f"objective.cache_chunk: expected at least 1 text at a time, or null, got {cache_chunk}")
        self.examples: ExampleKind = examples
        self.num_negatives = hard_negatives
        self.cross_process = cross_process
        self.cache_chunk = cache_chunk

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the contrastive loss; on batches without passages (validation) only retrieves."""
        ones_B = torch.ones(len(batch.questions), dtype=torch.long, device=batch.labels.device)
        if batch.passages is None and sources.retriever is not None:
            texts = [question.question for question in batch.questions]
            hits, scores_BK = model.retrieve(batch.query, texts, sources.retriever, forbidden_ids=batch.forbidden_ids)
            return Outcome(torch.zeros_like(scores_BK[:, 0]), ones_B, hits=hits, doc_scores_BK=scores_BK)
        if model.encoder is None or batch.query is None:
            raise ConfigError("objective contrastive: expected a model with an encoder")
        if batch.passages is None:
            raise DataError("objective contrastive: expected examples with their own passages")
        columns = self._columns(batch)
        queries_BD = self._encode(model.encoder.query, batch.query)
        tower = model.encoder.passage_tower()
        own = [batch.passages] if batch.negatives is None else [batch.passages, batch.negatives]
        passages_ND = torch.cat([self._encode(tower, tokens) for tokens in own])
        first = 0
        if self.cross_process:  # after the towers, so that its backward comes before DDP's first collective everywhere
            passages_ND = distributed.all_gather_rows_with_grad(passages_ND)
            columns = distributed.all_gather_rows(columns)
            first = int((columns[:, 2] < distributed.rank()).sum())
        scores_BN = all_pairs(queries_BD, passages_ND, model.settings.metric) / model.settings.temperature
        if scores_BN.shape[1] < 2:  # the odd last one of an epoch has nothing to be contrasted with
            return Outcome(0.0 * scores_BN.sum(dim=1), ones_B)
        ignored_BN = false_negatives(gold_rows(batch, sources), columns[:, 0], columns[:, 1] > 0)
        own_B = first + torch.arange(len(queries_BD), device=queries_BD.device)
        return Outcome(in_batch_contrastive(scores_BN, own_B, ignored_BN), ones_B)

    def _encode(self, tower: Tower, tokens: TokenBatch) -> Float[Tensor, "N D"]:
        return tower(tokens) if self.cache_chunk is None else encode_in_chunks(tower, tokens, self.cache_chunk)

    def _columns(self, batch: QuestionBatch) -> Int[Tensor, "N 3"]:
        """Returns what this process's passages are: number, 1 unless a filler's, and the process's own number.

        Gold passages come first, then each question's hard negatives.
        """
        counted_B = (batch.weights_B > 0).long()
        ids, counted = [batch.positive_ids], [counted_B]
        found = 0 if batch.negative_ids_BM is None else batch.negative_ids_BM.shape[1]
        if found != self.num_negatives:
            raise DataError(
                f"objective contrastive: expected {self.num_negatives} hard negatives for each question, as "
                f"objective.hard_negatives says, came {found}"
            )
        if batch.negative_ids_BM is not None:
            ids.append(batch.negative_ids_BM.reshape(-1))
            counted.append(counted_B.repeat_interleave(found))
        ids_N = torch.cat(ids)
        return torch.stack([ids_N, torch.cat(counted), torch.full_like(ids_N, distributed.rank())], dim=1)
