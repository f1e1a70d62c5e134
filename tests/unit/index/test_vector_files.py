import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rag_lightning.errors import DataError
from rag_lightning.index.vector_files import append_vectors, in_storage, write_vectors
from rag_lightning.index.vectors import StoredVectors, open_vectors


def naive_int8(rows):
    """Plain Python: the largest magnitude of a row becomes 127."""
    stored, scales = [], []
    for row in rows:
        scale = np.float32(np.float32(max(abs(value) for value in row)) / np.float32(127))
        stored.append([0 if scale == 0 else min(127, max(-127, round(float(v / scale)))) for v in row])
        scales.append(scale)
    return np.array(stored, dtype=np.int8), np.array(scales, dtype=np.float32)


@given(
    rows=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 6)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
@settings(deadline=None, max_examples=100)
def test_int8_is_the_naive_rounding_and_off_by_half_a_step_at_most(rows):
    (block,) = in_storage(torch.from_numpy(rows), "int8")
    stored, scales = naive_int8(rows)
    np.testing.assert_array_equal(block.scales_N.numpy(), scales)
    assert np.abs(block.stored_ND.numpy().astype(int) - stored.astype(int)).max() <= 1  # at exact halves
    (widened,) = (rows_MD.double().numpy() for _, rows_MD in block.blocks())
    # the scale itself is rounded to float32: of subnormal rows to a multiple of 1.4e-45, hence the last term
    bound = scales[:, None].astype(np.float64) * (0.5 + 127 * 1e-6) + 127 * 1.5e-45
    assert (np.abs(widened - rows.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_what_is_written_numpy_reads(tmp_path, storage):
    rows = np.random.default_rng(0).standard_normal((33, 5)).astype(np.float32)
    blocks = in_storage((torch.from_numpy(part) for part in np.array_split(rows, 4)), storage)
    assert write_vectors(tmp_path / "vectors.npy", blocks) == 33
    expected = {"float32": rows, "float16": rows.astype(np.float16), "int8": naive_int8(rows)[0]}[storage]
    written = np.load(tmp_path / "vectors.npy", allow_pickle=False)
    assert written.dtype == expected.dtype
    np.testing.assert_array_equal(written, expected)
    assert (tmp_path / "scales.npy").exists() == (storage == "int8")
    assert open_vectors(tmp_path / "vectors.npy").storage == storage


def test_stored_rows_are_written_as_they_are(tmp_path):
    stored = StoredVectors(torch.tensor([[3, -5]], dtype=torch.int8), torch.tensor([0.1]))
    write_vectors(tmp_path / "vectors.npy", stored)
    assert np.load(tmp_path / "vectors.npy").tolist() == [[3, -5]]  # encoding again would make 76, -127
    np.testing.assert_array_equal(np.load(tmp_path / "scales.npy"), np.float32([0.1]))


def test_half_precision_is_widened_and_blocks_are_streamed(tmp_path):
    blocks = (torch.full((2, 3), float(value), dtype=torch.bfloat16) for value in range(3))
    assert write_vectors(tmp_path / "v.npy", in_storage(blocks, "float32")) == 6
    vectors = open_vectors(tmp_path / "v.npy")
    assert vectors.rows(torch.arange(6))[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_float16_refuses_what_would_become_infinite_and_says_what_to_do():
    (block,) = in_storage(torch.tensor([[65504.0, -65504.0]]), "float16")
    assert block.stored_ND.tolist() == [[65504.0, -65504.0]]
    blocks = iter([torch.ones(3, 2), torch.tensor([[1.0, 1.0], [2.0, -65505.0]])])
    with pytest.raises(
        DataError, match=r"'float16': expected vector components within ±65504, came 65505 in row 4\. Use storage"
    ):
        list(in_storage(blocks, "float16"))


def test_a_row_of_zeros_stays_one_in_every_storage():
    for storage in ("float32", "float16", "int8"):
        (block,) = in_storage(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), storage)
        assert block.rows(torch.tensor([0, 1])).tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_bad_rows_are_refused(tmp_path):
    path = tmp_path / "v.npy"
    with pytest.raises(DataError, match="expected passage vectors, came none"):
        write_vectors(path, iter([]))
    with pytest.raises(DataError, match="expected dimension 2, came 3"):
        list(in_storage(iter([torch.ones(1, 2), torch.ones(1, 3)]), "int8"))
    with pytest.raises(DataError, match="NaN or infinity in row 4"):
        list(in_storage(iter([torch.ones(3, 1), torch.tensor([[0.0], [torch.inf]])]), "float16"))
    with pytest.raises(DataError, match="at least one row and one column, came 0 x 2"):
        write_vectors(path, torch.ones(0, 2))


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_appending_cuts_off_the_rest_of_an_append_that_was_killed(tmp_path, storage):
    rows_ND = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    for name, part in (("whole", rows_ND), ("target", rows_ND[:5]), ("part", rows_ND[5:])):
        (tmp_path / name).mkdir()
        write_vectors(tmp_path / name / "vectors.npy", in_storage(part, storage))
    for file in (tmp_path / "target").iterdir():
        file.write_bytes(file.read_bytes() + b"half a row")
    append_vectors(tmp_path / "target", 5, tmp_path / "part")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "target" / file.name).read_bytes() == file.read_bytes()
