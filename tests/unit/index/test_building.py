import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError
from rag_lightning.index import building
from rag_lightning.index.snapshot import Origin, SnapshotStore

ORIGIN = {"encoder_hash": "enc", "corpus_hash": "cor", "pooling": "mean"}


def random_vectors(num_vectors, dimension=8, seed=0):
    return torch.randn(num_vectors, dimension, generator=torch.Generator().manual_seed(seed))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Stands for a kill inside this process: nothing of the package catches it to clean up but ``finally``."""


@pytest.fixture(params=["float32", "int8"])
def storage(request):
    return request.param


def test_a_build_with_a_key_is_found_again_with_its_whole_shards(tmp_path, storage):
    vectors_ND = random_vectors(20)
    parts = vectors_ND.tensor_split(4)
    store = SnapshotStore(tmp_path, storage=storage)
    path = store.begin(3, key="k")
    assert store.finished_shards(path) == set()
    for rank in (2, 0):
        store.write_shard(path, rank, parts[rank])

    def broken():
        yield parts[1][:2]
        raise Killed

    with pytest.raises(Killed):
        store.write_shard(path, 1, broken())
    assert store.finished_shards(path) == {0, 2}
    del store  # the process is gone
    again = SnapshotStore(tmp_path, storage=storage)
    assert again.begin(3, key="k") == path
    assert again.finished_shards(path) == {0, 2}
    for rank in (1, 3):
        again.write_shard(path, rank, parts[rank])
    snapshot = again.finish(path, 4, Origin(step=3, **ORIGIN))
    whole = SnapshotStore(tmp_path / "other", storage=storage).publish(vectors_ND, step=3, **ORIGIN)
    assert snapshot.id == whole.id
    assert names(snapshot.path) == names(whole.path)
    assert set(names(tmp_path)) == {snapshot.id, "other"}


def test_another_key_is_another_folder_and_another_process_is_refused(tmp_path):
    store, other = SnapshotStore(tmp_path), SnapshotStore(tmp_path)
    path = store.begin(0, key="a")
    assert other.begin(0, key="b") != path
    with pytest.raises(ConfigError, match=rf"index 'a' alone, but another .* it: pid {os.getpid()} on host .*Wait"):
        other.begin(0, key="a")
    assert store.begin(0, key="a") == path  # one's own unfinished build, begun anew
    store.abandon(path)
    assert not path.exists()
    assert other.begin(0, key="a") == path
    assert other.finished_shards(path) == set()


def test_a_torn_shard_is_not_whole(tmp_path, storage):
    store = SnapshotStore(tmp_path, storage=storage)
    path = store.begin(0, key="k")
    for rank in range(3):
        store.write_shard(path, rank, random_vectors(9))
    for rank, name in ((0, "vectors.npy"), (1, "scales.npy" if storage == "int8" else "vectors.npy")):
        os.truncate(path / f"shard-{rank:05d}" / name, 130)
    assert store.finished_shards(path) == {2}
    store.write_shard(path, 0, random_vectors(9))  # replaces
    assert store.finished_shards(path) == {0, 2}


def test_a_failure_keeps_the_shards_of_a_key_and_lets_its_lock_go(tmp_path):
    store = SnapshotStore(tmp_path)
    path = store.begin(0, key="k")
    store.write_shard(path, 0, torch.zeros(3, 2))
    with pytest.raises(DataError, match="non-zero length"):
        store.finish(path, 1, Origin(metric="cosine", **ORIGIN))
    other = SnapshotStore(tmp_path)
    assert other.finished_shards(other.begin(0, key="k")) == {0}
    assert other.finish(path, 1, Origin(metric="l2", **ORIGIN)).manifest.num_vectors == 3


def test_more_shards_than_named_are_refused(tmp_path):
    store = SnapshotStore(tmp_path)
    path = store.begin(0, key="k")
    for rank in range(3):
        store.write_shard(path, rank, random_vectors(2))
    with pytest.raises(ConfigError, match=r"expected 2 shards, came also shards \[2\]\. A key must name how many"):
        store.finish(path, 2, Origin(**ORIGIN))
    assert store.finished_shards(path) == {0, 1, 2}


def test_shards_that_do_not_fit_together_are_refused(tmp_path):
    for number, (second, message) in enumerate(
        (
            ((3, "float32"), r"vectors of one dimension, came \[2, 3\]"),
            ((2, "int8"), r"one storage, came \['float32', 'int8'\]"),
        )
    ):
        store = SnapshotStore(tmp_path / str(number))
        path = store.begin(0)
        store.write_shard(path, 0, random_vectors(4, 2))
        SnapshotStore(tmp_path, storage=second[1]).write_shard(path, 1, random_vectors(4, second[0]))
        with pytest.raises(DataError, match=message):
            store.finish(path, 2, Origin(**ORIGIN))


class KilledAt:
    """Raises at the n-th call of any of the functions that change the building folder."""

    def __init__(self, monkeypatch, at):
        self.calls, self.at = 0, at
        for module, name in (
            (building, "write_json"),
            (building, "append_vectors"),
            (building, "_move_files"),
            (building.shutil, "rmtree"),
            (os, "fsync"),
            (Path, "rename"),
        ):
            monkeypatch.setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, function):
        def call(*arguments, **settings):
            self.calls += 1
            if self.calls == self.at:
                raise Killed
            return function(*arguments, **settings)

        return call


@pytest.mark.parametrize("when", range(1, 40))
def test_a_join_killed_anywhere_goes_on_to_the_same_snapshot(tmp_path, monkeypatch, storage, when):
    """Shards are deleted as they are copied: the first version would have lost or doubled them at a kill."""
    vectors_ND = random_vectors(20)
    parts = vectors_ND.tensor_split(4)
    store = SnapshotStore(tmp_path, storage=storage)
    path = store.begin(3, key="k")
    for rank, part in enumerate(parts):
        store.write_shard(path, rank, part)
    with monkeypatch.context() as patch:
        killer = KilledAt(patch, when)
        try:
            done = store.finish(path, 4, Origin(step=3, **ORIGIN))
        except Killed:
            done = None
    assert killer.calls >= min(when, 12)
    again = SnapshotStore(tmp_path, storage=storage)
    if done is None and again.ids() == []:
        path = again.begin(3, key="k")
        missing = set(range(4)) - again.finished_shards(path)
        assert len(missing) <= 1
        for rank in missing:
            again.write_shard(path, rank, parts[rank])
        done = again.finish(path, 4, Origin(step=3, **ORIGIN))
    snapshot = again.open(again.ids()[0])
    expected = SnapshotStore(tmp_path / "other", storage=storage).publish(vectors_ND, step=3, **ORIGIN)
    assert snapshot.id == expected.id
    assert torch.equal(snapshot.vectors(torch.arange(20)), expected.vectors(torch.arange(20)))


BUILDER = """
import sys, time
from pathlib import Path
import torch
from rag_lightning.index.snapshot import Origin, SnapshotStore

