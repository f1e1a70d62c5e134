"""Records that cross stage borders, and the one legend of shapes.

Axes, in names (``scores_BK``) and in jaxtyping strings alike:

====  =================================================
``B``  questions in a batch
``K``  passages retrieved for each question
``L``  input tokens (of a question, a passage or a joined context)
``T``  target tokens (scored positions of the answer)
``D``  embedding dimension of the retriever
``H``  hidden dimension of the generator
``V``  vocabulary of the generator
``N``  passages in the corpus, or rows of a flattened batch (``N = B * K``)
``M``  hard negatives of each question
``C``  classes: the labels, tags or entity types that a model tells apart
``R``  readings of a question: its K passages, or 1 where all are read at once
``S``  scored target positions of a batch, those of one question adjacent (no padding)
``E``  events of a distribution over the vocabulary: its tokens, or some of them and the rest as one
====  =================================================
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BatchT = TypeVar("BatchT", bound="TensorRecord")


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable unit of text."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its accepted answers.

    Attributes:
        id: Unique within its file.
        question: The text asked.
        answers: Accepted answers; the first is the training target unless the data module samples one.
        positive_passage_ids: Gold passages, where the dataset names them.
        answer_regex: A regular expression that accepts an answer (CuratedTREC); ``answers`` is then empty.
        negative_passage_ids: Hard negatives: passages that look like an answer and hold none, hardest first.
        source_passage_id: The passage that was made of this very question (a training example among examples to
            retrieve), which is never retrieved for it.
        excluded_passage_ids: Passages that are no answer (what a user has seen already): they are never retrieved for
            it, and a ranking of all passages leaves them out.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    positive_passage_ids: tuple[str, ...] = ()
    answer_regex: str | None = None
    negative_passage_ids: tuple[str, ...] = ()
    source_passage_id: str | None = None
    excluded_passage_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or a text with a context to judge it by, and its class.

    Attributes:
        id: Unique within its file.
        text: What is classified.
        label: The class's name.
        context: A given second text (the passage of a yes/no question); None where there is none.
    """

    id: str
    text: str
    label: str
    context: str | None = None


@dataclass(frozen=True, slots=True)
class TaggedSentence:
    """Words with one tag each, in BIO form: ``B-LOC`` begins a mention, ``I-LOC`` goes on with it, ``O`` is outside."""

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RelationMention:
    """A text in which two entities stand, and the relation between them.

    Attributes:
        id: Unique within its file.
        text: Without markers.
        head: Characters of the first entity, start and exclusive end.
        tail: Those of the second; the two do not overlap.
        label: The relation's name.
    """

    id: str
    text: str
    head: tuple[int, int]
    tail: tuple[int, int]
    label: str


@dataclass(frozen=True)
class TensorRecord:
    """A frozen record whose tensor fields move together; other fields stay as they are."""

    def to(self: BatchT, device: torch.device | str, non_blocking: bool = False) -> BatchT:
        """Returns a copy with every tensor on ``device``."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, TensorRecord)):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)

    def pinned(self: BatchT) -> BatchT:
        """Returns a copy with every CPU tensor in page-locked memory, for a copy to a GPU that nobody waits for."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TensorRecord):
                moved[field.name] = value.pinned()
            elif isinstance(value, Tensor) and value.device.type == "cpu":
                moved[field.name] = value.pin_memory()
        return replace(self, **moved)


@dataclass(frozen=True)
class FusionInputs(TensorRecord):
    """What a fused score needs besides the live similarities; constants for the gradient.

    They were settled over all candidates of the search, so they must travel with the K that were kept. See
    :mod:`rag_lightning.retrieval.fusion`.

    Attributes:
        sparse_BK: The normalised score by words of each hit.
        dense_shift_B1: Subtracted from the similarities of a question.
        dense_scale_B1: Divides them afterwards; positive.
    """

    sparse_BK: Float[Tensor, "B K"]
    dense_shift_B1: Float[Tensor, "B 1"]
    dense_scale_B1: Float[Tensor, "B 1"]


@dataclass(frozen=True)
class Hits(TensorRecord):
    """What an index returns: numbers only, so that a swap can never pair an id with another snapshot's text.

    Attributes:
        scores_BK: Similarities, larger is better, best first; ``-inf`` where nothing was found.
        ids_BK: Passage numbers, that is rows of the corpus named by the snapshot; ``-1`` where nothing was found
            (an approximate index may find fewer than K).
        snapshot_id: The index snapshot that answered.
        fusion: For hits of a hybrid retriever whose scores have a gradient.
        has_null: True where the last place is the null passage, chosen beside what was found; its id is ``-1`` too.
    """

    scores_BK: Float[Tensor, "B K"]
    ids_BK: Int[Tensor, "B K"]
    snapshot_id: str
    fusion: FusionInputs | None = None
    has_null: bool = False

    @property
    def retrieved(self) -> Hits:
        """What was searched for: the hits without the null passage."""
        if not self.has_null:
            return self
        return replace(self, scores_BK=self.scores_BK[:, :-1], ids_BK=self.ids_BK[:, :-1], has_null=False)

    @property
    def found_BK(self) -> Bool[Tensor, "B K"]:
        """True where the index found a passage."""
        return self.ids_BK >= 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """The passages behind some hits, looked up in the corpus, one inner tuple for each question."""

    passages: tuple[tuple[Passage, ...], ...]
    hits: Hits


