"""Fetching against a server on this machine: resumed, restarted, refused; and from folders, archives and the hub."""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from rag_lightning.corpora.fetch import download as downloads
from rag_lightning.corpora.fetch.download import Settings, download, part_of
from rag_lightning.corpora.fetch.fetching import chosen, fetch
from rag_lightning.corpora.fetch.lock import LOCK_NAME, Lock
from rag_lightning.corpora.fetch.sources import RemoteFile, Source, mirror_rules, mirrored, read_sources
from rag_lightning.errors import ConfigError, DataError, FetchError
from tests.unit.corpora.fetch.local_server import Served, serving

BODY = bytes(range(256)) * 400
SHA256 = hashlib.sha256(BODY).hexdigest()
QUICK = Settings(attempts=2, timeout_s=5, pause_s=0)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as one:
        one.files["/a.bin"] = BODY
        one.etags["/a.bin"] = '"first"'
        yield one


def source_of(served: Served, **fields) -> Source:
    return Source(name="things", files=(RemoteFile(url=f"{served.url}/a.bin", **fields),))


def kill_midway(served: Served, target: Path, num_bytes: int = 1000) -> None:
    """Leaves what a killed download leaves: the bytes that came, and what the server said of them."""
    part = part_of(target)
    part.write_bytes(served.files["/a.bin"][:num_bytes])
    notes = {"url": f"{served.url}/a.bin", "validator": served.etags.get("/a.bin")}
    part.with_name(f"{part.name}.json").write_text(json.dumps(notes))


def test_what_came_before_a_connection_broke_for_good_is_kept(served: Served, tmp_path: Path) -> None:
    served.die_after = [1000, 0]
    with pytest.raises(FetchError, match="broke 1 times .* 1000 bytes of it are kept: the same command goes on"):
        download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin", settings=Settings(1, 5, 0))
    assert part_of(tmp_path / "a.bin").read_bytes() == BODY[:1000]
    assert not (tmp_path / "a.bin").exists()
    assert download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin") == SHA256
    assert served.asked[-1] == ("GET", "/a.bin", "bytes=1000-")


def test_a_file_comes_whole_with_its_checksum(served: Served, tmp_path: Path) -> None:
    told = []
    file = RemoteFile(url="", sha256=SHA256.upper(), size=len(BODY), md5=hashlib.md5(BODY).hexdigest())
    sha256 = download(file, f"{served.url}/a.bin", tmp_path / "a.bin", report=lambda *bytes_: told.append(bytes_))
    assert sha256 == SHA256
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert told[-1] == (len(BODY), len(BODY))


def test_a_killed_download_goes_on_where_it_stopped(served: Served, tmp_path: Path) -> None:
    kill_midway(served, tmp_path / "a.bin")
    assert download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin") == SHA256
    assert served.asked == [("GET", "/a.bin", "bytes=1000-")]


def test_a_server_that_dies_midway_is_asked_again(served: Served, tmp_path: Path) -> None:
    served.die_after = [1000, 2000, 500]
    assert download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin", settings=QUICK) == SHA256
    assert [asked for _, _, asked in served.asked] == [None, "bytes=1000-", "bytes=3000-", "bytes=3500-"]


def test_a_server_that_is_busy_is_asked_again(served: Served, tmp_path: Path) -> None:
    served.failures = 1
    assert download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin", settings=QUICK) == SHA256
    served.failures = 9
    with pytest.raises(FetchError, match="broke 2 times .*503.*Check the address"):
        download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "b.bin", settings=QUICK)


def test_a_server_that_ignores_ranges_sends_all_again(served: Served, tmp_path: Path) -> None:
    kill_midway(served, tmp_path / "a.bin")
    served.ranges = False
    assert download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin") == SHA256
    assert len(served.asked) == 1


@pytest.mark.parametrize("if_range", [True, False])
def test_content_that_changed_in_between_is_never_mixed(served: Served, tmp_path: Path, if_range: bool) -> None:
    kill_midway(served, tmp_path / "a.bin")
    served.files["/a.bin"], served.etags["/a.bin"], served.if_range = BODY[::-1], '"second"', if_range
    download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin", settings=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY[::-1]


def test_a_part_longer_than_the_file_is_dropped(served: Served, tmp_path: Path) -> None:
    kill_midway(served, tmp_path / "a.bin")
    served.files["/a.bin"], served.if_range = BODY[:300], False
    download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin", settings=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY[:300]


def test_without_an_etag_or_a_checksum_nothing_is_resumed(served: Served, tmp_path: Path) -> None:
    del served.etags["/a.bin"]
    kill_midway(served, tmp_path / "a.bin")
    download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin")
    assert served.asked == [("GET", "/a.bin", None)]
    kill_midway(served, tmp_path / "b.bin")
    served.asked.clear()
    assert download(RemoteFile(url="", sha256=SHA256), f"{served.url}/a.bin", tmp_path / "b.bin") == SHA256
    assert served.asked == [("GET", "/a.bin", "bytes=1000-")]


