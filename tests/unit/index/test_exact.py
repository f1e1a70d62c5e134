import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingFileError
from rag_lightning.index.base import similarity
from rag_lightning.index.exact import ExactIndex, _top
from rag_lightning.index.vector_files import in_storage, write_vectors
from rag_lightning.index.vectors import StoredVectors, open_vectors

METRICS = ["inner_product", "l2", "cosine"]


def random_vectors(num_vectors, dimension=8, seed=0):
    return torch.randn(num_vectors, dimension, generator=torch.Generator().manual_seed(seed))


def numpy_search(queries_BD, vectors_ND, num_passages, metric):
    """float64, a full stable sort: independent of torch's top-k and of the blocks."""
    queries, vectors = queries_BD.double().numpy(), vectors_ND.double().numpy()
    scores = -((queries[:, None] - vectors[None]) ** 2).sum(-1) if metric == "l2" else queries @ vectors.T
    if metric == "cosine":
        scores /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num_passages]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_search_equals_a_full_sort_in_numpy(metric, block_size):
    vectors_ND, queries_BD = random_vectors(200), random_vectors(6, seed=1)
    scores_BK, ids_BK = ExactIndex(vectors_ND, metric=metric, block_size=block_size).search(queries_BD, 10)
    expected_scores, expected_ids = numpy_search(queries_BD, vectors_ND, 10, metric)
    np.testing.assert_array_equal(ids_BK.numpy(), expected_ids)
    np.testing.assert_allclose(scores_BK.numpy(), expected_scores, rtol=1e-5, atol=1e-5)
    assert (scores_BK.dtype, ids_BK.dtype) == (torch.float32, torch.int64)


@given(
    values=st.lists(st.integers(-3, 3), min_size=6, max_size=60),
    num_passages=st.integers(1, 3),
    block_size=st.integers(1, 9),
    metric=st.sampled_from(["inner_product", "l2"]),
)
@settings(deadline=None, max_examples=60)
def test_equal_scores_come_by_ascending_row_whatever_the_blocks(values, num_passages, block_size, metric):
    # small integers: exact in float32, and full of ties
    vectors_ND = torch.tensor(values[: len(values) // 2 * 2], dtype=torch.float32).reshape(-1, 2)
    queries_BD = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 1.0]])
    scores_BK, ids_BK = ExactIndex(vectors_ND, metric=metric, block_size=block_size).search(queries_BD, num_passages)
    expected_scores, expected_ids = numpy_search(queries_BD, vectors_ND, num_passages, metric)
    np.testing.assert_array_equal(ids_BK.numpy(), expected_ids)
    np.testing.assert_array_equal(scores_BK.numpy(), expected_scores)


def test_more_ties_than_candidates_still_give_the_lowest_rows():
    _, ids_BK = ExactIndex(torch.ones(500, 3), block_size=64).search(torch.ones(2, 3), 5)
    assert ids_BK.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert _top(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), 2)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_those_of_the_training_side_and_do_not_depend_on_the_batch(metric):
    vectors_ND, queries_BD = random_vectors(300, 32), random_vectors(16, 32, seed=1)
    index = ExactIndex(vectors_ND, metric=metric)
    scores_BK, ids_BK = index.search(queries_BD, 4)
    assert torch.equal(scores_BK, similarity(queries_BD, vectors_ND[ids_BK], metric))
    alone_scores, alone_ids = index.search(queries_BD[3:4], 4)
    assert torch.equal(alone_ids[0], ids_BK[3])
    torch.testing.assert_close(alone_scores[0], scores_BK[3], rtol=1e-6, atol=1e-6)


def test_search_has_no_gradient_and_takes_half_precision_queries():
    index = ExactIndex(random_vectors(10))
    scores_BK, _ = index.search(random_vectors(2).to(torch.bfloat16).requires_grad_(), 3)
    assert not scores_BK.requires_grad
    assert scores_BK.dtype == torch.float32


