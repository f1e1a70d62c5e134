"""The whole corpus into a snapshot, spread over processes and nodes by Lightning's own launcher (``trainer.predict``).

The corpus is cut into shards of whole blocks. Each process encodes its share of the shards that no earlier build has
finished, and writes each as soon as it is whole, so a build that was killed goes on with the missing ones; then the
first process joins them and builds the index. The blocks are those of
:func:`~rag_lightning.retrieval.encode.encode_passages`, so the vectors are the same, whatever the number of processes
and however often the build was interrupted.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.index.base import Metric
from rag_lightning.index.manifest import Origin, Snapshot
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.index.vectors import Storage
from rag_lightning.retrieval.encode import PassageTokens, encode_block, row_blocks
from rag_lightning.text.token_store import TokenStore, open_or_build
from rag_lightning.utils import distributed
from rag_lightning.utils.hashing import hash_texts

TrainerMaker = Callable[[list[L.Callback]], L.Trainer]


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What kind of index to build, and how it is searched.

    Attributes:
        factory: ``exact`` or a FAISS factory string.
        metric: What to rank by.
        storage: How vectors are stored.
        num_training_vectors: Rows that train a FAISS index; None leaves it to the index.
        nprobe: Inverted lists visited for each query.
        ef_search: Breadth of the graph search.
        seed: Seeds what FAISS draws.
    """

    factory: str = "exact"
    metric: Metric = "inner_product"
    storage: Storage = "float32"
    num_training_vectors: int | None = None
    nprobe: int | None = None
    ef_search: int | None = None
    seed: int = 0

    def store(self, root: str | Path) -> SnapshotStore:
        """Returns a folder of snapshots that builds such indexes."""
        return SnapshotStore(
            root,
            storage=self.storage,
            num_training_vectors=self.num_training_vectors,
            nprobe=self.nprobe,
            ef_search=self.ef_search,
            seed=self.seed,
        )


class RowBlock:
    """A block of passages that are encoded together.

    A plain class on purpose: Lightning takes dataclasses and tuples apart to move what is in them.

    Args:
        shard: Which shard they belong to.
        rows: Which passages.
        last: Whether they end the shard.
    """

    def __init__(self, shard: int, rows: range, *, last: bool) -> None:
        self.shard, self.rows, self.last = shard, rows, last


class RowBlocks:
    """The loader of one process: the blocks of its shards, in order."""

    def __init__(self, shards: Sequence[tuple[int, range]], batch_size: int) -> None:
        self._blocks = [
            RowBlock(number, block, last=block.stop == rows.stop)
            for number, rows in shards
            for block in row_blocks(rows, batch_size)
        ]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[RowBlock]:
        return iter(self._blocks)


