"""One process and pure functions; searches of several processes are in ``tests/pipelines/test_sharded_ddp.py``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import Index
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.faiss import FaissIndex
from rag_lightning.index.sharded import ShardedIndex, _Call, check_agreement, open_shard
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.index.vectors import StoredVectors, open_vectors

METRICS = ["inner_product", "l2", "cosine"]


def random_vectors(num_vectors, dimension=8, seed=0):
    return torch.randn(num_vectors, dimension, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("factory", "kind"), [("exact", ExactIndex), ("Flat", FaissIndex)])
def test_with_one_process_it_is_the_local_index(metric, factory, kind):
    vectors_ND, queries_BD = random_vectors(30), random_vectors(4, seed=1)
    index = open_shard(vectors_ND, rank=0, world_size=1, factory=factory, metric=metric)
    assert isinstance(index, Index)
    assert isinstance(index._local, kind)
    assert (index.num_vectors, index.dimension, index.metric, index.rows) == (30, 8, metric, range(30))
    scores_BK, ids_BK = index.search(queries_BD, 5)
    for query, scores, ids in zip(queries_BD.double(), scores_BK, ids_BK, strict=True):
        expected = []
        for row in vectors_ND.double():
            if metric == "l2":
                expected.append(-float(((query - row) ** 2).sum()))
            else:
                expected.append(float(query @ row) / (float(query.norm() * row.norm()) if metric == "cosine" else 1.0))
        assert ids.tolist() == sorted(range(30), key=lambda row, e=expected: -e[row])[:5]
        assert scores.tolist() == pytest.approx([expected[row] for row in ids], rel=1e-5, abs=1e-5)
    with pytest.raises(ConfigError, match="expected 1 to 30, the passages in the index; came 31"):
        index.search(queries_BD, 31)
    with pytest.raises(DataError, match="came NaN or infinity in 1 of 1 queries"):
        index.search(torch.full((1, 8), torch.nan), 1)


@given(num_vectors=st.integers(1, 30), world_size=st.integers(1, 7))
def test_the_shards_hold_every_row_once_in_order(num_vectors, world_size):
    vectors_ND = random_vectors(num_vectors)
    held = []
    for rank in range(world_size):
        shard = open_shard(vectors_ND, rank=rank, world_size=world_size)
        assert (shard.num_vectors, shard.dimension) == (num_vectors, 8)
        assert (shard._local is None) == (len(shard.rows) == 0)
        if shard._local is not None:
            held.append(shard._local._vectors.stored_ND)
            assert torch.equal(held[-1], vectors_ND[shard.rows.start : shard.rows.stop])
    assert torch.equal(torch.cat(held), vectors_ND)


def test_the_shard_of_a_memory_map_is_searched_in_place(tmp_path):
    np.save(tmp_path / "vectors.npy", random_vectors(11).numpy())
    mapped = open_vectors(tmp_path / "vectors.npy")
    shard = open_shard(mapped, rank=1, world_size=2)
    assert shard.rows == range(6, 11)
    assert shard._local._vectors.stored_ND.data_ptr() == mapped.stored_ND.data_ptr() + 6 * 8 * 4


@pytest.mark.parametrize("factory", ["exact", "Flat"])
def test_the_shards_of_int8_rows_are_those_rows(factory):
    draw = torch.Generator().manual_seed(0)
    stored_ND = torch.randint(-127, 128, (9, 4), generator=draw, dtype=torch.int8)
    scales_N = torch.rand(9, generator=draw) + 0.5
    queries_BD = random_vectors(3, 4)
    shard = open_shard(StoredVectors(stored_ND, scales_N), rank=1, world_size=2, factory=factory)
    scores_BK, ids_BK = shard._local.search(queries_BD, 4)
    expected_BN = queries_BD @ (stored_ND.float() * scales_N[:, None])[5:].T
    assert ids_BK.tolist() == expected_BN.argsort(dim=1, descending=True).tolist()
    torch.testing.assert_close(scores_BK, expected_BN.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_a_published_snapshot_is_searched_through_its_shards(tmp_path, storage):
    store = SnapshotStore(tmp_path, storage=storage)
    published = store.publish(random_vectors(21), encoder_hash="e", corpus_hash="c", pooling="mean", metric="cosine")
    snapshot = store.open(published.id, verify=False)
    queries_BD = random_vectors(3, seed=1)
    expected_scores, expected_ids = snapshot.index.search(queries_BD, 4)
    settings = {"factory": snapshot.manifest.factory, "metric": snapshot.manifest.metric}
    sharded = replace(snapshot, index=open_shard(snapshot.vectors_ND, rank=0, world_size=1, **settings))
    scores_BK, ids_BK = sharded.index.search(queries_BD, 4)
    assert torch.equal(ids_BK, expected_ids)
    assert torch.equal(scores_BK, expected_scores)
    found = []  # the shards of two processes, merged by hand
    for rank in range(2):
        shard = open_shard(snapshot.vectors_ND, rank=rank, world_size=2, **settings)
        scores, rows = shard._local.search(queries_BD, 4)
        pairs = torch.stack([-scores.double(), (rows + shard.rows.start).double()], dim=-1)
        found.append(pairs.tolist())
    merged = [[row for _, row in sorted(left + right)[:4]] for left, right in zip(*found, strict=True)]
    assert merged == expected_ids.tolist()


def test_what_faiss_is_told_reaches_each_shard():
    vectors_ND = random_vectors(400)
    settings = {"rank": 1, "world_size": 2, "factory": "IVF4,Flat", "num_training_vectors": 160}
    few, all_lists = open_shard(vectors_ND, nprobe=1, **settings), open_shard(vectors_ND, nprobe=4, **settings)
    queries_BD = random_vectors(5, seed=1)
    assert (few._local.search(queries_BD, 150)[1] == -1).any()
    assert not (all_lists._local.search(queries_BD, 150)[1] == -1).any()
    other_seed = open_shard(vectors_ND, nprobe=1, seed=1, **settings)
    assert not torch.equal(few._local.search(queries_BD, 150)[1], other_seed._local.search(queries_BD, 150)[1])
    with pytest.raises(ConfigError, match="ef_search: expected an index factory with a graph"):
        open_shard(vectors_ND, ef_search=5, **settings)
    with pytest.raises(ConfigError, match="nprobe: came 3, but factory 'exact' has no such setting"):
        open_shard(vectors_ND, rank=0, world_size=2, nprobe=3)


def test_one_process_with_a_part_of_the_rows_is_refused():
    with pytest.raises(ConfigError, match="expected all 10 rows in the one process that runs, came 5. Open the shards"):
        open_shard(random_vectors(10), rank=0, world_size=2).search(random_vectors(1), 1)
    with pytest.raises(ConfigError, match="expected all 2 rows in the one process that runs, came 0"):
        open_shard(random_vectors(2), rank=2, world_size=3).search(random_vectors(1), 1)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_processes_is_refused(rank, world_size):
    with pytest.raises(ConfigError, match=f"expected a rank within 0..{world_size - 1}, came {rank}"):
        open_shard(random_vectors(10), rank=rank, world_size=world_size)


def test_bad_vectors_are_refused_by_the_shard_that_holds_them():
    vectors_ND = random_vectors(10)
    vectors_ND[7, 0] = torch.nan
    assert open_shard(vectors_ND, rank=0, world_size=2).rows == range(5)
    with pytest.raises(DataError, match="NaN or infinity in row 2"):  # of the shard
        open_shard(vectors_ND, rank=1, world_size=2)


def test_a_shard_that_does_not_fit_is_refused():
    local = ExactIndex(random_vectors(5))
    whole = {"num_vectors": 10, "dimension": 8, "metric": "inner_product"}
    assert ShardedIndex(local, offset=5, **whole).rows == range(5, 10)
    with pytest.raises(ConfigError, match="expected a shard within rows 0 to 10, came 5 rows from row 6"):
        ShardedIndex(local, offset=6, **whole)
    with pytest.raises(ConfigError, match="came 5 rows from row -1"):
        ShardedIndex(local, offset=-1, **whole)
    with pytest.raises(ConfigError, match="within rows 0 to 0, came 0 rows"):
        ShardedIndex(None, offset=0, num_vectors=0, dimension=8, metric="l2")
    with pytest.raises(ConfigError, match="dimension 9 and metric 'inner_product', came one of 8 and 'inner_product'"):
        ShardedIndex(local, offset=0, **{**whole, "dimension": 9})
    with pytest.raises(ConfigError, match="metric 'cosine', came one of 8 and 'inner_product'. Build all shards"):
        ShardedIndex(local, offset=0, **{**whole, "metric": "cosine"})


def test_more_rows_than_32_bits_number_are_refused():
    class Vast(ExactIndex):
        num_vectors = 2**31

    with pytest.raises(ConfigError, match="at most 2147483647 rows in a shard, .* came 2147483648. Use more processes"):
        ShardedIndex(Vast(torch.eye(2)), offset=0, num_vectors=2**33, dimension=2, metric="inner_product")


def test_it_is_neither_added_to_nor_saved(tmp_path):
    index = open_shard(random_vectors(9), rank=0, world_size=2)
    with pytest.raises(ConfigError, match="expected to be searched only, came 2 rows to add. Publish a snapshot"):
        index.add(random_vectors(2))
    assert index._local.num_vectors == 5
    with pytest.raises(ConfigError, match="holds 5 of 9 rows. The snapshot keeps all vectors"):
        index.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def call(first_row, num_rows, **different):
    usual = {"failed": 0, "num_queries": 1, "num_passages": 3, "num_vectors": 5, "dimension": 8, "metric": 0}
    return _Call(first_row=first_row, num_rows=num_rows, **{**usual, **different})


def test_processes_must_speak_of_one_index():
    check_agreement([call(0, 3), call(3, 2)])
    check_agreement([call(0, 5), call(5, 0, num_queries=0)])
    for name, words in (
        ("num_passages", "[3, 4]"),
        ("num_vectors", "[5, 4]"),
        ("dimension", "[8, 4]"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_agreement([call(0, 3), call(3, 2, **{name: 4})])
        assert f"expected the same {name} from every process, came {words} in rank order" in str(caught.value)
    with pytest.raises(ConfigError, match=r"the same metric from every process, came \['inner_product', 'cosine'\]"):
        check_agreement([call(0, 3), call(3, 2, metric=2)])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(0, 3), (2, 3)], "came 0..2, 2..4"),  # one row twice
        ([(0, 2), (3, 2)], "came 0..1, 3..4"),  # one row never
        ([(0, 3), (3, 1)], "came 0..2, 3..3"),  # the last row never
        ([(3, 2), (0, 3)], "came 3..4, 0..2"),  # not in rank order
        ([(0, 5), (0, 5)], "came 0..4, 0..4"),  # the whole on each
    ],
)
def test_shards_must_be_all_rows_once_in_rank_order(parts, words):
    with pytest.raises(ConfigError) as caught:
        check_agreement([call(*part) for part in parts])
    assert words in str(caught.value)
    assert "shards of 2 processes to be rows 0..4, each once and in rank order" in str(caught.value)


@pytest.mark.gpu
def test_a_shard_on_a_gpu_lies_there():
    shard = open_shard(random_vectors(10), rank=1, world_size=2, device="cuda")
    assert shard._local._vectors.stored_ND.is_cuda
