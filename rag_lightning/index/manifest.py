"""What a snapshot says of itself, and how one is opened: nothing torn or stale is searched."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingFileError, StaleIndexError
from rag_lightning.index.base import MISSING_ID, Index, Metric, as_metric
from rag_lightning.index.build import on_gpu
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.faiss import FaissIndex
from rag_lightning.index.vectors import open_vectors
from rag_lightning.utils.hashing import hash_file
from rag_lightning.utils.io import read_json

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
VECTORS_FILE = "vectors.npy"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a snapshot is to be made from, checked before anything is built.

    Attributes:
        encoder_hash: Weights of the passage encoder.
        corpus_hash: Passages, in order.
        pooling: How the encoder pools, for people to read.
        factory: ``exact`` or a FAISS factory string.
        metric: What the index ranks by.
        step: Optimiser steps that the encoder has taken.

    Raises:
        ConfigError: Not a metric, an empty factory, or a negative step.
    """

    encoder_hash: str
    corpus_hash: str
    pooling: str
    factory: str = "exact"
    metric: Metric = "inner_product"
    step: int = 0

    def __post_init__(self) -> None:
        as_metric(self.metric)
        if self.factory.strip() == "":
            raise ConfigError(
                "factory: expected 'exact' or a FAISS factory string such as 'HNSW32', came an empty one."
            )
        if self.step < 0:
            raise ConfigError(f"step: expected 0 or more, came {self.step}.")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot was made from.

    Attributes:
        format_version: Of the folder's layout; a newer one than this package's is refused.
        snapshot_id: ``step<step>-<hash>``; the hash is of the files and of the origin.
        encoder_hash: As in :class:`Origin`, with those that follow.
        corpus_hash: Passages, in order.
        pooling: How the encoder pools.
        factory: ``exact`` or a FAISS factory string.
        metric: What the index ranks by.
        step: Optimiser steps that the encoder had taken.
        num_vectors: N.
        dimension: D.
        created: ISO 8601, UTC.
        checksums: SHA-256 of every other file.
    """

    format_version: int
    snapshot_id: str
    encoder_hash: str
    corpus_hash: str
    pooling: str
    factory: str
    metric: Metric
    step: int
    num_vectors: int
    dimension: int
    created: str
    checksums: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """An open snapshot.

    Attributes:
        manifest: What it was made from.
        path: Its folder.
        index: Ready to search.
        vectors_ND: The exact vectors, memory-mapped.
    """

    manifest: Manifest
    path: Path
    index: Index
    vectors_ND: Float[np.ndarray, "N D"]

    @property
    def id(self) -> str:
        """The snapshot id, also the folder's name."""
        return self.manifest.snapshot_id

    def vectors(self, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        """Returns the exact float32 vectors of some rows, on the device of ``ids``; zeros where the id is -1.

        Raises:
            DataError: An id that is no row of this snapshot.
        """
        rows = ids.detach().cpu().numpy()
        num_vectors = len(self.vectors_ND)
        if rows.size > 0 and (rows.min() < MISSING_ID or rows.max() >= num_vectors):
            raise DataError(
                f"snapshot {self.id}: expected passage numbers within -1..{num_vectors - 1}, "
                f"came {rows.min()}..{rows.max()}. The hits are of another corpus."
            )
        gathered = np.array(self.vectors_ND[np.maximum(rows, 0)], dtype=np.float32)
        gathered[rows == MISSING_ID] = 0.0
        return torch.from_numpy(gathered).to(ids.device)


def open_snapshot(
    path: str | Path,
    *,
    encoder_hash: str | None = None,
    corpus_hash: str | None = None,
    verify: bool = True,
    device: torch.device | str | None = None,
) -> Snapshot:
    """Opens a snapshot's folder.

    Args:
        path: The folder.
        encoder_hash: What the questions' partner encoder hashes to; None skips the comparison.
        corpus_hash: What the passages hash to; None skips the comparison.
        verify: Read every file and compare its checksum; False trusts them, as right after publishing.
        device: Where the index searches; None is the CPU.

    Raises:
        MissingFileError: No such folder.
        StaleIndexError: Made by another encoder or from another corpus; both hashes are named.
        CorruptSnapshotError: A file is missing, torn or altered, or the format is newer than this package.
        MissingExtraError: A FAISS index without FAISS.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingFileError(f"index snapshot: no such folder: {path}. Check the path, or build the index.")
    manifest = read_manifest(path)
    _check_origin(manifest, "encoder", manifest.encoder_hash, encoder_hash)
    _check_origin(manifest, "corpus", manifest.corpus_hash, corpus_hash)
    for name, digest in manifest.checksums.items():
        if not (path / name).is_file():
            raise _torn(path / name, "the file", "none")
        if verify and hash_file(path / name) != digest:
            raise _torn(path / name, f"the checksum {digest[:12]}…", hash_file(path / name)[:12] + "…")
    vectors_ND = open_vectors(path / VECTORS_FILE)
    if vectors_ND.shape != (manifest.num_vectors, manifest.dimension):
        raise _torn(path / VECTORS_FILE, f"{manifest.num_vectors} x {manifest.dimension}", str(vectors_ND.shape))
    index: Index
    if manifest.factory == "exact":
        index = ExactIndex(vectors_ND, metric=manifest.metric, device=device)
    else:
        index = FaissIndex.load(path, gpu=on_gpu(device))
    found = (index.num_vectors, index.dimension, index.metric)
    if found != (manifest.num_vectors, manifest.dimension, manifest.metric):
        raise _torn(path, f"an index of {manifest.num_vectors} x {manifest.dimension}, {manifest.metric}", str(found))
    return Snapshot(manifest=manifest, path=path, index=index, vectors_ND=vectors_ND)


def read_manifest(path: Path) -> Manifest:
    """Reads a snapshot's manifest.

    Raises:
        CorruptSnapshotError: Missing, not JSON, of a newer format, or with other fields than this format has.
    """
    file = path / MANIFEST_FILE
    try:
        record = cast(Any, read_json(file, "snapshot manifest"))
    except DataError as error:
        raise CorruptSnapshotError(f"{file}: expected the manifest of a whole snapshot: {error}") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise CorruptSnapshotError(
            f"{file}: expected snapshot format {FORMAT_VERSION} or older, came {version}. "
            "Update rag_lightning, or build the index again."
        )
    names = {field.name for field in fields(Manifest)}
    if not isinstance(record, dict) or set(record) != names:
        raise _torn(
            file, f"the fields {sorted(names)}", str(sorted(record)) if isinstance(record, dict) else str(record)[:80]
        )
    types: dict[str, type] = dict.fromkeys(names, str)
    types |= {"format_version": int, "step": int, "num_vectors": int, "dimension": int, "checksums": dict}
    for name, value in record.items():
        if type(value) is not types[name]:
            raise _torn(file, f"{name} as {types[name].__name__}", repr(value)[:80])
    if record["metric"] not in get_args(Metric):
        raise _torn(file, f"metric as one of {', '.join(get_args(Metric))}", repr(record["metric"]))
    checksums = record["checksums"]
    if VECTORS_FILE not in checksums or any(Path(name).name != name for name in checksums):
        raise _torn(file, f"checksums of {VECTORS_FILE} and of files beside it", repr(sorted(checksums))[:200])
    return Manifest(**record)


def _check_origin(manifest: Manifest, what: str, has: str, expected: str | None) -> None:
    if expected is not None and has != expected:
        raise StaleIndexError(
            f"index snapshot {manifest.snapshot_id} (step {manifest.step}): expected one of {what} {expected}, "
            f"came one of {what} {has}. Build the index again, or use the {what} that it was made from."
        )


def _torn(path: Path, expected: str, came: str) -> CorruptSnapshotError:
    return CorruptSnapshotError(
        f"{path}: the snapshot is torn or altered: expected {expected}, came {came}. Build the index again."
    )