def corpus_shards(num_passages: int, *, shard_rows: int, batch_size: int) -> list[range]:
    """Returns the corpus cut into shards of whole blocks, about ``shard_rows`` passages each.

    Raises:
        ConfigError: A size below 1.

    >>> [len(rows) for rows in corpus_shards(200, shard_rows=50, batch_size=1)]
    [64, 64, 64, 8]
    """
    if shard_rows < 1 or batch_size < 1:
        raise ConfigError(f"expected shard_rows and batch_size of at least 1, came {shard_rows} and {batch_size}.")
    blocks = row_blocks(range(num_passages), batch_size)
    per_shard = -(-shard_rows // len(blocks[0]))
    firsts = blocks[::per_shard]
    stops = [block.start for block in firsts[1:]] + [num_passages]
    return [range(block.start, stop) for block, stop in zip(firsts, stops, strict=True)]


class CorpusEncoder(L.LightningModule):
    """Encodes blocks of passages in ``trainer.predict``.

    Args:
        encoder: Whose passage tower encodes.
        corpus: The passages.
        open_store: Opens the corpus's token store, and builds it where there is none.
        begin: Returns the building folder and its finished shards; called by the first process alone.
        shards: The rows of each shard.
        batch_size: Passages at a time.
    """

    def __init__(
        self,
        *,
        encoder: BiEncoder,
        corpus: PassageCorpus,
        open_store: Callable[[], TokenStore],
        begin: Callable[[], tuple[Path, set[int]]],
        shards: Sequence[range],
        batch_size: int,
    ) -> None:
        super().__init__()
        # a process for which no shard is left has nothing to do, which is no error
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.encoder = encoder
        self.path = Path()
        self._corpus, self._open_store, self._begin = corpus, open_store, begin
        self._shards, self._batch_size = shards, batch_size
        self._missing: list[int] = []
        self._tokens: PassageTokens | None = None

    def setup(self, stage: str) -> None:
        """Agrees on the building folder and on what is missing; opens the token store once the first process has it."""
        begun = self._begin() if distributed.rank() == 0 else (Path(), set[int]())
        self.path, finished = distributed.broadcast_object(begun)
        self._missing = [number for number in range(len(self._shards)) if number not in finished]
        store = self._open_store() if distributed.rank() == 0 else None
        distributed.barrier()
        store = store if store is not None else self._open_store()
        self._tokens = PassageTokens(encoder=self.encoder, corpus=self._corpus, store=store)

    def predict_dataloader(self) -> RowBlocks:
        """Returns the blocks of this process's share of the missing shards: every W-th of them."""
        mine = self._missing[distributed.rank() :: distributed.world_size()]
        return RowBlocks([(number, self._shards[number]) for number in mine], self._batch_size)

    def transfer_batch_to_device(self, batch: RowBlock, device: torch.device, dataloader_idx: int) -> RowBlock:
        """Leaves row numbers as they are; tokens are moved batch by batch."""
        return batch

    def predict_step(self, batch: RowBlock, batch_idx: int) -> Float[Tensor, "M D"]:
        """Returns the vectors of one block."""
        assert self._tokens is not None
        return encode_block(self.encoder, self._tokens, batch.rows, batch_size=self._batch_size)


class ShardWriter(BasePredictionWriter):
    """Collects the blocks of a shard and writes it into the building folder when it is whole.

    Args:
        snapshots: Whose building folder.
    """

    def __init__(self, snapshots: SnapshotStore) -> None:
        super().__init__(write_interval="batch")
        self._snapshots = snapshots
        self._blocks: list[Tensor] = []

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keeps a block, or writes the shard that it ends."""
        assert isinstance(pl_module, CorpusEncoder)
        self._blocks.append(prediction)
        if batch.last:
            self._snapshots.write_shard(pl_module.path, batch.shard, self._blocks)
            self._blocks = []


def open_passage_store(
    encoder: BiEncoder, corpus: PassageCorpus, cache_dir: Path, *, progress: bool = True
) -> TokenStore:
    """Opens the corpus tokenised for an encoder, and builds it where there is none.

    Raises:
        ConfigError: The encoder has no tokenizer.
    """
    if encoder.tokenizer is None:
        raise ConfigError("this encoder has no tokenizer: give one when loading it")
    return open_or_build(
        (encoder.passage_text(passage) for passage in corpus),
        encoder.tokenizer,
        cache_dir=cache_dir,
        corpus_hash=corpus.hash,
        template_key=encoder.passage_template,
        max_tokens=encoder.max_passage_tokens,
        progress=progress,
    )


def encode_corpus(
    *,
    make_trainer: TrainerMaker,
    encoder: BiEncoder,
    corpus: PassageCorpus,
    output: Path,
    settings: BuildSettings,
    cache_dir: Path,
    batch_size: int = 64,
    shard_rows: int = 50_000,
    step: int = 0,
    recall_queries: Float[Tensor, "P D"] | None = None,
    recall_at: int = 10,
    progress: bool = True,
) -> Snapshot | None:
    """Encodes a corpus and publishes its snapshot; every process that the trainer starts must call it.

    Args:
        make_trainer: Returns the trainer with the callbacks that it is given; its ``use_distributed_sampler`` is off.
        encoder: Whose passage tower encodes.
        corpus: The passages.
        output: Folder of the snapshots.
        settings: The index.
        cache_dir: Where token stores are kept.
        batch_size: Passages at a time.
        shard_rows: About how many passages are lost when a process is killed; 4 x D bytes of memory for each.
        step: Optimiser steps that the encoder has taken.
        recall_queries: See :meth:`SnapshotStore.finish`.
        recall_at: K of the recall.
        progress: Shows bars.

    Returns:
        The snapshot on the first process; None on the others, which need not wait while the index is built.

    Raises:
        ConfigError: A factory, metric or size that cannot be run as asked, or another process builds the same.
        CorruptSnapshotError: The disk is full or failed; finished shards stay.
    """
    origin = Origin(
        encoder_hash=encoder.passage_hash(),
        corpus_hash=corpus.hash,
        pooling=encoder.passage_tower().pooling,
        factory=settings.factory,
        metric=settings.metric,
        step=step,
    )
    shards = corpus_shards(len(corpus), shard_rows=shard_rows, batch_size=batch_size)
    snapshots = settings.store(output)
    sizes = (len(corpus), len(shards[0]), encoder.dimension, step)
    key = hash_texts([origin.encoder_hash, origin.corpus_hash, settings.storage, *map(str, sizes)])

    def begin() -> tuple[Path, set[int]]:
        path = snapshots.begin(step, key=key)
        return path, snapshots.finished_shards(path)

    def open_store() -> TokenStore:
        return open_passage_store(encoder, corpus, cache_dir, progress=progress)

    module = CorpusEncoder(
        encoder=encoder, corpus=corpus, open_store=open_store, begin=begin, shards=shards, batch_size=batch_size
    )
    trainer = make_trainer([ShardWriter(snapshots)])
    if trainer.global_rank == 0:
        open_store()  # before Lightning starts other processes, which would wait for it with a time limit
    with warnings.catch_warnings():
        # row numbers are in the block itself; the total is zero where all shards were finished before
        warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
        warnings.filterwarnings("ignore", message="Total length of `RowBlocks` across ranks is zero")
        trainer.predict(module, return_predictions=False)
    distributed.barrier()
    if distributed.rank() != 0:
        return None
    return snapshots.finish(module.path, len(shards), origin, recall_queries=recall_queries, recall_at=recall_at)
