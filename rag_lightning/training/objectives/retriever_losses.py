"""What the retriever is taught by the reader, beside or instead of the marginal likelihood's own gradient.

Each is one term of :class:`~rag_lightning.training.objectives.marginal.MarginalObjective`, with a weight; the
mathematics is in :mod:`rag_lightning.losses.distillation`. ``p(z|x)`` has the model's temperature on its side.
"""

import logging
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.errors import ConfigError
from rag_lightning.losses.distillation import KlDirection, emdr2, leave_one_out, passage_kl, usefulness_log_target
from rag_lightning.losses.retriever import in_batch_contrastive
from rag_lightning.retrieval.rerank import PairScorer
from rag_lightning.training.objectives.pairs import Pairs
from rag_lightning.types import Evidence

logger = logging.getLogger(__name__)
Need = Literal["without", "attention", "evidence", "pairs"]
"""What a loss may ask for besides the likelihoods: those ``without`` each passage, where they are not mere arithmetic
(fusion-in-decoder), the reader's attention, the passages' texts, and the questions against gold passages."""


@dataclass(frozen=True)
class Reading:
    """What the reader says of a batch, and what the retriever says.

    Attributes:
        log_likelihood_BK: ``log p(y|x,z)``, of the whole answer, from each passage alone; a constant.
        num_tokens_B: Scored tokens of the answer.
        log_prior_BK: ``log p(z|x)``, with gradient to the retriever.
        without_BK: ``log p(y|x, D without z)`` as the reader says it, where it reads all passages at once; a constant.
        attention_BK: How much the reader takes from each passage; a constant.
        questions: The texts asked.
        evidence: The passages.
        pairs: The questions against the batch's gold passages and their own retrieved ones, with gradient.
        has_null: True where the last of the K places is the null passage.
    """

    log_likelihood_BK: Float[Tensor, "B K"]
    num_tokens_B: Int[Tensor, "B"]
    log_prior_BK: Float[Tensor, "B K"]
    without_BK: Float[Tensor, "B K"] | None = None
    attention_BK: Float[Tensor, "B K"] | None = None
    questions: tuple[str, ...] = ()
    evidence: Evidence | None = None
    pairs: Pairs | None = None
    has_null: bool = False


@runtime_checkable
class RetrieverLoss(Protocol):
    """One term of an objective that teaches the retriever.

    Attributes:
        weight: What it is multiplied by in the sum.
        needs: What else of a reading it looks at.
    """

    weight: float
    needs: tuple[Need, ...]

    def __call__(self, reading: Reading) -> Float[Tensor, "B"]:
        """Returns the loss of each question."""
        ...


class _Distillation:
    """What the losses share that draw ``p(z|x)`` towards a distribution made of usefulness.

    Args:
        weight: In the sum of an objective.
        temperature: Divides the usefulness.
        direction: ``forward`` or ``reverse``; see :func:`~rag_lightning.losses.distillation.passage_kl`.
        atlas_compat: Divides by K too, as Atlas's published code does.

    Raises:
        ConfigError: A weight or temperature that is not positive, or an unknown direction.
    """

    needs: tuple[Need, ...] = ()

    def __init__(self, *, weight: float, temperature: float, direction: KlDirection, atlas_compat: bool) -> None:
        _check(type(self).__name__, weight, temperature, direction)
        self.weight = weight
        self.temperature = temperature
        self.direction: KlDirection = direction
        self.atlas_compat = atlas_compat

    def __call__(self, reading: Reading) -> Float[Tensor, "B"]:
        """Returns the divergence between ``p(z|x)`` and the teacher's distribution."""
        log_target_BK = usefulness_log_target(self._usefulness(reading), reading.log_prior_BK, self.temperature)
        return passage_kl(log_target_BK, reading.log_prior_BK, self.direction, self.atlas_compat)

    def _usefulness(self, reading: Reading) -> Float[Tensor, "B K"]:
        raise NotImplementedError


