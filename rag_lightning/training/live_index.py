"""Which index snapshot is live, how the next one is made, and how it takes the live one's place."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError, StaleIndexError
from rag_lightning.index.base import Metric
from rag_lightning.index.faiss import FaissIndex
from rag_lightning.index.sharded import open_shard
from rag_lightning.index.snapshot import Snapshot, SnapshotStore, open_snapshot
from rag_lightning.index.vectors import Storage
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.retrieval.index_builder import RefreshJob
from rag_lightning.utils import distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How a run's index is built, kept, divided and searched.

    Attributes:
        factory: ``exact`` or a FAISS factory string.
        storage: How vectors are kept: ``float32``, ``float16`` or ``int8`` (one scale for each row).
        nprobe: FAISS inverted lists to search.
        ef_search: FAISS graph search breadth.
        num_training_vectors: Vectors drawn to train FAISS's clusters and codes; None leaves it to the factory.
        sharded: Each process holds and searches its part of the vectors alone; all search together.
        snapshot: Folder of a ready snapshot to start from; by default the index is built at the start.
        encode_batch_size: Passages at a time while encoding the corpus.
        recall_at: K of the recall against exact search that is measured of each approximate index.
    """

    factory: str = "exact"
    storage: Storage = "float32"
    nprobe: int | None = None
    ef_search: int | None = None
    num_training_vectors: int | None = None
    sharded: bool = False
    snapshot: str | None = None
    encode_batch_size: int = 64
    recall_at: int = 10


@runtime_checkable
class SearchSettings(Protocol):
    """What decides how an index ranks."""

    @property
    def metric(self) -> Metric:
        """By what it ranks."""
        ...


@runtime_checkable
class Searching(Protocol):
    """A model whose passage tower an index is built with."""

    @property
    def encoder(self) -> BiEncoder | None:
        """The towers; None for a model without."""
        ...

    @property
    def settings(self) -> SearchSettings:
        """How the index ranks."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Tell where the model is."""
        ...