@dataclass(frozen=True)
class TokenBatch(TensorRecord):
    """Padded token ids with their attention mask (1 on real tokens).

    Attributes:
        input_ids: The ids.
        attention_mask: The mask.
        lengths: Tokens of each row up to its last real one, 1 at least, where whoever made the batch knew: to ask a GPU
            is to wait for it. See :func:`rag_lightning.utils.lengths.lengths_of`.
    """

    input_ids: Int[Tensor, "N L"]
    attention_mask: Int[Tensor, "N L"]
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class QuestionBatch(TensorRecord):
    """What the data loader yields: questions and targets, not yet retrieved for.

    Attributes:
        questions: The B records, for metrics, messages and tables.
        query: Questions in the query encoder's vocabulary, ``[B, L]``; None for a model without an encoder.
        prompt: Questions in the generator's vocabulary, without special tokens, ``[B, L]``: the part of the
            generator's input that is joined to each passage.
        labels: Targets in the generator's vocabulary, ``[B, T + 1]``: a start token, the answer, an end token, padding.
        positive_ids: One gold passage number for each question, ``-1`` where none is known.
        weights_B: 1; 0 on a filler that only keeps processes in step, and counts nowhere.
        contexts: Ready generator inputs ``[B, L]`` for objectives that bring their own passage (denoising).
        passages: Each question's own passage in the encoder's vocabulary ``[B, L]`` (contrastive).
        negatives: M hard negatives for each question in the encoder's vocabulary ``[B * M, L]`` (contrastive).
        negative_ids_BM: Their passage numbers.
        forbidden_ids: The passage that must not be retrieved for each question, ``-1`` for none, or F of them where
            some question has several; None where no question has one.
    """

    questions: tuple[Question, ...]
    query: TokenBatch | None
    prompt: TokenBatch
    labels: Int[Tensor, "B T1"]
    positive_ids: Int[Tensor, "B"]
    weights_B: Float[Tensor, "B"]
    contexts: TokenBatch | None = None
    passages: TokenBatch | None = None
    negatives: TokenBatch | None = None
    negative_ids_BM: Int[Tensor, "B M"] | None = None
    forbidden_ids: Int[Tensor, "B *F"] | None = None


@dataclass(frozen=True)
class RagBatch(TensorRecord):
    """Questions with their retrieved passages, as the marginal objectives take them.

    Attributes:
        contexts: Passage and question joined, ``[B * K, L]``, passages of one question adjacent.
        doc_scores_BK: Similarities with gradient to the encoders; ``-inf`` where nothing was found.
        labels: As in :class:`QuestionBatch`.
    """

    contexts: TokenBatch
    doc_scores_BK: Float[Tensor, "B K"]
    labels: Int[Tensor, "B T1"]


@dataclass(frozen=True)
class GeneratorOutput(TensorRecord):
    """Scores of the target tokens under each passage.

    Attributes:
        token_log_probs_BKT: ``log p(y_t | x, z_k, y_<t)`` of the target token, float32 at least; 0 where unscored.
        target_mask_BT: True on scored positions.
        vocab_mean_BKT: Mean over the vocabulary of ``log p(v | x, z_k, y_<t)``, only when label smoothing asks for it.
        logits_BKTV: Full logits, only when asked for: by ``hf_compat`` label smoothing, or by distillation.
    """

    token_log_probs_BKT: Float[Tensor, "B K T"]
    target_mask_BT: Bool[Tensor, "B T"]
    vocab_mean_BKT: Float[Tensor, "B K T"] | None = None
    logits_BKTV: Float[Tensor, "B K T V"] | None = None


@dataclass(frozen=True, slots=True)
class RetrievedPassage:
    """A passage as it stands in a prediction.

    Where nothing was found, id, title and text are empty, and the probability is 0. The null passage stands last with
    empty fields too, and with the probability that the question alone was chosen.

    Attributes:
        score: The similarity of question and passage.
        probability: The document prior ``p(z | x)``.
        posterior: ``p(z | x, y)`` of the answer given.
    """

    id: str
    title: str
    text: str
    score: float
    probability: float
    posterior: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the n best answers.

    Attributes:
        log_likelihood: As in :class:`Prediction`.
    """

    answer: str
    log_likelihood: float


@dataclass(frozen=True, slots=True)
class TokenPosteriors:
    """Which passage each token of an answer comes from.

    Attributes:
        tokens: The T tokens' texts, the end token's included.
        probabilities: ``p(z | x, y_<=t)``, one row of T for each passage; see
            :func:`rag_lightning.losses.marginal.token_posteriors`.
    """

    tokens: tuple[str, ...]
    probabilities: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer with the passages that it came from.

    Attributes:
        log_likelihood: ``log p(y | x)``, marginalised over the passages, natural log.
        alternatives: The n best answers in the decoder's order, the one given first; empty unless asked for. Two may
            read the same where their tokens differ.
        token_posteriors: None unless asked for.
    """

    id: str
    question: str
    answer: str
    log_likelihood: float
    passages: tuple[RetrievedPassage, ...]
    alternatives: tuple[Alternative, ...] = ()
    token_posteriors: TokenPosteriors | None = None
