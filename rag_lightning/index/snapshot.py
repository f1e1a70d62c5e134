"""Snapshots: an index with its vectors and a manifest, built beside, verified, and published by rename.

A snapshot is a folder ``step<step>-<hash>`` with ``vectors.npy`` (float32, memory-mapped), for FAISS factories the
index itself, and ``manifest.json``, written last. Whatever interrupts a build leaves the published snapshots as they
were; a hidden ``.step….building`` folder is all that a killed process can leave.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from rag_lightning.errors import CorruptSnapshotError, MissingFileError, RagError
from rag_lightning.index.base import Metric, Vectors
from rag_lightning.index.build import build_index
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    VECTORS_FILE,
    Manifest,
    Origin,
    Snapshot,
    open_snapshot,
)
from rag_lightning.index.vectors import join_vectors, open_vectors, write_vectors
from rag_lightning.utils import distributed
from rag_lightning.utils.hashing import hash_file, hash_texts
from rag_lightning.utils.io import write_json

ResultT = TypeVar("ResultT")

__all__ = ["Manifest", "Origin", "Snapshot", "SnapshotStore", "open_snapshot"]


class SnapshotStore:
    """A folder of snapshots, and how its indexes are built and searched.

    Args:
        root: Where the snapshots lie; created by the first build.
        device: Where opened indexes search; None is the CPU.
        num_training_vectors: See :func:`~rag_lightning.index.build.build_index`, as for those that follow.
        nprobe: Inverted lists visited for each query.
        ef_search: Breadth of the graph search.
        seed: Seeds what FAISS draws.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        device: torch.device | str | None = None,
        num_training_vectors: int | None = None,
        nprobe: int | None = None,
        ef_search: int | None = None,
        seed: int = 0,
    ) -> None:
        self.root = Path(root)
        self._device = device
        self._num_training_vectors = num_training_vectors
        self._nprobe = nprobe
        self._ef_search = ef_search
        self._seed = seed

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
        return open_snapshot(path, encoder_hash=encoder_hash, corpus_hash=corpus_hash, verify=verify, device=device)

    def remove(self, snapshot_id: str) -> None:
        """Deletes a snapshot; maps of it that are open stay readable until they are closed."""
        if snapshot_id in self.ids():
            shutil.rmtree(self.root / snapshot_id)

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
        with _removed_on_failure(path):
            self.write_shard(path, 0, vectors)
            return self.finish(path, 1, origin)

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
        with _removed_on_failure(path if main else None):
            _together(lambda: self.write_shard(path, distributed.rank(), vectors))
            snapshot = _together(lambda: self.finish(path, distributed.world_size(), origin) if main else None)
        snapshot_id = distributed.broadcast_object("" if snapshot is None else snapshot.id)
        return snapshot if snapshot is not None else self.open(snapshot_id, verify=False)

    def begin(self, step: int) -> Path:
        """Makes a hidden building folder; several processes pass the same path on to ``write_shard``.

        Raises:
            CorruptSnapshotError: The folder cannot be made.
        """
        with _build_errors(self.root, None):
            self.root.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=f".step{step:08d}.", suffix=".building", dir=self.root))

    def write_shard(self, path: Path, rank: int, vectors: Vectors | Iterable[Tensor]) -> None:
        """Writes one process's rows into the building folder; the caller abandons the folder when this fails.

        Raises:
            CorruptSnapshotError: The disk is full or failed; the message names the space needed.
            DataError: No rows, NaN or infinity, or blocks of several dimensions.
        """
        num_bytes = 4 * int(np.prod(vectors.shape)) if isinstance(vectors, (Tensor, np.ndarray)) else None
        with _build_errors(path, num_bytes):
            write_vectors(path / _shard_name(rank), vectors)

    def abandon(self, path: Path) -> None:
        """Removes a building folder."""
        shutil.rmtree(path, ignore_errors=True)

    def finish(self, path: Path, world_size: int, origin: Origin) -> Snapshot:
        """Joins the shards, builds the index, writes the manifest, reads all back, and publishes by rename.

        On failure the building folder is removed. A snapshot of the same content that is already there is replaced.

        Args:
            path: The building folder.
            world_size: Number of shards.
            origin: What the vectors were made from.

        Raises:
            CorruptSnapshotError: A shard is missing, the disk is full or failed, or what was written reads back wrong.
            ConfigError: A factory that cannot be built over the vectors.
            DataError: Vectors that cannot be searched.
        """
        with _removed_on_failure(path):
            num_vectors, dimension = self._build(path, world_size, origin)
            with _build_errors(path, 4 * num_vectors * dimension):
                checksums = _sync_and_hash(path)
                content = hash_texts([*map(str, asdict(origin).values()), *map(str, checksums.items())])
                manifest = Manifest(
                    format_version=FORMAT_VERSION,
                    snapshot_id=f"step{origin.step:08d}-{content[:8]}",
                    **asdict(origin),
                    num_vectors=num_vectors,
                    dimension=dimension,
                    created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    checksums=checksums,
                )
                write_json(path / MANIFEST_FILE, asdict(manifest))
                _sync(path / MANIFEST_FILE)
                _sync(path)
            snapshot = open_snapshot(path, device=self._device)
            return replace(snapshot, path=self._rename(path, snapshot.id))

    def _build(self, path: Path, world_size: int, origin: Origin) -> tuple[int, int]:
        shards = [path / _shard_name(rank) for rank in range(world_size)]
        num_bytes = sum(shard.stat().st_size for shard in shards if shard.exists())
        with _build_errors(path, num_bytes):
            join_vectors(shards, path / VECTORS_FILE)
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
            if not isinstance(index, ExactIndex):  # the exact index is its vectors, which are there already
                index.save(path)
        return int(vectors_ND.shape[0]), int(vectors_ND.shape[1])

    def _rename(self, path: Path, snapshot_id: str) -> Path:
        target = self.root / snapshot_id
        with _build_errors(path, None):
            if target.exists():  # the same bytes of the same origin; the new copy is known to be whole
                shutil.rmtree(target)
            path.rename(target)
            _sync(self.root)
        return target


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.npy"


def _sync_and_hash(path: Path) -> dict[str, str]:
    checksums = {}
    for file in sorted(path.iterdir()):
        _sync(file)
        checksums[file.name] = hash_file(file)
    return checksums


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


@contextmanager
def _removed_on_failure(path: Path | None) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C too leaves nothing half built
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        raise


@contextmanager
def _build_errors(path: Path, num_bytes: int | None) -> Iterator[None]:
    """Turns the system's errors into one that names the space needed."""
    try:
        yield
    except RagError:
        raise
    except OSError as error:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = f"{_mebibytes(shutil.disk_usage(place).free)} are free"
        if num_bytes is not None:
            free = f"its vectors need {_mebibytes(num_bytes)}, an index that holds them as much again; {free}"
        raise CorruptSnapshotError(
            f"{path.parent}: the index snapshot could not be built: {error} ({free}). "
            "Published snapshots are untouched: free some space or choose another folder."
        ) from error


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
