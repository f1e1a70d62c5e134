import inspect
import re

import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.index.factory import index_size
from rag_lightning.index.plan import (
    BASE_BYTES,
    Limits,
    alternatives,
    check_fits,
    gigabytes,
    plan_index,
    refusal,
)
from rag_lightning.index.snapshot import SnapshotStore

ROOMY = Limits(ram_bytes=10**13, disk_bytes=10**13)
ORIGIN = {"encoder_hash": "e", "corpus_hash": "c", "pooling": "mean"}


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("factory", ["exact", "Flat", "HNSW16", "IVF32,Flat", "IVF32,PQ8np"])
def test_disk_is_that_of_a_published_snapshot(storage, factory, tmp_path):
    if factory != "exact":
        pytest.importorskip("faiss")
    vectors = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
    snapshot = SnapshotStore(tmp_path, storage=storage).publish(vectors, factory=factory, **ORIGIN)
    plan = plan_index(3000, 32, factory=factory, storage=storage)
    sizes = {file.name: file.stat().st_size for file in snapshot.path.iterdir()}
    stored = sizes["vectors.npy"] + sizes.get("scales.npy", 0)
    assert plan.vectors_bytes == pytest.approx(stored, rel=0.005)
    assert plan.index_bytes == pytest.approx(sizes.get("index.faiss", 0), rel=0.02)
    assert plan.disk_bytes == pytest.approx(sum(sizes.values()), rel=0.02)


def test_memory_is_that_of_its_parts():
    exact = plan_index(10**7, 768)
    assert exact.cache_bytes == exact.vectors_bytes == 4 * 768 * 10**7
    assert exact.ram_bytes < BASE_BYTES + 200e6, "rows are read in blocks"
    assert exact.needed_ram_bytes == exact.ram_bytes + exact.cache_bytes
    graph = plan_index(10**7, 768, factory="HNSW32")
    assert graph.cache_bytes == 0
    assert graph.ram_bytes == BASE_BYTES + graph.index_bytes
    assert graph.index_bytes == pytest.approx(10**7 * (4 * 768 + 8 * 32 + 16), rel=0.01)
    assert graph.build_ram_bytes > graph.ram_bytes
    codes = plan_index(10**7, 768, factory="IVF4096,PQ96np")
    more = plan_index(10**7, 768, factory="IVF4096,PQ96np", num_training_vectors=10**6)
    assert codes.index_bytes < exact.vectors_bytes / 25
    assert more.build_ram_bytes - BASE_BYTES > 2 * 4 * 768 * 10**6, "the sample is held twice"
    assert plan_index(10**7, 768, base_bytes=0).ram_bytes == exact.ram_bytes - BASE_BYTES


@pytest.mark.parametrize("num_vectors", [1, 9, 10, 11, 20, 21, 39, 41, 80, 81, 100])
def test_links_that_grow_are_held_twice_when_their_array_is_full(num_vectors, monkeypatch):
    """The same, allocation by allocation, with blocks of ten rows of four bytes; codes have room from the start."""
    monkeypatch.setattr("rag_lightning.index.plan.block_rows", lambda dimension: 10)
    capacity = size = peak = 0
    for start in range(0, num_vectors, 10):
        wanted = size + min(10, num_vectors - start)
        if wanted > capacity:
            old, capacity = size, max(2 * size, wanted)
            peak = max(peak, old + wanted)
        peak, size = max(peak, wanted), wanted
    block = 2 * 4 * min(num_vectors, 10)
    links = index_size("HNSW4", 1).graph_bytes
    plan = plan_index(num_vectors, 1, factory="HNSW4", shard_rows=1, base_bytes=0)
    assert plan.build_ram_bytes == pytest.approx(max(4 * num_vectors + links * peak + block, 4 + 40), abs=1)
    plan = plan_index(num_vectors, 1, factory="Flat", shard_rows=1, base_bytes=0)
    assert plan.build_ram_bytes == max(4 * num_vectors + block, 4 + 40)


def test_gpu_memory_is_divided_among_processes():
    whole, eighth = (plan_index(21_000_000, 768, storage="float16", num_shards=shards) for shards in (1, 8))
    assert whole.vram_bytes == pytest.approx(21e6 * 768 * 2, rel=0.01)
    assert eighth.vram_bytes == pytest.approx(21e6 * 768 * 2 / 8, rel=0.03)
    assert plan_index(1000, 8, factory="HNSW16").vram_bytes is None
    assert plan_index(10**7, 64, factory="IVF64,Flat").vram_bytes > 10**7 * 64 * 4


def test_a_plan_that_fits_is_not_refused():
    plan = plan_index(1000, 16, factory="HNSW16")
    assert refusal(plan, ROOMY) is None
    check_fits(plan, ROOMY)
    exactly = Limits(ram_bytes=plan.needed_ram_bytes, disk_bytes=plan.build_disk_bytes)
    check_fits(plan, exactly)
    for less in (
        Limits(ram_bytes=exactly.ram_bytes - 1, disk_bytes=exactly.disk_bytes),
        Limits(ram_bytes=exactly.ram_bytes, disk_bytes=exactly.disk_bytes - 1),
    ):
        with pytest.raises(ConfigError):
            check_fits(plan, less)


def test_wikipedia_on_a_laptop_is_refused_with_what_fits():
    plan = plan_index(21_000_000, 768)
    with pytest.raises(ConfigError) as caught:
        check_fits(plan, Limits(ram_bytes=24 * 10**9, disk_bytes=60 * 10**9))
    text = str(caught.value)
    assert text.startswith("index 'exact' with storage 'float32' over 21000000 x 768 vectors needs memory 65.2 GB ")
    assert "(there are 24.0 GB) and disk 64.7 GB (there are 60.0 GB)" in text
    offered = re.findall(r"index\.storage=(\w+) index\.factory=(\S+) \(memory ([\d.]+) GB, disk ([\d.]+) GB\)", text)
    assert ("int8", "exact") in [(storage, factory) for storage, factory, *_ in offered]
    assert any("PQ" in factory for _, factory, *_ in offered)
    for storage, factory, memory, disk in offered:
        assert float(memory) <= 24
        assert float(disk) <= 60
        again = plan_index(21_000_000, 768, factory=factory, storage=storage)
        assert gigabytes(again.needed_ram_bytes) == f"{memory} GB"


def test_where_nothing_fits_that_is_said():
    text = refusal(plan_index(21_000_000, 768), Limits(ram_bytes=10**9, disk_bytes=10**13))
    assert text is not None
    assert "No other kind of index fits either." in text
    assert "disk" not in text.split("No other")[0], "only what lacks is named"


@pytest.mark.parametrize("dimension", [7, 12, 768])
def test_every_alternative_is_one_that_faiss_accepts(dimension):
    faiss = pytest.importorskip("faiss")
    plans = list(alternatives(plan_index(10**6, dimension)))
    assert len(plans) >= 6
    for plan in plans:
        if plan.factory != "exact":
            assert faiss.index_factory(dimension, plan.factory).d == dimension
    assert ("float16", "exact") in [(plan.storage, plan.factory) for plan in plans]
    smaller = alternatives(plan_index(10**6, dimension, storage="float16"))
    assert ("float16", "exact") not in [(plan.storage, plan.factory) for plan in smaller]


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigError, match="of at least 1, came 0, 8, 1 and 50000"):
        inspect.unwrap(plan_index)(0, 8)