class LiveIndex:
    """The live snapshot of one run and its successors; all processes call the same methods at the same step.

    Args:
        model: Its passage tower encodes, its metric ranks.
        corpus: What is searched.
        tokens: The corpus in the tower's vocabulary; None for a model without one.
        root: Where this run's snapshots are kept.
        settings: How they are made.
        seed: Seeds what FAISS draws.
        progress: Show a bar while encoding.
    """

    def __init__(
        self,
        *,
        model: Searching,
        corpus: PassageCorpus,
        tokens: PassageTokens | None,
        root: Path,
        settings: IndexSettings,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.corpus = corpus
        self.root = root
        self.settings = settings
        self.retriever: DenseRetriever | None = None
        self._tokens = tokens
        self._seed = seed
        self._progress = progress
        self._restored: dict[str, Any] = {}
        self._checkpointed = ""

    @property
    def step(self) -> int:
        """This run's optimiser step at which the live snapshot's encoder stood; 0 for a snapshot of another run."""
        if self.retriever is None or self.retriever.snapshot.path.parent.absolute() != self.root.absolute():
            return 0
        return self.retriever.snapshot.manifest.step

    @property
    def device(self) -> torch.device:
        """Where the model is, and so where an index is searched."""
        return next(self.model.parameters()).device

    def store(self) -> SnapshotStore:
        """Returns the folder of this run's snapshots."""
        return SnapshotStore(
            self.root,
            device=self._whole_device(),
            seed=self._seed,
            storage=self.settings.storage,
            **self._faiss_settings(),
        )

    @property
    def published_factory(self) -> str:
        """What a snapshot holds: with shards the vectors alone, as each process builds the index of its own part."""
        return "exact" if self.settings.sharded else self.settings.factory

    def _faiss_settings(self) -> dict[str, int | None]:
        names = ("num_training_vectors", "nprobe", "ef_search")
        return {name: None if self.settings.sharded else getattr(self.settings, name) for name in names}

    def ensure(self, *, step: int, fresh: bool = False) -> None:
        """Makes a snapshot live if none is: the resumed one, the ready one, or one built now.

        Args:
            step: Optimiser steps taken.
            fresh: Build anew unless the live snapshot is of the passage tower as it is now.

        Raises:
            StaleIndexError: The ready snapshot is of another encoder or corpus.
            MissingFileError: The resumed run's snapshots are not there at all.
        """
        kept = distributed.broadcast_object(self.store().ids())  # as one process sees the folder
        ready = self.settings.snapshot
        restored = self._restored.get("snapshot_id")
        if self.retriever is None and ready is not None and restored in (None, Path(ready).name):
            self.go_live(self._open_ready(ready))
        elif self.retriever is None and restored is not None and (not kept or restored in kept):
            self.go_live(self.open(restored, encoder_hash=self._restored["encoder_hash"]))
        if self.retriever is None and self._restored and not fresh:
            logger.warning(
                "%s: the checkpoint's index snapshot %s is no longer there (only the last ones are kept); a fresh one "
                "is built, so training goes on with a fresher index than it had. reindex.keep_last keeps more.",
                self.root,
                self._restored["snapshot_id"],
            )
        if self.retriever is None or (fresh and self._is_stale(self.retriever.snapshot)):
            self.go_live(self.build(step))

    def build(self, step: int, *, probe_PD: Float[Tensor, "P D"] | None = None) -> Snapshot:
        """Encodes the corpus, each process its part, and publishes a snapshot; the live one stays live.

        Args:
            step: Optimiser steps taken.
            probe_PD: Question vectors to measure an approximate index's recall with.
        """
        encoder = self.model.encoder
        if encoder is None or self._tokens is None:
            raise ConfigError("this run has no passage encoder to build an index with")
        rows = distributed.shard(len(self.corpus), distributed.rank(), distributed.world_size())
        batch_size = self.settings.encode_batch_size
        snapshot = self.store().publish_shards(
            encode_passages(encoder, self._tokens, rows, batch_size=batch_size, progress=self._progress),
            encoder_hash=encoder.passage_hash(),
            corpus_hash=self.corpus.hash,
            pooling=encoder.passage_tower().pooling,
            factory=self.published_factory,
            metric=self.model.settings.metric,
            step=step,
            recall_queries=probe_PD.float().cpu() if probe_PD is not None else None,
            recall_at=self.settings.recall_at,
        )
        return self.divided(snapshot)

    def open(self, snapshot_id: str, *, encoder_hash: str | None = None, verify: bool = True) -> Snapshot:
        """Opens one of this run's snapshots; this process's part of it where the index is sharded."""
        return self.divided(self.open_whole(snapshot_id, encoder_hash=encoder_hash, verify=verify))

    def open_whole(self, snapshot_id: str, *, encoder_hash: str | None = None, verify: bool = False) -> Snapshot:
        """Opens one of this run's snapshots; speaks with no other process, so a thread may do it."""
        return self.store().open(
            snapshot_id,
            encoder_hash=encoder_hash,
            corpus_hash=self.corpus.hash,
            metric=self.model.settings.metric,
            verify=verify,
        )

    def go_live(self, snapshot: Snapshot) -> None:
        """Makes a snapshot live; call it between steps.

        Raises:
            StaleIndexError: It ranks by another metric than the model's; the old one stays live.
        """
        if snapshot.manifest.metric != self.model.settings.metric:
            raise StaleIndexError(
                f"index snapshot {snapshot.id}: expected metric {self.model.settings.metric!r} as the model's, "
                f"came {snapshot.manifest.metric!r}. Build the index again."
            )
        if self.retriever is None:
            self.retriever = DenseRetriever(snapshot, self.corpus)
        else:
            self.retriever.swap(snapshot)

    def collect(self, keep_last: int) -> list[str]:
        """Removes old snapshots but the last ones, the live one and that of the last checkpoint; returns their ids."""
        keep = {self._checkpointed}
        if self.retriever is not None:
            keep.add(self.retriever.snapshot_id)
        return self.store().prune(keep_last, keep)

    def job(self, step: int, *, passages: str, cache_dir: Path, device: str) -> RefreshJob:
        """Returns what another process needs to know to build the snapshot of the tower as it is now."""
        encoder = self.model.encoder
        assert encoder is not None
        parameter = next(encoder.passage_tower().parameters())
        store = self._faiss_settings()
        return RefreshJob(
            passages=passages,
            corpus_hash=self.corpus.hash,
            cache_dir=str(cache_dir.absolute()),
            index_dir=str(self.root.absolute()),
            step=step,
            metric=self.model.settings.metric,
            factory=self.published_factory,
            storage=self.settings.storage,
            num_training_vectors=store["num_training_vectors"],
            nprobe=store["nprobe"],
            ef_search=store["ef_search"],
            seed=self._seed,
            batch_size=self.settings.encode_batch_size,
            device=device,
            dtype=str(parameter.dtype).removeprefix("torch."),
            recall_at=self.settings.recall_at,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns which snapshot is live; it is kept from collection until the next checkpoint."""
        if self.retriever is None:
            return {}
        manifest = self.retriever.snapshot.manifest
        self._checkpointed = manifest.snapshot_id
        return {"snapshot_id": manifest.snapshot_id, "encoder_hash": manifest.encoder_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers which snapshot was live, to be opened by :meth:`ensure`."""
        self._restored = dict(state_dict)
        self._checkpointed = self._restored.get("snapshot_id", "")
        self.retriever = None

    def _open_ready(self, path: str) -> Snapshot:
        encoder = self.model.encoder
        encoder_hash = encoder.index_hash() if encoder is not None else None
        opened = open_snapshot(
            path,
            encoder_hash=encoder_hash,
            corpus_hash=self.corpus.hash,
            metric=self.model.settings.metric,
            device=self._whole_device(),
        )
        nprobe, ef_search = self.settings.nprobe, self.settings.ef_search
        if isinstance(opened.index, FaissIndex):
            opened.index.set_search(nprobe=nprobe, ef_search=ef_search)
        elif (nprobe, ef_search) != (None, None) and not self.settings.sharded:
            raise ConfigError(
                f"index.snapshot={path}: expected a FAISS index, as nprobe and ef_search are about one, came exact "
                "search. Leave them unset."
            )
        return self.divided(opened)

    def divided(self, snapshot: Snapshot) -> Snapshot:
        """Returns a snapshot with this process's part of the index, where it is sharded; all call it together."""
        if not self.settings.sharded:
            return snapshot
        index = open_shard(
            snapshot.vectors_ND,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            factory=self.settings.factory,
            metric=snapshot.manifest.metric,
            device=self._search_device(),
            num_training_vectors=self.settings.num_training_vectors,
            nprobe=self.settings.nprobe,
            ef_search=self.settings.ef_search,
            seed=self._seed,
        )
        return replace(snapshot, index=index)

    def _whole_device(self) -> torch.device | None:
        """Where whole indexes are opened: with shards only as a memory map, since parts are searched."""
        return None if self.settings.sharded else self._search_device()

    def _search_device(self) -> torch.device | None:
        return self.device if self.device.type != "cpu" else None

    def _is_stale(self, snapshot: Snapshot) -> bool:
        encoder = self.model.encoder
        if encoder is None or encoder.passage is None:
            return False
        return snapshot.manifest.encoder_hash != encoder.passage_hash()
