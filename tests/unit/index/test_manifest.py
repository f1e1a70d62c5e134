import hashlib
import json

import numpy as np
import pytest
import torch

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingFileError, StaleIndexError
from rag_lightning.index import manifest as manifest_module
from rag_lightning.index.manifest import Origin, open_snapshot, read_manifest
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.index.vectors import StoredVectors


@pytest.fixture
def snapshot(tmp_path):
    vectors_ND = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    return SnapshotStore(tmp_path).publish(vectors_ND, encoder_hash="enc", corpus_hash="cor", pooling="mean", step=7)


def edit_manifest(snapshot, **changes):
    file = snapshot.path / "manifest.json"
    record = json.loads(file.read_text())
    record.update(changes)
    file.write_text(json.dumps({name: value for name, value in record.items() if value != "REMOVED"}))


def test_the_manifest_says_what_the_snapshot_was_made_from(snapshot):
    manifest = read_manifest(snapshot.path)
    assert manifest == snapshot.manifest
    assert (manifest.encoder_hash, manifest.corpus_hash, manifest.pooling) == ("enc", "cor", "mean")
    assert (manifest.factory, manifest.metric, manifest.step) == ("exact", "inner_product", 7)
    assert (manifest.num_vectors, manifest.dimension, manifest.format_version) == (4, 3, 2)
    assert manifest.created.endswith("+00:00")
    assert set(manifest.checksums) == {"vectors.npy"}
    assert manifest.num_bytes == {"vectors.npy": 128 + 4 * 4 * 3}
    assert (manifest.storage, manifest.recall) == ("float32", {})


def test_a_folder_of_version_1_still_opens(tmp_path):
    """Written here by hand as version 1 wrote it, its id included."""
    vectors_ND = np.arange(12, dtype=np.float32).reshape(4, 3)
    checksums = {}
    folder = tmp_path / "building"
    folder.mkdir()
    np.save(folder / "vectors.npy", vectors_ND)
    checksums["vectors.npy"] = hashlib.sha256((folder / "vectors.npy").read_bytes()).hexdigest()
    digest = hashlib.sha256()
    origin = ["enc", "cor", "mean", "exact", "l2", "7"]
    for text in [*origin, str(("vectors.npy", checksums["vectors.npy"]))]:
        digest.update(len(text).to_bytes(8, "little") + text.encode())
    record = {
        "format_version": 1,
        "snapshot_id": f"step00000007-{digest.hexdigest()[:8]}",
        "encoder_hash": "enc",
        "corpus_hash": "cor",
        "pooling": "mean",
        "factory": "exact",
        "metric": "l2",
        "step": 7,
        "num_vectors": 4,
        "dimension": 3,
        "created": "2026-11-01T00:00:00+00:00",
        "checksums": checksums,
    }
    (folder / "manifest.json").write_text(json.dumps(record))
    folder.rename(tmp_path / record["snapshot_id"])
    snapshot = SnapshotStore(tmp_path).open(record["snapshot_id"], encoder_hash="enc", metric="l2")
    manifest = snapshot.manifest
    assert (manifest.format_version, manifest.storage, manifest.recall, manifest.num_bytes) == (1, "float32", {}, {})
    assert torch.equal(snapshot.vectors(torch.arange(4)), torch.from_numpy(vectors_ND))
    republished = SnapshotStore(tmp_path / "new").publish(
        torch.from_numpy(vectors_ND), encoder_hash="enc", corpus_hash="cor", pooling="mean", metric="l2", step=7
    )
    assert republished.id == snapshot.id  # the id says what is in it, not who wrote it


def test_the_right_encoder_and_corpus_open(snapshot):
    opened = open_snapshot(snapshot.path, encoder_hash="enc", corpus_hash="cor")
    assert opened.manifest == snapshot.manifest
    assert opened.index.search(torch.eye(3)[:1], 2)[1].tolist() == [[3, 2]]


def test_another_encoder_is_refused_with_both_hashes(snapshot):
    with pytest.raises(StaleIndexError, match=r"\(step 7\): expected one of encoder other, came one of encoder enc\."):
        open_snapshot(snapshot.path, encoder_hash="other", corpus_hash="cor")


def test_another_corpus_is_refused_with_both_hashes(snapshot):
    with pytest.raises(StaleIndexError, match=r"expected one of corpus other, came one of corpus cor\."):
        open_snapshot(snapshot.path, encoder_hash="enc", corpus_hash="other")


def test_another_metric_than_the_models_is_refused_with_both(snapshot):
    with pytest.raises(StaleIndexError, match="expected metric 'cosine' as the model's, came 'inner_product'"):
        open_snapshot(snapshot.path, metric="cosine")
    assert open_snapshot(snapshot.path, metric="inner_product").id == snapshot.id


def test_an_altered_byte_is_found_by_its_checksum(snapshot):
    file = snapshot.path / "vectors.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        CorruptSnapshotError, match=r"vectors\.npy: the snapshot is torn or altered: expected the checksum"
    ):
        open_snapshot(snapshot.path)
    assert open_snapshot(snapshot.path, verify=False).id == snapshot.id


