"""Tracking, read back from what the loggers wrote: configuration, metrics, predictions, no environment."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from rag_lightning.cli import run_pictures
from rag_lightning.cli.hydra_app import CHECKOUT_CONF
from rag_lightning.errors import ConfigError, MissingExtraError
from rag_lightning.reports.logs import read_log
from rag_lightning.training.tracking import (
    TrackingCallback,
    mlflow_logger,
    prediction_table,
    redacted,
    tensorboard_logger,
    wandb_logger,
)
from rag_lightning.training.tracking import tensorboard as tensorboard_module
from rag_lightning.types import Prediction, Question, RetrievedPassage
from rag_lightning.utils.io import read_json

MARKER = "abc123xyz-marker-of-the-environment"
Cli = Callable[..., None]


SECRETS = (
    "+notes.password=918273645",
    "+notes.uri='postgresql://me:shown-to-nobody@h/db'",
    "+notes.authToken=shown-to-nobody",
)


def assert_no_secret(folder: Path) -> None:
    """Looks into all that a tracker wrote; a password may be a number."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for path in files:
        assert not any(secret in path.read_bytes() for secret in (b"918273645", b"shown-to-nobody")), path


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
        patch.setenv("WANDB_API_KEY", MARKER.replace("-", "") + "0" * 12)
        patch.setenv("MY_SECRET", MARKER)
        secret = "data.cache_dir='" + str(folder.parent) + "/${oc.env:SECRET_TOKEN_FOR_TEST}'"
        arguments = [*tiny_train, "logger=wandb", "logger.offline=true", "run_name=tracked", secret]
        arguments += ["tracking.plots=true", "module.token_posteriors=true"]
        cli("train", folder, *arguments, "+logger_notes.api_key=shown-to-nobody")
        wandb.finish()
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


def artifacts_of(run_file: Path) -> dict[str, Any]:
    found = [
        record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        for record in records_of(run_file)
        if record.HasField("artifact") or record.request.HasField("log_artifact")
    ]
    return {artifact.type: artifact for artifact in found}


def test_wandb_gets_the_model_with_the_snapshot_it_was_made_with(wandb_run: tuple[Path, Path]) -> None:
    folder, offline = wandb_run
    artifacts = artifacts_of(next(offline.glob("run-*.wandb")))
    assert {"index-snapshot", "model"} <= set(artifacts)
    metadata = json.loads(artifacts["model"].metadata)
    snapshot = json.loads(artifacts["index-snapshot"].metadata)["snapshot_id"]
    assert metadata["snapshot"] == snapshot
    assert metadata["made_from"] == [f"index-snapshot/{snapshot}"]
    assert metadata["best/val/exact_match"] >= 0
    files = {entry.path for entry in artifacts["model"].manifest.contents}
    assert files == {path.relative_to(folder / "model").as_posix() for path in (folder / "model").rglob("*.*")}


def test_wandb_summarises_and_draws_the_signs_of_a_collapse(wandb_run: tuple[Path, Path]) -> None:
    _, offline = wandb_run
    summary: dict[str, Any] = {}
    logged: dict[str, Any] = {}
    for record in records_of(next(offline.glob("run-*.wandb"))):
        summary |= values_of(record.summary.update)
        logged |= values_of(record.history.item)
    assert {"best/val/exact_match", "last/val/exact_match", "best/val/nll", "last/val/nll"} <= set(summary)
    panel = {name.split("/")[1] for name in logged if name.startswith("retrieval_collapse/")}
    assert panel == {"distinct_passage_ratio", "posterior_entropy", "retrieval_utility", "age_steps"}
    assert logged["retrieval_collapse/retrieval_utility"] == logged["val/retrieval_utility"]


