import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingExtraError, MissingFileError
from rag_lightning.index import faiss as faiss_module
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.faiss import INDEX_FILE, FaissIndex, training_sample_size
from rag_lightning.index.vector_files import in_storage, write_vectors
from rag_lightning.index.vectors import StoredVectors, open_vectors

METRICS = ["inner_product", "l2", "cosine"]


@pytest.fixture(scope="module", autouse=True)
def _faiss():
    pytest.importorskip("faiss")


def random_vectors(num_vectors, dimension=16, seed=0):
    return torch.randn(num_vectors, dimension, generator=torch.Generator().manual_seed(seed))


def overlap(ids_BK, expected_BK):
    pairs = zip(ids_BK.tolist(), expected_BK.tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / expected_BK.numel()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("factory", "settings"),
    [("Flat", {}), ("IVF8,Flat", {"nprobe": 8})],  # visiting all lists is exhaustive
)
def test_exhaustive_factories_equal_exact_search(factory, settings, metric):
    vectors_ND, queries_BD = random_vectors(500), random_vectors(9, seed=1)
    index = FaissIndex.build(vectors_ND, factory=factory, metric=metric, **settings)
    scores_BK, ids_BK = index.search(queries_BD, 7)
    expected_scores, expected_ids = ExactIndex(vectors_ND, metric=metric).search(queries_BD, 7)
    assert torch.equal(ids_BK, expected_ids)
    torch.testing.assert_close(scores_BK, expected_scores, rtol=1e-4, atol=1e-4)
    assert (index.num_vectors, index.dimension, index.metric) == (500, 16, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_graph_search_finds_nearly_all_and_more_when_it_looks_wider(metric):
    vectors_ND, queries_BD = random_vectors(1000), random_vectors(50, seed=1)
    _, expected_ids = ExactIndex(vectors_ND, metric=metric).search(queries_BD, 10)

    def recall(ef_search):
        index = FaissIndex.build(vectors_ND, factory="HNSW16", metric=metric, ef_search=ef_search)
        return overlap(index.search(queries_BD, 10)[1], expected_ids)

    wide, narrow = recall(256), recall(10)
    assert wide >= 0.95
    assert narrow < wide


def test_few_lists_visited_leave_places_empty():
    centres = torch.eye(4).repeat_interleave(10, dim=0) * 100
    vectors_ND = centres + 0.01 * random_vectors(40, 4)
    scores_BK, ids_BK = FaissIndex.build(vectors_ND, factory="IVF4,Flat", metric="l2", nprobe=1).search(
        vectors_ND[:1], 15
    )
    assert ids_BK[0, 0] == 0
    assert set(ids_BK[0, :10].tolist()) == set(range(10))
    assert ids_BK[0, 10:].tolist() == [-1] * 5
    assert scores_BK[0, 10:].tolist() == [-torch.inf] * 5
    assert torch.isfinite(scores_BK[0, :10]).all()


def test_equal_scores_come_by_ascending_row():
    _, ids_BK = FaissIndex.build(torch.ones(6, 2)).search(torch.ones(1, 2), 6)
    assert ids_BK.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("num_training_vectors", [None, 300])
def test_the_seed_decides_the_clusters(num_training_vectors):
    vectors_ND, queries_BD = random_vectors(600), random_vectors(20, seed=1)

    def answer(seed):
        index = FaissIndex.build(
            vectors_ND, factory="IVF16,Flat", num_training_vectors=num_training_vectors, nprobe=2, seed=seed
        )
        return index.search(queries_BD, 5)[1]

    assert torch.equal(answer(3), answer(3))
    assert not torch.equal(answer(3), answer(4))


@given(
    factory=st.sampled_from(["Flat", "HNSW8", "IVF2,Flat", "SQ8"]),
    metric=st.sampled_from(METRICS),
    num_vectors=st.integers(4, 40),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25)
def test_save_load_search_is_the_identity(tmp_path_factory, factory, metric, num_vectors, seed):
    folder = tmp_path_factory.mktemp("faiss")
    index = FaissIndex.build(random_vectors(num_vectors, 4, seed), factory=factory, metric=metric)
    index.save(folder)
    loaded = FaissIndex.load(folder)
    queries_BD = random_vectors(3, 4, seed + 1)
    assert (loaded.metric, loaded.factory) == (metric, factory)
    assert all(map(torch.equal, index.search(queries_BD, num_vectors), loaded.search(queries_BD, num_vectors)))


def test_search_settings_survive_saving(tmp_path):
    vectors_ND, queries_BD = random_vectors(400), random_vectors(20, seed=1)
    FaissIndex.build(vectors_ND, factory="IVF16,Flat", nprobe=16).save(tmp_path)
    _, ids_BK = FaissIndex.load(tmp_path).search(queries_BD, 5)
    assert torch.equal(ids_BK, ExactIndex(vectors_ND).search(queries_BD, 5)[1])


def test_added_rows_continue_the_numbering():
    vectors_ND = random_vectors(30)
    index = FaissIndex.build(vectors_ND[:11], metric="cosine")
    index.add(vectors_ND[11:])
    _, ids_BK = index.search(vectors_ND, 1)
    assert ids_BK.flatten().tolist() == list(range(30))
    with pytest.raises(DataError, match="expected dimension 16, came 2"):
        index.add(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"factory": "Flatt"},
            r"index factory 'Flatt': expected one that FAISS accepts.*FAISS says: .*Flatt.*wiki.*'exact'",
        ),
        ({"factory": "PQ5"}, "index factory 'PQ5'.*20 x 16 vectors.*use factory 'exact'"),
        ({"factory": "IVF64,Flat"}, "index factory 'IVF64,Flat'.*20 x 16 vectors.*FAISS says.*fewer clusters"),
        (
            {"factory": "Flat", "nprobe": 4},
            r"nprobe: expected an index factory with inverted lists \(IVF…\), came 'Flat'",
        ),
        ({"factory": "IVF2,Flat", "ef_search": 4}, r"ef_search: expected an index factory with a graph \(HNSW…\)"),
        ({"factory": "IVF2,Flat", "nprobe": 0}, "nprobe: expected at least 1, came 0"),
        ({"factory": "IVF2,Flat", "num_training_vectors": 0}, "num_training_vectors: expected at least 1, came 0"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused_in_faiss_words_and_ours(settings, message):
    with pytest.raises(ConfigError, match=message):
        FaissIndex.build(random_vectors(20), **settings)


def test_bad_searches_are_refused_like_the_oracle_refuses_them():
    index = FaissIndex.build(random_vectors(10))
    with pytest.raises(ConfigError, match=r"expected 1 to 10, .* came 11"):
        index.search(random_vectors(1), 11)
    with pytest.raises(DataError, match="NaN or infinity"):
        index.search(torch.full((1, 16), torch.nan), 1)
    with pytest.raises(DataError, match="query vectors of non-zero length"):
        FaissIndex.build(random_vectors(10), metric="cosine").search(torch.zeros(1, 16), 1)


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"'HNSW32' \(factory 'exact' needs nothing\).*rag_lightning\[faiss\]"):
        FaissIndex.build(random_vectors(10), factory="HNSW32")