def test_bfloat16_autocast_does_not_choose_the_candidates():
    # scores 512 + n / 512 for n < 500 all round to 512 or to 514 in bfloat16
    vectors_ND = torch.stack([torch.full((500,), 512.0), torch.arange(500) / 512.0], dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_BK, ids_BK = ExactIndex(vectors_ND).search(torch.ones(1, 2), 3)
    assert ids_BK.tolist() == [[499, 498, 497]]
    assert scores_BK.dtype == torch.float32


def test_no_queries_give_no_hits():
    scores_BK, ids_BK = ExactIndex(random_vectors(10)).search(torch.zeros(0, 8), 3)
    assert scores_BK.shape == ids_BK.shape == (0, 3)


def test_more_passages_than_the_corpus_names_both_numbers():
    index = ExactIndex(random_vectors(10))
    with pytest.raises(ConfigError, match=r"expected 1 to 10, .* came 11\. Ask for fewer"):
        index.search(random_vectors(1), 11)
    with pytest.raises(ConfigError, match="came 0"):
        index.search(random_vectors(1), 0)
    assert index.search(random_vectors(1), 10)[1].sort().values.tolist() == [list(range(10))]


def test_bad_queries_and_vectors_are_refused():
    index = ExactIndex(random_vectors(10))
    with pytest.raises(ConfigError, match="expected dimension 8, that of the index; came 5"):
        index.search(torch.zeros(1, 5), 1)
    queries_BD = random_vectors(4)
    queries_BD[2, 3] = torch.nan
    with pytest.raises(DataError, match=r"1 of 4 queries \(rows \[2\]\)"):
        index.search(queries_BD, 1)
    with pytest.raises(DataError, match="passage vectors of non-zero length"):
        ExactIndex(torch.zeros(2, 2), metric="cosine")


@pytest.mark.parametrize("metric", METRICS)
def test_added_rows_continue_the_numbering(metric):
    vectors_ND, queries_BD = random_vectors(30), random_vectors(3, seed=1)
    index = ExactIndex(vectors_ND[:11], metric=metric)
    index.add(vectors_ND[11:])
    whole = ExactIndex(vectors_ND, metric=metric)
    assert index.num_vectors == 30
    assert all(map(torch.equal, index.search(queries_BD, 30), whole.search(queries_BD, 30)))
    with pytest.raises(DataError, match="expected dimension 8, came 2"):
        index.add(torch.ones(1, 2))


@given(
    num_vectors=st.integers(1, 30),
    dimension=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(METRICS),
)
@settings(deadline=None, max_examples=25)
def test_save_load_search_is_the_identity(tmp_path_factory, num_vectors, dimension, seed, metric):
    folder = tmp_path_factory.mktemp("exact")
    index = ExactIndex(random_vectors(num_vectors, dimension, seed), metric=metric)
    index.save(folder)
    loaded = ExactIndex.load(folder)
    queries_BD = random_vectors(3, dimension, seed + 1)
    assert loaded.metric == metric
    assert all(map(torch.equal, index.search(queries_BD, num_vectors), loaded.search(queries_BD, num_vectors)))


def test_loading_nothing_or_torn_files_says_so(tmp_path):
    with pytest.raises(MissingFileError, match="exact index: no such file"):
        ExactIndex.load(tmp_path)
    ExactIndex(random_vectors(10)).save(tmp_path)
    file = tmp_path / "vectors.npy"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CorruptSnapshotError, match=r"vectors.npy: expected a whole .npy file"):
        ExactIndex.load(tmp_path)


@pytest.fixture(params=["float32", "float16", "int8"])
def stored(request, tmp_path):
    """200 rows on disk in a storage, and what NumPy reads there."""
    write_vectors(tmp_path / "vectors.npy", in_storage(random_vectors(200), request.param))
    rows_ND = np.load(tmp_path / "vectors.npy").astype(np.float32)
    if request.param == "int8":
        rows_ND *= np.load(tmp_path / "scales.npy")[:, None]
    return open_vectors(tmp_path / "vectors.npy"), torch.from_numpy(rows_ND)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block_size", [None, 7])
