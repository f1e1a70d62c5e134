"""Rows written to disk: encoded into a storage, streamed into a folder, and joined without a second copy.

A folder holds ``vectors.npy`` (float32, float16 or int8) and, for int8, ``scales.npy``; NumPy reads both. See
:mod:`~rag_lightning.index.vectors` for the storages and for reading.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rag_lightning.errors import DataError
from rag_lightning.index.vectors import (
    DESCRIPTIONS,
    DTYPES,
    SCALES_FILE,
    Storage,
    StoredVectors,
    Vectors,
    blocks,
    check_finite,
    check_width,
    open_vectors,
)

VECTORS_FILE = "vectors.npy"

_COPY_BYTES = 16 * 1024 * 1024
_LARGEST_FLOAT16 = 65504.0
_INT8_STEPS = 127


def in_storage(vectors: Vectors | Iterable[Tensor], storage: Storage) -> Iterator[StoredVectors]:
    """Encodes rows, or blocks of rows, into a storage; yields blocks of at most 32 MiB of float32.

    Raises:
        DataError: No rows, NaN or infinity, blocks of several dimensions, or components beyond float16's range.

    >>> [block.storage for block in in_storage(torch.eye(2), "int8")]
    ['int8']
    """
    parts: Iterable[Vectors] = [vectors] if isinstance(vectors, (Tensor, np.ndarray, StoredVectors)) else vectors
    first_row, dimension = 0, None
    for part in parts:
        check_width(part, dimension)
        dimension = int(part.shape[1])
        for start, block_MD in blocks(part):
            check_finite(block_MD, first_row + start)
            yield encoded(block_MD, storage, first_row + start)
        first_row += int(part.shape[0])


def stored_bytes(vectors: Vectors | Iterable[Tensor], storage: Storage) -> int | None:
    """Returns how many bytes rows take on disk (without their scales), or None of a stream, where it is not known.

    >>> stored_bytes(torch.ones(3, 2), "float16"), stored_bytes(iter([torch.ones(3, 2)]), "int8")
    (12, None)
    """
    if not isinstance(vectors, (Tensor, np.ndarray, StoredVectors)):
        return None
    return int(np.prod(vectors.shape)) * DTYPES[storage].itemsize


def encoded(rows_MD: Float[Tensor, "M D"], storage: Storage, first_row: int = 0) -> StoredVectors:
    """Returns finite rows in a storage, on their device.

    int8 is symmetric with one scale a row, ``max |x| / 127``, so a component is off by at most half of that.

    Raises:
        DataError: A component beyond float16's largest number; names the row, counted from ``first_row``.
    """
    if storage == "float32":
        return StoredVectors(rows_MD)
    peaks_M = rows_MD.abs().amax(dim=1)
    if storage == "float16":
        over_M = peaks_M > _LARGEST_FLOAT16
        if bool(over_M.any()):
            row = int(over_M.nonzero()[0])
            raise DataError(
                f"storage 'float16': expected vector components within ±{_LARGEST_FLOAT16:.0f}, came "
                f"{float(peaks_M[row]):g} in row {first_row + row}. Use storage 'float32' or 'int8', or normalise."
            )
        return StoredVectors(rows_MD.to(torch.float16))
    scales_M = peaks_M / _INT8_STEPS
    divisors_M = torch.where(scales_M > 0, scales_M, 1.0)  # a row of zeros stays one
    steps_MD = (rows_MD / divisors_M.unsqueeze(1)).round_().clamp_(-_INT8_STEPS, _INT8_STEPS)
    return StoredVectors(steps_MD.to(torch.int8), scales_M)


def write_vectors(path: Path, vectors: Vectors | Iterable[StoredVectors]) -> int:
    """Writes rows as they are stored (tensors and arrays as float32) and returns how many.

    Args:
        path: A ``.npy`` file to create; scales go beside it.
        vectors: All rows, or blocks of them as from :func:`in_storage`, which never stand in memory together.

    Raises:
        DataError: No rows, NaN or infinity, or blocks of several dimensions.
        OSError: The disk is full or not writable.
    """
    if isinstance(vectors, StoredVectors):
        vectors = vectors.parts()
    elif isinstance(vectors, (Tensor, np.ndarray)):
        vectors = in_storage(vectors, "float32")
    num_vectors, first = 0, None
    with ExitStack() as files:
        stream = files.enter_context(path.open("wb"))
        scales: BinaryIO | None = None
        for block in vectors:
            if first is None:
                first = block
                _write_header(stream, first.storage, (0, first.dimension))
                if first.scales_N is not None:
                    scales = files.enter_context(path.with_name(SCALES_FILE).open("wb"))
                    _write_header(scales, "float32", (0,))
            assert (block.storage, block.dimension) == (first.storage, first.dimension)
            stream.write(_bytes_of(block.stored_ND))
            if scales is not None and block.scales_N is not None:
                scales.write(_bytes_of(block.scales_N))
            num_vectors += block.num_vectors
        if first is None:
            raise DataError(
                f"{path.name}: expected passage vectors, came none. The corpus or this rank's shard is empty."
            )
        _write_header(stream, first.storage, (num_vectors, first.dimension))
        if scales is not None:
            _write_header(scales, "float32", (num_vectors,))
    return num_vectors


def append_vectors(target: Path, num_vectors: int, part: Path) -> None:
    """Appends the rows of one folder's files to another's, which are alike, after its first ``num_vectors`` rows.

    What stands behind those rows is cut off first: the remains of an append that was killed.
    """
    new = open_vectors(part / VECTORS_FILE)
    row_bytes = new.dimension * new.stored_ND.element_size()
    total = num_vectors + new.num_vectors
    _append(target / VECTORS_FILE, part / VECTORS_FILE, num_vectors * row_bytes, new.storage, (total, new.dimension))
    if new.scales_N is not None:
        _append(target / SCALES_FILE, part / SCALES_FILE, num_vectors * 4, "float32", (total,))


def _append(target: Path, part: Path, num_bytes: int, storage: Storage, shape: tuple[int, ...]) -> None:
    """Keeps ``num_bytes`` of the target's data, appends the part's, and names the shape of both in the header."""
    with target.open("r+b") as stream, part.open("rb") as source:
        start = _header_bytes(stream)
        stream.truncate(start + num_bytes)
        stream.seek(0, os.SEEK_END)
        source.seek(_header_bytes(source))
        while chunk := source.read(_COPY_BYTES):
            stream.write(chunk)
        _write_header(stream, storage, shape)
        stream.flush()
        os.fsync(stream.fileno())


def _write_header(stream: BinaryIO, storage: Storage, shape: tuple[int, ...]) -> None:
    """(Re)writes the header in place: NumPy pads it so that its length does not depend on the number of rows."""
    stream.seek(0)
    header = {"descr": DESCRIPTIONS[storage], "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _header_bytes(stream: BinaryIO) -> int:
    return 10 + int.from_bytes(stream.read(10)[8:], "little")


def _bytes_of(tensor: Shaped[Tensor, "..."]) -> memoryview:
    array: Any = np.ascontiguousarray(tensor.cpu().numpy())
    return memoryview(array).cast("B")
