"""Snapshots: an index with its vectors and a manifest, built beside, verified, and published by rename.

A snapshot is a folder ``step<step>-<hash>`` with ``vectors.npy`` (float32, float16 or int8 with ``scales.npy``,
memory-mapped), for FAISS factories the index itself, and ``manifest.json``, written last. Whatever interrupts a build
leaves the published snapshots as they were; hidden folders are all that a killed process can leave
(:mod:`~rag_lightning.index.building`), and :meth:`SnapshotStore.sweep` removes them.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import ConfigError, CorruptSnapshotError, MissingFileError
from rag_lightning.index import building
from rag_lightning.index.base import Index, Metric
from rag_lightning.index.build import build_index
from rag_lightning.index.building import build_errors, sync, sync_and_hash
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.locks import SnapshotLock
from rag_lightning.index.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    Origin,
    Snapshot,
    is_whole,
    open_snapshot,
    read_manifest,
    snapshot_id,
)
from rag_lightning.index.quality import recall_against_exact
from rag_lightning.index.vector_files import VECTORS_FILE, in_storage, stored_bytes, write_vectors
from rag_lightning.index.vectors import DTYPES, Storage, StoredVectors, Vectors, open_vectors
from rag_lightning.utils import distributed
from rag_lightning.utils.io import write_json

ResultT = TypeVar("ResultT")

LOCK_FILE = ".lock"

__all__ = ["Manifest", "Origin", "Snapshot", "SnapshotLock", "SnapshotStore", "open_snapshot"]


class SnapshotStore:
    """A folder of snapshots, and how its indexes are built and searched.

    Args:
        root: Where the snapshots lie; created by the first build.
        device: Where opened indexes search; None is the CPU.
        storage: How vectors are stored from now on; snapshots of any storage are opened.
        num_training_vectors: See :func:`~rag_lightning.index.build.build_index`, as for those that follow.
        nprobe: Inverted lists visited for each query.
        ef_search: Breadth of the graph search.
        seed: Seeds what FAISS draws.

    Raises:
        ConfigError: Not a storage.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        device: torch.device | str | None = None,
        storage: Storage = "float32",
        num_training_vectors: int | None = None,
        nprobe: int | None = None,
        ef_search: int | None = None,
        seed: int = 0,
    ) -> None:
        if storage not in get_args(Storage):
            raise ConfigError(f"storage: expected one of {', '.join(get_args(Storage))}; came {storage!r}.")
        self.root = Path(root)
        self._device = device
        self._storage = storage
        self._num_training_vectors = num_training_vectors
        self._nprobe = nprobe
        self._ef_search = ef_search
        self._seed = seed
        self._building: dict[Path, SnapshotLock] = {}

    def ids(self) -> list[str]:
        """Returns the published snapshots, oldest step first."""
        if not self.root.is_dir():
            return []
        return sorted(
            path.name
            for path in self.root.iterdir()
            if path.name.startswith("step") and (path / MANIFEST_FILE).is_file()
        )

    def open(
        self,
        snapshot_id: str,
        *,
        encoder_hash: str | None = None,
        corpus_hash: str | None = None,
        metric: Metric | None = None,
        verify: bool = True,
        device: torch.device | str | None = None,
    ) -> Snapshot:
        """Opens one of the snapshots; see :func:`open_snapshot`. ``device`` None is the store's own."""
        path = self.root / snapshot_id
        if not path.is_dir():
            raise MissingFileError(
                f"index snapshot: no snapshot {snapshot_id!r} in {self.root}. Name one of those there "
                f"({', '.join(self.ids()) or 'none'}), or build the index."
            )
        device = self._device if device is None else device
        return open_snapshot(
            path, encoder_hash=encoder_hash, corpus_hash=corpus_hash, metric=metric, verify=verify, device=device
        )

    def remove(self, snapshot_id: str) -> None:
        """Deletes a snapshot; maps of it that are open stay readable until they are closed."""
        if snapshot_id in self.ids():
            building.discard(self.root / snapshot_id)

    def prune(self, keep_last: int, keep: Collection[str] = ()) -> list[str]:
        """Removes old snapshots and returns their ids, oldest first; maps of them that are open stay readable.

        Args:
            keep_last: How many to leave, the newest by step and, of one step, by the time of building.
            keep: Ids to leave whatever their age, such as the live one and those that checkpoints name.

        Raises:
            ConfigError: ``keep_last`` below 1.
        """
        if keep_last < 1:
            raise ConfigError(f"keep_last: expected 1 or more, came {keep_last}. A run searches its newest snapshot.")
        by_age = []
        for name in self.ids():
            try:
                manifest = read_manifest(self.root / name)
            except CorruptSnapshotError:  # torn, or removed meanwhile: neither counted nor touched
                continue
            by_age.append((manifest.step, manifest.created, name))
        removed = [name for _, _, name in sorted(by_age)[:-keep_last] if name not in keep]
        for name in removed:
            self.remove(name)
        return removed

    def lock(self) -> SnapshotLock:
        """Keeps other runs off this folder until ``release`` or the end of the process; one process of a run takes it.

        Raises:
            ConfigError: Another run holds it; its process and host are named.
            CorruptSnapshotError: The folder cannot be written to.
        """
        refusal = (
            f"{self.root}: expected a snapshot folder that no other run uses, came one in use by {{owner}}. Two runs "
            "would remove each other's snapshots: wait for that run, stop it, or give this one another folder."
        )
        with build_errors(self.root / LOCK_FILE, None):
            self.root.mkdir(parents=True, exist_ok=True)
            return SnapshotLock(self.root / LOCK_FILE, refusal=refusal)

    def sweep(self, *, resumable: bool = False) -> list[Path]:
        """Removes the building folders of processes that are gone, and returns them.

        Args:
            resumable: Also those of builds with a key, whose finished shards would otherwise be used again.
        """
        return building.sweep(self.root, resumable=resumable)

    def publish(
        self,
        vectors: Vectors | Iterable[Tensor],
        *,
        encoder_hash: str,
        corpus_hash: str,
        pooling: str,
        factory: str = "exact",
        metric: Metric = "inner_product",
        step: int = 0,
        recall_queries: Float[Tensor, "P D"] | None = None,
        recall_at: int = 10,
    ) -> Snapshot:
        """Builds and publishes a snapshot in this process alone.

        Args:
            vectors: One row for each passage, in corpus order; or blocks of rows, streamed to disk as they come.
            encoder_hash: What encoded them.
            corpus_hash: What was encoded.
            pooling: How the encoder pools.
            factory: ``exact`` or a FAISS factory string.
            metric: What to rank by.
            step: Optimiser steps that the encoder has taken.
            recall_queries: See ``finish``, as for ``recall_at``.
            recall_at: K of the recall.

        Raises:
            CorruptSnapshotError: The disk is full or failed; the message names the space needed. Nothing is published.
            ConfigError: A factory, metric or step that cannot be run as asked.
            DataError: Vectors that cannot be searched.
        """
        origin = Origin(
            encoder_hash=encoder_hash,
            corpus_hash=corpus_hash,
            pooling=pooling,
            factory=factory,
            metric=metric,
            step=step,
        )
        path = self.begin(step)
        with self._removed_on_failure(path):
            self.write_shard(path, 0, vectors)
            return self.finish(path, 1, origin, recall_queries=recall_queries, recall_at=recall_at)

    def publish_shards(
        self,
        vectors: Vectors | Iterable[Tensor],
        *,
        encoder_hash: str,
        corpus_hash: str,
        pooling: str,
        factory: str = "exact",
        metric: Metric = "inner_product",
        step: int = 0,
        recall_queries: Float[Tensor, "P D"] | None = None,
        recall_at: int = 10,
    ) -> Snapshot:
        """Like ``publish``, called by every process of the group with its own part of the rows.

        Ranks hold contiguous parts in rank order (:func:`~rag_lightning.utils.distributed.shard`) and share a file
        system. Rank 0 builds; all fail together, so that no rank waits for one that has gone.

        Args:
            vectors: This rank's rows, or blocks of them.
            encoder_hash: As in ``publish``, with those that follow.
            corpus_hash: What was encoded.
            pooling: How the encoder pools.
            factory: ``exact`` or a FAISS factory string.
            metric: What to rank by.
            step: Optimiser steps that the encoder has taken.
            recall_queries: See ``finish``, as for ``recall_at``.
            recall_at: K of the recall.

        Raises:
            CorruptSnapshotError: Some rank failed to write, or rank 0 to build; nothing is published.
            DataError: Some rank's vectors cannot be searched.
        """
        origin = Origin(
            encoder_hash=encoder_hash,
            corpus_hash=corpus_hash,
            pooling=pooling,
            factory=factory,
            metric=metric,
            step=step,
        )
        main = distributed.rank() == 0
        path = distributed.broadcast_object(_together(lambda: self.begin(step) if main else Path()))
        with self._removed_on_failure(path if main else None):
            _together(lambda: self.write_shard(path, distributed.rank(), vectors))
            snapshot = _together(
                lambda: (
                    self.finish(
                        path,
                        distributed.world_size(),
                        origin,
                        recall_queries=recall_queries,
                        recall_at=recall_at,
                    )
                    if main
                    else None
                )
            )
        snapshot_id = distributed.broadcast_object("" if snapshot is None else snapshot.id)
        return snapshot if snapshot is not None else self.open(snapshot_id, verify=False)

    def begin(self, step: int, *, key: str | None = None) -> Path:
        """Makes a hidden building folder; several processes pass the same path on to ``write_shard``.

        Args:
            step: Optimiser steps that the encoder has taken.
            key: Names what is being built and into how many shards it is cut, for instance a hash of encoder, corpus,
                storage and number of shards. The folder is then kept through failures and kills until it is finished
                or abandoned: begin the same key again, and write the shards that ``finished_shards`` lacks.

        Raises:
            ConfigError: Another process is building the same key.
            CorruptSnapshotError: The folder cannot be made.
        """
        for path, lock in list(self._building.items()):
            if key is not None and building.is_folder_of(path, key):  # begun again after a failure in this process
                self._building.pop(path)
                lock.release()
        with build_errors(self.root, None):
            path, lock = building.begin_folder(self.root, step, key)
        self._building[path] = lock
        return path

    def write_shard(self, path: Path, rank: int, vectors: Vectors | Iterable[Tensor]) -> None:
        """Writes one process's rows into the building folder; the caller abandons the folder when this fails.

        The shard is there when it is whole, and not before.

        Raises:
            CorruptSnapshotError: The disk is full or failed; the message names the space needed.
            DataError: No rows, NaN or infinity, blocks of several dimensions, or numbers too large for float16.
        """
        num_bytes = stored_bytes(vectors, self._storage)
        with build_errors(path, num_bytes), building.new_shard(path, rank) as part, build_errors(path, num_bytes, part):
            write_vectors(part / VECTORS_FILE, in_storage(vectors, self._storage))

    def finished_shards(self, path: Path) -> set[int]:
        """Returns which shards of a building folder are whole, whoever wrote them."""
        return building.finished_shards(path)

    def abandon(self, path: Path) -> None:
        """Removes a building folder, also one with a key."""
        shutil.rmtree(path, ignore_errors=True)
        self._release(path)

    def finish(
        self,
        path: Path,
        num_shards: int,
        origin: Origin,
        *,
        recall_queries: Float[Tensor, "P D"] | None = None,
        recall_at: int = 10,
    ) -> Snapshot:
        """Joins the shards, builds the index, writes the manifest, reads all back, and publishes by rename.

        On failure the building folder is removed, or kept if it was begun with a key. Where a whole snapshot of the
        same content is there already, that one stays.

        Args:
            path: The building folder.
            num_shards: How many shards it has.
            origin: What the vectors were made from.
            recall_queries: Vectors of questions on which a FAISS index is compared with exact search over the stored
                vectors; the manifest says how it did. None, or factory ``exact``: nothing is measured.
            recall_at: K of that recall, at most N.

        Raises:
            CorruptSnapshotError: A shard is missing, the disk is full or failed, or what was written reads back wrong.
            ConfigError: A factory that cannot be built over the vectors, or more shards than ``num_shards``.
            DataError: Vectors that cannot be searched.
        """
        with self._removed_on_failure(path):
            shape, recall = self._build(path, num_shards, origin, recall_queries, recall_at)
            with build_errors(path, int(np.prod(shape)) * DTYPES[self._storage].itemsize):
                checksums = sync_and_hash(path)
                manifest = Manifest(
                    format_version=FORMAT_VERSION,
                    snapshot_id=snapshot_id(origin, checksums),
                    **asdict(origin),
                    num_vectors=shape[0],
                    dimension=shape[1],
                    created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
                    checksums=checksums,
                    num_bytes={name: (path / name).stat().st_size for name in checksums},
                    storage=open_vectors(path / VECTORS_FILE).storage,
                    recall=recall,
                )
                write_json(path / MANIFEST_FILE, asdict(manifest))
                sync(path / MANIFEST_FILE)
                sync(path)
            return self._publish(path, open_snapshot(path, device=self._device))

    def _build(
        self, path: Path, num_shards: int, origin: Origin, queries_PD: Float[Tensor, "P D"] | None, recall_at: int
    ) -> tuple[tuple[int, int], dict[str, float]]:
        """Joins and indexes; returns the vectors' shape and the recall. The index is dropped before it is read back."""
        num_bytes = sum(file.stat().st_size for file in path.rglob(VECTORS_FILE))
        with build_errors(path, num_bytes):
            building.join_shards(path, num_shards)
            vectors_ND = open_vectors(path / VECTORS_FILE)
            index = build_index(
                vectors_ND,
                factory=origin.factory,
                metric=origin.metric,
                num_training_vectors=self._num_training_vectors,
                nprobe=self._nprobe,
                ef_search=self._ef_search,
                seed=self._seed,
            )
            if isinstance(index, ExactIndex):  # the exact index is its vectors, which are there already
                index.check_rows()
                return vectors_ND.shape, {}
            recall = _recall(index, vectors_ND, queries_PD, recall_at)
            index.save(path)
        return vectors_ND.shape, recall

    def _publish(self, path: Path, snapshot: Snapshot) -> Snapshot:
        """Renames the folder; a whole snapshot of the same content stays, as there is no instant without it."""
        target = self.root / snapshot.id
        with build_errors(path, None):
            if is_whole(target):
                self.abandon(path)
                return self.open(snapshot.id, verify=False)
            if target.exists():
                building.discard(target)
            path.rename(target)
            (target / building.JOURNAL_FILE).unlink(missing_ok=True)
            self._release(path, target)
            sync(self.root)
        return replace(snapshot, path=target)

    def _release(self, path: Path, moved_to: Path | None = None) -> None:
        lock = self._building.pop(path, None)
        if lock is not None:
            lock.release((moved_to or path) / building.LOCK_FILE)

    @contextmanager
    def _removed_on_failure(self, path: Path | None) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C too leaves nothing half built
            if path is not None and building.is_resumable(path):
                self._release(path)
            elif path is not None:
                self.abandon(path)
            raise


def _recall(
    index: Index, vectors_ND: StoredVectors, queries_PD: Float[Tensor, "P D"] | None, recall_at: int
) -> dict[str, float]:
    if queries_PD is None:
        return {}
    num_passages = min(recall_at, len(vectors_ND))
    share = recall_against_exact(index, vectors_ND, queries_PD.detach().cpu(), num_passages=num_passages)
    return {f"recall@{num_passages}": share}


def _together(work: Callable[[], ResultT]) -> ResultT:
    """Does this rank's part; when any rank has failed, all raise: their own error, or the first rank's in words."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    own = None if error is None else f"{type(error).__name__}: {error}"
    text = distributed.first_error(distributed.gather_objects(own))
    if error is not None:
        raise error
    if text is not None:
        raise CorruptSnapshotError(f"the index snapshot could not be built, another process failed: {text}")
    return cast(ResultT, result)
