"""A trained model that answers for a student: what it would say next, and which passages it would say it from.

It is loaded when it is first asked, stays in evaluation mode without gradients, and is no part of the student: neither
its checkpoint nor its optimiser knows it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus, resolve
from rag_lightning.errors import ConfigError
from rag_lightning.index.base import similarity
from rag_lightning.losses.knowledge import predictive_log_probs
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import CONFIG_NAME, MarginalKind
from rag_lightning.rag_reading import Marginal
from rag_lightning.retrieval.base import even_where_empty
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.retrieval.rerank import live_vectors
from rag_lightning.text.tokenizers import tokenizer_hash
from rag_lightning.types import Hits, QuestionBatch, RagBatch, TokenBatch
from rag_lightning.utils.hashing import hash_file, hash_tensors, hash_texts


@dataclass(frozen=True)
class Vocabulary:
    """What two generators must share for their distributions to speak of the same tokens.

    Attributes:
        tokenizer_hash: See :func:`~rag_lightning.text.tokenizers.tokenizer_hash`.
        size: Rows of the output layer.
        special_ids: Padding, start of an answer, end of an answer.
    """

    tokenizer_hash: str
    size: int
    special_ids: tuple[int, int, int]

    @classmethod
    def of(cls, model: RagModel, whose: str) -> "Vocabulary":
        """Returns a model's.

        Raises:
            ConfigError: Its generator has no tokenizer.
        """
        generator = model.generator
        if generator.tokenizer is None:
            raise ConfigError(f"distill: {whose} has no generator tokenizer: give one when loading it")
        special_ids = (generator.pad_token_id, generator.start_token_id, generator.eos_token_id)
        return cls(tokenizer_hash(generator.tokenizer), generator.vocab_size, special_ids)

    def check(self, student: "Vocabulary", source: str) -> None:
        """Refuses a student of another vocabulary.

        Raises:
            ConfigError: Says what differs.
        """
        if self == student:
            return
        raise ConfigError(
            f"distill.teacher={source}: expected a teacher of the student's vocabulary, since its distribution over "
            f"tokens is the target. The student has {student._described()}; the teacher has {self._described()}. "
            "Train the student with the teacher's tokenizer (generator.tokenizer=…), or distil by the teacher's "
            "answers, which are texts (data.answers_from=…)."
        )

    def _described(self) -> str:
        pad, start, end = self.special_ids
        return f"{self.size} tokens of tokenizer {self.tokenizer_hash[:12]} (padding {pad}, start {start}, end {end})"


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of a batch; constants.

    Attributes:
        log_probs_SV: Its ``log p(v | x, y_<t)`` at each scored position of the targets.
        log_posterior_BK: Its ``log p(z | x, y)`` over the passages that it read; for closed-book teachers of one.
    """

    log_probs_SV: Float[Tensor, "S V"]
    log_posterior_BK: Float[Tensor, "B K"]


