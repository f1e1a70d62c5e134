"""Memory of a build that streams: a process of its own publishes a corpus block by block, opens it and searches it.

The bar: resident memory stays within the size of the snapshot's index plus 1 GB, whatever the corpus. The slow tier
runs the size for which it is stated; the default one a corpus that would show, at 400 MB, if it were held in memory.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import json
import sys
import time
from pathlib import Path

import torch
import faiss  # what imports alone take belongs to the start, not to the growth
from rag_lightning.index.snapshot import SnapshotStore

folder, num_vectors, dimension, factory, storage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6]
sample = int(sys.argv[6]) or None
origin = {"encoder_hash": "e", "corpus_hash": "c", "pooling": "mean", "factory": factory}
GENERATOR = torch.Generator().manual_seed(0)

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def blocks():
    for start in range(0, num_vectors, 10_000):
        yield torch.randn(min(10_000, num_vectors - start), dimension, generator=GENERATOR)

torch.randn(64, dimension) @ torch.randn(1000, dimension).T  # starts the threads
start = status("VmRSS")
begun = time.perf_counter()
ivf = {"nprobe": 16} if "IVF" in factory else {}
store = SnapshotStore(folder, storage=storage, num_training_vectors=sample, **ivf)
snapshot_id = store.publish(blocks(), **origin).id
built = time.perf_counter() - begun
peak_build = status("VmHWM")
snapshot = store.open(snapshot_id)
queries_BD = torch.randn(64, dimension, generator=GENERATOR)
begun = time.perf_counter()
for _ in range(3):
    scores_BK, ids_BK = snapshot.index.search(queries_BD, 10)
searched = (time.perf_counter() - begun) / 3
for ids_B in ids_BK.repeat(20, 20).split(64):
    snapshot.vectors(ids_B)
sizes = {file.name: file.stat().st_size for file in snapshot.path.iterdir()}
print(json.dumps({"start": start, "peak_build": peak_build, "peak": status("VmHWM"), "build_s": built,
                  "search_s": searched, "sizes": sizes, "num_vectors": snapshot.index.num_vectors}))
"""


def build(folder, num_vectors, dimension, factory, storage, sample=0):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "2"}
    begun = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(num_vectors), str(dimension), factory, storage, str(sample)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=3000,
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout.splitlines()[-1])
    memory = {name: f"{figures[name] / 1e6:.0f} MB" for name in ("start", "peak_build", "peak")}
    times = {name: f"{figures[name]:.2f}" for name in ("build_s", "search_s")}
    print(factory, storage, memory, times, figures["sizes"], f"{time.perf_counter() - begun:.0f} s in all")
    assert figures["num_vectors"] == num_vectors
    return figures


def index_bytes(figures):
    """What is searched: the FAISS file where there is one, the vectors otherwise."""
    return figures["sizes"].get("index.faiss", figures["sizes"]["vectors.npy"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
@pytest.mark.parametrize(("factory", "storage", "sample"), [("exact", "float32", 0), ("PCA32,SQ8", "float16", 5000)])
def test_a_corpus_is_never_held_in_memory(tmp_path, factory, storage, sample):
    """410 MB of float32 go through; only some blocks of 32 MiB and FAISS's index (6 MB) may stand in memory."""
    pytest.importorskip("faiss")
    figures = build(tmp_path, 200_000, 512, factory, storage, sample)
    assert figures["peak"] - figures["start"] < 330e6, figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "storage"),
    [
        ("exact", "float32"),
        ("exact", "int8"),
        ("Flat", "float32"),
        ("IVF256,PQ48", "float32"),
        ("HNSW32", "float32"),
    ],
)
def test_a_big_build_and_search_keep_to_the_index_and_a_gigabyte(tmp_path, factory, storage):
    pytest.importorskip("faiss")
    figures = build(tmp_path, 300_000, 384, factory, storage)
    assert figures["peak"] <= index_bytes(figures) + 1e9, figures
