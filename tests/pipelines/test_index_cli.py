"""``rag-lightning index``, end to end: builds over processes and through kills, recall, plans and refusals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rag_lightning.cli.index_benchmark import markdown
from rag_lightning.cli.plan import free_disk
from rag_lightning.index.snapshot import open_snapshot
from rag_lightning.training import encode_corpus
from rag_lightning.utils.io import read_json
from rag_lightning.utils.memory import available_memory, peak_memory

Cli = Callable[..., None]
ROOT = Path(__file__).parents[2]
FILMS = "passages=bundled:films/passages.jsonl.gz"


def refusal(cli: Cli, folder: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli("index", folder, *arguments)
    return str(caught.value)


def only_snapshot(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def checksum(folder: Path) -> str:
    return read_json(only_snapshot(folder) / "manifest.json")["checksums"]["vectors.npy"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, "-m", "rag_lightning", "index", "build", *arguments, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, start_new_session=True, **streams)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a build of the film passages in 125 shards of one block of 32 (4,000 passages, one at a time)."""
    cache = tmp_path_factory.mktemp("films_cache")
    return [FILMS, "batch_size=1", "shard_rows=32", f"paths.cache_dir={cache}", "trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def uninterrupted(films: list[str], cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    cli("index", folder, "build", *films, f"output={folder / 'index'}")
    return folder / "index"


# ---------------------------------------------------------------------- build


def test_a_killed_build_goes_on_with_the_missing_shards(
    films: list[str], uninterrupted: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "index"
    process = start(tmp_path / "run", *films, f"output={output}")
    try:
        end = time.monotonic() + 250
        while len(list(output.glob(".build-*.building/shard-?????"))) < 20:
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < end, "timed out"
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    (building,) = output.iterdir()
    whole = len([path for path in building.glob("shard-?????") if path.suffix == ""])
    assert 20 <= whole < 125
    encoded: list[int] = []
    plain = encode_corpus.encode_block

    def watched(encoder: Any, tokens: Any, rows: range, *, batch_size: int) -> Any:
        encoded.append(rows.start // 32)
        return plain(encoder, tokens, rows, batch_size=batch_size)

    monkeypatch.setattr(encode_corpus, "encode_block", watched)
    cli("index", tmp_path / "run", "build", *films, f"output={output}")
    assert encoded == list(range(whole, 125)), "the finished ones are not encoded again"
    assert checksum(output) == checksum(uninterrupted)


@pytest.mark.ddp
@pytest.mark.parametrize("shard_rows", [320, 50_000])
def test_two_processes_build_what_one_does(
    shard_rows: int, films: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """13 shards, so one process has one more; and one shard, so the second process has nothing to encode."""
    output = tmp_path / "index"
    two = ["trainer.strategy=ddp", "trainer.devices=2", f"shard_rows={shard_rows}"]
    process = start(tmp_path / "run", *films, *two, f"output={output}")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert "Starting with 2 processes" in errors
    assert printed.count("snapshot of 4000 passages") == 1
    assert checksum(output) == checksum(uninterrupted)


def test_build_measures_recall_with_questions(
    cli: Cli, films: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    place = [f"output={tmp_path / 'index'}", f"figures={tmp_path / 'built.json'}", "batch_size=64", "shard_rows=50000"]
    questions = "questions=bundled:films/validation.jsonl.gz"
    narrow = ["index.factory='IVF64,SQ8'", "index.nprobe=4", "index.storage=float16", "recall_at=5", "sample=100"]
    cli("index", tmp_path, "build", *films, *place, *narrow, questions)
    printed = capsys.readouterr().out
    snapshot = only_snapshot(tmp_path / "index")
    recall = read_json(snapshot / "manifest.json")["recall"]["recall@5"]
    assert 0.1 < recall < 1
    assert f"recall@5 {recall:.3f}" in printed
    figures = read_json(tmp_path / "built.json")
    assert figures["recall@5"] == recall
    assert figures["disk_bytes"] == sum(
        file.stat().st_size for file in snapshot.iterdir() if file.name != "manifest.json"
    )
    assert figures["seconds"] > 0
    cli("index", tmp_path, "info", f"snapshot={snapshot}")
    told = json.loads(capsys.readouterr().out)
    assert (told["storage"], told["recall"]) == ("float16", {"recall@5": recall})
    cli("index", tmp_path, "verify", f"snapshot={snapshot}", FILMS, questions, "recall_at=5", "sample=100")
    checked = capsys.readouterr().out
    assert "checksums, encoder, corpus verified" in checked
    assert f"recall@5 against exact search: {recall:.4f} on 100 questions" in checked


# ---------------------------------------------------------------------- verify


def test_verify_says_what_recall_was_measured_on(
    cli: Cli, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = only_snapshot(uninterrupted)
    cli("index", tmp_path, "verify", f"snapshot={snapshot}", "sample=70", f"figures={tmp_path / 'verified.json'}")
    printed = capsys.readouterr().out
    assert "recall@10 against exact search: 1.0000 on 70 sampled passages" in printed
    assert "which flatters (give questions=FILE for real ones)" in printed
    assert re.search(r"[\d.]+ ms for 64 queries \(exact: [\d.]+ ms\)", printed)
    figures = read_json(tmp_path / "verified.json")
    assert (figures["recall"], figures["num_queries"], figures["num_passages"]) == (1.0, 70, 10)
    assert figures["queries_per_s"] == pytest.approx(64_000 / figures["ms_per_batch"])


def test_verify_with_questions_of_another_encoder_is_refused(cli: Cli, uninterrupted: Path, tmp_path: Path) -> None:
    other = ["encoder=word_embeddings", "questions=bundled:films/validation.jsonl.gz"]
    message = refusal(cli, tmp_path, "verify", f"snapshot={only_snapshot(uninterrupted)}", *other)
    assert re.search("expected one of encoder .*, came one of encoder", message)


# ---------------------------------------------------------------------- generated vectors, plan, benchmark


def test_generated_vectors_are_built_and_searched(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    vectors = "vectors=generated:3000x16"
    cli("index", tmp_path, "build", vectors, "index.factory=HNSW16", "seed=3", f"output={tmp_path / 'index'}")
    snapshot = open_snapshot(only_snapshot(tmp_path / "index"))
    assert (snapshot.manifest.num_vectors, snapshot.manifest.dimension) == (3000, 16)
    figures = tmp_path / "verified.json"
    cli("index", tmp_path, "verify", vectors, "seed=3", f"snapshot={snapshot.path}", f"figures={figures}")
    found = read_json(figures)
    assert 0.8 < found["recall"] < 1
    assert found["recall_of_originals"] == found["recall"], "float32 is what it was made from"
    printed = f"{found['recall']:.4f} on 1000 further draws of the generated mixture"
    assert printed in capsys.readouterr().out


def test_a_build_that_does_not_fit_is_refused_before_it_starts(cli: Cli, films: list[str], tmp_path: Path) -> None:
    output = f"output={tmp_path / 'index'}"
    small = ["limits.ram_bytes=2000000000", "limits.disk_bytes=4000000"]
    message = refusal(cli, tmp_path, "build", *films, output, *small)
    assert message.startswith("error: index 'exact' with storage 'float32' over 4000 x 288 vectors needs disk 4.6 MB ")
    assert "(there are 4.0 MB)" in message
    assert "These fit: index.storage=float16 index.factory=exact (memory 0." in message
    assert "GB, disk 2.3 MB)" in message
    assert not (tmp_path / "index").exists()
    cli("index", tmp_path, "build", *films, output, *small, "limits.check=false")
    assert only_snapshot(tmp_path / "index").name.startswith("step00000000")
    vectors = ["vectors=generated:21000000x768", "limits.ram_bytes=24000000000", "limits.disk_bytes=60000000000"]
    message = refusal(cli, tmp_path, "build", *vectors, f"output={tmp_path / 'other'}")
    assert "over 21000000 x 768 vectors needs memory 65.2 GB (there are 24.0 GB) and disk 64.7 GB" in message
    assert not (tmp_path / "other").exists()


def test_plan_prints_every_cost(cli: Cli, films: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "plan.json"
    cli("index", tmp_path, "action=plan", *films, f"output={tmp_path / 'index'}", f"figures={figures}")
    printed = capsys.readouterr().out
    assert "index 'exact', storage float32, over 4000 x 288 vectors" in printed
    for line in (
        r"disk    4.6 MB \(vectors 4.6 MB\), [\d.]+ MB while building",
        r"memory  [\d.]+ GB to build, [\d.]+ GB to search, and 4.6 MB free for the file cache",
        r"GPU     [\d.]+ MB to search there, about [\d.]+ MB to encode there",
        r"encode  [\d.]+ s",
        r"build   [\d.]+ s",
    ):
        assert re.search(line, printed), line
    plan = read_json(figures)
    assert plan["disk_bytes"] == 4000 * 288 * 4
    assert plan["encode_s"] > 0
    assert list((tmp_path / "index").iterdir()) == []


def test_plan_of_a_corpus_not_at_hand_ends_with_a_refusal(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["num_vectors=21000000", "dimension=768", "index.storage=float16", "num_shards=8"]
    limits = ["limits.ram_bytes=24000000000", "limits.disk_bytes=100000000000"]
    message = refusal(cli, tmp_path, "action=plan", *size, *limits, f"output={tmp_path / 'index'}")
    printed = capsys.readouterr().out
    assert "32.3 GB (vectors 32.3 GB)" in printed
    assert "4.1 GB for each of 8 processes to search there" in printed
    assert "not measured: give encoder=… and passages=…" in printed
    assert "needs memory 33.0 GB (there are 24.0 GB). These fit: index.storage=int8 index.factory=exact" in message


def test_the_benchmark_plans_and_measures_each_row(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    settings = ["vectors=generated:20000x64", "sample=256", f"figures={tmp_path / 'table.json'}"]
    settings += [f"benchmark_dir={tmp_path}", "rows=[{factory: 'IVF16,SQ8', nprobe: 2, storage: int8}]"]
    cli("index", tmp_path / "run", "action=benchmark", *settings)
    table = read_json(tmp_path / "table.json")
    (row,) = table["rows"]
    plan, build, verify = row["plan"], row["build"], row["verify"]
    assert build["disk_bytes"] == pytest.approx(plan["disk_bytes"], rel=0.02)
    assert build["peak_memory_bytes"] == pytest.approx(plan["build_ram_bytes"], rel=0.15)
    assert verify["peak_memory_bytes"] == pytest.approx(plan["ram_bytes"], rel=0.15)
    assert 0.2 < verify["recall"] < 1
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed == markdown(table["rows"]).splitlines()
    assert printed[2].startswith("| IVF16,SQ8, int8 |")
    assert f"| {verify['recall_of_originals']:.4f} |" in printed[2]
    assert verify["recall_of_originals"] == pytest.approx(verify["recall"], abs=0.05)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp")] == []


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["action=dance"], "expected action=plan, build, verify, info, benchmark; got 'dance'"),
        (["action=plan"], "index action=plan: expected passages=FILE, or num_vectors=N dimension=D; came neither"),
        (["action=plan", "num_vectors=5"], "came neither"),
        (["action=benchmark"], "expected vectors=generated:NUMBERxDIMENSION, came none"),
        (["build", "vectors=some.npy"], "expected generated:NUMBERxDIMENSION such as generated:1000000x384"),
        (["build", FILMS, "index.factory=NSG32"], "expected parts whose size is known"),
        (["build", FILMS, "index.storage=float8"], "storage: expected one of float32, float16, int8; came 'float8'"),
        (["build", FILMS, "shard_rows=0"], "at least 1, came"),
    ],
)
def test_bad_input_is_refused(arguments: Sequence[str], expected: str, cli: Cli, tmp_path: Path) -> None:
    assert expected in refusal(cli, tmp_path, *arguments, f"output={tmp_path / 'index'}")


def test_a_benchmark_says_which_command_failed(cli: Cli, tmp_path: Path) -> None:
    rows = "rows=[{factory: exact, nprobe: 3}]"
    message = refusal(cli, tmp_path, "action=benchmark", "vectors=generated:100x8", rows)
    assert "action=build" in message
    assert "index.nprobe=3" in message
    assert "factory 'exact' has no such setting" in message


def test_what_the_machine_has_is_asked_of_the_system(tmp_path: Path) -> None:
    assert 10**7 < available_memory() < 10**14
    assert free_disk(tmp_path / "not" / "there" / "yet") == pytest.approx(free_disk(tmp_path), rel=0.01)
    before = peak_memory()
    block = bytearray(50 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    assert before > 10**7
    assert peak_memory() >= before