def test_gpu_search_needs_a_gpu_build(caplog):
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        pytest.skip("this FAISS has a GPU")
    rows = random_vectors(10)
    index = FaissIndex.build(rows)
    with pytest.raises((MissingExtraError, ConfigError), match=r"rag_lightning\[gpu\]|GPUs that FAISS sees"):
        index.to_gpu("cuda:0")
    # a model on a GPU must still be able to search with the usual build of FAISS
    assert index.on_device("cuda:0") is index
    assert "the index is searched on the CPU" in caplog.text
    caplog.clear()
    assert index.on_device("cpu") is index
    assert index.on_device(None) is index
    assert caplog.text == ""


@pytest.fixture
def faiss_with_gpus(monkeypatch):
    """FAISS as if it saw two GPUs; notes where indexes go."""
    import faiss

    moves = []

    def move(resources, number, index):
        if isinstance(faiss.downcast_index(index), faiss.IndexHNSW):
            raise RuntimeError("Error: 'false' failed: This index type is not implemented on GPU.")
        moves.append(number)
        return index

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", move, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: index, raising=False)
    return moves


def test_each_process_takes_its_own_gpu(faiss_with_gpus, caplog, tmp_path):
    rows = random_vectors(100)
    on_gpu = FaissIndex.build(rows, device="cuda:1")
    assert faiss_with_gpus == [1]
    torch.testing.assert_close(on_gpu.search(rows[:3], 2), FaissIndex.build(rows).search(rows[:3], 2))
    on_gpu.save(tmp_path)
    FaissIndex.load(tmp_path, device="cuda:0")
    assert faiss_with_gpus == [1, 0]
    with pytest.raises(ConfigError, match="device cuda:2: expected one of the 2 GPUs that FAISS sees"):
        on_gpu.to_gpu("cuda:2")
    assert caplog.text == ""
    FaissIndex.build(rows, factory="HNSW8", device="cuda:1")
    assert "searched on the CPU: index factory 'HNSW8': FAISS has no GPU form of it: This index type is" in caplog.text


def test_loading_nothing_or_torn_files_says_so(tmp_path):
    with pytest.raises(MissingFileError, match="FAISS index settings: no such file"):
        FaissIndex.load(tmp_path)
    FaissIndex.build(random_vectors(10)).save(tmp_path)
    file = tmp_path / INDEX_FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptSnapshotError, match="expected a whole FAISS index; FAISS says"):
        FaissIndex.load(tmp_path)