folder, key = sys.argv[1], sys.argv[2] or None
store = SnapshotStore(folder, storage="int8")
origin = {"encoder_hash": "e", "corpus_hash": "c", "pooling": "mean"}
path = store.begin(7, key=key)
print("begun", sorted(store.finished_shards(path)), flush=True)
for rank in range(40):
    if rank in store.finished_shards(path):
        continue
    sys.stdin.readline()  # waits to be told
    store.write_shard(path, rank, torch.full((50, 4), rank + 1.0))
    print("written", rank, flush=True)
snapshot = store.finish(path, 40, Origin(step=7, **origin))
print("published", snapshot.id, flush=True)
"""


def builder(folder, key):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILDER, str(folder), key]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def tell(process, times):
    process.stdin.write("\n" * times)
    process.stdin.flush()


def test_a_killed_process_loses_no_whole_shard_and_no_published_snapshot(tmp_path):
    live = SnapshotStore(tmp_path).publish(random_vectors(5), step=1, **ORIGIN)
    finished = 0
    for lines in (3, 20):
        with builder(tmp_path, "k") as process:
            assert json.loads(process.stdout.readline().removeprefix("begun ")) == list(range(finished))
            tell(process, lines)
            for _ in range(lines):
                process.stdout.readline()
            tell(process, 1)
            process.send_signal(signal.SIGKILL)  # before, while or after it writes one more
            assert process.wait(timeout=60) == -signal.SIGKILL
        (path,) = tmp_path.glob(".build-*")
        before, finished = finished, len(SnapshotStore(tmp_path).finished_shards(path))
        assert finished - before in (lines, lines + 1)
        assert SnapshotStore(tmp_path).ids() == [live.id]
    with builder(tmp_path, "k") as process:
        output = process.communicate("\n" * 40, timeout=60)[0].splitlines()
        assert process.returncode == 0
    assert json.loads(output[0].removeprefix("begun ")) == list(range(finished))
    assert len(output) == 1 + (40 - finished) + 1
    snapshot = SnapshotStore(tmp_path).open(output[-1].removeprefix("published "))
    expected = np.repeat(np.arange(1, 41, dtype=np.float32), 50)
    np.testing.assert_allclose(snapshot.vectors(torch.arange(2000))[:, 0].numpy(), expected, rtol=1e-6)
    assert names(tmp_path) == sorted([live.id, snapshot.id])


def test_sweeping_removes_what_the_dead_have_left_and_nothing_of_the_living(tmp_path):
    store = SnapshotStore(tmp_path)
    assert SnapshotStore(tmp_path / "nowhere").sweep() == []
    live = store.publish(random_vectors(5), **ORIGIN)
    mine, kept = store.begin(1), store.begin(1, key="k")
    with builder(tmp_path, "") as process:
        assert process.stdout.readline() == "begun []\n"
        (theirs,) = tmp_path.glob(".step00000007.*.building")
        assert SnapshotStore(tmp_path).sweep() == []
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert SnapshotStore(tmp_path).sweep() == [theirs]
    assert sorted(tmp_path.iterdir()) == sorted([live.path, mine, kept])
    assert SnapshotStore(tmp_path).sweep(resumable=True) == []  # this process holds it
    del store
    assert sorted(SnapshotStore(tmp_path).sweep(resumable=True)) == sorted([mine, kept])
    assert SnapshotStore(tmp_path).ids() == [live.id]


def test_a_folder_just_made_and_not_yet_locked_is_left_alone(tmp_path):
    newborn, old, half_removed = (
        tmp_path / name
        for name in (".step00000001.a.building", ".step00000001.b.building", ".step00000001-abc.1234.removed")
    )
    for folder in (newborn, old, half_removed):
        folder.mkdir()
    os.utime(old, (time.time() - 100, time.time() - 100))
    assert SnapshotStore(tmp_path).sweep() == [old, half_removed]
    assert newborn.exists()


def test_a_missing_shard_of_a_key_is_named(tmp_path):
    store = SnapshotStore(tmp_path)
    path = store.begin(0, key="k")
    store.write_shard(path, 1, random_vectors(3))
    with pytest.raises(CorruptSnapshotError, match="shard-00000/vectors.npy: expected a whole"):
        store.finish(path, 2, Origin(**ORIGIN))
    assert path.exists()


def test_checksums_are_sha_256_of_files_larger_than_a_piece_and_of_nothing_but_content(tmp_path):
    data = np.random.default_rng(0).bytes(9 * 2**20 + 7)
    for name in ("vectors.npy", "owner.lock", "joined.json"):
        (tmp_path / name).write_bytes(data)
    assert building.sync_and_hash(tmp_path) == {"vectors.npy": hashlib.sha256(data).hexdigest()}
