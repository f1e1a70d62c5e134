import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.errors import CorruptSnapshotError, DataError
from rag_lightning.index.vectors import join_vectors, open_vectors, write_vectors


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), dimension=st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_parts_written_and_joined_are_numpys_own_file(tmp_path_factory, sizes, dimension):
    folder = tmp_path_factory.mktemp("vectors")
    rows = np.arange(sum(sizes) * dimension, dtype=np.float32).reshape(-1, dimension)
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    paths = [folder / f"part{number}.npy" for number in range(len(parts))]
    assert [write_vectors(path, part) for path, part in zip(paths, parts, strict=True)] == sizes
    join_vectors(paths, folder / "all.npy")
    np.save(folder / "numpy.npy", rows)
    assert (folder / "all.npy").read_bytes() == (folder / "numpy.npy").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["all.npy", "numpy.npy"]


def test_blocks_are_streamed_and_half_precision_is_widened(tmp_path):
    path = tmp_path / "v.npy"
    blocks = (torch.full((2, 3), float(value), dtype=torch.bfloat16) for value in range(3))
    assert write_vectors(path, blocks) == 6
    vectors_ND = open_vectors(path)
    assert isinstance(vectors_ND, np.memmap)
    assert vectors_ND[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert not vectors_ND.flags.writeable


def test_bad_rows_are_refused(tmp_path):
    path = tmp_path / "v.npy"
    with pytest.raises(DataError, match="expected passage vectors, came none"):
        write_vectors(path, iter([]))
    with pytest.raises(DataError, match="expected dimension 2, came 3"):
        write_vectors(path, iter([torch.ones(1, 2), torch.ones(1, 3)]))
    with pytest.raises(DataError, match="NaN or infinity in row 1"):
        write_vectors(path, torch.tensor([[0.0], [torch.inf]]))
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    write_vectors(paths[0], torch.ones(1, 2))
    write_vectors(paths[1], torch.ones(1, 3))
    with pytest.raises(DataError, match=r"vectors of one dimension, came \[2, 3\]"):
        join_vectors(paths, path)


def test_torn_or_foreign_files_are_refused(tmp_path):
    path = tmp_path / "v.npy"
    with pytest.raises(CorruptSnapshotError, match=r"expected a whole \.npy file"):
        open_vectors(path)
    write_vectors(path, torch.ones(100, 4))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CorruptSnapshotError, match=r"expected a whole \.npy file"):
        open_vectors(path)
    np.save(path, np.ones((2, 2)))
    with pytest.raises(CorruptSnapshotError, match=r"expected float32 vectors \[N, D\], came float64 \(2, 2\)"):
        open_vectors(path)
    np.save(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(CorruptSnapshotError, match=r"expected a whole \.npy file"):
        open_vectors(path)
