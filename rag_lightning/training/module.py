"""RagLightningModule: one shared step for training, validation and test."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rag_lightning.decoding.options import DecodingMode
from rag_lightning.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from rag_lightning.generators.base import EncodedContexts
from rag_lightning.losses.marginal import TokenPosteriorKind, rag_token_log_likelihood
from rag_lightning.metrics.answers import AnswerMetrics
from rag_lightning.metrics.diagnostics import DiagnosticMetrics, posterior_entropy
from rag_lightning.metrics.passages import RetrievalMetrics, relevant_by_answer, relevant_by_gold
from rag_lightning.metrics.text import TextMetrics, bleu_signature
from rag_lightning.rag import RagModel
from rag_lightning.text.normalise import Language
from rag_lightning.training.activations import checkpoint_activations
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.examples import RETRIEVED_FOR
from rag_lightning.training.objectives import (
    Contrastive,
    KnowledgeDistillation,
    MarginalObjective,
    Objective,
    Outcome,
    PolicyGradient,
    Sources,
)
from rag_lightning.training.objectives.base import Attaching
from rag_lightning.training.objectives.marginal import RETRIEVER
from rag_lightning.training.optim import (
    OptimSettings,
    build_optimizer,
    build_scheduler,
    check_learns,
    check_optimizer,
    freeze_all_but,
    modules_of,
)
from rag_lightning.types import Prediction, QuestionBatch
from rag_lightning.utils import distributed

logger = logging.getLogger(__name__)
OPTIMIZER_KEY = "rag_lightning_optimizer"
Reduction = Literal["example_mean", "token_mean", "sum"]


class RagLightningModule(L.LightningModule):
    """Trains a :class:`~rag_lightning.rag.RagModel` with an objective.

    Args:
        model: Encoder, generator, marginal.
        objective: What a batch is worth.
        optim: Who learns and how fast.
        reduction: How the losses of a step become one number. ``example_mean`` gives every question the same weight,
            1 / (questions of a full batch over all processes), so that accumulation and several processes change
            nothing; ``token_mean`` divides by the target tokens of the batch over all processes (of each one, when
            gradients are accumulated); ``sum`` is transformers' ``reduce_loss``.
        recall_at: Cut-offs of recall.
        generate_in_validation: Decode answers in validation too, not only in the test.
        retrieval_utility: Also score the targets without passages in evaluation.
        text_metrics: Figures of longer answers beside exact match and F1, such as ``bleu`` or ``rougeL``; see
            :mod:`rag_lightning.metrics.text`.
        language: Whose normalisation compares answers: ``en`` (words) or ``zh`` (Chinese characters).
        token_posteriors: Also keep which passage each token of the test's answers came from.
        learns: False for a module that only evaluates, whatever its model's parts.
    """

    def __init__(
        self,
        *,
        model: RagModel,
        objective: Objective,
        optim: OptimSettings,
        reduction: Reduction = "example_mean",
        recall_at: Sequence[int] = (1, 5, 20),
        generate_in_validation: bool = True,
        retrieval_utility: bool = True,
        text_metrics: Sequence[str] = (),
        language: Language = "en",
        token_posteriors: bool = False,
        learns: bool = True,
    ) -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ConfigError(f"reduction: expected one of {', '.join(get_args(Reduction))}, got {reduction!r}")
        self.model = model
        self.objective = objective
        self.optim = optim
        self.reduction: Reduction = reduction
        self.generate_in_validation = generate_in_validation
        self.retrieval_utility = retrieval_utility
        self.language: Language = language
        self.token_posteriors = token_posteriors
        parts = {*modules_of(model), *(() if model.encoder is None else ("passage_encoder",))}  # which may be shared
        wanted = [part for part in objective.trains if part in parts]
        self.trained = optim.trained_parts(wanted) if learns else ()
        check_fits(model)
        if token_posteriors:
            check_tells_tokens(model)
        if learns:
            check_teaches(model, objective, self.trained)
            freeze_all_but(model, self.trained)
        if learns and isinstance(objective, Attaching):
            objective.attach(model, self.trained)
        if learns:
            checkpoint_activations(model, optim.checkpoint_activations, self.trained)
        self.metrics = nn.ModuleDict(
            {
                "answers": AnswerMetrics(language=language),
                "texts": TextMetrics(metrics=tuple(text_metrics), language=language),
                "gold": RetrievalMetrics(ks=tuple(recall_at)),
                "answer_in_passage": RetrievalMetrics(ks=tuple(recall_at)),
            }
        )
        self.diagnostics: DiagnosticMetrics | None = None
        self.predictions: list[Prediction] = []
        self._nll_and_count = torch.zeros(2, dtype=torch.float64)
        self._rng: torch.Generator | None = None  # one stream of sampled answers through all batches
        self.train()  # pretrained parts come in evaluation mode, and Lightning leaves modes as they are

    # ------------------------------------------------------------------ training

    @property
    def data(self) -> RagDataModule:
        """The data module, which owns the live index."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, RagDataModule)
        return datamodule

    def training_step(self, batch: QuestionBatch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch; refuses one that is not finite."""
        try:
            outcome = self.objective(self.model, batch, self._sources(reencode="passage_encoder" in self.trained))
        except DataError as error:  # such as query vectors that are not finite: no loss is reached
            ids = ", ".join(question.id for question in batch.questions[:8])
            raise DataError(f"step {self.global_step} (batch {batch_idx}, questions {ids}, …): {error}") from error
        figures = self._training_figures(outcome, batch)
        if not math.isfinite(figures["train/loss"]):  # over all processes, so that all stop together
            self._refuse(outcome, batch, batch_idx)
        self.log_dict(figures, batch_size=len(batch.questions), prog_bar=True)
        return self._reduce(outcome, batch)

    def _refuse(self, outcome: Outcome, batch: QuestionBatch, batch_idx: int) -> None:
        mine = [
            q.id for q, loss in zip(batch.questions, outcome.loss_B.tolist(), strict=True) if not math.isfinite(loss)
        ]
        bad = [question_id for part in distributed.gather_objects(mine) for question_id in part]
        raise NonFiniteLossError(
            f"the loss is not finite at step {self.global_step} (batch {batch_idx}, questions {', '.join(bad[:8])}"
            f"{', …' if len(bad) > 8 else ''}). "
            "The weights are as they were before this step and the last checkpoint is kept. "
            "Lower the learning rates, clip gradients, or look at these questions."
        )

    def on_train_start(self) -> None:
        """Refuses to train a part that the loss does not reach through the retriever."""
        learns_from_hits = self.objective.reads == "retrieved" and self.objective.examples in RETRIEVED_FOR
        if learns_from_hits and self.data.retriever is not None:
            check_learns(self.model, self.data.retriever, self.trained)

    def _sources(self, *, reencode: bool, teaching: bool = True) -> Sources:
        data = self.data
        tokens = data.encoder_tokens if reencode else None
        return Sources(data.assembler, data.retriever, tokens, teaching, step=int(self.global_step))

    def _reduce(self, outcome: Outcome, batch: QuestionBatch) -> Float[Tensor, ""]:
        """Reduces once, so that the mean of the processes' gradients is the gradient of the whole batch's loss."""
        total: Tensor = (outcome.loss_B * batch.weights_B).sum()
        num_processes: int = self.trainer.world_size
        if self.reduction == "sum":
            accumulated: int = self.trainer.accumulate_grad_batches
            return total * num_processes * accumulated
        if self.reduction == "token_mean":
            units: Tensor = (outcome.num_units_B * batch.weights_B).sum()
            units = self.trainer.strategy.reduce(units, reduce_op="sum")
            return total * num_processes / units
        return total * num_processes / self.data.batch_size

    @torch.no_grad()
    def _training_figures(self, outcome: Outcome, batch: QuestionBatch) -> dict[str, float]:
        """Returns the batch's means over the questions of all processes."""
        each = {"train/loss": outcome.loss_B, **{f"train/{name}": term_B for name, term_B in outcome.terms.items()}}
        if outcome.hits is not None and outcome.marginal is not None:
            marginal = outcome.marginal  # a NaN is the loss's to report
            each["train/posterior_entropy"] = posterior_entropy(marginal.log_posterior_BK.exp().nan_to_num())
            each["train/prior_entropy"] = posterior_entropy(marginal.log_prior_BK.exp().nan_to_num())
            if outcome.hits.has_null:
                each["train/null_probability"] = marginal.log_prior_BK[:, -1].exp()
        weights_B = batch.weights_B.float()
        sums = torch.stack([(values_B.float() * weights_B).sum() for values_B in each.values()] + [weights_B.sum()])
        *totals, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        figures = {name: total / count for name, total in zip(each, totals, strict=True)}
        if self.data.dense is not None:
            figures["index/age_steps"] = float(self.global_step - self.data.snapshot_step)
        return figures

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        """Forgets the last epoch's predictions."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Forgets the last epoch's predictions."""
        self._start_evaluation()

    def validation_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        """Scores, retrieves and, if asked, answers."""
        self._evaluate(batch, generate=self.generate_in_validation)

    def test_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        """Scores, retrieves and answers."""
        self._evaluate(batch, generate=True)

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch's metrics."""
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs the epoch's metrics."""
        self._finish_evaluation("test")

    def _metric(self, name: str) -> Any:
        return self.metrics[name]

    def _start_evaluation(self) -> None:
        self._rng = torch.Generator(self.device).manual_seed(self.model.decoding_options.seed)
        self.predictions = []
        self._nll_and_count = torch.zeros(2, dtype=torch.float64)
        for name in self.metrics:
            self._metric(name).reset()
        self.diagnostics = None
        if self.data.retriever is not None:
            self.diagnostics = DiagnosticMetrics(corpus_size=len(self.data.corpus)).to(self.device)
        # empty updates: an objective, or a process without questions, that measures nothing deserves no warning
        none_B1 = torch.zeros(0, 1, dtype=torch.long, device=self.device)
        self._metric("answers").update([], [])
        self._metric("texts").update([], [])
        self._metric("gold").update(none_B1.bool(), none_B1[:, 0].bool())
        self._metric("answer_in_passage").update(none_B1.bool(), none_B1[:, 0].bool())
        if self.diagnostics is not None:
            self.diagnostics.update(none_B1)

    def _evaluate(self, batch: QuestionBatch, *, generate: bool) -> None:
        outcome = self.objective(self.model, batch, self._sources(reencode=False, teaching=False))
        real = [row for row, weight in enumerate(batch.weights_B.tolist()) if weight > 0]
        scored = [row for row in real if batch.questions[row].answers]
        if scored and outcome.marginal is not None:
            nll = -float(outcome.marginal.log_likelihood_B[scored].double().sum())
            self._nll_and_count += torch.tensor([nll, len(scored)], dtype=torch.float64)
        self._update_retrieval(outcome, batch, real)
        if generate and outcome.encoded is not None and outcome.doc_scores_BK is not None:
            self._answer(outcome, batch, real)

    def _update_retrieval(self, outcome: Outcome, batch: QuestionBatch, real: list[int]) -> None:
        if outcome.hits is None or self.data.retriever is None or not real:
            return
        hits = outcome.hits.retrieved  # a null passage is no passage that was found
        evidence = self.data.retriever.evidence(hits).passages
        passages = [evidence[row] for row in real]
        questions = [batch.questions[row] for row in real]
        width = hits.ids_BK.shape[1]
        by_answer = partial(relevant_by_answer, language=self.language)
        for name, relevance in (("gold", relevant_by_gold), ("answer_in_passage", by_answer)):
            relevant_BK, counted_B = relevance(passages, questions, num_passages=width)
            self._metric(name).update(relevant_BK.to(self.device), counted_B.to(self.device))
        assert self.diagnostics is not None
        posterior_BK = outcome.marginal.log_posterior_BK[real].exp() if outcome.marginal is not None else None
        self.diagnostics.update(outcome.hits.ids_BK[real], posterior_BK, self._utility(outcome, batch, real))
        if outcome.hits.has_null and outcome.marginal is not None and posterior_BK is not None:
            prior_B = outcome.marginal.log_prior_BK[real, -1].exp()
            self.diagnostics.update_null(prior_B, posterior_BK[:, -1])

    def _utility(self, outcome: Outcome, batch: QuestionBatch, real: list[int]) -> Float[Tensor, "B"] | None:
        """Returns how much the passages add to the target's log-likelihood (REALM's retrieval utility)."""
        if not self.retrieval_utility or outcome.marginal is None:
            return None
        if not all(batch.questions[row].answers for row in real):
            return None
        alone = self.model.generator.score(
            self.model.generator.encode(self.data.assembler.without_passage(batch.prompt)), batch.labels, 1
        )
        certain_B1 = torch.zeros_like(alone.token_log_probs_BKT[:, :, 0])
        alone_B = rag_token_log_likelihood(alone.token_log_probs_BKT, certain_B1, alone.target_mask_BT)
        return (outcome.marginal.log_likelihood_B - alone_B)[real]

    def _answer(self, outcome: Outcome, batch: QuestionBatch, real: list[int]) -> None:
        assert outcome.encoded is not None
        assert outcome.doc_scores_BK is not None
        decoding: DecodingMode | None = None if outcome.doc_scores_BK.shape[1] > 1 else "rag_token"
        encoded = self._encoded_for_answers(outcome, batch)
        decoded = self.model.decode(encoded, outcome.doc_scores_BK, decoding=decoding, rng=self._rng)
        kind: TokenPosteriorKind | None = None
        if self.token_posteriors and self.trainer.testing:
            kind = "rag_token" if self.model.settings.decoding == "rag_token" else "rag_sequence"
        predictions = self.model.predictions(
            batch.questions,
            decoded,
            encoded,
            outcome.doc_scores_BK,
            outcome.hits,
            self.data.retriever,
            posterior_kind=kind,
        )
        chosen = [predictions[row] for row in real]
        self.predictions += chosen
        if chosen:
            questions = [batch.questions[row] for row in real]
            answers = [prediction.answer for prediction in chosen]
            self._metric("answers").update(answers, questions)
            if self._metric("texts").names:
                self._metric("texts").update(answers, questions, self.data.knowledge(questions))

    def _encoded_for_answers(self, outcome: Outcome, batch: QuestionBatch) -> EncodedContexts:
        """Returns the outcome's contexts; others where decoding reads passages together that training reads apart."""
        assert outcome.encoded is not None
        stuffed = self.model.settings.decoding == "stuffed"
        if outcome.hits is None or stuffed == (self.model.settings.objective == "stuffed"):
            return outcome.encoded
        ids_BK = outcome.hits.ids_BK.to(batch.labels.device)
        return self.model.generator.encode(self.data.assembler.for_reading(ids_BK, batch.prompt, stuffed=stuffed))

    def _finish_evaluation(self, stage: str) -> None:
        values: dict[str, Tensor] = {**self._metric("answers").compute(), **self._metric("texts").compute()}
        if stage == "test" and "bleu" in values and distributed.rank() == 0:
            logger.info("BLEU: %s", bleu_signature(self._metric("texts").tokenize))
        values |= self._metric("gold").compute()
        values |= {f"answer_{name}": value for name, value in self._metric("answer_in_passage").compute().items()}
        if self.diagnostics is not None:
            values |= self.diagnostics.compute()
            # a test's index is of the passage tower as it is
            age = self.global_step - self.data.snapshot_step if stage == "val" else 0
            if self.data.dense is not None:
                values["index_age_steps"] = torch.tensor(float(age))
        nll, count = torch.tensor(distributed.gather_objects(self._nll_and_count.tolist())).sum(dim=0)
        if count > 0:
            values["nll"] = nll / count
        figures = {f"{stage}/{name}": value.float().to(self.device) for name, value in values.items()}
        self.log_dict(figures, sync_dist=True)  # the same in all processes already

    # ------------------------------------------------------------------ optimiser and checkpoints

    def configure_optimizers(self) -> Any:
        """Returns AdamW with one group for each part, and its schedule, stepped every optimiser step."""
        optimizer = build_optimizer(self.model, self.optim)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_scheduler(optimizer, self.optim, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train(self, mode: bool = True) -> "RagLightningModule":
        """Sets training mode; frozen parts stay in evaluation mode, without dropout."""
        super().train(mode)
        for name, part in modules_of(self.model).items():
            if name not in self.trained:
                part.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the optimiser's name beside its state."""
        checkpoint[OPTIMIZER_KEY] = self.optim.name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights of other shapes, and another optimiser's state, before anything is overwritten.

        Raises:
            CheckpointError: Names the first tensor that differs; another vocabulary is the usual reason.
        """
        check_shapes(self.state_dict(), checkpoint["state_dict"])
        check_optimizer(self.optim, checkpoint.get(OPTIMIZER_KEY, "adamw"))


def check_teaches(model: RagModel, objective: Objective, trained: Sequence[str]) -> None:
    """Refuses losses for the retriever, and a null passage, that no part would learn from.

    Raises:
        ConfigError: Names the losses; or what else would not learn.
    """
    objective = taught_by(objective)
    if model.null_passage is not None and isinstance(objective, Contrastive):
        raise ConfigError(
            "model.null_passage: the contrastive objective compares given passages and never weighs it: it would "
            "not learn. Set model.null_passage=false here; a marginal objective can start from the encoder trained so."
        )
    if model.null_passage is not None and isinstance(objective, MarginalObjective) and not objective.weighs_null:
        raise ConfigError(
            f"model.null_passage: objective {objective.kind} with {', '.join(objective.retriever_losses) or 'no'} "
            "retriever loss never weighs it: it would not learn. Set model.null_passage=false, choose a marginal "
            "(rag_token, rag_sequence), or a loss that weighs every choice (pdist, loop, emdr2)."
        )
    if model.generator.fixed_parameters and "generator" not in trained:
        raise ConfigError(
            "peft: adapters were added to a generator that does not learn. Set optim.train_generator=true with an "
            "objective that trains it, or peft=null."
        )
    if isinstance(objective, MarginalObjective) and objective.retriever_losses and not {*RETRIEVER} & {*trained}:
        raise ConfigError(
            f"retriever_loss: {', '.join(objective.retriever_losses)} would teach nothing, as no part of the retriever "
            "learns. Set optim.train_query_encoder=true, or leave retriever_loss out."
        )


def check_fits(model: RagModel) -> None:
    """Refuses prompts that may be longer than the generator has positions: one would end the run, some day.

    Raises:
        ConfigError: Says what to lower.
    """
    positions = model.generator.max_positions
    answer = max(model.settings.max_target_tokens, model.decoding_options.max_new_tokens)
    room = positions - answer if positions is not None and model.generator.continues_prompt else positions
    if room is not None and model.prompt.max_tokens > room:
        raise ConfigError(
            f"model.prompt.max_tokens={model.prompt.max_tokens}: expected at most {room}, as the generator has "
            f"{positions} positions" + (f", {answer} of them for the answer" if room != positions else "")
        )


def check_tells_tokens(model: RagModel) -> None:
    """Refuses to ask which passage each token came from where passages are not read apart.

    Raises:
        ConfigError: A closed-book model, or one that reads all passages at once.
    """
    decoding = model.settings.decoding
    if model.settings.num_passages == 0 or decoding in ("fid", "stuffed"):
        came = "a closed-book model" if model.settings.num_passages == 0 else f"decoding.mode={decoding}"
        raise ConfigError(
            f"module.token_posteriors: expected a model that reads its passages apart (rag_token, rag_sequence), came "
            f"{came}. Leave it out."
        )


def taught_by(objective: Objective) -> Objective:
    """Returns the objective that a teacher or a reward stands beside, where its own loss counts; else the objective."""
    if isinstance(objective, KnowledgeDistillation) and objective.weights["hard"] > 0:
        return objective.objective
    if isinstance(objective, PolicyGradient) and objective.likelihood_weight > 0:
        return objective.objective
    return objective


def check_shapes(expected: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> None:
    """Refuses a state dict that belongs to a model of another size.

    Raises:
        CheckpointError: Names the first tensor that differs.
    """
    for name, tensor in expected.items():
        if name in came and came[name].shape != tensor.shape:
            hint = (
                " (the first axis is the vocabulary: was it trained with another tokenizer?)"
                if tensor.ndim == 2
                else ""
            )
            raise CheckpointError(
                f"checkpoint: expected {name} of shape {tuple(tensor.shape)}, came {tuple(came[name].shape)}{hint}. "
                "Give the encoder and generator that the checkpoint was trained with."
            )
