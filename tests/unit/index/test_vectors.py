import gc
import mmap
import os
import re

import numpy as np
import psutil
import pytest
import torch

from rag_lightning.errors import CorruptSnapshotError, DataError
from rag_lightning.index import vectors as vectors_module
from rag_lightning.index.vector_files import in_storage, write_vectors
from rag_lightning.index.vectors import StoredVectors, as_stored, as_tensor, check_vectors, open_vectors

STORAGES = ["float32", "float16", "int8"]


def random_vectors(num_vectors, dimension=8, seed=0):
    return torch.randn(num_vectors, dimension, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=STORAGES)
def stored(request, tmp_path):
    """50 rows on disk, and the same rows read by NumPy alone."""
    write_vectors(tmp_path / "vectors.npy", in_storage(random_vectors(50), request.param))
    rows_ND = np.load(tmp_path / "vectors.npy").astype(np.float32)
    if request.param == "int8":
        rows_ND *= np.load(tmp_path / "scales.npy")[:, None]
    return open_vectors(tmp_path / "vectors.npy"), rows_ND


def test_rows_and_blocks_are_what_numpy_reads(stored):
    vectors, rows_ND = stored
    assert (vectors.shape, len(vectors), vectors.device.type) == ((50, 8), 50, "cpu")
    ids = torch.tensor([[49, 0, 7], [7, 7, 1]])
    np.testing.assert_array_equal(vectors.rows(ids).numpy(), rows_ND[ids.numpy()])
    np.testing.assert_array_equal(vectors[ids.numpy()].numpy(), rows_ND[ids.numpy()])
    assert vectors.rows(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 8)
    for size in (None, 1, 7, 50, 60):
        starts, parts = zip(*vectors.blocks(size), strict=True)
        assert list(starts) == list(range(0, 50, size or 50))
        assert {part.dtype for part in parts} == {torch.float32}
        np.testing.assert_array_equal(torch.cat(parts).numpy(), rows_ND)


def test_a_part_is_a_view_of_its_rows(stored):
    vectors, rows_ND = stored
    part = vectors.part(range(13, 41)).part(range(2, 28))
    assert part.shape == (26, 8)
    assert part.storage == vectors.storage
    np.testing.assert_array_equal(part.rows(torch.arange(26)).numpy(), rows_ND[15:41])
    np.testing.assert_array_equal(torch.cat([rows for _, rows in part.blocks(5)]).numpy(), rows_ND[15:41])
    np.testing.assert_array_equal(vectors[15:41].rows(torch.arange(26)).numpy(), rows_ND[15:41])
    assert part.stored_ND.data_ptr() == vectors.stored_ND[15:].data_ptr()
    assert vectors.part(range(3, 3)).num_vectors == 0


def test_rows_are_copies_and_the_file_stays_as_it_is(stored):
    vectors, rows_ND = stored
    vectors.rows(torch.arange(50)).zero_()
    np.testing.assert_array_equal(vectors.rows(torch.arange(50)).numpy(), rows_ND)


def test_moving_to_where_they_are_copies_nothing_and_tensors_become_float32(stored):
    vectors, _ = stored
    assert vectors.to(None) is vectors
    assert vectors.to("cpu") is vectors
    assert as_stored(vectors) is vectors
    assert as_stored(torch.ones(2, 3, dtype=torch.bfloat16)).storage == "float32"
    rows_ND = random_vectors(3)
    assert as_stored(rows_ND).stored_ND.data_ptr() == rows_ND.data_ptr()


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system cannot give pages back")
def test_reading_a_map_through_does_not_keep_it_in_memory(tmp_path):
    """256 MiB read in blocks, and then by random rows, may leave a block or two resident."""
    path = tmp_path / "vectors.npy"
    write_vectors(path, (StoredVectors(torch.full((2**14, 1024), float(n))) for n in range(4)))
    vectors, process = open_vectors(path), psutil.Process()
    before, peak = process.memory_info().rss, 0
    for start, rows_MD in vectors.blocks(2**12):
        assert rows_MD[0, 0] == start // 2**14
        rows_MD.sum()
        peak = max(peak, process.memory_info().rss - before)
    assert peak < 80 * 2**20
    ids = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    before = process.memory_info().rss
    for some in ids[: 2**14].split(64):
        vectors.rows(some)
    assert process.memory_info().rss - before < 20 * 2**20