class Teacher:
    """A saved model that teaches.

    Args:
        source: A run folder or a saved model folder, or whatever else ``load`` takes.
        load: Opens it; by default :meth:`~rag_lightning.rag.RagModel.from_pretrained`.
    """

    def __init__(self, *, source: str, load: Callable[[str], RagModel] | None = None) -> None:
        self.source = source
        self._load = load if load is not None else _load_saved
        self._model: RagModel | None = None
        self._assembler: ContextAssembler | None = None
        self._tokens: PassageTokens | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    @property
    def model(self) -> RagModel:
        """The model, loaded when first asked for, in evaluation mode and without gradients."""
        if self._model is None:
            self._model = self._load(self.source).eval().requires_grad_(False)
        return self._model

    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary that it speaks."""
        return Vocabulary.of(self.model, f"the teacher {self.source}")

    def fingerprint(self) -> str:
        """Returns a hash of its files: weights, tokenizers, settings, and the manifests of the indexes beside it.

        A hub id has none here, and is loaded for its weights to be hashed.
        """
        place = _model_folder(resolve(self.source))
        if not place.exists():
            return hash_tensors(self.model.state_dict())
        if place.is_file():
            beside = place.parent.parent / "config.yaml"
            return hash_texts([hash_file(file) for file in (place, beside) if file.is_file()])
        files = sorted(file for file in place.rglob("*") if file.is_file())
        parts = [part for file in files for part in (file.relative_to(place).as_posix(), hash_file(file))]
        manifests = sorted(place.parent.glob("index/*/manifest.json"))
        return hash_texts([*parts, *(hash_file(file) for file in manifests)])

    @torch.no_grad()
    def on_students_passages(self, batch: QuestionBatch, hits: Hits, assembler: ContextAssembler) -> Lesson:
        """Reads what the student found.

        Its prior over these passages is of its own encoder, where it retrieves by vectors alone; else each is as likely
        as any other.

        Args:
            batch: Questions and targets.
            hits: The student's.
            assembler: The student's; its tokens serve where both models write passages alike.
        """
        device = batch.labels.device
        model, ids_BK = self.model.to(device), hits.retrieved.ids_BK.to(device)
        prompt = batch.prompt
        if (model.prompt, model.generator.affixes()) != (assembler.prompt, assembler.affixes):
            prompt, assembler = model.prompt_tokens(_texts(batch)).to(device), self._assembler_for(assembler.corpus)
        scores_BK = self._scores(batch, ids_BK, assembler.corpus)
        return self._read(model, assembler, ids_BK, prompt, scores_BK, batch.labels)

    @torch.no_grad()
    def on_own_passages(self, batch: QuestionBatch) -> Lesson:
        """Reads what it finds itself in the index it was saved with; nothing, where it is closed-book.

        Raises:
            ConfigError: It was saved without an index.
        """
        model = self.model.to(batch.labels.device)
        device, texts = batch.labels.device, _texts(batch)
        prompt = model.prompt_tokens(texts).to(device)
        if model.settings.num_passages == 0:
            nothing_B1 = torch.full((len(texts), 1), -1, device=device)
            even_B1 = torch.zeros(len(texts), 1, device=device)
            return self._read(model, self._assembler_for(None), nothing_B1, prompt, even_B1, batch.labels)
        if model.retriever_source is None:
            raise ConfigError(
                f"distill.passages=own: expected a teacher saved with its index, {self.source} has none. Give a run "
                "folder of rag-lightning train, or let it read the student's passages (distill.passages=student)."
            )
        retriever = model.default_retriever()
        query = model.query_tokens(texts).to(device) if retriever.needs_vectors else None
        hits, scores_BK = model.retrieve(query, texts, retriever)
        assembler = self._assembler_for(retriever.corpus)
        return self._read(model, assembler, hits.ids_BK.to(device), prompt, scores_BK.to(device), batch.labels)

    def _assembler_for(self, corpus: PassageCorpus | None) -> ContextAssembler:
        """Returns one that writes passages of a corpus as the teacher was trained to read them."""
        if self._assembler is None or self._assembler.corpus is not corpus:
            tokenizer = self.model.generator.tokenizer
            assert tokenizer is not None  # without one there is no vocabulary to compare, and so no lesson
            self._assembler = ContextAssembler(
                corpus=corpus, tokenizer=tokenizer, prompt=self.model.prompt, affixes=self.model.generator.affixes()
            )
        return self._assembler

    def _scores(
        self, batch: QuestionBatch, ids_BK: Int[Tensor, "B K"], corpus: PassageCorpus | None
    ) -> Float[Tensor, "B K"]:
        """Returns what the teacher's encoder makes of passages that another model found."""
        model, found_BK = self.model, ids_BK >= 0
        source = model.retriever_source
        if model.encoder is None or corpus is None or (source is not None and source.settings.kind != "dense"):
            even_BK = torch.zeros(ids_BK.shape, device=ids_BK.device)
            return even_where_empty(even_BK.masked_fill(~found_BK, -torch.inf))
        if self._tokens is None or self._tokens.corpus is not corpus:
            self._tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
        queries_BD = model.encoder.query(model.query_tokens(_texts(batch)).to(ids_BK.device))
        passages_BKD = live_vectors(model.encoder, self._tokens)(ids_BK)
        return even_where_empty(similarity(queries_BD, passages_BKD, model.settings.metric, found_BK))

    def _read(
        self,
        model: RagModel,
        assembler: ContextAssembler,
        ids_BK: Int[Tensor, "B K"],
        prompt: TokenBatch,
        scores_BK: Float[Tensor, "B K"],
        labels: Int[Tensor, "B T1"],
    ) -> Lesson:
        """Reads passages as trained to; who reads them in one prompt reads each alone too, for the posterior."""
        stuffed, alone = model.settings.objective == "stuffed" and assembler.corpus is not None, None
        if assembler.corpus is None:
            contexts = assembler.without_passage(prompt)
        else:
            contexts = assembler.for_reading(ids_BK, prompt, stuffed=stuffed)
        if stuffed:
            alone = model.generator.encode(assembler.contexts(ids_BK, prompt))
        marginal = model.marginal(RagBatch(contexts, scores_BK, labels), alone=alone, keep_logits=True)
        mask_BT = labels[:, 1:] != model.generator.pad_token_id
        log_probs_SV = next_token(marginal, labels, mask_BT, model.settings.objective)
        return Lesson(log_probs_SV, marginal.log_posterior_BK)


def _texts(batch: QuestionBatch) -> list[str]:
    return [question.question for question in batch.questions]


def next_token(
    marginal: Marginal, labels: Int[Tensor, "B T1"], target_mask_BT: Tensor, kind: MarginalKind
) -> Float[Tensor, "S V"]:
    """Returns ``log p(v | x, y_<t)`` of a model, with gradient to its generator and none to what it retrieves by."""
    logits_BRTV = marginal.logits_BRTV
    assert logits_BRTV is not None
    prior_BR = marginal.log_prior_BK.detach()
    if kind in ("fid", "stuffed"):
        prior_BR = torch.zeros_like(prior_BR[:, :1])
    return predictive_log_probs(logits_BRTV, prior_BR, labels[:, 1:], target_mask_BT, sequence=kind == "rag_sequence")


def _model_folder(place: Path) -> Path:
    return place / "model" if place.is_dir() and not (place / CONFIG_NAME).is_file() else place


def _load_saved(source: str) -> RagModel:
    return RagModel.from_pretrained(_model_folder(resolve(source)))
