"""Content hashes: what a cache, a snapshot or a checkpoint was made from."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_PIECE_BYTES = 4 * 1024 * 1024
_WHOLE_BYTES = 256 * 1024 * 1024
_END_BYTES = 1024 * 1024


def hash_texts(texts: Iterable[str]) -> str:
    """Returns the SHA-256 of a sequence of strings, unambiguous about where each ends.

    >>> hash_texts(["ab", "c"]) == hash_texts(["a", "bc"])
    False
    """
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, read in 4 MiB pieces: a published index is many gigabytes."""
    digest, buffer = hashlib.sha256(), bytearray(_PIECE_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def fingerprint(path: Path) -> dict[str, int | str]:
    """Returns ``{"bytes", "sha256"}`` of a file, or of all files under a folder: did two runs read the same?

    Beyond 256 MiB the hash is of a file's size, first and last MiB alone: a corpus of many gigabytes is told in a
    moment.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    parts = [(file.relative_to(path).as_posix(), file.stat().st_size, _hash_quickly(file)) for file in files]
    sha256 = parts[0][2] if path.is_file() else hash_texts(str(field) for part in parts for field in part)
    return {"bytes": sum(size for _, size, _ in parts), "sha256": sha256}


def _hash_quickly(path: Path) -> str:
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return hash_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_END_BYTES))
        stream.seek(-_END_BYTES, 2)
        digest.update(stream.read())
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of named tensors (names, dtypes, shapes and values), in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