def test_stored_rows_are_searched_by_the_similarity_of_what_is_stored(stored, metric, block_size):
    vectors, rows_ND = stored
    queries_BD = random_vectors(6, seed=1)
    scores_BK, ids_BK = ExactIndex(vectors, metric=metric, block_size=block_size).search(queries_BD, 10)
    expected_scores, expected_ids = numpy_search(queries_BD, rows_ND, 10, metric)
    np.testing.assert_array_equal(ids_BK.numpy(), expected_ids)
    np.testing.assert_allclose(scores_BK.numpy(), expected_scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores_BK, similarity(queries_BD, rows_ND[ids_BK], metric))


@pytest.mark.parametrize("metric", METRICS)
def test_rows_added_to_stored_ones_take_their_storage_and_save_and_load_keep_it(stored, metric, tmp_path):
    vectors, rows_ND = stored
    index = ExactIndex(vectors, metric=metric)
    index.search(random_vectors(1), 1)  # what it remembers of its rows must grow with them
    index.add(random_vectors(20, seed=2))
    (added,) = in_storage(random_vectors(20, seed=2), vectors.storage)
    expected_ND = torch.cat([rows_ND, added.rows(torch.arange(20))])
    queries_BD = random_vectors(3, seed=1)
    answer = index.search(queries_BD, 30)
    assert all(map(torch.equal, answer, ExactIndex(expected_ND, metric=metric).search(queries_BD, 30)))
    (tmp_path / "saved").mkdir()
    index.save(tmp_path / "saved")
    loaded = ExactIndex.load(tmp_path / "saved")
    assert np.load(tmp_path / "saved" / "vectors.npy").dtype == vectors.stored_ND.numpy().dtype
    assert all(map(torch.equal, answer, loaded.search(queries_BD, 30)))


def test_stored_rows_are_not_read_until_they_are_searched(stored, monkeypatch):
    vectors, _ = stored

    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(StoredVectors, "blocks", read)
    index = ExactIndex(vectors, metric="cosine")
    with pytest.raises(AssertionError, match="read"):
        index.search(random_vectors(1), 1)


def test_a_row_that_float16_rounds_to_zero_has_no_cosine():
    (vectors,) = in_storage(torch.tensor([[1.0, 0.0], [1e-9, 0.0]]), "float16")
    with pytest.raises(DataError, match="passage vectors of non-zero length, came 1 zero vector"):
        ExactIndex(vectors, metric="cosine").check_rows()
    ExactIndex(vectors, metric="l2").check_rows()
    index = ExactIndex(torch.ones(2, 2), metric="cosine")
    with pytest.raises(DataError, match="passage vectors of non-zero length"):
        index.add(torch.zeros(1, 2))
    assert index.num_vectors == 2


def test_settings_of_another_format_are_refused(tmp_path):
    ExactIndex(random_vectors(10)).save(tmp_path)
    for text, message in (('{"factory": "exact"}', "expected a factory and a metric"), ("{", "not valid JSON")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(CorruptSnapshotError, match=message):
            ExactIndex.load(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_stored_rows_stay_in_their_storage_on_a_gpu(stored, metric):
    vectors, rows_ND = stored
    index = ExactIndex(vectors, metric=metric, device="cuda", block_size=33)
    assert index._vectors.stored_ND.dtype == vectors.stored_ND.dtype
    assert index._vectors.device.type == "cuda"
    queries_BD = random_vectors(6, seed=1)
    scores_BK, ids_BK = index.search(queries_BD, 10)
    expected_scores, expected_ids = numpy_search(queries_BD, rows_ND, 10, metric)
    np.testing.assert_array_equal(ids_BK.numpy(), expected_ids)
    np.testing.assert_allclose(scores_BK.numpy(), expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_search_on_a_gpu_equals_the_cpu():
    vectors_ND, queries_BD = random_vectors(5000, 64), random_vectors(32, 64, seed=1)
    for metric in METRICS:
        scores_BK, ids_BK = ExactIndex(vectors_ND, metric=metric, device="cuda", block_size=999).search(queries_BD, 10)
        expected_scores, expected_ids = ExactIndex(vectors_ND, metric=metric).search(queries_BD, 10)
        assert torch.equal(ids_BK, expected_ids)
        torch.testing.assert_close(scores_BK, expected_scores)
