"""A process of its own that makes index snapshots, while training goes on with the one before.

The trainer writes a job, a hidden folder beside the snapshots, and sends its path to the builder's standard input. The
builder encodes the corpus with the passage tower found there, builds, verifies and publishes the snapshot, and writes
``done.json`` (or ``failed.json``). Nothing else passes between the two, so a builder that is killed costs one refresh
and nothing more, and a trainer that is killed closes the pipe, at which the builder ends itself.

A job folder, written whole or not at all::

    job.json       a RefreshJob
    encoder/       the passage tower, in the layout of BiEncoder.save, and encoder.json, its settings
    probe.npy      question vectors to measure the new index's recall with (where its search is approximate)
"""

import copy
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import RagError, StaleIndexError
from rag_lightning.index.base import Metric
from rag_lightning.index.snapshot import Snapshot, SnapshotStore
from rag_lightning.index.vectors import Storage
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.text.token_store import TokenStore, open_or_build
from rag_lightning.utils.io import atomic_directory, read_json, write_json

JOB_FILE, DONE_FILE, FAILED_FILE, PROBE_FILE = "job.json", "done.json", "failed.json", "probe.npy"
ENCODER_FILE = "encoder.json"


@dataclass(frozen=True, kw_only=True)
class RefreshJob:
    """What to build, and how; plain JSON.

    Attributes:
        passages: Passage file.
        corpus_hash: What it must hash to.
        cache_dir: Where token stores are.
        index_dir: Where to publish.
        step: Optimiser steps that the encoder has taken.
        metric: What to rank by.
        factory: ``exact`` or a FAISS factory string.
        storage: How vectors are kept.
        num_training_vectors: See :class:`~rag_lightning.index.snapshot.SnapshotStore`, as for those that follow.
        nprobe: Inverted lists visited for each query.
        ef_search: Breadth of the graph search.
        seed: Seeds what FAISS draws.
        batch_size: Passages at a time.
        device: Where to encode.
        dtype: Of the tower's weights, such as ``float32``.
        recall_at: K of the recall that is measured.
    """

    passages: str
    corpus_hash: str
    cache_dir: str
    index_dir: str
    step: int
    metric: Metric
    factory: str
    storage: Storage
    num_training_vectors: int | None
    nprobe: int | None
    ef_search: int | None
    seed: int
    batch_size: int
    device: str
    dtype: str
    recall_at: int


def copy_of_passage_tower(encoder: BiEncoder) -> BiEncoder:
    """Returns the passage tower as it is now, on the CPU, to be written while the original learns on."""
    tower = copy.deepcopy(encoder.passage_tower()).cpu().requires_grad_(False)
    return BiEncoder(
        query=tower,
        passage=tower,
        tokenizer=encoder.tokenizer,
        query_template=encoder.query_template,
        passage_template=encoder.passage_template,
        max_query_tokens=encoder.max_query_tokens,
        max_passage_tokens=encoder.max_passage_tokens,
    )


def write_job(folder: Path, job: RefreshJob, tower: BiEncoder, probe_PD: Float[Tensor, "P D"] | None) -> None:
    """Publishes a job's folder, replacing one of the same name."""
    with atomic_directory(folder, replace=True) as part:
        tower.passage_tower().save(part / "encoder" / "passage")  # a DPR passage encoder loads as nothing else
        if tower.tokenizer is not None:
            tower.tokenizer.save_pretrained(part / "encoder" / "tokenizer")
        write_json(part / ENCODER_FILE, tower.settings())
        if probe_PD is not None:
            np.save(part / PROBE_FILE, probe_PD.float().cpu().numpy(), allow_pickle=False)
        write_json(part / JOB_FILE, asdict(job))


class IndexBuilder:
    """Does jobs; keeps the corpus and its token store open from one to the next."""

    def __init__(self) -> None:
        self._corpus: PassageCorpus | None = None
        self._source = ""

    def run(self, folder: Path) -> None:
        """Does one job and says in its folder how it ended; an error that says nothing to people ends the process."""
        start = time.perf_counter()
        try:
            snapshot = self.build(folder)
        except (RagError, OSError) as error:
            write_json(folder / FAILED_FILE, {"error": f"{type(error).__name__}: {error}"})
            return
        done = {"snapshot_id": snapshot.id, "seconds": round(time.perf_counter() - start, 3)}
        write_json(folder / DONE_FILE, done)

    def build(self, folder: Path) -> Snapshot:
        """Encodes, builds, verifies and publishes.

        Raises:
            StaleIndexError: The passage file has changed since training began.
            CorruptSnapshotError: The snapshot could not be written.
        """
        job = RefreshJob(**read_json(folder / JOB_FILE, "refresh job"))
        settings = read_json(folder / ENCODER_FILE, "refresh job's encoder")
        encoder = BiEncoder.load(folder / "encoder", settings).to(torch.device(job.device), _dtype(job.dtype)).eval()
        corpus = self._open_corpus(job)
        tokens = PassageTokens(encoder=encoder, corpus=corpus, store=_open_store(job, encoder, corpus))
        store = SnapshotStore(
            job.index_dir,
            num_training_vectors=job.num_training_vectors,
            nprobe=job.nprobe,
            ef_search=job.ef_search,
            seed=job.seed,
            storage=job.storage,
        )
        probe = folder / PROBE_FILE
        return store.publish(
            encode_passages(encoder, tokens, range(len(corpus)), batch_size=job.batch_size, progress=False),
            encoder_hash=encoder.passage_hash(),
            corpus_hash=corpus.hash,
            pooling=encoder.passage_tower().pooling,
            factory=job.factory,
            metric=job.metric,
            step=job.step,
            recall_queries=torch.from_numpy(np.load(probe, allow_pickle=False)) if probe.is_file() else None,
            recall_at=job.recall_at,
        )

    def _open_corpus(self, job: RefreshJob) -> PassageCorpus:
        if self._corpus is None or self._source != job.passages:
            self._corpus, self._source = PassageCorpus.read(job.passages), job.passages
        if self._corpus.hash != job.corpus_hash:
            raise StaleIndexError(
                f"{job.passages}: expected the corpus {job.corpus_hash} that training began with, came "
                f"{self._corpus.hash}. Leave the passage file as it is while a run goes on."
            )
        return self._corpus


def _open_store(job: RefreshJob, encoder: BiEncoder, corpus: PassageCorpus) -> TokenStore:
    assert encoder.tokenizer is not None
    return open_or_build(
        (encoder.passage_text(passage) for passage in corpus),
        encoder.tokenizer,
        cache_dir=Path(job.cache_dir),
        corpus_hash=corpus.hash,
        template_key=encoder.passage_template,
        max_tokens=encoder.max_passage_tokens,
        progress=False,
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _lines_of_input() -> Iterator[str]:
    """Yields the lines of standard input; ends the process, whatever it is doing, when that is closed."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
        os._exit(0)  # the trainer has gone: nobody would use what is being built

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def main() -> None:
    """Does the jobs whose folders come on standard input, until it is closed."""
    builder = IndexBuilder()
    for line in _lines_of_input():
        builder.run(Path(line))


if __name__ == "__main__":
    main()
