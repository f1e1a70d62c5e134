"""The hidden folder in which a snapshot is built: its lock, its shards, and what is left of it after a kill.

An unnamed build lies in ``.step<step>.<random>.building`` and is thrown away when it fails. One with a key lies in
``.build-<hash of the key>.building`` and is kept: a shard appears there under its name only when it is whole, and the
joining of shards keeps a journal, so whoever begins the same key again finds out which shards it need not encode.
"""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, RagError
from rag_lightning.index.locks import SnapshotLock
from rag_lightning.index.vector_files import VECTORS_FILE, append_vectors
from rag_lightning.index.vectors import SCALES_FILE, Storage, StoredVectors, open_vectors
from rag_lightning.utils.hashing import hash_file, hash_texts
from rag_lightning.utils.io import read_json, write_json

LOCK_FILE = "owner.lock"
JOURNAL_FILE = "joined.json"
_NOT_CONTENT = (LOCK_FILE, JOURNAL_FILE)

_NEWBORN_S = 60.0
"""A building folder without a lock is left alone this long: its process may be about to take it."""


class _Journal(NamedTuple):
    """How many shards have been joined, how many rows they have, and of what kind."""

    shards: int
    num_vectors: int
    dimension: int
    storage: Storage


def begin_folder(root: Path, step: int, key: str | None) -> tuple[Path, SnapshotLock]:
    """Makes, or finds again, a building folder and locks it.

    Raises:
        ConfigError: Another process is building the same key.
        OSError: The folder cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    if key is None:
        return _new_folder(root, step)
    path = root / _name_of(key)
    path.mkdir(exist_ok=True)
    refusal = (
        f"{root}: expected to build index {key!r} alone, but another process is building it: {{owner}}. "
        "Wait for it, or stop it: what it has finished will be used."
    )
    lock = SnapshotLock(path / LOCK_FILE, refusal=refusal)
    _clear_unfinished(path)
    return path, lock


def is_resumable(path: Path) -> bool:
    """Whether a building folder outlives a failure.

    >>> is_resumable(Path("store/.step00000000.abc.building"))
    False
    """
    return path.name.startswith(".build-")


def is_folder_of(path: Path, key: str) -> bool:
    """Whether a building folder was begun with a key."""
    return path.name == _name_of(key)


@contextmanager
def new_shard(path: Path, rank: int) -> Iterator[Path]:
    """Yields a folder to write a shard into; it gets the shard's name when it is whole, or is removed."""
    shard = path / _shard_name(rank)
    part = shard.with_name(f"{shard.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if is_resumable(path):  # found again after a power failure too
            for file in part.iterdir():
                sync(file)
        shutil.rmtree(shard, ignore_errors=True)
        part.rename(shard)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def finished_shards(path: Path) -> set[int]:
    """Returns the shards of a building folder that are whole, those already joined included."""
    finished = set(range(_journal(path).shards))
    for shard in path.glob("shard-*"):
        if shard.suffix == ".part":
            continue
        try:
            open_vectors(shard / VECTORS_FILE)  # compares the number of rows in its header with its length
        except CorruptSnapshotError:
            continue
        finished.add(int(shard.name.removeprefix("shard-")))
    return finished


def join_shards(path: Path, num_shards: int) -> None:
    """Joins the shards in order into the folder's ``vectors.npy``, deleting each as soon as it is copied.

    The first becomes the target by renaming, so the peak on disk is the total plus one further part. The journal says
    after each which rows are whole: a join that was killed goes on from there.

    Raises:
        ConfigError: There are more shards.
        CorruptSnapshotError: One is missing or torn.
        DataError: Shards of different dimensions or storages.
    """
    beyond = sorted(finished_shards(path) - set(range(num_shards)))
    if beyond:
        raise ConfigError(
            f"{path}: expected {num_shards} shards, came also shards {beyond[:10]}. "
            "A key must name how many shards there are: give another number another key."
        )
    journal = _journal(path)
    shards = [path / _shard_name(rank) for rank in range(num_shards)]
    _check_alike(journal, [open_vectors(shard / VECTORS_FILE) for shard in shards[journal.shards :]])
    for rank, shard in enumerate(shards):
        if rank >= journal.shards:
            new = open_vectors(shard / VECTORS_FILE)
            append_vectors(path, journal.num_vectors, shard) if rank > 0 else _move_files(shard, path)
            journal = _Journal(rank + 1, journal.num_vectors + new.num_vectors, new.dimension, new.storage)
            write_json(path / JOURNAL_FILE, journal._asdict())
        shutil.rmtree(shard, ignore_errors=True)


def sweep(root: Path, *, resumable: bool) -> list[Path]:
    """Removes building folders whose process is gone and what a killed removal left; returns them."""
    names = [".step*.building", ".step*.removed", *([".build-*.building"] if resumable else [])]
    return [path for name in names for path in sorted(root.glob(name)) if _sweep_one(path)]


def discard(path: Path) -> None:
    """Removes a published folder in such an order that no half of it is ever found under its name."""
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def content_files(path: Path) -> list[Path]:
    """Returns the files of a building folder that belong to the snapshot."""
    return sorted(file for file in path.iterdir() if file.name not in _NOT_CONTENT)


def sync_and_hash(path: Path) -> dict[str, str]:
    """Writes the snapshot's files through to the disk and returns their checksums."""
    checksums = {}
    for file in content_files(path):
        sync(file)
        checksums[file.name] = hash_file(file)
    return checksums


def sync(path: Path) -> None:
    """Writes a file or a folder's entries through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def build_errors(path: Path, num_bytes: int | None, part: Path | None = None) -> Iterator[None]:
    """Turns the system's errors into one that names the space needed.

    Args:
        path: What is being built; its folder is named.
        num_bytes: What the vectors need, where it is known.
        part: Where they are being written, which tells the least that they need.
    """
    try:
        yield
    except RagError:
        raise
    except OSError as error:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = f"{_mebibytes(shutil.disk_usage(place).free)} are free"
        if num_bytes is not None:
            free = f"its vectors need {_mebibytes(num_bytes)}, an index that holds them as much again; {free}"
        elif part is not None:
            written = sum(file.stat().st_size for file in part.iterdir())
            free = f"its vectors need more than the {_mebibytes(written)} written so far; {free}"
        raise CorruptSnapshotError(
            f"{path.parent}: the index snapshot could not be built: {error} ({free}). "
            "Published snapshots are untouched: free some space or choose another folder."
        ) from error


def _new_folder(root: Path, step: int) -> tuple[Path, SnapshotLock]:
    for attempt in range(3):
        path = Path(tempfile.mkdtemp(prefix=f".step{step:08d}.", suffix=".building", dir=root))
        path.chmod(0o755)  # others may read what is published
        try:
            return path, SnapshotLock(path / LOCK_FILE, refusal=f"{path}: taken by {{owner}} as it was made.")
        except (ConfigError, FileNotFoundError):
            if attempt == 2:  # a sweep takes the folder between its making and its lock, but hardly ever thrice
                raise
    raise AssertionError


def _clear_unfinished(path: Path) -> None:
    """Removes what a killed build left beside whole shards."""
    for part in path.glob("*.part"):
        shutil.rmtree(part, ignore_errors=True)
    kept = {*_NOT_CONTENT, *((VECTORS_FILE, SCALES_FILE) if _journal(path).shards > 0 else ())}
    for file in path.iterdir():
        if file.is_file() and file.name not in kept:
            file.unlink()


def _move_files(shard: Path, path: Path) -> None:
    for file in shard.iterdir():
        file.rename(path / file.name)


def _check_alike(journal: _Journal, shards: list[StoredVectors]) -> None:
    kinds = [(vectors.dimension, vectors.storage) for vectors in shards]
    if journal.shards > 0:
        kinds = [(journal.dimension, journal.storage), *kinds]
    if len({dimension for dimension, _ in kinds}) > 1:
        raise DataError(
            f"shards: expected vectors of one dimension, came {[d for d, _ in kinds]}. Encode all shards alike."
        )
    if len(set(kinds)) > 1:
        raise DataError(f"shards: expected one storage, came {[s for _, s in kinds]}. Store all shards alike.")


def _journal(path: Path) -> _Journal:
    file = path / JOURNAL_FILE
    return _Journal(**read_json(file, "build journal")) if file.exists() else _Journal(0, 0, 0, "float32")


def _sweep_one(path: Path) -> bool:
    try:
        if path.suffix == ".removed":
            shutil.rmtree(path, ignore_errors=True)
            return True
        if not (path / LOCK_FILE).exists():
            if time.time() - path.stat().st_mtime < _NEWBORN_S:
                return False
            shutil.rmtree(path, ignore_errors=True)
            return True
        with SnapshotLock(path / LOCK_FILE, refusal="its process lives: {owner}"):
            shutil.rmtree(path, ignore_errors=True)
            return True
    except (ConfigError, OSError):  # it is being built, or another process sweeps it
        return False


def _name_of(key: str) -> str:
    return f".build-{hash_texts([key])[:16]}.building"


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}"


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
