"""RagDataModule: reads corpus and questions, tokenises passages once, and knows which index snapshot is live."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions, with_answers
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.bm25 import Bm25Index
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.build import RetrieverSettings, build_retriever, open_bm25, open_cross_encoder
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.retrieval.rerank import live_vectors
from rag_lightning.text.token_store import TokenStore, open_or_build
from rag_lightning.training.examples import (
    Collator,
    DenoisingExamples,
    Example,
    ExampleKind,
    Examples,
    InverseClozeExamples,
    QuestionExamples,
)
from rag_lightning.training.live_index import IndexSettings, LiveIndex
from rag_lightning.training.loader import BatchLoader
from rag_lightning.training.pretraining_examples import MaskedExamples, pretraining_examples
from rag_lightning.types import Question, QuestionBatch, TokenBatch
from rag_lightning.utils import distributed
from rag_lightning.utils.transfer import to_device

logger = logging.getLogger(__name__)
BuiltT = TypeVar("BuiltT")
QuestionLoader = BatchLoader[Example, QuestionBatch]


class RagDataModule(L.LightningDataModule):
    """Corpus, questions and the live index of one run.

    Args:
        passages: Passage file (see :mod:`rag_lightning.corpora.passages`); None for closed-book training.
        train: Question file; None where passages alone are trained on.
        validation: Question file; None to train without validation.
        test: Question file; None for no test.
        answers_from: Predictions on the training questions, to train on instead of their own answers (sequence-level
            distillation); validation and test keep theirs.
        batch_size: Questions of a training batch, over all processes.
        eval_batch_size: Questions of a validation or test batch, over all processes.
        limit_validation: Validate on the first so many questions only.
        sample_answers: Train on a random accepted answer at each visit, instead of the first.
        seed: Seeds order and draws.
        cache_dir: Where token stores are kept; shared by all runs.
        index_dir: Where this run's index snapshots are kept.
        index: How the index is built, kept and searched; exact search by default.
        retriever: How passages are found: by vectors (the default), by words, by both; reranked or not.
        denoising: Settings of :class:`~rag_lightning.training.examples.DenoisingExamples`, for that objective.
        salient_spans: Settings of :class:`~rag_lightning.training.pretraining_examples.SalientSpanExamples`, for
            objectives with these examples.
        random_spans: Likewise of :class:`~rag_lightning.training.pretraining_examples.RandomSpanExamples`.
        progress: Show progress bars.
    """

    def __init__(
        self,
        *,
        passages: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        answers_from: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        limit_validation: int | None = None,
        sample_answers: bool = False,
        seed: int = 0,
        cache_dir: str = "outputs/cache",
        index_dir: str = "outputs/index",
        index: IndexSettings | None = None,
        retriever: RetrieverSettings | None = None,
        denoising: Mapping[str, Any] | None = None,
        salient_spans: Mapping[str, Any] | None = None,
        random_spans: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.passages = passages
        self.paths = {"train": train, "validation": validation, "test": test}
        self.answers_from = answers_from
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.limit_validation = limit_validation
        self.sample_answers = sample_answers
        self.seed = seed
        self.cache_dir = Path(cache_dir)
        self.index_dir = Path(index_dir)
        self.index_settings = index if index is not None else IndexSettings()
        self.retriever_settings = retriever if retriever is not None else RetrieverSettings()
        self.denoising = dict(denoising) if denoising is not None else {}
        self.pretraining = {"salient_spans": dict(salient_spans or {}), "random_spans": dict(random_spans or {})}
        self.progress = progress
        self.questions: dict[str, list[Question]] = {}
        self.index: LiveIndex | None = None
        self.retriever: Retriever | None = None
        self.bm25: Bm25Index | None = None
        self._corpus: PassageCorpus | None = None
        self._corpus_for_metrics: PassageCorpus | None = None
        self._model: RagModel | None = None
        self._train_kind: ExampleKind = "questions"
        self._eval_kind: ExampleKind = "questions"
        self._retrieves = True
        self._num_negatives = 0
        self._cross_process = False
        self._assembler: ContextAssembler | None = None
        self._passage_tokens: PassageTokens | None = None
        self._restored: dict[str, Any] = {}

    # ------------------------------------------------------------------ set-up

    def bind(
        self,
        model: RagModel,
        *,
        train_kind: ExampleKind,
        eval_kind: ExampleKind,
        retrieves: bool,
        num_negatives: int = 0,
        cross_process: bool = False,
    ) -> None:
        """Names the model whose vocabularies and towers the data are made for, and what its objective feeds on."""
        self._num_negatives = num_negatives
        self._cross_process = cross_process
        self._model = model
        self._train_kind = train_kind
        self._eval_kind = eval_kind
        self._retrieves = retrieves

    def setup(self, stage: str) -> None:
        """Reads and checks every file before anything trains; builds token stores, rank 0 first. Nothing twice."""
        model = self.model
        needs_corpus = self._retrieves or self._train_kind != "questions" or self._eval_kind != "questions"
        if needs_corpus and self.passages is None:
            raise ConfigError("data.passages: expected a passage file, this objective needs one; came none")
        if needs_corpus and self.passages is not None and self._corpus is None:
            self._corpus = PassageCorpus.read(self.passages)
        wanted = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for split, path in self.paths.items():
            if split not in self.questions and path is not None and (split in wanted.get(stage, ()) or stage == "fit"):
                questions = read_questions(path, corpus=self._corpus)
                if split == "train" and self.answers_from is not None:
                    questions = with_answers(questions, self.answers_from)
                self.questions[split] = questions
        if self.answers_from is not None and self._train_kind not in ("questions", "gold_passages", "denoising"):
            raise ConfigError(
                f"data.answers_from: expected training on questions, got objective.examples={self._train_kind}, whose "
                "answers are cut out of passages. Leave one of them out."
            )
        if self._retrieves and model.settings.num_passages > len(self.corpus):
            raise ConfigError(
                f"num_passages: expected at most the {len(self.corpus)} passages of {self.corpus.source}, "
                f"got {model.settings.num_passages}: lower model.num_passages or add passages"
            )
        if self._train_kind not in ("inverse_cloze", "salient_spans", "random_spans") and stage == "fit":
            self._check_trainable()
        if self._assembler is not None:
            return
        tokenizer = model.generator.tokenizer
        if tokenizer is None:
            raise ConfigError("the generator has no tokenizer: give one when loading it")
        self._assembler = ContextAssembler(
            corpus=self._corpus,
            tokenizer=tokenizer,
            prompt=model.prompt,
            store=self._generator_store(),
            affixes=model.generator.affixes(),
        )
        if self._corpus is not None and model.encoder is not None:
            self._passage_tokens = PassageTokens(
                encoder=model.encoder, corpus=self._corpus, store=self._encoder_store()
            )
        if self._retrieves:
            self._set_up_retrieval()

    def _set_up_retrieval(self) -> None:
        settings = self.retriever_settings
        if settings.needs_vectors:
            self.index = LiveIndex(
                model=self.model,
                corpus=self.corpus,
                tokens=self._passage_tokens,
                root=self.index_dir,
                settings=self.index_settings,
                seed=self.seed,
                progress=self.progress,
            )
            if self._restored:
                self.index.load_state_dict(self._restored)
        if settings.needs_words:
            self.bm25 = _rank_0_first(
                lambda: open_bm25(settings, self.corpus, cache_dir=self.cache_dir, progress=self.progress)
            )

    def _check_trainable(self) -> None:
        questions = self.questions.get("train")
        if questions is None:
            raise ConfigError("data.train: expected a question file to train on, came none")
        bare = next((question.id for question in questions if not question.answers), None)
        if bare is not None and self._train_kind != "gold_passages":
            raise DataError(
                f"{self.paths['train']}: question {bare!r} has no answer string to train on (only a regular "
                "expression): replace it by an answer, as Lewis et al. 2020 do for CuratedTREC (its commonest match)"
            )

    def _generator_store(self) -> TokenStore | None:
        model, corpus = self.model, self._corpus
        if corpus is None:
            return None
        texts = (model.prompt.passage_text(passage) for passage in corpus)
        key = model.prompt.passage_key
        return self._store(texts, model.generator.tokenizer, key, model.prompt.max_passage_tokens)

    def _encoder_store(self) -> TokenStore:
        encoder = self.model.encoder
        assert encoder is not None
        texts = (encoder.passage_text(passage) for passage in self.corpus)
        return self._store(texts, encoder.tokenizer, encoder.passage_template, encoder.max_passage_tokens)

    def _store(self, texts: Any, tokenizer: Any, key: str, limit: int) -> TokenStore:
        def build() -> TokenStore:
            return open_or_build(
                texts,
                tokenizer,
                cache_dir=self.cache_dir,
                corpus_hash=self.corpus.hash,
                template_key=key,
                max_tokens=limit,
                progress=self.progress,
            )

        return _rank_0_first(build)

    # ------------------------------------------------------------------ what a step needs

    @property
    def model(self) -> RagModel:
        """The model that :meth:`bind` named."""
        if self._model is None:
            raise ConfigError("RagDataModule: call bind(model, …) before training")
        return self._model

    @property
    def corpus(self) -> PassageCorpus:
        """The passages."""
        if self._corpus is None:
            raise ConfigError("data.passages: this run reads no passages")
        return self._corpus

    def knowledge(self, questions: Sequence[Question]) -> list[str | None]:
        """Returns the gold passages' texts of each question as one text, for metrics; None where none are known.

        They are known to a closed-book run too, where ``passages`` is given.
        """
        if self._corpus is None and self.passages is not None and any(one.positive_passage_ids for one in questions):
            self._corpus_for_metrics = self._corpus_for_metrics or PassageCorpus.read(self.passages)
        corpus = self._corpus if self._corpus is not None else self._corpus_for_metrics
        if corpus is None:
            return [None] * len(questions)
        rows = [[corpus.row_of(one) for one in question.positive_passage_ids] for question in questions]
        return [" ".join(f"{corpus[row].title} {corpus[row].text}" for row in row_ids) or None for row_ids in rows]

    @property
    def assembler(self) -> ContextAssembler:
        """Joins passages and questions."""
        if self._assembler is None:
            raise ConfigError("RagDataModule: setup() has not run")
        return self._assembler

    def transfer_batch_to_device(
        self, batch: QuestionBatch, device: torch.device, dataloader_idx: int
    ) -> QuestionBatch:
        """Returns a batch on the device; Lightning's own way would neither pin a record nor go on meanwhile."""
        return to_device(batch, device)

    def encoder_tokens(self, ids_BK: Int[Tensor, "B K"]) -> TokenBatch:
        """Returns the encoder's tokens of passage numbers, ``[B * K, L]``, for encoding them with gradient."""
        if self._passage_tokens is None:
            raise ConfigError("this run has no passage encoder")
        return to_device(self._passage_tokens.batch(ids_BK.reshape(-1).cpu().numpy()), ids_BK.device)

    def live_vectors(self, ids_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Returns the vectors of passage numbers under the passage tower as it is now, without gradient or dropout."""
        encoder = self.model.encoder
        if encoder is None or self._passage_tokens is None:
            raise ConfigError("this run has no passage encoder")
        return live_vectors(encoder, self._passage_tokens, batch_size=self.index_settings.encode_batch_size)(ids_BL)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> QuestionLoader:
        """Returns the training batches.

        Raises:
            ConfigError: Fewer questions in a batch than the processes, or the objective, need.
        """
        contrasts = self._train_kind in ("gold_passages", "inverse_cloze") and self._num_negatives == 0
        needed = 2 if self._cross_process else 2 * distributed.world_size()
        if contrasts and self.batch_size < needed:
            raise ConfigError(
                f"data.batch_size: expected at least {needed} examples over all processes, since a contrastive "
                f"objective takes the others of {'the batch' if self._cross_process else 'its process'} as negatives, "
                f"got {self.batch_size}"
            )
        return self._loader(self._examples("train", self._train_kind), self.batch_size, shuffle=True)

    def val_dataloader(self) -> QuestionLoader | list[QuestionLoader]:
        """Returns the validation batches."""
        return self._eval_loader("validation", self.limit_validation)

    def test_dataloader(self) -> QuestionLoader | list[QuestionLoader]:
        """Returns the test batches."""
        return self._eval_loader("test", None)

    def _eval_loader(self, split: str, limit: int | None) -> QuestionLoader | list[QuestionLoader]:
        if split not in self.questions:
            return []
        return self._loader(self._examples(split, self._eval_kind, limit), self.eval_batch_size, shuffle=False)

    def _examples(self, split: str, kind: ExampleKind, limit: int | None = None) -> Examples:
        if kind == "inverse_cloze":
            return InverseClozeExamples(self.corpus, rows=self._rows_to_practise_on())
        if kind in ("salient_spans", "random_spans"):
            return pretraining_examples(
                kind,
                self.corpus,
                rows=self._rows_to_practise_on(),
                tokenizer_mask=getattr(self.assembler.tokenizer, "mask_token", None),
                settings=self.pretraining[kind],
            )
        questions: Sequence[Question] = self.questions[split][:limit]
        if kind == "denoising":
            mask = getattr(self.assembler.tokenizer, "mask_token", None)
            return DenoisingExamples(
                questions,
                self.corpus,
                rows=self._rows_to_practise_on(),
                sample_answers=self.sample_answers,
                mask=mask if mask is not None else "...",
                **self.denoising,
            )
        sampled = self.sample_answers and split == "train"
        with_passage = kind == "gold_passages"
        return QuestionExamples(
            questions,
            self._corpus,
            sample_answers=sampled,
            with_passage=with_passage,
            num_negatives=self._num_negatives if split == "train" else 0,
        )

    def _rows_to_practise_on(self) -> list[int]:
        """Returns the passages that warm-up may read: none that a validation or test question is about.

        Only questions of files that are given can be kept out: a run without its test file is told so.
        """
        for split in ("validation", "test"):
            if split not in self.questions:
                logger.warning(
                    "data.%s is not given: warm-up will also read the passages that its questions are about", split
                )
        held_out = {
            passage_id
            for split in ("validation", "test")
            for question in self.questions.get(split, ())
            for passage_id in question.positive_passage_ids
        }
        return [row for row, passage in enumerate(self.corpus) if passage.id not in held_out]

    def _loader(self, examples: Examples, batch_size: int, *, shuffle: bool) -> QuestionLoader:
        mask = examples.mask if isinstance(examples, MaskedExamples) else None
        collate = Collator(self.model, assembler=self.assembler, passage_tokens=self._passage_tokens, mask=mask)
        return QuestionLoader(
            examples,
            collate,
            batch_size=max(batch_size, distributed.world_size()) if not shuffle else batch_size,
            seed=self.seed,
            shuffle=shuffle,
            current_epoch=self._current_epoch if shuffle else lambda: 0,
            num_processed=self._num_processed if shuffle else None,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def _current_epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def _num_processed(self) -> int:
        assert self.trainer is not None
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed)

    # ------------------------------------------------------------------ the live index

    @property
    def dense(self) -> DenseRetriever | None:
        """The retriever over the live snapshot; None before there is one, and where words alone are searched."""
        return self.index.retriever if self.index is not None else None

    @property
    def snapshot_step(self) -> int:
        """The optimiser step at which the live snapshot's encoder stood."""
        return self.index.step if self.index is not None else 0

    def ensure_index(self, *, step: int, fresh: bool = False) -> None:
        """Makes a snapshot live if none is, see :meth:`LiveIndex.ensure`, and the retriever ready that searches it.

        Args:
            step: Optimiser steps taken.
            fresh: Build anew unless the live snapshot is of the passage tower as it is now.
        """
        if not self._retrieves:
            return
        if self.index is not None:
            self.index.ensure(step=step, fresh=fresh)
        if self.retriever is None:
            self.retriever = self._build_retriever()

    def _build_retriever(self) -> Retriever:
        settings = self.retriever_settings
        cross_encoder = open_cross_encoder(settings)
        if cross_encoder is not None:
            cross_encoder = cross_encoder.to(next(self.model.parameters()).device).eval()
        return build_retriever(
            settings,
            corpus=self.corpus,
            dense=self.dense,
            bm25=self.bm25,
            fusion=self.model.fusion,
            reencode=self.live_vectors,
            cross_encoder=cross_encoder,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns which snapshot is live; Lightning keeps it in the checkpoint."""
        return self.index.state_dict() if self.index is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers which snapshot was live, to be opened by :meth:`ensure_index`."""
        self._restored = dict(state_dict)
        self.retriever = None
        if self.index is not None:
            self.index.load_state_dict(self._restored)


def _rank_0_first(build: Callable[[], BuiltT]) -> BuiltT:
    """Lets rank 0 build what the other processes then find on disk."""
    built = build() if distributed.rank() == 0 else None
    distributed.barrier()
    return built if built is not None else build()