def test_settings_that_contradict_the_index_are_refused(tmp_path):
    FaissIndex.build(random_vectors(10)).save(tmp_path)
    for text, message in (
        ('{"factory": "Flat", "metric": "l2"}', "expected an index of metric 'l2', came another"),
        ('{"factory": "Flat", "metric": "dot"}', "expected a factory and a metric of inner_product, l2, cosine"),
        ("[]", "expected a factory and a metric"),
        ("{", "not valid JSON.*Build the index again"),
    ):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(CorruptSnapshotError, match=message):
            FaissIndex.load(tmp_path)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("metric", METRICS)
def test_an_index_over_stored_rows_is_one_over_their_values(tmp_path, storage, metric):
    write_vectors(tmp_path / "vectors.npy", in_storage(random_vectors(400), storage))
    vectors = open_vectors(tmp_path / "vectors.npy")
    rows_ND, queries_BD = vectors.rows(torch.arange(400)), random_vectors(9, seed=1)
    for parts in ({"factory": "Flat"}, {"factory": "IVF8,Flat", "nprobe": 8, "num_training_vectors": 320}):
        scores_BK, ids_BK = FaissIndex.build(vectors, metric=metric, **parts).search(queries_BD, 7)
        expected_scores, expected_ids = ExactIndex(rows_ND, metric=metric).search(queries_BD, 7)
        assert torch.equal(ids_BK, expected_ids)
        torch.testing.assert_close(scores_BK, expected_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "factory", ["IVF4,PQ4x4", "OPQ4,IVF4,PQ4x4", "PCA8,Flat", "HNSW8,PQ4x4", "IVF4,SQ8", "PQ4x4np"]
)
def test_factories_of_all_families_find_most_neighbours(factory):
    vectors_ND = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(40, dim=0) * 4
    vectors_ND += random_vectors(800) / 4  # 20 clouds of 40 rows
    settings = {"nprobe": 4} if "IVF" in factory else {"ef_search": 64} if "HNSW" in factory else {}
    index = FaissIndex.build(vectors_ND, factory=factory, metric="l2", **settings)
    _, ids_BK = index.search(vectors_ND[::40], 40)
    of_the_cloud = (ids_BK // 40 == torch.arange(20).unsqueeze(1)).double().mean()
    assert of_the_cloud > 0.9


def test_only_the_sample_is_read_to_train(monkeypatch):
    """The first version took all rows of a memory map as the sample, 64 GB for 21 million passages."""
    (vectors,) = in_storage(random_vectors(5000), "float16")
    read, trained = [], []
    real_rows, real_train = StoredVectors.rows, FaissIndex._train

    def rows(self, ids):
        read.append(len(ids))
        return real_rows(self, ids)

    def train(self, *arguments):
        monkeypatch.setattr(StoredVectors, "blocks", lambda *_: pytest.fail("all rows were read"))
        real_train(self, *arguments)
        trained.append(True)
        monkeypatch.undo()

    monkeypatch.setattr(StoredVectors, "rows", rows)
    monkeypatch.setattr(FaissIndex, "_train", train)
    FaissIndex.build(vectors, factory="IVF4,Flat", num_training_vectors=1000)
    assert (read, trained) == ([1000], [True])


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "HNSW8", "HNSW8_SQ8", "PCA8,SQ8", "PQ4x4np", "Flat,RFlat", "IVF2,Flat"]
)
def test_room_for_all_codes_is_made_before_the_first(factory, monkeypatch):
    """And the index is the same as one that grew."""
    import faiss

    made, plain = [], faiss_module._reserve

    def reserve(*arguments):
        plain(*arguments)
        made.append(arguments[1].ntotal)

    rows = random_vectors(300)
    monkeypatch.setattr(faiss_module, "_reserve", lambda *_: None)
    grown = FaissIndex.build(rows, factory=factory)
    monkeypatch.setattr(faiss_module, "_reserve", reserve)
    index = FaissIndex.build(rows, factory=factory)
    assert made
    assert set(made) == {0}
    assert index.num_vectors == 300
    assert (faiss.serialize_index(index._index) == faiss.serialize_index(grown._index)).all()


def test_the_default_sample_is_the_documented_one():
    assert training_sample_size(500, 16, 8) == 500
    assert training_sample_size(10**6, 16, 0) == 65_536  # the 256 codes of a quantizer
    assert training_sample_size(10**6, 16, 1024) == 262_144  # 256 a list
    assert training_sample_size(10**7, 768, 4096) == 39 * 4096  # where 160 MiB would be too few a list
    assert training_sample_size(10**7, 768, 1024) == 160 * 2**20 // (4 * 768)


def test_an_unwritable_place_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="FAISS could not write the index"):
        FaissIndex.build(random_vectors(10)).save(tmp_path / "nowhere")
