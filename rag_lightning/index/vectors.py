"""float32 rows on disk: one ``.npy`` file, written as a stream, joined without a second copy, read by memory map."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import CorruptSnapshotError, DataError
from rag_lightning.index.base import Vectors, blocks, check_vectors

_COPY_BYTES = 16 * 1024 * 1024


def write_vectors(path: Path, vectors: Vectors | Iterable[Tensor]) -> int:
    """Writes rows and returns how many.

    Args:
        path: A ``.npy`` file to create.
        vectors: All rows, or an iterable of blocks of rows that never stand in memory together.

    Raises:
        DataError: No rows, NaN or infinity, or blocks of several dimensions.
        OSError: The disk is full or not writable.
    """
    parts: Iterable[Vectors] = [vectors] if isinstance(vectors, (Tensor, np.ndarray)) else vectors
    num_vectors, dimension = 0, None
    with path.open("wb") as stream:
        for part in parts:
            check_vectors(part, dimension)
            if dimension is None:
                dimension = int(part.shape[1])
                _write_header(stream, 0, dimension)
            for _, block_MD in blocks(part):
                rows_MD: Any = np.ascontiguousarray(block_MD.cpu().numpy(), dtype="<f4")
                stream.write(memoryview(rows_MD).cast("B"))
                num_vectors += len(block_MD)
        if dimension is None:
            raise DataError(
                f"{path.name}: expected passage vectors, came none. The corpus or this rank's shard is empty."
            )
        _write_header(stream, num_vectors, dimension)
    return num_vectors


def join_vectors(paths: list[Path], target: Path) -> None:
    """Joins files of :func:`write_vectors` in order into ``target``, deleting each as soon as it is copied.

    The first file becomes the target by renaming, so the peak on disk is the total plus one further part.

    Raises:
        DataError: Parts of different dimensions.
    """
    shapes = [open_vectors(path).shape for path in paths]
    if len({dimension for _, dimension in shapes}) > 1:
        raise DataError(
            f"shards: expected vectors of one dimension, came {[d for _, d in shapes]}. Encode all shards alike."
        )
    paths[0].rename(target)
    if len(paths) == 1:
        return
    with target.open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        for path in paths[1:]:
            with path.open("rb") as part:
                _read_header(part)
                while chunk := part.read(_COPY_BYTES):
                    stream.write(chunk)
            path.unlink()
        _write_header(stream, sum(count for count, _ in shapes), int(shapes[0][1]))


def open_vectors(path: Path) -> Float[np.ndarray, "N D"]:
    """Returns a read-only memory map of the rows.

    Raises:
        CorruptSnapshotError: Missing, torn, or not two-dimensional float32.
    """
    try:
        vectors_ND: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorruptSnapshotError(
            f"{path}: expected a whole .npy file of float32 vectors: {error}. Build the index again."
        ) from error
    if vectors_ND.ndim != 2 or vectors_ND.dtype != np.float32:
        raise CorruptSnapshotError(
            f"{path}: expected float32 vectors [N, D], came {vectors_ND.dtype} {vectors_ND.shape}. Build it again."
        )
    return vectors_ND


def _write_header(stream: BinaryIO, num_vectors: int, dimension: int) -> None:
    """(Re)writes the header in place: NumPy pads it so that its length does not depend on the number of rows."""
    stream.seek(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_vectors, dimension)}
    np.lib.format.write_array_header_1_0(stream, header)


def _read_header(stream: BinaryIO) -> None:
    np.lib.format.read_magic(stream)
    np.lib.format.read_array_header_1_0(stream)
