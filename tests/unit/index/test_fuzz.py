"""Random damage to snapshots: each change is refused with an error of ours, or the answers are what they were.

The loop runs in a process of its own, so that a crash of the interpreter fails a test and names the change.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = """
import faulthandler, json, random, sys, warnings
from pathlib import Path

import torch
from rag_lightning.errors import RagError
from rag_lightning.index.snapshot import SnapshotStore, open_snapshot
from rag_lightning.index.vectors import open_vectors

faulthandler.enable()
torch.set_num_threads(1)
folder, num_changes = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)
generator = torch.Generator().manual_seed(0)
vectors_ND, queries_BD = (torch.randn(n, 8, generator=generator) for n in (300, 5))
origin = {"encoder_hash": "enc", "corpus_hash": "cor", "pooling": "mean", "step": 12}

def damaged(data):
    # a cut, one flipped bit or byte, or a stretch of noise
    kind = rng.choice(["cut", "bit", "bit", "byte", "noise"])
    place = rng.randrange(len(data))
    if rng.random() < 0.5:  # headers and names lie at the beginning
        place = rng.randrange(min(len(data), 200))
    if kind == "cut":
        return f"cut at {place}", data[:place]
    size = rng.randint(2, 16) if kind == "noise" else 1
    new = bytearray(data)
    for position in range(place, min(place + size, len(data))):
        new[position] = new[position] ^ (1 << rng.randrange(8)) if kind == "bit" else rng.randrange(256)
    return f"{kind} at {place}", bytes(new)

def announce(text):  # what stands here last was in work when the process died
    (folder / "change").write_text(text)

def run(changes, check):
    counts = {"refused": 0, "harmless": 0, "failed": []}
    for number, file in enumerate(changes):
        data = file.read_bytes()
        what, changed = damaged(data)
        announce(f"change {number}: {file.parent.name}/{file.name}, {what}")
        file.write_bytes(changed)
        try:
            if check(file):
                counts["harmless"] += 1
            else:
                counts["failed"].append(f"other answers: {file.parent.name}/{file.name}, {what}")
        except RagError as error:
            assert str(error)
            counts["refused"] += 1
        except BaseException as error:
            counts["failed"].append(f"{type(error).__name__} {error}: {file.parent.name}/{file.name}, {what}")
        file.write_bytes(data)
    print(json.dumps(counts))
"""

VERIFIED = """
answers = {}
for name, storage, factory in (("a", "float32", "exact"), ("b", "int8", "exact"), ("c", "float32", "HNSW8"),
                               ("d", "float16", "IVF4,PQ4x4")):
    snapshot = SnapshotStore(folder / name, storage=storage).publish(vectors_ND, factory=factory, **origin)
    answers[snapshot.path] = snapshot.index.search(queries_BD, 10)
files = [file for path in answers for file in sorted(path.iterdir())]

def check(file):
    snapshot = open_snapshot(file.parent)
    return all(map(torch.equal, snapshot.index.search(queries_BD, 10), answers[file.parent]))

run((files[number % len(files)] for number in range(num_changes)), check)
"""

UNVERIFIED = """
files = []
for storage in ("float32", "float16", "int8"):
    snapshot = SnapshotStore(folder / storage, storage=storage).publish(vectors_ND, **origin)
    files += sorted(file for file in snapshot.path.iterdir() if file.suffix == ".npy")

def check(file):
    vectors = open_vectors(file.with_name("vectors.npy"))
    blocks = [block_MD for _, block_MD in vectors.blocks(64)]
    assert torch.cat(blocks).shape == vectors.shape and vectors.num_vectors * vectors.dimension <= 300 * 8
    vectors.rows(torch.tensor([0, vectors.num_vectors - 1]))
    try:
        open_snapshot(file.parent, verify=False).index.search(queries_BD, 10)
    except RagError:
        pass  # the header was readable, but not that of the manifest
    return True

run((files[number % len(files)] for number in range(num_changes)), check)
"""


def fuzz(tmp_path, script, num_changes):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMON + script, str(tmp_path), str(num_changes)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    change = (tmp_path / "change").read_text() if (tmp_path / "change").exists() else "before any change"
    assert process.returncode == 0, f"died with {process.returncode} in {change}:\n{process.stderr[-3000:]}"
    counts = json.loads(process.stdout.splitlines()[-1])
    assert counts["failed"] == []
    assert counts["refused"] + counts["harmless"] == num_changes
    return counts


def test_two_thousand_changes_are_refused_or_harmless(tmp_path):
    pytest.importorskip("faiss")
    counts = fuzz(tmp_path, VERIFIED, 2000)
    assert counts["refused"] > 1800  # harmless: the date of building, white space, and bytes replaced by themselves


def test_headers_are_not_trusted_without_checksums(tmp_path):
    counts = fuzz(tmp_path, UNVERIFIED, 1000)
    assert counts["refused"] > 200  # those of the header; a changed number in the data shows only in the checksum
    assert counts["harmless"] > 200
