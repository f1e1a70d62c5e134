"""What a snapshot says of itself, and how one is opened: nothing torn or stale is searched."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingFileError, StaleIndexError
from rag_lightning.index.base import MISSING_ID, Index, Metric, as_metric
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.faiss import FaissIndex
from rag_lightning.index.vector_files import VECTORS_FILE
from rag_lightning.index.vectors import Storage, StoredVectors, open_vectors
from rag_lightning.utils.hashing import hash_file, hash_texts
from rag_lightning.utils.io import read_json

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"

_SINCE_VERSION_2: dict[str, Any] = {"storage": "float32", "recall": {}, "num_bytes": {}}
"""What version 1 did not say, as it was then."""


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
        num_bytes: Length of every other file; empty in version 1.
        storage: How the vectors are stored.
        recall: Share of the exact top K that the index finds, such as ``{"recall@10": 0.93}``; empty where it was not
            measured.
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
    num_bytes: dict[str, int]
    storage: Storage
    recall: dict[str, float]


@dataclass(frozen=True)
class Snapshot:
    """An open snapshot.

    Attributes:
        manifest: What it was made from.
        path: Its folder.
        index: Ready to search.
        vectors_ND: The stored vectors, memory-mapped.
    """

    manifest: Manifest
    path: Path
    index: Index
    vectors_ND: StoredVectors

    @property
    def id(self) -> str:
        """The snapshot id, also the folder's name."""
        return self.manifest.snapshot_id

    def vectors(self, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        """Returns the stored vectors of some rows as float32, on the device of ``ids``; zeros where the id is -1.

        Raises:
            DataError: An id that is no row of this snapshot.
        """
        num_vectors = len(self.vectors_ND)
        if ids.numel() > 0 and (int(ids.min()) < MISSING_ID or int(ids.max()) >= num_vectors):
            raise DataError(
                f"snapshot {self.id}: expected passage numbers within -1..{num_vectors - 1}, "
                f"came {int(ids.min())}..{int(ids.max())}. The hits are of another corpus."
            )
        rows = ids.detach().cpu()
        gathered = self.vectors_ND.rows(rows.clamp(min=0))
        gathered[rows == MISSING_ID] = 0.0
        return gathered.to(ids.device)


def open_snapshot(
    path: str | Path,
    *,
    encoder_hash: str | None = None,
    corpus_hash: str | None = None,
    metric: Metric | None = None,
    verify: bool = True,
    device: torch.device | str | None = None,
) -> Snapshot:
    """Opens a snapshot's folder.

    Args:
        path: The folder.
        encoder_hash: What the questions' partner encoder hashes to; None skips the comparison.
        corpus_hash: What the passages hash to; None skips the comparison.
        metric: What the model scores by; None skips the comparison.
        verify: Read every file and compare its checksum. False compares lengths and headers only and does not read the
            vectors: for a snapshot that has just been published or verified.
        device: Where the index searches; None is the CPU.

    Raises:
        MissingFileError: No such folder.
        StaleIndexError: Made by another encoder, from another corpus or for another metric; both are named.
        CorruptSnapshotError: A file is missing, torn or altered, or the format is newer than this package.
        MissingExtraError: A FAISS index without FAISS.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingFileError(f"index snapshot: no such folder: {path}. Check the path, or build the index.")
    manifest = read_manifest(path)
    _check_origin(manifest, "encoder", manifest.encoder_hash, encoder_hash)
    _check_origin(manifest, "corpus", manifest.corpus_hash, corpus_hash)
    if metric is not None and manifest.metric != metric:
        raise StaleIndexError(
            f"index snapshot {manifest.snapshot_id}: expected metric {metric!r} as the model's, came "
            f"{manifest.metric!r}. Build the index again with the model's metric."
        )
    check_files(path, manifest, verify=verify)
    vectors_ND = open_vectors(path / VECTORS_FILE)
    found: tuple[object, ...] = (*vectors_ND.shape, vectors_ND.storage)
    if found != (manifest.num_vectors, manifest.dimension, manifest.storage):
        expected = f"{manifest.num_vectors} x {manifest.dimension} of {manifest.storage}"
        raise _torn(path / VECTORS_FILE, expected, f"{found[0]} x {found[1]} of {found[2]}")
    index: Index
    if manifest.factory == "exact":
        index = ExactIndex(vectors_ND, metric=manifest.metric, device=device)
    else:
        index = FaissIndex.load(path, device=device)
    found = (index.num_vectors, index.dimension, index.metric)
    if found != (manifest.num_vectors, manifest.dimension, manifest.metric):
        raise _torn(path, f"an index of {manifest.num_vectors} x {manifest.dimension}, {manifest.metric}", str(found))
    return Snapshot(manifest=manifest, path=path, index=index, vectors_ND=vectors_ND)


def check_files(path: Path, manifest: Manifest, *, verify: bool) -> None:
    """Compares a snapshot's files with its manifest.

    Args:
        path: The snapshot's folder.
        manifest: What it says of itself.
        verify: Read every file and compare its checksum too, not its length only.

    Raises:
        CorruptSnapshotError: A file is missing, of another length, or altered.
    """
    for name, digest in manifest.checksums.items():
        file = path / name
        if not file.is_file():
            raise _torn(file, "the file", "none")
        num_bytes = file.stat().st_size
        if num_bytes != manifest.num_bytes.get(name, num_bytes):
            raise _torn(file, f"{manifest.num_bytes[name]} bytes", f"{num_bytes}")
        if verify and (found := hash_file(file)) != digest:
            raise _torn(file, f"the checksum {digest[:12]}…", found[:12] + "…")


def is_whole(path: Path) -> bool:
    """Whether there is a snapshot in a folder whose files are those of its manifest; reads them all."""
    try:
        check_files(path, read_manifest(path), verify=True)
    except (CorruptSnapshotError, OSError):
        return False
    return True


def snapshot_id(origin: Origin, checksums: dict[str, str]) -> str:
    """Returns the id of a snapshot: its step, and a hash of what it was made from and of its files."""
    content = hash_texts([*map(str, asdict(origin).values()), *map(str, checksums.items())])
    return f"step{origin.step:08d}-{content[:8]}"


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
    if type(version) is int and not 1 <= version <= FORMAT_VERSION:
        raise CorruptSnapshotError(
            f"{file}: expected snapshot format {FORMAT_VERSION} or older, came {version}. "
            "Update rag_lightning, or build the index again."
        )
    names = {field.name for field in fields(Manifest)}
    known = names - set(_SINCE_VERSION_2) if version == 1 else names
    if not isinstance(record, dict) or set(record) != known:
        raise _torn(
            file, f"the fields {sorted(known)}", str(sorted(record)) if isinstance(record, dict) else str(record)[:80]
        )
    record = {**(_SINCE_VERSION_2 if version == 1 else {}), **record}
    _check_types(file, record)
    manifest = Manifest(**record)
    try:
        origin = Origin(**{field.name: record[field.name] for field in fields(Origin)})
    except ConfigError as error:
        raise _torn(file, "an origin that can be built", str(error)) from error
    if manifest.snapshot_id != snapshot_id(origin, manifest.checksums):
        raise _torn(file, f"the id {snapshot_id(origin, manifest.checksums)} of its content", manifest.snapshot_id)
    return manifest


def _check_types(file: Path, record: dict[str, Any]) -> None:
    types: dict[str, type] = dict.fromkeys(record, str)
    types |= {"format_version": int, "step": int, "num_vectors": int, "dimension": int}
    types |= {"checksums": dict, "num_bytes": dict, "recall": dict}
    for name, value in record.items():
        if type(value) is not types[name]:
            raise _torn(file, f"{name} as {types[name].__name__}", repr(value)[:80])
    for name, choices in (("metric", get_args(Metric)), ("storage", get_args(Storage))):
        if record[name] not in choices:
            raise _torn(file, f"{name} as one of {', '.join(choices)}", repr(record[name])[:80])
    for name, kind in (("checksums", str), ("num_bytes", int), ("recall", float)):
        if any(type(value) is not kind for value in record[name].values()):
            raise _torn(file, f"{name} as names with {kind.__name__}", repr(record[name])[:200])
    checksums = record["checksums"]
    if VECTORS_FILE not in checksums or any(Path(name).name != name for name in checksums):
        raise _torn(file, f"checksums of {VECTORS_FILE} and of files beside it", repr(sorted(checksums))[:200])


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