@pytest.mark.parametrize("field", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"size": 3}], ids=["sha256", "md5", "size"])
def test_a_mismatch_deletes_the_part_and_says_so(served: Served, tmp_path: Path, field: dict) -> None:
    with pytest.raises(FetchError, match=f"a.bin: expected {next(iter(field))} .*, came .* What came is deleted"):
        fetch(source_of(served, **field), tmp_path, settings=QUICK)
    assert not [path for path in (tmp_path / "things").iterdir() if not path.name.endswith(".lock")]


def test_a_missing_file_is_no_broken_connection(served: Served, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="expected the file, came HTTP 404"):
        download(RemoteFile(url=""), f"{served.url}/none", tmp_path / "a.bin")
    assert len(served.asked) == 1


def test_a_disk_without_room_is_refused_before_anything_comes(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(FetchError, match=r"expected 0\.07 GB free in .*, came 0\.00 GB\. Make room"):
        download(RemoteFile(url=""), f"{served.url}/a.bin", tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_an_unknown_checksum_is_kept_and_compared_from_then_on(served: Served, tmp_path: Path) -> None:
    assert fetch(source_of(served), tmp_path) == {"things/a.bin": "fetched"}
    lock = json.loads((tmp_path / LOCK_NAME).read_text())
    assert lock == {"things/a.bin": {"sha256": SHA256, "size": len(BODY), "url": f"{served.url}/a.bin"}}
    served.asked.clear()
    assert fetch(source_of(served), tmp_path) == {"things/a.bin": "already there"}
    assert served.asked == []
    file = tmp_path / "things" / "a.bin"
    file.write_bytes(b"altered")
    with pytest.raises(FetchError, match=f"expected sha256 {SHA256}, came .* Remove the file to fetch it again"):
        fetch(source_of(served), tmp_path)
    assert file.read_bytes() == b"altered", "a file of someone's own is not deleted"
    file.unlink()
    served.files["/a.bin"] = b"changed at its source"
    with pytest.raises(FetchError, match="What came is deleted.*from an earlier fetch: .* remove the line"):
        fetch(source_of(served), tmp_path)
    assert not file.exists()


def test_a_damaged_lock_file_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected sha256, size and url of each file"):
        Lock(tmp_path)


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_mirror_may_be_a_folder(served: Served, tmp_path: Path, form: str) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "a.bin").write_bytes(BODY)
    rules = mirror_rules(f"https://example.org/data/={form.format(tmp_path / 'mirror')}/")
    source = Source(name="x", files=(RemoteFile(url="https://example.org/data/a.bin", sha256=SHA256),))
    assert fetch(source, tmp_path / "out", rules=rules) == {"x/a.bin": "fetched"}
    assert (tmp_path / "out" / "x" / "a.bin").read_bytes() == BODY
    lacking = Source(name="x", files=(RemoteFile(url="https://example.org/data/b.bin"),))
    with pytest.raises(FetchError, match="b.bin: expected the file there, found none"):
        fetch(lacking, tmp_path / "out", rules=rules)


def test_a_mirror_may_be_another_server(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_LIGHTNING_MIRROR", f"https://none.invalid/=https://b/ https://example.org/={served.url}/")
    assert mirrored("https://example.org/a.bin", mirror_rules()) == f"{served.url}/a.bin"
    source = Source(name="x", files=(RemoteFile(url="https://example.org/a.bin"),))
    assert fetch(source, tmp_path, rules=mirror_rules()) == {"x/a.bin": "fetched"}
    with pytest.raises(ConfigError, match="expected rules such as .*, got 'https://x'"):
        mirror_rules("https://x")


def test_wanted_files_are_taken_out_of_an_archive(served: Served, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("train.txt", "one")
        archive.writestr("other.txt", "two")
    served.files["/a.zip"] = packed.getvalue()
    source = Source(name="c", files=(RemoteFile(url=f"{served.url}/a.zip", members=("train.txt",)),))
    assert fetch(source, tmp_path) == {"c/train.txt": "fetched"}
    assert fetch(source, tmp_path) == {"c/train.txt": "already there"}
    assert {path.name for path in (tmp_path / "c").iterdir() if path.suffix != ".lock"} == {"train.txt"}
    lacking = Source(name="d", files=(RemoteFile(url=f"{served.url}/a.zip", members=("none.txt",)),))
    with pytest.raises(FetchError, match=r"expected a zip archive with none\.txt.*What came is deleted"):
        fetch(lacking, tmp_path)
    assert not (tmp_path / "d" / "a.zip").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "expected files or a repo, got neither"),
        ({"repo": "a/b", "files": [{"url": "https://x/y"}]}, "got both"),
        ({"files": [{"url": "ftp://x/y"}]}, "expected a url that begins with https://"),
        ({"files": [{"url": "https://x/y", "name": "../y"}]}, "expected names of files within its own folder"),
        ({"files": [{"url": "https://x/y", "sha256": "12"}]}, "sha256: expected 64 hexadecimal digits, got '12'"),
        ({"files": [{"link": "https://x/y"}]}, "expected fields among .*, got link"),
        ({"files": [{"name": "y"}]}, "expected the field url"),
        ({"repo": "a/b", "repo_type": "space"}, "expected model or dataset, got 'space'"),
    ],
)
def test_bad_sources_are_named(entry: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"sources.x.*{message}"):
        read_sources({"x": entry})


