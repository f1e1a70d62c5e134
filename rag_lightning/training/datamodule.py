"""RagDataModule: reads corpus and questions, tokenises passages once, and knows which index snapshot is live."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError, StaleIndexError
from rag_lightning.index.snapshot import Snapshot, SnapshotStore, open_snapshot
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.text.token_store import TokenStore, open_or_build
from rag_lightning.training.examples import (
    Collator,
    DenoisingExamples,
    ExampleKind,
    Examples,
    InverseClozeExamples,
    QuestionExamples,
)
from rag_lightning.training.loader import QuestionLoader
from rag_lightning.types import Question, TokenBatch
from rag_lightning.utils import distributed

logger = logging.getLogger(__name__)


class RagDataModule(L.LightningDataModule):
    """Corpus, questions and the live index of one run.

    Args:
        passages: Passage file (see :mod:`rag_lightning.corpora.passages`); None for closed-book training.
        train: Question file; None where passages alone are trained on.
        validation: Question file; None to train without validation.
        test: Question file; None for no test.
        batch_size: Questions of a training batch, over all processes.
        eval_batch_size: Questions of a validation or test batch, over all processes.
        limit_validation: Validate on the first so many questions only.
        sample_answers: Train on a random accepted answer at each visit, instead of the first.
        seed: Seeds order and draws.
        cache_dir: Where token stores are kept; shared by all runs.
        index_dir: Where this run's index snapshots are kept.
        snapshot: Folder of a ready snapshot to start from; by default the index is built at the start.
        factory: ``exact`` or a FAISS factory string.
        nprobe: FAISS inverted lists to search.
        ef_search: FAISS graph search breadth.
        encode_batch_size: Passages at a time while encoding the corpus.
        denoising: Settings of :class:`~rag_lightning.training.examples.DenoisingExamples`, for that objective.
        progress: Show progress bars.
    """

    def __init__(
        self,
        *,
        passages: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        limit_validation: int | None = None,
        sample_answers: bool = False,
        seed: int = 0,
        cache_dir: str = "outputs/cache",
        index_dir: str = "outputs/index",
        snapshot: str | None = None,
        factory: str = "exact",
        nprobe: int | None = None,
        ef_search: int | None = None,
        encode_batch_size: int = 64,
        denoising: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.passages = passages
        self.paths = {"train": train, "validation": validation, "test": test}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.limit_validation = limit_validation
        self.sample_answers = sample_answers
        self.seed = seed
        self.cache_dir = Path(cache_dir)
        self.index_dir = Path(index_dir)
        self.ready_snapshot = snapshot
        self.factory = factory
        self.search_settings = {"nprobe": nprobe, "ef_search": ef_search}
        self.encode_batch_size = encode_batch_size
        self.denoising = dict(denoising) if denoising is not None else {}
        self.progress = progress
        self.questions: dict[str, list[Question]] = {}
        self.retriever: DenseRetriever | None = None
        self._corpus: PassageCorpus | None = None
        self._model: RagModel | None = None
        self._train_kind: ExampleKind = "questions"
        self._eval_kind: ExampleKind = "questions"
        self._retrieves = True
        self._assembler: ContextAssembler | None = None
        self._passage_tokens: PassageTokens | None = None
        self._live: dict[str, Any] = {}

    # ------------------------------------------------------------------ set-up

    def bind(self, model: RagModel, *, train_kind: ExampleKind, eval_kind: ExampleKind, retrieves: bool) -> None:
        """Names the model whose vocabularies and towers the data are made for, and what its objective feeds on."""
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
                self.questions[split] = read_questions(path, corpus=self._corpus)
        if self._retrieves and model.settings.num_passages > len(self.corpus):
            raise ConfigError(
                f"num_passages: expected at most the {len(self.corpus)} passages of {self.corpus.source}, "
                f"got {model.settings.num_passages}: lower model.num_passages or add passages"
            )
        if self._train_kind != "inverse_cloze" and stage == "fit":
            self._check_trainable()
        if self._assembler is not None:
            return
        tokenizer = model.generator.tokenizer
        if tokenizer is None:
            raise ConfigError("the generator has no tokenizer: give one when loading it")
        self._assembler = ContextAssembler(
            corpus=self._corpus, tokenizer=tokenizer, prompt=model.prompt, store=self._generator_store()
        )
        if self._corpus is not None and model.encoder is not None:
            self._passage_tokens = PassageTokens(
                encoder=model.encoder, corpus=self._corpus, store=self._encoder_store()
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

        store = build() if distributed.rank() == 0 else None
        distributed.barrier()
        return store if store is not None else build()

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

    @property
    def assembler(self) -> ContextAssembler:
        """Joins passages and questions."""
        if self._assembler is None:
            raise ConfigError("RagDataModule: setup() has not run")
        return self._assembler

    def encoder_tokens(self, ids_BK: Int[Tensor, "B K"]) -> TokenBatch:
        """Returns the encoder's tokens of passage numbers, ``[B * K, L]``, for encoding them with gradient."""
        if self._passage_tokens is None:
            raise ConfigError("this run has no passage encoder")
        return self._passage_tokens.batch(ids_BK.reshape(-1).cpu().numpy()).to(ids_BK.device)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> QuestionLoader:
        """Returns the training batches.

        Raises:
            ConfigError: Fewer questions in a batch than the processes, or the objective, need.
        """
        contrasts = self._train_kind in ("gold_passages", "inverse_cloze")
        if contrasts and self.batch_size < 2 * distributed.world_size():
            raise ConfigError(
                f"data.batch_size: expected at least 2 examples for each of {distributed.world_size()} processes, "
                f"since a contrastive objective takes the others of a batch as negatives, got {self.batch_size}"
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
        return QuestionExamples(questions, self._corpus, sample_answers=sampled, with_passage=with_passage)

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
        collate = Collator(self.model, assembler=self.assembler, passage_tokens=self._passage_tokens)
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
    def snapshot_step(self) -> int:
        """The optimiser step at which the live snapshot's encoder stood."""
        return self.retriever.snapshot.manifest.step if self.retriever is not None else 0

    def ensure_index(self, *, step: int, fresh: bool = False) -> None:
        """Makes a snapshot live if none is: the resumed one, the ready one, or one built now.

        Args:
            step: Optimiser steps taken.
            fresh: Build anew unless the live snapshot is of the passage tower as it is now.

        Raises:
            StaleIndexError: The ready snapshot is of another encoder or corpus.
        """
        if not self._retrieves:
            return
        device = next(self.model.parameters()).device
        if self.retriever is None and self._live:
            self._go_live(
                self._snapshots(device).open(
                    self._live["snapshot_id"],
                    encoder_hash=self._live["encoder_hash"],
                    corpus_hash=self.corpus.hash,
                )
            )
        elif self.retriever is None and self.ready_snapshot is not None:
            self._go_live(self._open_ready(self.ready_snapshot, device))
        if self.retriever is None or (fresh and self._is_stale(self.retriever.snapshot)):
            self._go_live(self.build_snapshot(step))

    def _open_ready(self, path: str, device: torch.device) -> Snapshot:
        encoder = self.model.encoder
        has_tower = encoder is not None and encoder.passage is not None
        encoder_hash = encoder.passage_hash() if encoder is not None and has_tower else None
        return open_snapshot(path, encoder_hash=encoder_hash, corpus_hash=self.corpus.hash, device=device)

    def _is_stale(self, snapshot: Snapshot) -> bool:
        encoder = self.model.encoder
        if encoder is None or encoder.passage is None:
            return False
        return snapshot.manifest.encoder_hash != encoder.passage_hash()

    def build_snapshot(self, step: int) -> Snapshot:
        """Encodes the corpus, each process its part, and publishes a snapshot; the live one stays live."""
        encoder = self.model.encoder
        if encoder is None or self._passage_tokens is None:
            raise ConfigError("this run has no passage encoder to build an index with")
        rows = distributed.shard(len(self.corpus), distributed.rank(), distributed.world_size())
        device = next(self.model.parameters()).device
        return self._snapshots(device).publish_shards(
            encode_passages(
                encoder, self._passage_tokens, rows, batch_size=self.encode_batch_size, progress=self.progress
            ),
            encoder_hash=encoder.passage_hash(),
            corpus_hash=self.corpus.hash,
            pooling=encoder.passage_tower().pooling,
            factory=self.factory,
            metric=self.model.settings.metric,
            step=step,
        )

    def swap(self, snapshot: Snapshot) -> None:
        """Makes a snapshot live; call it at a step boundary."""
        self._go_live(snapshot)

    def _go_live(self, snapshot: Snapshot) -> None:
        if snapshot.manifest.metric != self.model.settings.metric:
            raise StaleIndexError(
                f"index snapshot {snapshot.id}: expected metric {self.model.settings.metric!r} as the model's, "
                f"came {snapshot.manifest.metric!r}. Build the index again."
            )
        if self.retriever is None:
            self.retriever = DenseRetriever(snapshot, self.corpus)
        else:
            self.retriever.swap(snapshot)

    def _snapshots(self, device: torch.device) -> SnapshotStore:
        search_device = device if device.type != "cpu" else None
        return SnapshotStore(self.index_dir, device=search_device, seed=self.seed, **self.search_settings)

    def state_dict(self) -> dict[str, Any]:
        """Returns which snapshot is live; Lightning keeps it in the checkpoint."""
        if self.retriever is None:
            return {}
        manifest = self.retriever.snapshot.manifest
        return {"snapshot_id": manifest.snapshot_id, "encoder_hash": manifest.encoder_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers which snapshot was live, to be opened by :meth:`ensure_index`."""
        self._live = dict(state_dict)
        self.retriever = None
