"""Knowledge distillation: a student learns from a teacher's distributions beside, or instead of, the gold answers."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rag_lightning.errors import ConfigError
from rag_lightning.losses.distillation import KlDirection, passage_kl
from rag_lightning.losses.knowledge import coarsen, soft_target_kl, tempered
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import MarginalKind
from rag_lightning.training.examples import ExampleKind
from rag_lightning.training.objectives.base import Objective, Outcome, Reads, Sources
from rag_lightning.training.objectives.closed_book import ClosedBook
from rag_lightning.training.objectives.marginal import RETRIEVER, MarginalObjective, check_weighted
from rag_lightning.training.objectives.target_cache import SoftTargets, TargetCache
from rag_lightning.training.objectives.teacher import Lesson, Teacher, Vocabulary, next_token
from rag_lightning.types import QuestionBatch
from rag_lightning.utils.hashing import hash_texts

TeacherReads = Literal["student", "own"]


class KnowledgeDistillation:
    """An objective with a teacher: ``hard · loss + soft · T² KL(p(y_t|x,y_<t)) + posterior · KL(p(z|x,y) ‖ p(z|x))``.

    - ``soft`` draws the student's next-token distributions, passages summed out, to the teacher's (Hinton et al. 2015).
      Its gradient reaches the generator alone.
    - ``posterior`` draws the student's ``p(z|x)`` to the teacher's ``p(z|x,y)`` over the student's K passages: which of
      them the teacher finds to explain the answer. Its gradient reaches the retriever alone.
    - ``hard`` is the objective itself, which looks at the gold answers (or at the teacher's: ``data.answers_from``).

    The teacher reads in training only. Validation and test are the objective's own.

    Args:
        objective: The student's: rag_token, rag_sequence, fid or closed_book.
        teacher: A saved model of the same generator vocabulary.
        passages: What the teacher reads: the ``student``'s passages, or its ``own`` (its saved index).
        soft_weight: Of the soft targets.
        hard_weight: Of the objective's own loss.
        posterior_weight: Of the passages' posterior; needs ``passages=student``.
        temperature: T of the soft targets.
        direction: Of both divergences; ``forward`` is ``KL(teacher ‖ student)``; see
            :func:`~rag_lightning.losses.knowledge.soft_target_kl`.
        top_tokens: Compare the teacher's so many likeliest tokens, and all the others as one; None compares all.
        cache: A folder to keep soft targets in, for ``passages=own``; None asks the teacher each time.

    Raises:
        ConfigError: A temperature that is not positive, or settings that contradict each other or teach nothing.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        teacher: Teacher,
        passages: TeacherReads = "student",
        soft_weight: float = 1.0,
        hard_weight: float = 1.0,
        posterior_weight: float = 0.0,
        temperature: float = 1.0,
        direction: KlDirection = "forward",
        top_tokens: int | None = None,
        cache: str | None = None,
    ) -> None:
        if not isinstance(objective, (MarginalObjective, ClosedBook)):
            raise ConfigError(
                "distill: expected an objective that scores answers (rag_token, rag_sequence, fid, prompt_stuffing, "
                f"closed_book) and no reward beside it, got {type(objective).__name__}: choose another, or distill=null"
            )
        self.objective = objective
        self.teacher = teacher
        self.passages: TeacherReads = passages
        self.weights = {"hard": hard_weight, "soft": soft_weight, "posterior": posterior_weight}
        self.temperature = temperature
        self.direction: KlDirection = direction
        self.top_tokens = top_tokens
        self.cache_root = Path(cache) if cache is not None else None
        self._cache: TargetCache | None = None
        self._check_numbers()
        self._check_passages()
        self.reads: Reads = objective.reads
        self.examples: ExampleKind = objective.examples
        self.eval_examples: ExampleKind = objective.eval_examples
        self.num_negatives = objective.num_negatives
        self.cross_process = objective.cross_process
        self.trains: tuple[str, ...] = self._trained()

    def _check_numbers(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"distill.temperature: expected a number above 0, got {self.temperature}: 1 leaves the distributions "
                "as they are, 2 to 4 show more of what the teacher holds unlikely"
            )
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"distill.{name}_weight: expected 0 or more, got {weight}")
        if not self.weights["soft"] + self.weights["posterior"] > 0:
            raise ConfigError(
                "distill: expected soft_weight or posterior_weight above 0, got 0 for both: nothing would be learned "
                "from the teacher. Raise one, or leave distill out."
            )
        for name, value, known in (
            ("direction", self.direction, get_args(KlDirection)),
            ("passages", self.passages, get_args(TeacherReads)),
        ):
            if value not in known:
                raise ConfigError(f"distill.{name}: expected {' or '.join(known)}, got {value!r}")
        if self.top_tokens is not None and self.top_tokens < 1:
            raise ConfigError(
                f"distill.top_tokens: expected at least 1, or null for the whole vocabulary, got {self.top_tokens}"
            )

    def _check_passages(self) -> None:
        check_weighted(self.objective, self.weights["hard"], "distill.hard_weight")
        if self.passages == "own" and self.objective.examples != "questions":
            raise ConfigError(
                f"distill.passages=own: expected objective.examples=questions, got {self.objective.examples}: the "
                "teacher would search for passages with holes, and find the very passage that the hole was cut from. "
                "Set distill.passages=student."
            )
        retrieves = self.objective.reads == "retrieved"
        if self.passages == "student" and not retrieves:
            raise ConfigError(
                "distill.passages=student: expected a student that retrieves, got a closed-book one. Let the teacher "
                "read its own passages: distill.passages=own."
            )
        if self.passages == "own" and self.weights["posterior"] > 0:
            raise ConfigError(
                "distill.posterior_weight: the teacher's posterior over its own passages says nothing of the "
                "student's. Expected distill.passages=student, got own; or set posterior_weight=0."
            )
        if self.passages == "student" and self.cache_root is not None:
            raise ConfigError(
                "distill.cache: expected distill.passages=own, got student: the student's passages change as its "
                "retriever learns, and what the teacher said of others is no target. Set distill.cache=null, or "
                "distill.passages=own."
            )
        if self.weights["soft"] > 0 and "generator" not in self.objective.trains:
            raise ConfigError(
                "distill.soft_weight: soft targets teach the generator, which objective.marginal_weight=0 leaves as it "
                "is. Set marginal_weight=1, and distill.hard_weight=0 to learn from the teacher alone."
            )

    def _trained(self) -> tuple[str, ...]:
        own = self.objective.trains if self.weights["hard"] > 0 else ()
        taught = [*own]
        taught += ["generator"] if self.weights["soft"] > 0 else []
        taught += RETRIEVER if self.weights["posterior"] > 0 else []
        return tuple(dict.fromkeys(taught))

    # ------------------------------------------------------------------ before training

    def attach(self, student: RagModel, trained: tuple[str, ...]) -> None:
        """Refuses a teacher of another vocabulary, and terms that no trained part learns from; opens the cache.

        A cache that was filled before tells the teacher's vocabulary, so that the teacher need not be loaded.

        Raises:
            ConfigError: Says what does not fit.
        """
        for name, learners, setting in (
            ("soft", {"generator"}, "train_generator"),
            ("posterior", {*RETRIEVER}, "train_query_encoder"),
        ):
            if self.weights[name] > 0 and not learners & {*trained}:
                raise ConfigError(
                    f"distill.{name}_weight={self.weights[name]} would teach nothing, as no part that it teaches "
                    f"learns. Set optim.{setting}=true, or distill.{name}_weight=0."
                )
        if self.passages == "student" and self.teacher.model.settings.num_passages == 0:
            raise ConfigError(
                f"distill.passages=student: expected a teacher that reads passages, {self.teacher.source} is "
                "closed-book. Set distill.passages=own: it then reads the question alone, as it was trained to."
            )
        self._cache = self._opened()
        notes = self._cache.notes() if self._cache is not None else {}
        if notes:
            known = notes["vocabulary"]
            vocabulary = Vocabulary(known["tokenizer_hash"], known["size"], tuple(known["special_ids"]))
        else:
            vocabulary = self.teacher.vocabulary()
        vocabulary.check(Vocabulary.of(student, "the student"), self.teacher.source)
        if self._cache is not None:
            self._cache.note({"vocabulary": asdict(vocabulary), "source": self.teacher.source})

    def _opened(self) -> TargetCache | None:
        if self.cache_root is None:
            return None
        made_of = {
            "teacher": self.teacher.fingerprint(),
            "temperature": self.temperature,
            "top_tokens": self.top_tokens,
        }
        return TargetCache(self.cache_root, made_of)

    # ------------------------------------------------------------------ a step

    def __call__(self, model: RagModel, batch: QuestionBatch, sources: Sources) -> Outcome:
        """Returns the objective's outcome, in training with what the teacher adds to its loss."""
        if not sources.teaching:
            return self.objective(model, batch, sources)
        outcome = self.objective(model, batch, replace(sources, keep_logits=self.weights["soft"] > 0))
        terms = {**outcome.terms, "hard": outcome.loss_B}
        lesson = self._lesson(outcome, batch, sources) if self.passages == "student" else None
        if self.weights["soft"] > 0:
            mask_BT = batch.labels[:, 1:] != model.generator.pad_token_id
            terms["soft"] = self._soft(outcome, batch, self._targets(lesson, batch, mask_BT), mask_BT)
        if self.weights["posterior"] > 0:
            assert lesson is not None
            assert outcome.doc_scores_BK is not None
            assert outcome.hits is not None
            scores_BK = outcome.doc_scores_BK  # of a null passage, which has no text, the teacher says nothing
            scores_BK = scores_BK[:, :-1] if outcome.hits.has_null else scores_BK
            log_prior_BK = doc_log_prior(scores_BK, model.settings.temperature)
            terms["posterior"] = passage_kl(lesson.log_posterior_BK, log_prior_BK, self.direction)
        loss_B = torch.zeros_like(outcome.loss_B)
        for name, weight in self.weights.items():
            if weight > 0:
                loss_B = loss_B + weight * terms[name]
        return replace(outcome, loss_B=loss_B, terms=terms)

    def _lesson(self, outcome: Outcome, batch: QuestionBatch, sources: Sources) -> Lesson:
        assert outcome.hits is not None
        return self.teacher.on_students_passages(batch, outcome.hits, sources.assembler)

    def _soft(
        self, outcome: Outcome, batch: QuestionBatch, targets: SoftTargets, mask_BT: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B"]:
        assert outcome.marginal is not None
        kind: MarginalKind = self.objective.kind if isinstance(self.objective, MarginalObjective) else "rag_token"
        log_probs_SV = next_token(outcome.marginal, batch.labels, mask_BT, kind)
        return soft_target_kl(
            targets.log_probs_SE, log_probs_SV, mask_BT, self.temperature, self.direction, targets.ids_SN
        )

    def _targets(self, lesson: Lesson | None, batch: QuestionBatch, mask_BT: Bool[Tensor, "B T"]) -> SoftTargets:
        if lesson is not None:
            return self._made(lesson)
        if self._cache is None:
            return self._made(self.teacher.on_own_passages(batch))
        lengths = mask_BT.sum(dim=1).tolist()
        keys = [
            hash_texts([question.question, str(labels[: length + 1])])
            for question, labels, length in zip(batch.questions, batch.labels.tolist(), lengths, strict=True)
        ]
        targets = self._cache.get(keys)
        if targets is None:
            targets = self._made(self.teacher.on_own_passages(batch))
            self._cache.put(keys, lengths, targets)
        return targets.to(batch.labels.device)

    def _made(self, lesson: Lesson) -> SoftTargets:
        log_probs_SV = tempered(lesson.log_probs_SV, self.temperature)
        if self.top_tokens is None or self.top_tokens >= log_probs_SV.shape[1]:
            return SoftTargets(log_probs_SV)
        ids_SN = log_probs_SV.topk(self.top_tokens, dim=1).indices
        return SoftTargets(coarsen(log_probs_SV, ids_SN), ids_SN)
