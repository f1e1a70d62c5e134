"""Tracking, read back from what the loggers wrote: configuration, metrics, predictions, no environment."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag_lightning.errors import ConfigError, MissingExtraError
from rag_lightning.training import tracking
from rag_lightning.training.tracking import TrackingCallback, prediction_table, tensorboard_logger, wandb_logger
from rag_lightning.types import Prediction, Question, RetrievedPassage
from rag_lightning.utils.io import read_json

MARKER = "abc123xyz-marker-of-the-environment"
Cli = Callable[..., None]


def records_of(run_file: Path) -> list[Any]:
    """Returns the protocol records of a ``run-*.wandb`` file.

    The file is a LevelDB log behind a header of 7 bytes: blocks of 32 KiB, chunks with checksum, length and kind
    (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto import wandb_internal_pb2

    data = run_file.read_bytes()
    assert data.startswith(b":W&B")
    place, whole, records = 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def values_of(items: Any) -> dict[str, Any]:
    """Returns key-value items of a record; nested keys joined by dots."""
    return {item.key if item.key else ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def wandb_run(cli: Cli, tiny_train: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Trains two steps with ``logger=wandb`` offline; returns the run's folder and W&B's folder in it."""
    wandb = pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    folder = tmp_path_factory.mktemp("wandb") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_TOKEN_FOR_TEST", MARKER)
        patch.setenv("WANDB_DATA_DIR", str(folder.parent / "staging"))
        patch.setenv("WANDB_CACHE_DIR", str(folder.parent / "cache"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder.parent / "config"))
        patch.setenv("WANDB_SILENT", "true")
        # a setting that reads the environment: its value must not be recorded either
        secret = "data.cache_dir='" + str(folder.parent) + "/${oc.env:SECRET_TOKEN_FOR_TEST}'"
        cli("train", folder, *tiny_train, "logger=wandb", "logger.offline=true", "run_name=tracked", secret)
        wandb.teardown()  # ends its service too, which writes the last of the file after finish() has returned
    (offline,) = folder.glob("wandb/offline-run-*")
    return folder, offline


def test_wandb_is_told_configuration_and_metrics(wandb_run: tuple[Path, Path]) -> None:
    folder, offline = wandb_run
    (run_file,) = offline.glob("run-*.wandb")
    records = records_of(run_file)
    config: dict[str, Any] = {}
    for record in records:
        config |= values_of(record.run.config.update) | values_of(record.config.update)
    assert config["seed"] == 0
    assert config["run_name"] == "tracked"
    assert config["model"]["num_passages"] == 3
    assert config["data"]["seed"] == 0, "interpolations are resolved"
    assert config["data"]["cache_dir"].endswith("/${oc.env:SECRET_TOKEN_FOR_TEST}"), "the environment is not"
    names = {record.run.display_name for record in records if record.HasField("run")}
    assert "tracked" in names

    logged: dict[str, Any] = {}
    steps = []
    for record in records:
        row = values_of(record.history.item)
        steps += [row["trainer/global_step"]] if "train/loss" in row else []
        logged |= row
    assert steps == [0, 1]
    metrics = read_json(folder / "metrics.json")
    for name in ("exact_match", "f1", "nll", "recall@1", "posterior_entropy"):
        assert logged[f"test/{name}"] == pytest.approx(metrics[name])
    assert {"train/posterior_entropy", "val/nll", "index/age_steps"} <= set(logged)


def test_wandb_gets_the_predictions_with_passages_and_posteriors(wandb_run: tuple[Path, Path]) -> None:
    folder, offline = wandb_run
    (file,) = offline.glob("files/media/table/**/*.table.json")
    table = json.loads(file.read_text(encoding="utf-8"))
    written = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(table["data"]) == len(written) == 5
    for row, prediction in zip(table["data"], written, strict=True):
        cells = dict(zip(table["columns"], row, strict=True))
        assert cells["id"] == prediction["id"]
        assert cells["answer"] == prediction["answer"]
        assert cells["accepted"].count(" | ") == 1
        assert len(prediction["passages"]) == 3
        for place, passage in enumerate(prediction["passages"], start=1):
            assert cells[f"passage_{place}"].startswith(f"{passage['title']}: {passage['title']} was made by")
            assert cells[f"probability_{place}"] == pytest.approx(passage["probability"])
            assert cells[f"posterior_{place}"] == pytest.approx(passage["posterior"])


def test_wandb_gets_the_manifest_of_the_searched_snapshot_as_an_artifact(wandb_run: tuple[Path, Path]) -> None:
    folder, offline = wandb_run
    (run_file,) = offline.glob("run-*.wandb")
    artifacts = [
        record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        for record in records_of(run_file)
        if record.HasField("artifact") or record.request.HasField("log_artifact")
    ]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "index-snapshot"]
    (entry,) = artifact.manifest.contents
    assert entry.path == "manifest.json"
    (manifest,) = folder.glob("index/*/manifest.json")
    assert Path(entry.local_path).samefile(manifest)
    assert json.loads(artifact.metadata) == read_json(manifest)


def test_wandb_never_sees_the_environment_nor_the_machine(wandb_run: tuple[Path, Path]) -> None:
    folder, offline = wandb_run
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    leaking = [path for path in files if MARKER.encode() in path.read_bytes()]
    assert leaking == []
    kinds = {record.WhichOneof("record_type") for record in records_of(next(offline.glob("run-*.wandb")))}
    assert "history" in kinds
    assert not kinds & {"stats", "output", "output_raw", "environment"}
    names = {str(path.relative_to(offline)) for path in offline.rglob("*") if path.is_file()}
    kept = {name for name in names if not name.startswith(("logs/", "files/media/table/", "run-"))}
    assert kept <= {"files/config.yaml", "files/wandb-summary.json"}, "no code, packages, host, output or git state"


def test_tensorboard_gets_configuration_and_metrics(cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cli("train", tmp_path / "run", *tiny_train, "logger=tensorboard", "data.test=null")
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert {"val/nll", "val/recall@1"} <= set(events.Tags()["scalars"])
    settings = (tmp_path / "run" / "logs" / "version_0" / "hparams.yaml").read_text(encoding="utf-8")
    assert "num_passages: 3" in settings


@pytest.mark.parametrize(("name", "make"), [("wandb", wandb_logger), ("tensorboard", tensorboard_logger)])
def test_a_missing_extra_is_named(
    name: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    find_spec = tracking.importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted)
    )
    with pytest.raises(MissingExtraError, match=rf"rag_lightning\[{name}\]"):
        make(save_dir=str(tmp_path))


def test_a_table_is_as_wide_as_its_widest_row() -> None:
    passage = RetrievedPassage("p", "Kismet", "A film.", 1.5, 0.75, 0.875)
    asked = {
        "a": Question("a", "who?", ("x", "y")),
        "b": Question("b", "when?", (), answer_regex="19[0-9]{2}"),
    }
    predictions = [Prediction("a", "who?", "x", -0.5, (passage,)), Prediction("b", "when?", "1944", -1.0, ())]
    columns, rows = prediction_table(predictions, asked)
    assert columns == [
        "id",
        "question",
        "accepted",
        "answer",
        "log_likelihood",
        "passage_1",
        "probability_1",
        "posterior_1",
    ]
    assert rows == [
        ["a", "who?", "x | y", "x", -0.5, "Kismet: A film.", 0.75, 0.875],
        ["b", "when?", "19[0-9]{2}", "1944", -1.0, None, None, None],
    ]


def test_a_negative_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_table_rows: expected 0 or more, got -1"):
        TrackingCallback(config={}, max_table_rows=-1)