class PerplexityDistillation(_Distillation):
    """PDist: passages from which the reader predicts the answer well become likely (Izacard et al. 2022, §2.2).

    With ``direction=reverse`` it is REPLUG's LSR (Shi et al. 2024, eq. 5 and 6).

    Args:
        weight: In the sum of an objective.
        temperature: Divides the reader's log-likelihoods.
        per_token: Averages them over the answer's tokens first, so that the target of a long answer is no sharper.
        direction: ``forward`` or ``reverse``; see :func:`~rag_lightning.losses.distillation.passage_kl`.
        atlas_compat: Divides by K too, as Atlas's published code does.

    Raises:
        ConfigError: A weight or temperature that is not positive, or an unknown direction.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 0.1,
        per_token: bool = True,
        direction: KlDirection = "forward",
        atlas_compat: bool = False,
    ) -> None:
        super().__init__(weight=weight, temperature=temperature, direction=direction, atlas_compat=atlas_compat)
        self.per_token = per_token

    def _usefulness(self, reading: Reading) -> Float[Tensor, "B K"]:
        useful_BK = self._of_answer(reading)
        return useful_BK / reading.num_tokens_B[:, None] if self.per_token else useful_BK

    def _of_answer(self, reading: Reading) -> Float[Tensor, "B K"]:
        return reading.log_likelihood_BK


class LeaveOneOut(PerplexityDistillation):
    """LOOP: passages without which the reader predicts the answer badly become likely (Izacard et al. 2022, §2.2).

    A reader of all passages at once is asked K times again, each time without one; for the others it is arithmetic.

    Args and Raises: as :class:`PerplexityDistillation`.
    """

    needs: tuple[Need, ...] = ("without",)

    def _of_answer(self, reading: Reading) -> Float[Tensor, "B K"]:
        if reading.without_BK is not None:
            return -reading.without_BK
        return leave_one_out(reading.log_likelihood_BK, reading.log_prior_BK.detach())


class AttentionDistillation(_Distillation):
    """ADist: passages from which fusion-in-decoder takes much become likely (Izacard et al. 2022, §2.2).

    Usefulness is ``α ‖v‖`` averaged over heads, layers, target positions and the passage's tokens
    (:meth:`~rag_lightning.generators.seq2seq.Seq2SeqGenerator.attention`); it is small, about one by the number of
    tokens read, and so is the temperature.

    Args:
        weight: In the sum of an objective.
        temperature: Divides the usefulness.
        direction: ``forward`` or ``reverse``; see :func:`~rag_lightning.losses.distillation.passage_kl`.
        atlas_compat: Divides by K too, as Atlas's published code does.

    Raises:
        ConfigError: A weight or temperature that is not positive, or an unknown direction.
    """

    needs: tuple[Need, ...] = ("attention",)

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 0.01,
        direction: KlDirection = "forward",
        atlas_compat: bool = False,
    ) -> None:
        super().__init__(weight=weight, temperature=temperature, direction=direction, atlas_compat=atlas_compat)

    def _usefulness(self, reading: Reading) -> Float[Tensor, "B K"]:
        assert reading.attention_BK is not None
        return reading.attention_BK


class CrossEncoderDistillation(_Distillation):
    """The retriever follows a cross-encoder, which reads question and passage together (Ren et al. 2021, "RocketQAv2").

    Args:
        cross_encoder: Scores the K passages of each question anew in every step; it learns nothing here.
        weight: In the sum of an objective.
        temperature: Divides its logits.
        direction: ``forward`` or ``reverse``; see :func:`~rag_lightning.losses.distillation.passage_kl`.
        atlas_compat: Divides by K too.
        batch_size: Pairs that it reads at a time.

    Raises:
        ConfigError: A weight or temperature that is not positive, or an unknown direction.
    """

    needs: tuple[Need, ...] = ("evidence",)

    def __init__(
        self,
        *,
        cross_encoder: PairScorer,
        weight: float = 1.0,
        temperature: float = 1.0,
        direction: KlDirection = "forward",
        atlas_compat: bool = False,
        batch_size: int = 32,
    ) -> None:
        super().__init__(weight=weight, temperature=temperature, direction=direction, atlas_compat=atlas_compat)
        self.cross_encoder = cross_encoder
        self.batch_size = batch_size

    def __call__(self, reading: Reading) -> Float[Tensor, "B"]:
        """Returns the divergence over the passages: of a null passage, which has no text, a cross-encoder says nothing.

        Its share is left as it is, and ``p(z|x)`` taken given that a passage is chosen.
        """
        if not reading.has_null:
            return super().__call__(reading)
        found_BK = reading.log_prior_BK[:, :-1].log_softmax(dim=1)
        return super().__call__(
            Reading(
                reading.log_likelihood_BK[:, :-1],
                reading.num_tokens_B,
                found_BK,
                questions=reading.questions,
                evidence=reading.evidence,
            )
        )

    def _usefulness(self, reading: Reading) -> Float[Tensor, "B K"]:
        assert reading.evidence is not None
        prior_BK = reading.log_prior_BK
        if isinstance(self.cross_encoder, nn.Module):
            self.cross_encoder.to(prior_BK.device)
        questions = [text for text in reading.questions for _ in range(prior_BK.shape[1])]
        passages = [passage for row in reading.evidence.passages for passage in row[: prior_BK.shape[1]]]
        return self.cross_encoder.score(questions, passages, batch_size=self.batch_size).view_as(prior_BK)


class Emdr2:
    """EMDR²: the RAG-Sequence likelihood of a constant reader (Sachan et al. 2021, §2.3).

    Args:
        weight: In the sum of an objective.

    Raises:
        ConfigError: A weight that is not positive.
    """

    needs: tuple[Need, ...] = ()

    def __init__(self, *, weight: float = 1.0) -> None:
        _check(type(self).__name__, weight)
        self.weight = weight

    def __call__(self, reading: Reading) -> Float[Tensor, "B"]:
        """Returns ``-log p(y|x)``, with gradient to the retriever alone."""
        return emdr2(reading.log_likelihood_BK, reading.log_prior_BK)


class InBatchContrastive:
    """Draws each question to its gold passage, away from others (Karpukhin et al. 2020, DPR §3.2), beside any reader.

    Negatives are the other questions' gold passages, and the question's own retrieved passages that are not gold for
    it: hard negatives of the live index. Use it where gold passages are known, to hold the retriever to them while the
    reader's judgement teaches it more. :class:`~rag_lightning.training.objectives.contrastive.Contrastive` is the
    objective for a retriever alone, with the passages of all processes; this one contrasts within its process.

    A question without a gold passage has loss 0.

    Args:
        weight: In the sum of an objective.

    Raises:
        ConfigError: A weight that is not positive.
    """

    needs: tuple[Need, ...] = ("pairs",)

    def __init__(self, *, weight: float = 1.0) -> None:
        _check(type(self).__name__, weight)
        self.weight = weight
        self._told_of_none = False

    def __call__(self, reading: Reading) -> Float[Tensor, "B"]:
        """Returns ``-log softmax`` of each question's gold passage among those of the batch and its own."""
        pairs = reading.pairs
        assert pairs is not None
        if not self._told_of_none and not bool(pairs.known_B.any()):
            self._told_of_none = True
            logger.warning(
                "retriever_loss contrastive: no question of this batch has a gold passage (positive_passage_ids), so "
                "it teaches nothing here; further such batches will come without a message"
            )
        loss_B = in_batch_contrastive(pairs.scores_BN, pairs.own_B, pairs.ignored_BN)
        return torch.where(pairs.known_B, loss_B, torch.zeros_like(loss_B))


def _check(name: str, weight: float, temperature: float = 1.0, direction: str = "forward") -> None:
    for what, value in (("weight", weight), ("temperature", temperature)):
        if not value > 0:
            raise ConfigError(f"objective, {name}: expected a {what} above 0, got {value}")
    if direction not in get_args(KlDirection):
        raise ConfigError(f"objective, {name}: expected direction forward or reverse, got {direction!r}")
