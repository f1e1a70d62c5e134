"""The rows that an index is built over and searched in: in memory, on a device, or memory-mapped from disk.

On disk they are ``vectors.npy`` in one of three storages, read in blocks that are float32 whatever the storage:

========  ===========  =====================================================================================
storage   bytes a row  what is lost
========  ===========  =====================================================================================
float32   4 D          nothing
float16   2 D          rounding to 11 bits; components beyond 65504 are refused
int8      D + 4        each row is rounded to 255 steps of its own scale (``scales.npy``): at most half a step
========  ===========  =====================================================================================

A process that reads a memory map through would keep all of it resident; here the pages of a block are given back when
the block has been read, and single rows are read from the file, so memory stays small whatever the corpus (the system
may keep the file cached).
"""

import math
import mmap
import os
import re
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, overload

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from rag_lightning.errors import CorruptSnapshotError, DataError

Storage = Literal["float32", "float16", "int8"]

SCALES_FILE = "scales.npy"
"""Beside an int8 ``vectors.npy``: what each of its rows is multiplied by, float32."""

DTYPES: dict[Storage, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
DESCRIPTIONS: dict[Storage, str] = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}

_BLOCK_BYTES = 32 * 1024 * 1024
_MAX_BLOCK_ROWS = 65_536
_NPY_START = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(r"\{'descr': '([^']{0,20})', 'fortran_order': False, 'shape': \(([\d, ]{0,60})\), \} *\n")