def test_torn_files_are_refused_whatever_their_header_says(tmp_path):
    path = tmp_path / "vectors.npy"
    with pytest.raises(CorruptSnapshotError, match=r"vectors\.npy: expected a whole \.npy file"):
        open_vectors(path)
    write_vectors(path, torch.ones(100, 4))
    whole = path.read_bytes()
    for data in (whole[:500], whole + b"\0", whole[:128], whole[:9], b"", whole[:128] + b"\0"):
        path.write_bytes(data)
        with pytest.raises(CorruptSnapshotError, match=r"expected a whole \.npy file of vectors"):
            open_vectors(path)
    path.write_bytes(whole.replace(b"(100, 4)", b"(999, 4)"))
    with pytest.raises(CorruptSnapshotError, match=r"its header names \(999, 4\) of <f4, its length is 1600 bytes"):
        open_vectors(path)
    shape, huge = b"(100, 4), }", b"(2305843009213693951, 8), }"  # times 4 bytes it is beyond 64 bits
    assert shape.ljust(len(huge)) in whole
    path.write_bytes(whole.replace(shape.ljust(len(huge)), huge))
    with pytest.raises(CorruptSnapshotError, match=r"its header names \(2305843009213693951, 8\)"):
        open_vectors(path)


def test_foreign_arrays_are_refused_by_what_they_are(tmp_path):
    path = tmp_path / "vectors.npy"
    for array, came in (
        (np.ones((2, 2)), "<f8 (2, 2)"),
        (np.ones((2, 2), dtype=">f4"), ">f4 (2, 2)"),
        (np.ones(3, dtype=np.float32), "<f4 (3,)"),
        (np.ones((2, 2, 2), dtype=np.float16), "<f2 (2, 2, 2)"),
        (np.array([{"a": 1}], dtype=object), "|O (1,)"),
    ):
        np.save(path, array)
        message = f"expected vectors [N, D] of float32, float16, int8; came {came}"
        with pytest.raises(CorruptSnapshotError, match=re.escape(message)):
            open_vectors(path)
    np.save(path, np.asfortranarray(np.ones((2, 3), dtype=np.float32)))
    with pytest.raises(CorruptSnapshotError, match="its header is not that of a plain array"):
        open_vectors(path)


def test_int8_rows_need_their_scales(tmp_path):
    path, scales = tmp_path / "vectors.npy", tmp_path / "scales.npy"
    write_vectors(path, in_storage(random_vectors(10), "int8"))
    np.save(scales, np.ones(9, dtype=np.float32))
    with pytest.raises(CorruptSnapshotError, match=r"scales\.npy: expected 10 scales of float32, came <f4 \(9,\)"):
        open_vectors(path)
    scales.unlink()
    with pytest.raises(CorruptSnapshotError, match=r"scales\.npy: expected a whole \.npy file"):
        open_vectors(path)


@pytest.mark.parametrize(
    ("vectors", "dimension", "message"),
    [
        (torch.zeros(0, 3), None, "at least one row and one column, came 0 x 3"),
        (torch.tensor([[0.0], [torch.nan]]), None, "NaN or infinity in row 1"),
        (np.array([[np.inf]], dtype=np.float32), None, "NaN or infinity in row 0"),
        (torch.zeros(1, 3), 4, "expected dimension 4, came 3"),
    ],
)
def test_vectors_that_would_train_wrong_are_refused(vectors, dimension, message):
    with pytest.raises(DataError, match=message):
        check_vectors(vectors, dimension)


def test_a_bad_row_is_counted_from_the_first_block(monkeypatch):
    monkeypatch.setattr(vectors_module, "_MAX_BLOCK_ROWS", 4)
    vectors_ND = torch.zeros(10, 1)
    vectors_ND[9] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity in row 9"):
        check_vectors(vectors_ND)


def test_a_read_only_array_is_viewed_without_copy_or_warning():
    array = np.ones((2, 2), dtype=np.float32)
    array.flags.writeable = False
    assert as_tensor(array).data_ptr() == array.ctypes.data


def test_an_open_map_outlives_the_removal_of_its_file(tmp_path):
    path = tmp_path / "vectors.npy"
    write_vectors(path, torch.eye(3))
    vectors = open_vectors(path)
    os.unlink(path)
    assert torch.equal(vectors.rows(torch.arange(3)), torch.eye(3))


def test_a_file_cut_short_while_open_is_an_error_and_no_crash(tmp_path):
    write_vectors(tmp_path / "vectors.npy", torch.ones(10_000, 4))
    vectors = open_vectors(tmp_path / "vectors.npy")
    os.truncate(tmp_path / "vectors.npy", 1000)
    with pytest.raises(CorruptSnapshotError, match="expected 10000 rows, but the file has been cut short since it"):
        vectors.rows(torch.tensor([9_999]))


def test_open_files_are_closed_with_their_vectors(tmp_path):
    write_vectors(tmp_path / "vectors.npy", torch.ones(10, 4))
    gc.collect()  # what other tests left open
    before = psutil.Process().num_fds()
    vectors = [open_vectors(tmp_path / "vectors.npy") for _ in range(5)]
    assert psutil.Process().num_fds() > before
    del vectors
    gc.collect()
    assert psutil.Process().num_fds() == before
