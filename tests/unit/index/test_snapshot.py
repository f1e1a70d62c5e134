import errno
import inspect
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingFileError
from rag_lightning.index import building
from rag_lightning.index import snapshot as snapshot_module
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.faiss import FaissIndex
from rag_lightning.index.snapshot import Origin, SnapshotStore, open_snapshot

ORIGIN = {"encoder_hash": "enc", "corpus_hash": "cor", "pooling": "mean"}


def random_vectors(num_vectors, dimension=8, seed=0):
    return torch.randn(num_vectors, dimension, generator=torch.Generator().manual_seed(seed))


@contextmanager
def file_size_limit(num_bytes):
    """The system itself refuses to let any file grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(
    num_vectors=st.integers(1, 30),
    dimension=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(["inner_product", "l2", "cosine"]),
    factory=st.sampled_from(["exact", "Flat", "HNSW4"]),
)
@settings(deadline=None, max_examples=30)
def test_publish_open_search_is_the_identity(tmp_path_factory, num_vectors, dimension, seed, metric, factory):
    if factory != "exact":
        pytest.importorskip("faiss")
    root = tmp_path_factory.mktemp("store")
    vectors_ND = random_vectors(num_vectors, dimension, seed)
    published = SnapshotStore(root).publish(vectors_ND, factory=factory, metric=metric, step=seed % 1000, **ORIGIN)
    opened = SnapshotStore(root).open(published.id, encoder_hash="enc", corpus_hash="cor")
    queries_BD = random_vectors(3, dimension, seed + 1)
    answer = opened.index.search(queries_BD, num_vectors)
    assert all(map(torch.equal, answer, published.index.search(queries_BD, num_vectors)))
    if factory == "exact":
        assert all(map(torch.equal, answer, ExactIndex(vectors_ND, metric=metric).search(queries_BD, num_vectors)))
    assert torch.equal(opened.vectors(torch.arange(num_vectors)), vectors_ND)
    assert opened.manifest == published.manifest
    assert isinstance(opened.index, ExactIndex if factory == "exact" else FaissIndex)


def test_ids_are_unique_to_their_content_and_listed_by_step(tmp_path):
    store = SnapshotStore(tmp_path)
    assert store.ids() == []
    late = store.publish(random_vectors(5), step=500, **ORIGIN)
    early = store.publish(random_vectors(5), step=60, **ORIGIN)
    twin = store.publish(random_vectors(5, seed=1), step=60, **ORIGIN)
    other = store.publish(random_vectors(5), step=60, encoder_hash="enc2", corpus_hash="cor", pooling="mean")
    assert store.ids() == [*sorted([early.id, twin.id, other.id]), late.id]
    assert late.id.startswith("step00000500-")
    assert len(set(store.ids())) == 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == store.ids()


def test_publishing_the_same_again_keeps_one_whole_snapshot_and_open_maps_readable(tmp_path):
    store = SnapshotStore(tmp_path)
    first = store.publish(random_vectors(5), **ORIGIN)
    (first.path / "manifest.json").unlink()  # as if torn
    second = store.publish(random_vectors(5), **ORIGIN)
    assert second.id == first.id
    assert store.open(first.id).id == first.id
    assert torch.equal(first.vectors(torch.arange(5)), random_vectors(5))


def test_publishing_the_same_again_never_takes_the_live_one_away(tmp_path, monkeypatch):
    """The old one was removed before the new one was renamed: a kill between the two lost the live snapshot."""
    store = SnapshotStore(tmp_path)
    first = store.publish(random_vectors(5), **ORIGIN)
    inode, created = (first.path / "vectors.npy").stat().st_ino, first.manifest.created
    monkeypatch.setattr(building, "discard", lambda *_: pytest.fail("the live snapshot was touched"))
    second = store.publish(random_vectors(5), **ORIGIN)
    assert (second.path, second.manifest.created) == (first.path, created)
    assert (second.path / "vectors.npy").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == [first.id]
    assert torch.equal(second.vectors(torch.arange(5)), random_vectors(5))


def test_an_altered_snapshot_of_the_same_content_is_replaced(tmp_path):
    store = SnapshotStore(tmp_path)
    first = store.publish(random_vectors(5), **ORIGIN)
    data = bytearray((first.path / "vectors.npy").read_bytes())
    data[-1] ^= 1
    (first.path / "vectors.npy").write_bytes(data)
    second = store.publish(random_vectors(5), **ORIGIN)
    assert store.open(second.id).id == first.id
    assert [path.name for path in tmp_path.iterdir()] == [first.id]


@pytest.mark.parametrize(("storage", "row_bytes"), [("float32", 32), ("float16", 16), ("int8", 8)])
@pytest.mark.parametrize("factory", ["exact", "Flat"])
def test_vectors_lie_in_the_storage_asked_for_and_are_what_is_searched(tmp_path, storage, row_bytes, factory):
    if factory == "Flat":
        pytest.importorskip("faiss")
    vectors_ND, queries_BD = random_vectors(40), random_vectors(3, seed=1)
    published = SnapshotStore(tmp_path, storage=storage).publish(iter(vectors_ND.split(7)), factory=factory, **ORIGIN)
    opened = SnapshotStore(tmp_path).open(published.id)  # whatever that store's own storage
    assert opened.manifest.storage == storage
    assert opened.manifest.num_bytes["vectors.npy"] == 128 + 40 * row_bytes
    assert ("scales.npy" in opened.manifest.checksums) == (storage == "int8")
    rows_ND = opened.vectors(torch.arange(40))
    assert (rows_ND.dtype, opened.vectors_ND.storage) == (torch.float32, storage)
    steps = {"float32": 0.0, "float16": 2e-3, "int8": float(vectors_ND.abs().max()) / 127 / 2 + 1e-6}
    assert (rows_ND - vectors_ND).abs().max() <= steps[storage]
    scores_BK, ids_BK = opened.index.search(queries_BD, 10)
    expected_scores, expected_ids = ExactIndex(rows_ND).search(queries_BD, 10)
    assert torch.equal(ids_BK, expected_ids)
    torch.testing.assert_close(scores_BK, expected_scores)


def test_what_float16_cannot_hold_publishes_nothing(tmp_path):
    with pytest.raises(DataError, match=r"came 70000 in row 1\. Use storage 'float32' or 'int8'"):
        SnapshotStore(tmp_path, storage="float16").publish(torch.tensor([[1.0], [7e4]]), **ORIGIN)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="storage: expected one of float32, float16, int8; came 'bfloat16'"):
        inspect.unwrap(SnapshotStore.__init__)(SnapshotStore.__new__(SnapshotStore), tmp_path, storage="bfloat16")


def test_recall_is_measured_before_publishing_and_kept(tmp_path):
    pytest.importorskip("faiss")
    vectors_ND, queries_PD = random_vectors(500), random_vectors(30, seed=1)
    for nprobe in (1, 4, 16):
        store = SnapshotStore(tmp_path / str(nprobe), nprobe=nprobe, storage="int8")
        snapshot = store.publish(vectors_ND, factory="IVF16,Flat", recall_queries=queries_PD, recall_at=5, **ORIGIN)
        found = snapshot.index.search(queries_PD, 5)[1].tolist()
        exact = (queries_PD @ snapshot.vectors(torch.arange(500)).T).topk(5).indices.tolist()
        share = sum(len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)) / (30 * 5)
        assert snapshot.manifest.recall == {"recall@5": pytest.approx(share)}
        assert store.open(snapshot.id).manifest.recall == snapshot.manifest.recall
    assert snapshot.manifest.recall == {"recall@5": 1.0}
    exact = SnapshotStore(tmp_path).publish(vectors_ND, recall_queries=queries_PD, **ORIGIN)
    assert exact.manifest.recall == {}
    small = SnapshotStore(tmp_path).publish(vectors_ND[:4], factory="Flat", recall_queries=queries_PD, **ORIGIN)
    assert small.manifest.recall == {"recall@4": 1.0}  # K is at most N


def test_old_snapshots_are_pruned_but_never_those_to_keep(tmp_path):
    store = SnapshotStore(tmp_path)
    ids = [store.publish(random_vectors(5, seed=step), step=step, **ORIGIN).id for step in (30, 10, 20, 0)]
    late, first, middle, zero = ids
    again = store.publish(random_vectors(5, seed=99), step=10, **ORIGIN).id  # newer than ``first``, of the same step
    mapped = store.open(zero)
    assert store.prune(5) == []
    assert store.prune(2, keep=[first]) == [zero, again]
    assert store.ids() == [first, middle, late]
    assert mapped.vectors(torch.arange(5)).shape == (5, 8)  # an open map stays readable
    (tmp_path / middle / "manifest.json").write_text("{")
    assert store.prune(1) == [first]  # what cannot be read is neither counted nor touched
    assert store.ids() == [middle, late]
    with pytest.raises(ConfigError, match="keep_last: expected 1 or more, came 0"):
        store.prune(0)


def test_of_one_step_the_oldest_goes_first(tmp_path):
    store = SnapshotStore(tmp_path)
    ids = [store.publish(random_vectors(5, seed=seed), step=4, **ORIGIN).id for seed in range(4)]
    assert store.prune(1) == ids[:3]


def test_two_trainers_cannot_share_a_folder(tmp_path):
    store = SnapshotStore(tmp_path / "index")
    lock = store.lock()
    message = (
        rf"index: expected a snapshot folder that no other run uses, came one in use by pid {os.getpid()} on host "
    )
    with pytest.raises(ConfigError, match=message + ".*wait for that run, stop it, or give this one another folder"):
        SnapshotStore(tmp_path / "index").lock()
    store.publish(random_vectors(3), **ORIGIN)
    assert len(store.ids()) == 1
    lock.release()
    SnapshotStore(tmp_path / "index").lock().release()
    assert [path.name for path in store.root.iterdir()] == store.ids()
    (tmp_path / "file").write_text("")
    with pytest.raises(CorruptSnapshotError, match="could not be built"):
        SnapshotStore(tmp_path / "file" / "store").lock()


def test_blocks_are_streamed_into_the_same_snapshot(tmp_path):
    vectors_ND = random_vectors(10)
    whole = SnapshotStore(tmp_path / "a").publish(vectors_ND, **ORIGIN)
    streamed = SnapshotStore(tmp_path / "b").publish(iter(vectors_ND.split(3)), **ORIGIN)
    assert whole.id == streamed.id


def test_shards_in_rank_order_are_the_whole(tmp_path):
    vectors_ND = random_vectors(10)
    whole = SnapshotStore(tmp_path / "a").publish(vectors_ND, step=3, **ORIGIN)
    store = SnapshotStore(tmp_path / "b")
    path = store.begin(3)
    for rank in (2, 0, 1):
        store.write_shard(path, rank, vectors_ND.tensor_split(3)[rank])
    assert store.ids() == []
    sharded = store.finish(path, 3, Origin(step=3, **ORIGIN))
    assert sharded.id == whole.id
    assert torch.equal(sharded.vectors(torch.arange(10)), vectors_ND)
    assert sharded.path.is_dir()
    assert not path.exists()


def test_a_missing_shard_publishes_nothing(tmp_path):
    store = SnapshotStore(tmp_path)
    path = store.begin(0)
    store.write_shard(path, 0, random_vectors(3))
    with pytest.raises(CorruptSnapshotError, match=r"shard-00001/vectors\.npy: expected a whole"):
        store.finish(path, 2, Origin(**ORIGIN))
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_build_leaves_nothing(tmp_path):
    store = SnapshotStore(tmp_path)
    path = store.begin(0)
    store.write_shard(path, 0, random_vectors(3))
    store.abandon(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("factory", "limit"),
    [
        ("exact", 10_000),  # fails on the vectors (16 kB)
        ("Flat", 10_000),
        ("HNSW32", 20_000),  # the vectors fit, the graph does not
    ],
)
def test_a_disk_that_fills_up_leaves_the_old_snapshot_live(tmp_path, factory, limit):
    if factory != "exact":
        pytest.importorskip("faiss")
    store = SnapshotStore(tmp_path)
    old = store.publish(random_vectors(20), step=1, **ORIGIN)
    before = old.index.search(random_vectors(2, seed=1), 5)
    with (
        file_size_limit(limit),
        pytest.raises(
            CorruptSnapshotError, match=r"could not be built: .*vectors need 0\.0 MiB.* MiB are free.*untouched"
        ),
    ):
        store.publish(random_vectors(500), factory=factory, step=2, **ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == [old.id]
    assert all(map(torch.equal, store.open(old.id).index.search(random_vectors(2, seed=1), 5), before))


@pytest.mark.parametrize("stage", ["write_vectors", "write_json", "sync", "sync_and_hash"])
def test_no_space_at_any_stage_removes_the_partial_folder(tmp_path, monkeypatch, stage):
    store = SnapshotStore(tmp_path)
    old = store.publish(random_vectors(20), step=1, **ORIGIN)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot_module, stage, full)
    with pytest.raises(CorruptSnapshotError, match=r"No space left on device.*MiB are free.*choose another folder"):
        store.publish(random_vectors(300_000, 1), step=2, **ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == [old.id]
    assert store.open(old.id).index.num_vectors == 20


def test_the_space_needed_is_named_in_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot_module, "write_vectors", full)
    with pytest.raises(CorruptSnapshotError, match=r"vectors need 2\.0 MiB"):
        SnapshotStore(tmp_path).publish(torch.zeros(2**19, 1), **ORIGIN)


def test_a_stream_that_fills_the_disk_names_what_it_had_written(tmp_path):
    blocks = (random_vectors(1000, 256) for _ in range(20))
    with (
        file_size_limit(5 * 2**20),
        pytest.raises(CorruptSnapshotError, match=r"vectors need more than the 5\.0 MiB written so far; .* are free"),
    ):
        SnapshotStore(tmp_path).publish(blocks, **ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_root_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorruptSnapshotError, match="could not be built"):
        SnapshotStore(tmp_path / "file" / "store").publish(random_vectors(2), **ORIGIN)


def test_bad_vectors_and_settings_publish_nothing(tmp_path):
    store = SnapshotStore(tmp_path)
    with pytest.raises(DataError, match="NaN or infinity in row 1"):
        store.publish(torch.tensor([[1.0], [torch.nan]]), **ORIGIN)
    with pytest.raises(DataError, match="passage vectors of non-zero length"):
        store.publish(torch.zeros(2, 2), metric="cosine", **ORIGIN)
    with pytest.raises(ConfigError, match="step: expected 0 or more, came -3"):
        store.publish(random_vectors(2), step=-3, **ORIGIN)
    with pytest.raises(ConfigError, match="nprobe: came 2, but factory 'exact'"):
        SnapshotStore(tmp_path, nprobe=2).publish(random_vectors(2), **ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_half_built(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot_module, "build_index", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SnapshotStore(tmp_path).publish(random_vectors(2), **ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_wrong_is_not_published(tmp_path, monkeypatch):
    real = snapshot_module.sync_and_hash

    def bit_rot_after_hashing(path):
        checksums = real(path)
        data = bytearray((path / "vectors.npy").read_bytes())
        data[-1] ^= 1
        (path / "vectors.npy").write_bytes(data)
        return checksums

    monkeypatch.setattr(snapshot_module, "sync_and_hash", bit_rot_after_hashing)
    with pytest.raises(CorruptSnapshotError, match="torn or altered"):
        SnapshotStore(tmp_path).publish(random_vectors(2), **ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_id_lists_those_there_are(tmp_path):
    store = SnapshotStore(tmp_path)
    with pytest.raises(MissingFileError, match=r"no snapshot 'step1'.*\(none\)"):
        store.open("step1")
    snapshot = store.publish(random_vectors(2), **ORIGIN)
    with pytest.raises(MissingFileError, match=snapshot.id):
        store.open("step1")
    store.remove(snapshot.id)
    assert store.ids() == []


def test_faiss_settings_of_the_store_are_used_and_kept(tmp_path):
    pytest.importorskip("faiss")
    vectors_ND, queries_BD = random_vectors(200), random_vectors(10, seed=1)
    store = SnapshotStore(tmp_path, nprobe=8, num_training_vectors=150, seed=3)
    snapshot = store.publish(vectors_ND, factory="IVF8,Flat", **ORIGIN)
    _, ids_BK = open_snapshot(snapshot.path).index.search(queries_BD, 5)
    assert torch.equal(ids_BK, ExactIndex(vectors_ND).search(queries_BD, 5)[1])


RANK_SCRIPT = """
import sys
import torch
import torch.distributed as dist
from rag_lightning.errors import RagError
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.utils.distributed import shard

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
store = SnapshotStore(f"{folder}/store")
vectors_ND = torch.arange(33, dtype=torch.float32).reshape(11, 3)
rows = shard(11, rank, 2)
mine = vectors_ND[rows.start : rows.stop]
origin = {"encoder_hash": "enc", "corpus_hash": "cor", "pooling": "mean"}
snapshot = store.publish_shards(mine, step=4, **origin)
assert torch.equal(snapshot.vectors(torch.arange(11)), vectors_ND)
print("published", snapshot.id)
for bad_rank in (0, 1):
    try:
        store.publish_shards(mine * (torch.nan if rank == bad_rank else 1.0), step=5, **origin)
    except RagError as error:
        print(type(error).__name__, error)
dist.barrier()
assert store.ids() == [snapshot.id]
dist.destroy_process_group()
"""


@pytest.mark.ddp
def test_two_processes_publish_one_snapshot_and_fail_together(tmp_path):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output.splitlines())
    vectors_ND = torch.arange(33, dtype=torch.float32).reshape(11, 3)
    alone = SnapshotStore(tmp_path / "alone").publish(vectors_ND, step=4, **ORIGIN)
    for rank, lines in enumerate(outputs):
        assert lines[0] == f"published {alone.id}"
        assert lines[1 + rank].startswith("DataError passage vectors: expected finite numbers")
        assert "another process failed: DataError: passage vectors" in lines[2 - rank]
    assert [path.name for path in (tmp_path / "store").iterdir()] == [alone.id]
