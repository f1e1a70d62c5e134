"""Reinforcement: an objective plus what a reward teaches that has no derivative, ``L + α R``.

The retriever is a policy over the C best candidates of its search: it draws K passages without replacement. The
generator is a policy over answers: it draws one for each set of passages. A reward judges what came of it (exact match,
F1, citation of a gold passage), and the draws that earned more than the baseline become likelier. The mathematics is in
:mod:`rag_lightning.losses.policy`.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.decoding.texts import answer_texts
from rag_lightning.encoders.bi_encoder import Tower
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import similarity
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.losses.policy import (
    draw_without_replacement,
    leave_one_out_advantage,
    ordered_log_prob,
    policy_entropy,
    policy_kl,
    policy_loss,
)
from rag_lightning.rag import RagModel
from rag_lightning.training.examples import ExampleKind
from rag_lightning.training.objectives.base import Objective, Outcome, Reads, Sources
from rag_lightning.training.objectives.marginal import RETRIEVER, MarginalObjective, check_weighted
from rag_lightning.training.objectives.policy_draws import (
    MODES,
    answers_to,
    attempts_of,
    chosen,
    evaluating,
    said_of,
)
from rag_lightning.training.rewards import Reward, WeightedReward
from rag_lightning.types import Hits, QuestionBatch, TokenBatch
from rag_lightning.utils.seeding import derived_seed

Policy = Literal["retriever", "generator"]
Baseline = Literal["leave_one_out", "self_critical"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class PolicyGradient(nn.Module):
    """``likelihood_weight · L + α(step) · R``; R is the policy gradient's loss of the retriever, the generator or both.

    ``R = -1/S Σ_s A_s log π(draw_s) - entropy_weight · H + kl_weight · KL(π ‖ π₀)``. The retriever's entropy and
    divergence are exact, over its candidates. The generator's divergence is a cost in the reward: ``kl_weight`` times
    the drawn answer's log-ratio, whose expectation is the divergence.

    The policies as they started (π₀) are copies, kept in the checkpoints while ``kl_weight`` is above 0.

    Args:
        objective: L: rag_token, rag_sequence or fid, with retriever losses or without.
        policies: Who learns from the reward: ``retriever``, ``generator`` or both.
        rewards: Weights of ``exact_match``, ``f1`` and ``citation``; the reward is their weighted mean.
        reward: A function of one attempt, from 0 to 1, in place of ``rewards``.
        num_samples: S, draws for each question.
        num_candidates: C, passages that the retriever draws from, all others having probability 0; None for 4 K.
        baseline: ``leave_one_out`` or ``self_critical`` (what the model does without drawing).
        likelihood_weight: Of L; 0 trains on the reward alone.
        alpha: α at its full height.
        alpha_delay_steps: Optimiser steps before it rises from 0.
        alpha_warmup_steps: Optimiser steps over which it rises, linearly.
        entropy_weight: Keeps the retriever from settling too early.
        kl_weight: Keeps the policies near their start.
        seed: Of the draws; each step has its own.

    Raises:
        ConfigError: Settings that contradict each other or teach nothing.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        policies: Sequence[Policy] = ("retriever",),
        rewards: Mapping[str, float] | None = None,
        reward: Reward | None = None,
        num_samples: int = 4,
        num_candidates: int | None = None,
        baseline: Baseline = "leave_one_out",
        likelihood_weight: float = 1.0,
        alpha: float = 1.0,
        alpha_delay_steps: int = 0,
        alpha_warmup_steps: int = 0,
        entropy_weight: float = 0.0,
        kl_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(objective, MarginalObjective) or objective.kind not in MODES:
            raise ConfigError(
                "reinforce: expected an objective that reads retrieved passages apart (rag_token, rag_sequence, fid), "
                f"got {getattr(objective, 'kind', type(objective).__name__)}: choose another, or reinforce=null"
            )
        self.objective = objective
        self.policies: tuple[Policy, ...] = tuple(policies)
        self.reward: Reward = reward if reward is not None else WeightedReward(rewards or {})
        self.num_samples = num_samples
        self.num_candidates = num_candidates
        self.baseline: Baseline = baseline
        self.likelihood_weight = likelihood_weight
        self.alpha = alpha
        self.alpha_delay_steps = alpha_delay_steps
        self.alpha_warmup_steps = alpha_warmup_steps
        self.entropy_weight = entropy_weight
        self.kl_weight = kl_weight
        self.seed = seed
        self.start_query: Tower | None = None
        self.start_reader: RagModel | None = None
        self._check()
        self.reads: Reads = "retrieved"
        self.examples: ExampleKind = objective.examples
        self.eval_examples: ExampleKind = objective.eval_examples
        self.num_negatives = 0
        self.cross_process = False
        taught = [*(objective.trains if likelihood_weight > 0 else ())]
        taught += RETRIEVER if "retriever" in self.policies else []
        taught += ["generator"] if "generator" in self.policies else []
        self.trains: tuple[str, ...] = tuple(dict.fromkeys(taught))

    def _check(self) -> None:
        if not self.policies or not {*self.policies} <= {*get_args(Policy)}:
            raise ConfigError(f"reinforce.policies: expected retriever, generator or both, got {list(self.policies)}")
        if self.baseline not in get_args(Baseline):
            raise ConfigError(f"reinforce.baseline: expected {' or '.join(get_args(Baseline))}, got {self.baseline!r}")
        least = 2 if self.baseline == "leave_one_out" else 1
        if self.num_samples < least:
            raise ConfigError(
                f"reinforce.num_samples: expected at least {least} with baseline={self.baseline}, got "
                f"{self.num_samples}"
            )
        idle = {"entropy_weight": self.entropy_weight > 0, "num_candidates": self.num_candidates is not None}
        for name in [name for name, given in idle.items() if given and "retriever" not in self.policies]:
            raise ConfigError(f"reinforce.{name}: is the retriever's, who is not among policies={list(self.policies)}")
        check_weighted(self.objective, self.likelihood_weight, "reinforce.likelihood_weight")
        if not self.alpha > 0:
            raise ConfigError(f"reinforce.alpha: expected a number above 0, got {self.alpha}; or set reinforce=null")
        for name in ("likelihood_weight", "alpha_delay_steps", "alpha_warmup_steps", "entropy_weight", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"reinforce.{name}: expected 0 or more, got {getattr(self, name)}")

    def attach(self, model: RagModel, trained: tuple[str, ...]) -> None:
        """Keeps copies of the policies as they start; refuses policies that do not learn.

        Raises:
            ConfigError: A policy is frozen, or the model has a null passage.
        """
        if model.null_passage is not None:
            raise ConfigError("reinforce: expected model.null_passage=false, as policies draw from passages alone")
        wanted, num_passages = self.num_candidates, model.settings.num_passages
        if wanted is not None and wanted < num_passages:
            raise ConfigError(f"reinforce.num_candidates: expected at least K={num_passages}, got {wanted}")
        if self.kl_weight > 0 and "retriever" in self.policies and {"passage_encoder", "fusion"} & {*trained}:
            raise ConfigError(
                "reinforce.kl_weight: expected a retriever whose query encoder alone learns, as its start is what is "
                "kept; got one that trains its passage encoder or gate. Freeze them by "
                "optim.train_passage_encoder=false and optim.train_fusion=false, or set kl_weight=0."
            )
        if "generator" in self.policies and "generator" not in trained:
            raise ConfigError(
                "reinforce.policies: the generator is frozen. Set optim.train_generator=true, or leave it out"
            )
        if "retriever" in self.policies and not {*RETRIEVER} & {*trained}:
            raise ConfigError(
                "reinforce.policies: no part of the retriever learns. Set optim.train_query_encoder=true, or leave it "
                "out"
            )
        if self.kl_weight == 0:
            return
        if "retriever" in self.policies and model.encoder is not None:
            self.start_query = _frozen(model.encoder.query)
        if "generator" in self.policies:
            reader = RagModel(encoder=None, generator=model.generator, prompt=model.prompt, settings=model.settings)
            self.start_reader = _frozen(reader)

    def alpha_at(self, step: int) -> float:
        """Returns α at an optimiser step."""
        past = step - self.alpha_delay_steps
        if past < 0:
            return 0.0
        return self.alpha * min(1.0, (past + 1) / (self.alpha_warmup_steps + 1))

    def train(self, mode: bool = True) -> "PolicyGradient":
        """The copies of the start stay in evaluation mode, without dropout."""
        super().train(mode)
        for start in (self.start_query, self.start_reader):
            if start is not None:
                start.eval()
        return self

    # ------------------------------------------------------------------ a step

    def forward(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the objective's outcome, in training with what the reward adds to its loss."""
        alpha = self.alpha_at(sources.step)
        # α = 0 has a gradient of 0, which several processes want of every part that learns
        waits = alpha == 0 and self.likelihood_weight > 0 and {*self.trains} <= {*self.objective.trains}
        if not sources.teaching or waits:
            return self.objective(model, batch, sources)
        with nullcontext() if self.likelihood_weight > 0 else torch.no_grad():
            outcome = self.objective(model, batch, sources)
        torch.clear_autocast_cache()  # before torch 2.11, weights cast without gradient were used again with it
        reinforced_B, figures = self._reinforce(model, batch, sources)
        terms = {**outcome.terms, "likelihood": outcome.loss_B, **figures, "policy": reinforced_B}
        loss_B = alpha * reinforced_B
        if self.likelihood_weight > 0:
            loss_B = loss_B + self.likelihood_weight * outcome.loss_B
        return replace(outcome, loss_B=loss_B, terms={**terms, "alpha": torch.full_like(loss_B, alpha)})

    def _reinforce(
        self, model: RagModel, batch: QuestionBatch, sources: Sources
    ) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, "B"]]]:
        """Returns R of each question, and what is worth logging."""
        hits, scores_BC = self._candidates(model, batch, sources)
        contexts = sources.assembler.contexts(hits.ids_BK.to(scores_BC.device), batch.prompt)
        with evaluating(model.generator):
            log_prob_BS, gap_BS, reward_BS, baseline_B1 = self._draw(model, batch, sources, hits, contexts, scores_BC)
        net_BS = reward_BS - self.kl_weight * gap_BS
        advantage_BS = leave_one_out_advantage(net_BS) if baseline_B1 is None else net_BS - baseline_B1
        loss_B, kl_B = policy_loss(log_prob_BS, advantage_BS), gap_BS.mean(dim=1)
        log_policy_BC = doc_log_prior(scores_BC, model.settings.temperature)
        entropy_B = policy_entropy(log_policy_BC)
        if "retriever" in self.policies:
            retriever_kl_B = self._retriever_kl(model, batch, sources, hits, log_policy_BC)
            loss_B = loss_B - self.entropy_weight * entropy_B + self.kl_weight * retriever_kl_B
            kl_B = kl_B + retriever_kl_B.detach()
        figures = {
            "reward": reward_BS.mean(dim=1),
            "advantage": advantage_BS.abs().mean(dim=1),
            "policy_entropy": entropy_B.detach(),
            "kl": kl_B,
        }
        return loss_B, figures

    def _candidates(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> tuple[Hits, Float[Tensor, "B C"]]:
        """Returns what the retriever draws from; the generator's policy alone reads the best K."""
        assert sources.retriever is not None
        num_passages = model.settings.num_passages
        wanted = self.num_candidates if self.num_candidates is not None else 4 * num_passages
        num_candidates = min(wanted, len(sources.retriever.corpus)) if "retriever" in self.policies else num_passages
        texts = [question.question for question in batch.questions]
        hits, scores_BC = model.retrieve(
            batch.query,
            texts,
            sources.retriever,
            num_passages=num_candidates,
            reencode=sources.reencode,
            forbidden_ids=batch.forbidden_ids,
        )
        found_B = (scores_BC > -torch.inf).sum(dim=1)
        if "retriever" in self.policies and int(found_B.min()) < num_passages:
            row = int(found_B.argmin())
            raise DataError(
                f"reinforce: expected at least K={num_passages} candidates to draw from for each question, found "
                f"{int(found_B[row])} for {batch.questions[row].id!r}. Raise reinforce.num_candidates, search more of "
                "an approximate index (index.nprobe, index.ef_search), or lower model.num_passages."
            )
        return hits, scores_BC

    def _draw(
        self,
        model: RagModel,
        batch: QuestionBatch,
        sources: Sources,
        hits: Hits,
        contexts: TokenBatch,
        scores_BC: Float[Tensor, "B C"],
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"], Float[Tensor, "B S"], Float[Tensor, "B 1"] | None]:
        """Draws S times for each question, and has it judged.

        Returns:
            ``log π`` of the draws with gradient to the policies; the generator's log-ratio to its start; the rewards;
            and the self-critical baseline, where that is wanted.
        """
        seed = derived_seed(self.seed, "policy", sources.step, *(question.id for question in batch.questions[:1]))
        rng = torch.Generator().manual_seed(seed)
        kind, learns = self.objective.kind, "generator" in self.policies
        num_passages = model.settings.num_passages
        best_B1K = torch.arange(num_passages, device=scores_BC.device).expand(len(scores_BC), 1, -1)
        picked_BSK = best_B1K.expand(-1, self.num_samples, -1)
        log_prob_BS = torch.zeros(picked_BSK.shape[:2], device=scores_BC.device)
        if "retriever" in self.policies:
            logits_BC = scores_BC / model.settings.temperature
            picked_BSK = draw_without_replacement(logits_BC, num_passages, self.num_samples, rng)
            log_prob_BS = ordered_log_prob(logits_BC, picked_BSK)
        with nullcontext() if learns else torch.no_grad():
            encoded = model.generator.encode(contexts)
            read, known_NK = chosen(encoded, scores_BC if len(self.policies) > 1 else scores_BC.detach(), picked_BSK)
            labels_NT1 = answers_to(model, kind, read, known_NK.detach(), rng if learns else None)
            said = said_of(model, kind, read, known_NK, labels_NT1)
        shape_BS = picked_BSK.shape[:2]
        reward_BS = self._judge(model, batch, sources, hits, picked_BSK, labels_NT1, said.log_posterior_BK)
        if learns:
            log_prob_BS = log_prob_BS + said.log_likelihood_B.view(shape_BS)
        gap_BS = torch.zeros_like(reward_BS)
        with torch.no_grad():
            if self.start_reader is not None:
                before, _ = chosen(self.start_reader.generator.encode(contexts), scores_BC, picked_BSK)
                begun = said_of(self.start_reader, kind, before, known_NK.detach(), labels_NT1)
                gap_BS = (said.log_likelihood_B.detach() - begun.log_likelihood_B).view(shape_BS)
            if self.baseline == "leave_one_out":
                return log_prob_BS, gap_BS, reward_BS, None
            read, known_NK = chosen(encoded, scores_BC.detach(), best_B1K)
            greedy_NT1 = answers_to(model, kind, read, known_NK, None)
            said = said_of(model, kind, read, known_NK, greedy_NT1)
        baseline_B1 = self._judge(model, batch, sources, hits, best_B1K, greedy_NT1, said.log_posterior_BK)
        return log_prob_BS, gap_BS, reward_BS, baseline_B1

    def _judge(
        self,
        model: RagModel,
        batch: QuestionBatch,
        sources: Sources,
        hits: Hits,
        picked_BSK: Int[Tensor, "B S K"],
        labels_NT1: Int[Tensor, "N T1"],
        log_posterior_NK: Float[Tensor, "N K"],
    ) -> Float[Tensor, "B S"]:
        """Returns the rewards of the answers."""
        assert sources.retriever is not None
        texts = answer_texts(model.generator.text_tokenizer, labels_NT1, model.decoding_options.stop)
        ids_BSC = hits.ids_BK.to(picked_BSK.device)[:, None].expand(-1, picked_BSK.shape[1], -1)
        attempts = attempts_of(
            batch.questions,
            texts,
            log_posterior_NK,
            ids_BSC.gather(2, picked_BSK),
            sources.retriever.corpus,
        )
        values = [self.reward(attempt) for attempt in attempts]
        return torch.tensor(values, device=labels_NT1.device).view(picked_BSK.shape[:2])

    def _retriever_kl(
        self,
        model: RagModel,
        batch: QuestionBatch,
        sources: Sources,
        hits: Hits,
        log_policy_BC: Float[Tensor, "B C"],
    ) -> Float[Tensor, "B"]:
        """Returns ``KL(π ‖ π₀)`` over the candidates; both see the vectors of the index: the passage encoder rests."""
        if self.start_query is None or batch.query is None or sources.retriever is None:
            return torch.zeros_like(log_policy_BC[:, 0])
        with torch.no_grad():
            queries_BD = self.start_query(batch.query)
            vectors_BCD = sources.retriever.vectors(hits.ids_BK).to(queries_BD.device)
            similarities_BC = similarity(queries_BD, vectors_BCD, model.settings.metric, hits.found_BK)
            scores_BC = sources.retriever.scores(hits, similarities_BC, queries_BD)
            start_BC = doc_log_prior(scores_BC, model.settings.temperature)
        return policy_kl(log_policy_BC, start_BC)


def _frozen(module: ModuleT) -> ModuleT:
    return copy.deepcopy(module).requires_grad_(False).eval()