class _File:
    """An open file and its memory map, both closed with this object; it may be unlinked meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)
        self.num_bytes = os.fstat(self.number).st_size
        if self.num_bytes == 0:
            raise ValueError("it is empty")
        self.map = mmap.mmap(self.number, 0, access=mmap.ACCESS_READ)


class _Map(NamedTuple):
    """Where in a file the rows of a :class:`StoredVectors` begin."""

    file: _File
    offset: int


class StoredVectors:
    """N rows of dimension D in one of the storages, read as float32; made by :func:`open_vectors` or from a tensor.

    The rows are trusted to be finite, as :func:`~rag_lightning.index.vector_files.write_vectors` wrote them.

    Args:
        stored_ND: The rows as they are stored: float32, float16 or int8.
        scales_N: What the rows of int8 are multiplied by; None otherwise.
        mapped: The memory map that ``stored_ND`` lies in, if any.

    >>> vectors = StoredVectors(torch.tensor([[127, -64], [1, 2]], dtype=torch.int8), torch.tensor([0.5, 2.0]))
    >>> vectors.storage, vectors.shape, vectors.rows(torch.tensor([1, 0]))
    ('int8', (2, 2), tensor([[  2.0000,   4.0000],
            [ 63.5000, -32.0000]]))
    """

    def __init__(
        self, stored_ND: Shaped[Tensor, "N D"], scales_N: Float[Tensor, "N"] | None = None, mapped: _Map | None = None
    ) -> None:
        assert stored_ND.dtype in DTYPES.values()
        assert (scales_N is not None) == (stored_ND.dtype == torch.int8)
        self.stored_ND = stored_ND
        self.scales_N = scales_N
        self._map = mapped

    @property
    def storage(self) -> Storage:
        """How the rows are stored."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.stored_ND.dtype)

    @property
    def num_vectors(self) -> int:
        """N."""
        return int(self.stored_ND.shape[0])

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.stored_ND.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.num_vectors, self.dimension

    @property
    def device(self) -> torch.device:
        """Where the rows are; memory-mapped ones are on the CPU."""
        return self.stored_ND.device

    def __len__(self) -> int:
        return self.num_vectors

    @overload
    def __getitem__(self, rows: slice) -> "StoredVectors": ...
    @overload
    def __getitem__(self, rows: Tensor | np.ndarray) -> Tensor: ...
    def __getitem__(self, rows: slice | Tensor | np.ndarray) -> "StoredVectors | Tensor":
        """As of a tensor: a slice is a view (:meth:`part`), numbers are a copy (:meth:`rows`)."""
        return self.part(range(*rows.indices(len(self)))) if isinstance(rows, slice) else self.rows(rows)

    def rows(self, ids: Int[Tensor, "*rows"] | Int[np.ndarray, "*rows"]) -> Float[Tensor, "*rows D"]:
        """Returns a copy of some rows, float32, on this object's device; ids are 0..N-1."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        flat_M = ids.reshape(-1)
        stored_MD = self.stored_ND[flat_M] if self._map is None else self._read_rows(self._map, flat_M)
        rows_MD = _as_float32(stored_MD, None if self.scales_N is None else self.scales_N[flat_M])
        return rows_MD.reshape(*ids.shape, self.dimension)

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, Float[Tensor, "M D"]]]:
        """Yields (first row, float32 rows) in order; float32 storage is not copied.

        Args:
            size: Rows in a block; None is 32 MiB of float32, at most 65,536 rows.
        """
        start = 0
        for part in self.parts(size):
            yield start, _as_float32(part.stored_ND, part.scales_N)
            start += part.num_vectors

    def parts(self, size: int | None = None) -> "Iterator[StoredVectors]":
        """Yields the rows in order as views in their storage; the pages of each are given back after it."""
        size = block_rows(self.dimension) if size is None else size
        for start in range(0, self.num_vectors, size):
            stop = min(start + size, self.num_vectors)
            yield self.part(range(start, stop))
            self._give_back(start, stop)

    def part(self, rows: range) -> "StoredVectors":
        """Returns a view of consecutive rows, such as one process's :func:`~rag_lightning.utils.distributed.shard`."""
        assert rows.step == 1
        assert 0 <= rows.start <= rows.stop <= self.num_vectors
        chosen = slice(rows.start, rows.stop)
        scales_M = None if self.scales_N is None else self.scales_N[chosen]
        mapped = self._map and _Map(self._map.file, self._map.offset + rows.start * self._row_bytes)
        return StoredVectors(self.stored_ND[chosen], scales_M, mapped)

    def to(self, device: torch.device | str | None) -> "StoredVectors":
        """Returns the rows on a device in their storage, copied block by block; None or the same device is no copy."""
        if device is None or torch.device(device) == self.device:
            return self
        moved_ND = torch.empty(self.shape, dtype=self.stored_ND.dtype, device=device)
        start = 0
        for part in self.parts():
            moved_ND[start : start + part.num_vectors].copy_(part.stored_ND)
            start += part.num_vectors
        return StoredVectors(moved_ND, None if self.scales_N is None else self.scales_N.to(device))

    @property
    def _row_bytes(self) -> int:
        return self.dimension * self.stored_ND.element_size()

    def _read_rows(self, mapped: _Map, ids_M: Int[Tensor, "M"]) -> Shaped[Tensor, "M D"]:
        """Reads rows from the file: through the map each of them could keep 2 MiB around it in memory."""
        rows_MD = torch.empty(len(ids_M), self.dimension, dtype=self.stored_ND.dtype)
        assert not len(ids_M) or 0 <= int(ids_M.min()) <= int(ids_M.max()) < self.num_vectors
        array: Any = rows_MD.numpy()
        for row, number in zip(array, ids_M.tolist(), strict=True):
            if os.preadv(mapped.file.number, [row], mapped.offset + number * self._row_bytes) != self._row_bytes:
                raise CorruptSnapshotError(
                    f"{mapped.file.path}: expected {self.num_vectors} rows, but the file has been cut short since it "
                    "was opened. Build the index again."
                )
        return rows_MD

    def _give_back(self, start: int, stop: int) -> None:
        """Tells the system that the pages of some rows are not needed now; what needs them again reads them again."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first, last = (self._map.offset + row * self._row_bytes for row in (start, stop))
        first -= first % mmap.PAGESIZE
        if last > first:
            self._map.file.map.madvise(mmap.MADV_DONTNEED, first, last - first)


Vectors = Shaped[Tensor, "N D"] | Shaped[np.ndarray, "N D"] | StoredVectors
"""What can be indexed: rows in memory, or rows in a storage."""


def block_rows(dimension: int) -> int:
    """Returns how many rows are read at once: 32 MiB of float32, at most 65,536.

    >>> block_rows(8), block_rows(384), block_rows(10**9)
    (65536, 21845, 1)
    """
    return max(1, min(_MAX_BLOCK_ROWS, _BLOCK_BYTES // (4 * dimension)))


def blocks(vectors_ND: Vectors, size: int | None = None) -> Iterator[tuple[int, Float[Tensor, "M D"]]]:
    """Yields (first row, float32 rows) in order, so that no more than a block is ever converted or read."""
    if isinstance(vectors_ND, StoredVectors):
        yield from vectors_ND.blocks(size)
        return
    rows_ND = as_tensor(vectors_ND).detach()
    size = block_rows(rows_ND.shape[1]) if size is None else size
    for start in range(0, rows_ND.shape[0], size):
        yield start, rows_ND[start : start + size].to(torch.float32)


def as_stored(vectors_ND: Vectors) -> StoredVectors:
    """Returns rows as :class:`StoredVectors`; tensors and arrays of float32 are used in place, others are converted."""
    if isinstance(vectors_ND, StoredVectors):
        return vectors_ND
    return StoredVectors(as_tensor(vectors_ND).detach().to(torch.float32))


def as_tensor(vectors_ND: Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."]) -> Shaped[Tensor, "..."]:
    """Returns a tensor over the same memory; a read-only memory map must not be written through it."""
    if isinstance(vectors_ND, Tensor):
        return vectors_ND
    with warnings.catch_warnings():
        # torch warns that a read-only map must not be written to; nothing here writes
        warnings.filterwarnings("ignore", message="The given .* is not writ", category=UserWarning)
        return torch.from_numpy(cast(Any, vectors_ND))


def check_vectors(vectors_ND: Vectors, dimension: int | None = None) -> None:
    """Refuses vectors that would train wrong without a word.

    Raises:
        DataError: No rows, no columns, NaN or infinity, or another dimension than ``dimension``.
    """
    check_width(vectors_ND, dimension)
    for start, block_MD in blocks(vectors_ND):
        check_finite(block_MD, start)


def check_width(vectors_ND: Vectors, dimension: int | None = None) -> None:
    """Refuses rows by their shape alone.

    Raises:
        DataError: No rows, no columns, or another dimension than ``dimension``.
    """
    num_vectors, columns = vectors_ND.shape
    if num_vectors == 0 or columns == 0:
        raise DataError(f"passage vectors: expected at least one row and one column, came {num_vectors} x {columns}.")
    if dimension is not None and columns != dimension:
        raise DataError(f"passage vectors: expected dimension {dimension}, came {columns}. Re-encode with one encoder.")


def check_finite(block_MD: Float[Tensor, "M D"], first_row: int) -> None:
    """Refuses a block with NaN or infinity.

    Raises:
        DataError: Names the first such row, counted from ``first_row``.
    """
    bad_M = ~torch.isfinite(block_MD).all(dim=1)
    if bool(bad_M.any()):
        raise DataError(
            f"passage vectors: expected finite numbers, came NaN or infinity in row "
            f"{first_row + int(bad_M.nonzero()[0])}. The passage encoder has diverged, or overflowed in half precision."
        )


def open_vectors(path: Path) -> StoredVectors:
    """Returns the rows of a ``vectors.npy``, memory-mapped read-only; nothing but the headers is read.

    Raises:
        CorruptSnapshotError: Missing, torn, longer or shorter than its header says, or of no storage known here.
    """
    described, shape, mapped = _map_array(path)
    storage = next((name for name, text in DESCRIPTIONS.items() if text == described), None)
    if storage is None or len(shape) != 2:
        known = ", ".join(DTYPES)
        raise CorruptSnapshotError(
            f"{path}: expected vectors [N, D] of {known}; came {described} {shape}. Build the index again."
        )
    stored_ND = _mapped_tensor(mapped, described, shape)
    scales_N = None
    if storage == "int8":
        scales_path = path.with_name(SCALES_FILE)
        described, scales_shape, scales_map = _map_array(scales_path)
        if (described, scales_shape) != ("<f4", shape[:1]):
            raise CorruptSnapshotError(
                f"{scales_path}: expected {shape[0]} scales of float32, came {described} {scales_shape}. "
                "Build the index again."
            )
        scales_N = _mapped_tensor(scales_map, described, scales_shape)
    return StoredVectors(stored_ND, scales_N, mapped)


def _map_array(path: Path) -> tuple[str, tuple[int, ...], _Map]:
    """Maps an ``.npy`` file of format 1.0; its header is only believed where the length of the file agrees."""
    try:
        file = _File(path)
        start = os.pread(file.number, 10, 0)
        length = int.from_bytes(start[8:10], "little")
        match = _NPY_HEADER.fullmatch(os.pread(file.number, length, len(start)).decode("latin-1"))
        if start[:8] != _NPY_START or match is None:
            raise ValueError("its header is not that of a plain array")
        described, offset = match[1], len(start) + length
        known = described in DESCRIPTIONS.values()
        shape = tuple(int(size) for size in re.findall(r"\d+", match[2]))
        num_bytes = file.num_bytes - offset
        # math.prod: a shape from a damaged header must not overflow
        if known and (num_bytes <= 0 or num_bytes != np.dtype(described).itemsize * math.prod(shape)):
            raise ValueError(f"its header names {shape} of {described}, its length is {num_bytes} bytes")
        return described, shape, _Map(file, offset)
    except (OSError, ValueError) as error:
        raise CorruptSnapshotError(
            f"{path}: expected a whole .npy file of vectors or scales: {error}. Build the index again."
        ) from error


def _mapped_tensor(mapped: _Map, described: str, shape: tuple[int, ...]) -> Shaped[Tensor, "..."]:
    flat = np.frombuffer(mapped.file.map, dtype=described, count=math.prod(shape), offset=mapped.offset)
    array: Any = flat.reshape(shape)
    return as_tensor(array)


def _as_float32(stored_MD: Shaped[Tensor, "M D"], scales_M: Float[Tensor, "M"] | None) -> Float[Tensor, "M D"]:
    rows_MD = stored_MD.to(torch.float32)
    return rows_MD if scales_M is None else rows_MD * scales_M.unsqueeze(1)