def test_names_are_chosen_among_those_there_are() -> None:
    sources = {"a": Source(name="a"), "b": Source(name="b")}
    assert [one.name for one in chosen(["b", "b"], sources)] == ["b"]
    assert [one.name for one in chosen(["all"], sources)] == ["a", "b"]
    with pytest.raises(ConfigError, match="expected names among a, b, or all, got c"):
        chosen(["c"], sources)
    with pytest.raises(ConfigError, match="got none. There are: a, b"):
        chosen([], sources)


# ---------------------------------------------------------------------- the hub

COMMIT = "1" * 40
WEIGHTS = b"weights" * 1000


def tell_hub(served: Served, names: tuple[str, ...]) -> None:
    """Lets a server speak the hub's addresses, of a repository with these files."""
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    siblings = [{"rfilename": name} for name in (*names, "flax_model.msgpack")]
    told = {"id": "own/tiny", "modelId": "own/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
    small = (b"{}", '"' + "a" * 40 + '"')
    content = {name: small if name.endswith(".json") else (WEIGHTS, f'"{sha256}"') for name in names}
    served.files["/api/models/own/tiny/revision/main"] = json.dumps(told).encode()
    served.headers["/api/models/own/tiny/revision/main"] = {"Content-Type": "application/json"}
    oid = {"type": "file", "oid": "b" * 40}
    tree = [{**oid, "path": name, "size": len(body)} for name, (body, _) in content.items()]
    served.files[f"/api/models/own/tiny/tree/{COMMIT}"] = json.dumps(tree).encode()
    served.headers[f"/api/models/own/tiny/tree/{COMMIT}"] = {"Content-Type": "application/json"}
    for name, (body, etag) in content.items():
        path = f"/own/tiny/resolve/{COMMIT}/{name}"
        served.files[path], served.etags[path] = body, etag
        served.headers[path] = {"X-Repo-Commit": COMMIT}


@pytest.fixture
def hub(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server that speaks the hub's addresses, and an empty cache."""
    tell_hub(served, ("config.json", "model.safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return served


def test_a_repository_comes_from_the_endpoint_into_the_hubs_cache(hub: Served, tmp_path: Path) -> None:
    (folder,) = fetch(Source(name="tiny", repo="own/tiny"), tmp_path / "out")
    assert Path(folder).is_relative_to(tmp_path / "hub" / "models--own--tiny" / "snapshots")
    assert {path.name for path in Path(folder).iterdir()} == {"config.json", "model.safetensors"}
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("weights", "comes"),
    [
        (("model.safetensors", "pytorch_model.bin"), ["model.safetensors"]),
        (("pytorch_model.bin",), ["pytorch_model.bin"]),
    ],
)
def test_weights_that_lie_there_twice_come_once(
    hub: Served, tmp_path: Path, weights: tuple[str, ...], comes: list[str]
) -> None:
    tell_hub(hub, ("config.json", *weights))
    (folder,) = fetch(Source(name="tiny", repo="own/tiny"), tmp_path / "out")
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json", *comes]
    (folder,) = fetch(Source(name="tiny", repo="own/tiny", patterns=("*.json", "*.bin")), tmp_path / "asked")
    assert (Path(folder) / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_repository_is_taken_from_a_folder_in_the_hubs_layout(
    hub: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(Source(name="tiny", repo="own/tiny"), tmp_path / "out")
    shutil.copytree(tmp_path / "hub", tmp_path / "brought", symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "brought"))
    (folder,) = fetch(Source(name="tiny", repo="own/tiny"), tmp_path / "out")
    assert Path(folder).is_relative_to(tmp_path / "brought")
    with pytest.raises(FetchError, match="own/none: expected the repository from the hub"):
        fetch(Source(name="none", repo="own/none"), tmp_path / "out")


def test_a_damaged_file_of_a_repository_is_deleted(hub: Served, tmp_path: Path) -> None:
    hub.files[f"/own/tiny/resolve/{COMMIT}/model.safetensors"] = WEIGHTS[::-1]
    with pytest.raises(FetchError, match=r"model\.safetensors: expected sha256 .*, came .* What came is deleted"):
        fetch(Source(name="tiny", repo="own/tiny"), tmp_path / "out")
    hub.files[f"/own/tiny/resolve/{COMMIT}/model.safetensors"] = WEIGHTS
    (folder,) = fetch(Source(name="tiny", repo="own/tiny"), tmp_path / "out")
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