def test_a_torn_file_is_found_even_unverified(snapshot):
    file = snapshot.path / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorruptSnapshotError, match=r"vectors\.npy: .* expected 176 bytes, came 168"):
        open_snapshot(snapshot.path, verify=False)
    edit_manifest(snapshot, num_bytes={})
    with pytest.raises(CorruptSnapshotError, match=r"vectors\.npy: expected a whole .npy file"):
        open_snapshot(snapshot.path, verify=False)
    file.unlink()
    with pytest.raises(CorruptSnapshotError, match=r"vectors\.npy: .* expected the file, came none"):
        open_snapshot(snapshot.path, verify=False)


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_opening_unverified_reads_no_vectors(tmp_path, monkeypatch, metric):
    origin = {"encoder_hash": "e", "corpus_hash": "c", "pooling": "mean", "metric": metric}
    path = SnapshotStore(tmp_path, storage="int8").publish(torch.ones(4, 3), **origin).path

    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(manifest_module, "hash_file", read)
    for name in ("rows", "blocks", "parts"):
        monkeypatch.setattr(StoredVectors, name, read)
    assert open_snapshot(path, verify=False).manifest.storage == "int8"
    with pytest.raises(AssertionError, match="read"):
        open_snapshot(path)


def test_a_folder_without_a_manifest_is_torn(snapshot):
    (snapshot.path / "manifest.json").unlink()
    with pytest.raises(CorruptSnapshotError, match=r"manifest\.json: expected the manifest of a whole snapshot"):
        open_snapshot(snapshot.path)
    (snapshot.path / "manifest.json").write_text('{"format_ver')
    with pytest.raises(CorruptSnapshotError, match="not valid JSON"):
        open_snapshot(snapshot.path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(MissingFileError, match="index snapshot: no such folder"):
        open_snapshot(tmp_path / "step00000000-00000000")


def test_a_newer_format_says_to_update(snapshot):
    edit_manifest(snapshot, format_version=3, something_new=True)
    with pytest.raises(CorruptSnapshotError, match=r"format 2 or older, came 3\. Update rag_lightning"):
        open_snapshot(snapshot.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus_hash": "REMOVED"}, "expected the fields"),
        ({"extra": 1}, "expected the fields"),
        ({"step": "7"}, "expected step as int, came '7'"),
        ({"metric": "dot"}, "expected metric as one of inner_product, l2, cosine, came 'dot'"),
        ({"checksums": {}}, "expected checksums of vectors.npy"),
        ({"checksums": {"vectors.npy": "0", "../secret": "0"}}, "and of files beside it"),
        ({"num_vectors": 5}, "expected 5 x 3 of float32, came 4 x 3 of float32"),
        ({"storage": "int8"}, "expected 4 x 3 of int8, came 4 x 3 of float32"),
        ({"storage": "int4"}, "expected storage as one of float32, float16, int8, came 'int4'"),
        ({"recall": {"recall@10": "0.9"}}, "expected recall as names with float"),
        ({"num_bytes": {"vectors.npy": 9}}, "expected 9 bytes, came 176"),
        ({"encoder_hash": "end"}, r"expected the id step00000007-[0-9a-f]{8} of its content, came step00000007-"),
        ({"step": 8}, "expected the id step00000008-"),
        ({"step": -8}, "expected an origin that can be built, came step: expected 0 or more"),
    ],
)
def test_a_manifest_that_contradicts_its_files_is_refused(snapshot, changes, message):
    edit_manifest(snapshot, **changes)
    with pytest.raises(CorruptSnapshotError, match=message):
        open_snapshot(snapshot.path, verify=False)


def test_a_faiss_file_of_another_index_is_refused(tmp_path):
    pytest.importorskip("faiss")
    store = SnapshotStore(tmp_path)
    origin = {"encoder_hash": "e", "corpus_hash": "c", "pooling": "mean", "factory": "Flat"}
    snapshot = store.publish(torch.eye(3), **origin)
    other = store.publish(torch.eye(4)[:, :3], **origin)
    (snapshot.path / "index.faiss").write_bytes((other.path / "index.faiss").read_bytes())
    with pytest.raises(CorruptSnapshotError, match=r"index\.faiss: .* expected \d+ bytes, came \d+"):
        open_snapshot(snapshot.path)
    edit_manifest(snapshot, num_bytes={})
    with pytest.raises(CorruptSnapshotError, match="expected an index of 3 x 3, inner_product, came"):
        open_snapshot(snapshot.path, verify=False)


def test_vectors_are_gathered_exactly_in_any_shape(snapshot):
    ids_BK = torch.tensor([[2, -1], [0, 2]])
    vectors_BKD = snapshot.vectors(ids_BK)
    assert vectors_BKD.tolist() == [[[6, 7, 8], [0, 0, 0]], [[0, 1, 2], [6, 7, 8]]]
    assert vectors_BKD.dtype == torch.float32
    assert snapshot.vectors(torch.tensor(3)).tolist() == [9, 10, 11]
    assert snapshot.vectors(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 3)
    vectors_BKD += 1  # a copy: the file must not change
    assert open_snapshot(snapshot.path).vectors(torch.tensor([2])).tolist() == [[6, 7, 8]]


@pytest.mark.parametrize("bad", [4, -2])
def test_ids_of_another_corpus_are_refused(snapshot, bad):
    with pytest.raises(DataError, match=rf"within -1\.\.3, came .*{bad}"):
        snapshot.vectors(torch.tensor([0, bad]))


def test_an_origin_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="step: expected 0 or more, came -1"):
        Origin(encoder_hash="e", corpus_hash="c", pooling="mean", step=-1)
    with pytest.raises(ConfigError, match="factory: expected 'exact' or a FAISS factory string"):
        Origin(encoder_hash="e", corpus_hash="c", pooling="mean", factory=" ")