def test_wandb_gets_the_plots_that_the_run_draws(wandb_run: tuple[Path, Path]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    folder, offline = wandb_run
    for name in ("learning_curves", "index_age", "calibration", "heatmap_1"):
        (picture,) = offline.glob(f"files/media/images/plots/{name}_*.png")
        assert picture.read_bytes() == (folder / f"{name}.png").read_bytes()
        with Image.open(picture) as image:
            assert min(image.size) > 300
    states = [
        state
        for name, state in torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"].items()
        if name.startswith("TrackingCallback")
    ]
    rows = states[0]["history"]
    assert [row["step"] for row in rows if "train/loss" in row] == [0, 1], "kept without any log file"
    assert [row["step"] for row in rows if "val/exact_match" in row] == [1]


def test_what_cannot_be_drawn_is_told_and_loses_no_run(
    cli: Cli, tiny_train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rag_lightning")
    history = [{"step": 0.0, "train/loss": 2.0}]
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    run_pictures.draw_run(tmp_path, history, name="a")
    assert {path.name for path in tmp_path.glob("*.png")} == {"learning_curves.png"}
    assert "learning_curves.png; not index_age: index age: expected validations" in caplog.text
    assert "heatmap_1: heat map: expected token posteriors, found none" in caplog.text

    drawn = []

    def failing(logs: dict[str, Any], *, path: Path) -> None:
        drawn.append(logs)
        raise ZeroDivisionError

    monkeypatch.setattr(run_pictures, "plot_learning_curves", failing)
    validated = ["trainer.val_check_interval=1", "monitor=val/nll", "callbacks.checkpoint.mode=max"]
    cli("train", tmp_path / "run", *tiny_train, "logger=csv", "tracking.plots=true", *validated)
    assert (tmp_path / "run" / "model" / "rag_config.json").is_file()
    log = read_log(tmp_path / "run")
    nll = [row["val/nll"] for row in log if "val/nll" in row]
    ((rows,),) = drawn[0].values()
    assert [row["val/nll"] for row in rows if "val/nll" in row] == pytest.approx(nll)
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(
        [row["train/loss"] for row in log if "train/loss" in row]
    )
    summary = read_json(tmp_path / "run" / "logs" / "version_0" / "summary.json")
    assert nll[1] < nll[0], "so the first step's checkpoint is the one that is tested, and says nothing of the last"
    assert (summary["last/val/nll"], summary["best/val/nll"]) == pytest.approx((nll[1], nll[1]))

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    caplog.set_level("INFO", "rag_lightning")
    caplog.clear()
    run_pictures.draw_run(tmp_path, history, name="a")
    assert "the run is not drawn: " in caplog.text
    assert "rag_lightning[plots]" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a copy is resumed, so that other tests find theirs
def test_a_resumed_run_keeps_its_id(
    wandb_run: tuple[Path, Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import wandb

    folder = tmp_path / "run"
    shutil.copytree(wandb_run[0], folder)
    known = read_json(folder / "tracking.json")["wandb"]
    assert wandb_run[1].name.endswith(known)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(wandb_run[0]), str(folder)))
    monkeypatch.setenv("SECRET_TOKEN_FOR_TEST", MARKER)
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = (f"resume={folder}", "trainer.max_steps=3", "trainer.val_check_interval=1")
    cli("train", folder, *arguments)
    wandb.finish()
    wandb.teardown()
    runs = sorted(folder.glob("wandb/offline-run-*"))
    assert [path.name.rsplit("-", 1)[1] for path in runs] == [known] * len(runs)
    steps = [
        values_of(record.history.item).get("trainer/global_step")
        for record in records_of(next(runs[-1].glob("run-*.wandb")))
        if "train/loss" in values_of(record.history.item)
    ]
    assert steps == [2]
    (folder / "tracking.json").unlink()
    with pytest.raises(SystemExit, match="expected the id under which the resumed run was tracked.*logger.id=new"):
        cli("train", folder, *arguments)


def test_wandb_never_sees_the_environment_nor_the_machine(wandb_run: tuple[Path, Path]) -> None:
    folder, offline = wandb_run
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for text in (MARKER, MARKER.replace("-", "")):
        assert [path for path in files if text.encode() in path.read_bytes()] == []
    told = [path for path in offline.rglob("*") if path.is_file()]
    assert [path for path in told if b"shown-to-nobody" in path.read_bytes()] == []
    kinds = {record.WhichOneof("record_type") for record in records_of(next(offline.glob("run-*.wandb")))}
    assert "history" in kinds
    assert not kinds & {"stats", "output", "output_raw", "environment"}
    names = {str(path.relative_to(offline)) for path in offline.rglob("*") if path.is_file()}
    kept = {name for name in names if not name.startswith(("logs/", "files/media/", "run-"))}
    assert kept <= {"files/config.yaml", "files/wandb-summary.json"}, "no code, packages, host, output or git state"


def test_csv_keeps_tables_images_artifacts_and_summary(cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (2, 2), "red").save(run / "plot.png")
    cli("train", run, *tiny_train, "logger=csv", *SECRETS)
    logs = run / "logs" / "version_0"
    assert "password: <redacted>" in (logs / "hparams.yaml").read_text(encoding="utf-8")
    assert_no_secret(logs)
    summary = read_json(logs / "summary.json")
    assert summary["last/val/exact_match"] <= summary["best/val/exact_match"]
    assert summary["last/val/index_age_steps"] == 2
    assert "best/val/index_age_steps" not in summary, "an old index is no better than a fresh one"
    lines = [json.loads(line) for line in (logs / "tables" / "test_predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert {"question", "passage_3", "posterior_3"} <= set(lines[0])
    assert (logs / "images" / "plots_plot.png").read_bytes() == (run / "plot.png").read_bytes()
    model = read_json(logs / "artifacts" / "model.json")
    assert (
        model["metadata"]["snapshot"]
        == read_json(logs / "artifacts" / "index-snapshot.json")["metadata"]["snapshot_id"]
    )
    assert "rag_config.json" in model["files"]


def test_mlflow_gets_the_same(cli: Cli, tiny_train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    monkeypatch.setenv("MY_SECRET", MARKER)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    run = tmp_path / "run"
    cli("train", run, *tiny_train, "logger=mlflow", "run_name=tracked", "+notes.password=shown-to-nobody")
    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    found = client.get_run(read_json(run / "tracking.json")["mlflow"])
    assert found.info.status == "FINISHED"
    assert found.data.params["model/num_passages"] == "3"
    assert found.data.params["notes/password"] == "<redacted>"
    assert found.data.tags == {"mlflow.runName": "tracked"}, "no user, source file or git state"
    metrics = read_json(run / "metrics.json")
    assert found.data.metrics["test/recall_at_1"] == pytest.approx(metrics["recall@1"])
    assert {"best/val/exact_match", "last/val/exact_match", "retrieval_collapse/retrieval_utility"} <= set(
        found.data.metrics
    )
    table = json.loads(next(run.glob("mlflow_artifacts/**/tables/test_predictions.json")).read_text())
    assert (len(table["data"]), table["columns"][0]) == (5, "id")
    assert next(run.glob("mlflow_artifacts/**/model/rag_config.json")).is_file()
    described = read_json(next(run.glob("mlflow_artifacts/**/model/artifact.json")))
    assert described["made_from"] == [f"index-snapshot/{described['snapshot']}"]
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert MARKER.encode() not in content
            assert b"shown-to-nobody" not in content or "mlflow" not in str(path.relative_to(run))


def test_the_jobs_of_a_sweep_share_a_group(
    cli: Cli, tiny_train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    cli("train", tmp_path / "my_sweep", "-m", *tiny_train, "logger=wandb", "logger.offline=true", "seed=0,1")
    wandb.finish()
    wandb.teardown()
    files = list(tmp_path.glob("my_sweep/*/wandb/offline-run-*/run-*.wandb"))
    told = [record.run for file in files for record in records_of(file) if record.HasField("run")]
    assert len({run.run_id for run in told}) == len(files) == 2
    assert {run.run_group for run in told} == {"my_sweep"}


def test_mlflow_tags_the_sweep_and_a_resumed_job_keeps_its_run(
    cli: Cli, tiny_train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    cli("train", tmp_path / "my_sweep", "-m", *tiny_train, "logger=mlflow", "seed=7")
    (run,) = [path.parent for path in tmp_path.glob("my_sweep/*/tracking.json")]
    known = read_json(run / "tracking.json")["mlflow"]
    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    assert client.get_run(known).data.tags["rag_lightning.sweep"] == "my_sweep"
    cli("train", f"'{run}'", f"resume='{run}'", "trainer.max_steps=3", "trainer.val_check_interval=1")
    assert read_json(run / "tracking.json")["mlflow"] == known
    experiments = [one.experiment_id for one in client.search_experiments()]
    assert [one.info.run_id for one in client.search_runs(experiments)] == [known]
    steps = [metric.step for metric in client.get_metric_history(known, "train/loss")]
    assert steps == [0, 1, 2], "the steps of both parts"
    tags = client.get_run(known).data.tags
    assert (tags["rag_lightning.sweep"], tags["resumed.trainer/max_steps"]) == ("my_sweep", "3")


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (wandb_logger, {"project": "a/b"}, r"logger.project: expected 1 to 128 characters without / .*got 'a/b'"),
        (mlflow_logger, {"tracking_uri": "nowhere"}, "logger.tracking_uri: expected an address .*got 'nowhere'"),
        (mlflow_logger, {"tracking_uri": "sqlite:////dev/null/x.db"}, "expected an MLflow store at sqlite"),
    ],
)
def test_an_invalid_address_is_refused(
    make: Callable[..., Any], settings: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(make.__name__.removesuffix("_logger"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with pytest.raises(ConfigError, match=message):
        make(save_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"a": [{"access_token": "x"}]}, {"a": [{"access_token": "<redacted>"}]}),
        ({"password": 12345, "hf_token": "x"}, {"password": "<redacted>", "hf_token": "<redacted>"}),
        ({"authToken": "x", "auth": "x", "bearer": 1}, dict.fromkeys(("authToken", "auth", "bearer"), "<redacted>")),
        ({"license_key": 1, "APIKey": "x", "pwd": "x"}, dict.fromkeys(("license_key", "APIKey", "pwd"), "<redacted>")),
        ({"secret": {"of": ["x", 1]}}, {"secret": {"of": ["<redacted>", "<redacted>"]}}),
        ({"uri": "postgresql://me:hunter2@h/db"}, {"uri": "postgresql://<redacted>@h/db"}),
        ({"uri": ["http://h/?a=1&token=x&b=2"]}, {"uri": ["http://h/?a=1&token=<redacted>&b=2"]}),
        ({"api_key": "${oc.env:K}"}, {"api_key": "${oc.env:K}"}),
        ({"api_key": "${oc.env:K,hunter2}"}, {"api_key": "<redacted>"}),
    ],
)
def test_what_a_name_calls_secret_is_not_told(settings: dict[str, Any], told: dict[str, Any]) -> None:
    assert redacted(settings) == told


def test_settings_that_only_sound_secret_are_told() -> None:
    sounding = {"mask_token": "<m>", "max_tokens": 3, "passage": "a", "tokenizer": "b", "author": "c", "monkey": "d"}
    sounding |= {"keep_last": 1, "key": "e", "token_posteriors": True, "password": None, "uri": "http://h:1/a@b"}
    assert redacted(sounding) == sounding
    files = sorted(CHECKOUT_CONF.rglob("*.yaml"))
    assert len(files) > 100
    for file in files:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        assert redacted(settings) == settings, file


def test_tensorboard_gets_configuration_and_metrics(cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cli("train", tmp_path / "run", *tiny_train, "logger=tensorboard", *SECRETS)
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert {"val/nll", "val/recall@1"} <= set(events.Tags()["scalars"])
    tags = events.Tags()
    assert {"summary/best/val/exact_match", "retrieval_collapse/retrieval_utility"} <= set(tags["scalars"])
    (text,) = events.Tensors("test/predictions/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table.startswith("| id | question | accepted | answer | log_likelihood | passage_1 | probability_1 |")
    assert len(table.splitlines()) == 2 + 5
    assert {"artifacts/model/text_summary", "artifacts/index-snapshot/text_summary"} <= set(tags["tensors"])
    settings = (tmp_path / "run" / "logs" / "version_0" / "hparams.yaml").read_text(encoding="utf-8")
    assert "num_passages: 3" in settings
    assert_no_secret(tmp_path / "run" / "logs")


@pytest.mark.parametrize(
    ("name", "make"), [("wandb", wandb_logger), ("tensorboard", tensorboard_logger), ("mlflow", mlflow_logger)]
)
def test_a_missing_extra_is_named(
    name: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    find_spec = tensorboard_module.importlib.util.find_spec
    monkeypatch.setattr(
        tensorboard_module.importlib.util, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted)
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
