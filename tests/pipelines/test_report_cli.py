"""Real runs of the tiny world: what they note down of themselves, and every report on them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_lightning.reports.runs import by_signature, find_runs
from rag_lightning.utils.hashing import fingerprint
from rag_lightning.utils.io import read_json, read_json_lines
from tests.report_runs import ANSWERS, prediction, write_questions, write_run

Cli = Callable[..., None]


@pytest.fixture(scope="module")
def sweep(
    cli: Cli,
    tiny_data_overrides: list[str],
    tiny_model_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two seeds, two steps, a validation after each."""
    folder = tmp_path_factory.mktemp("report") / "sweep"
    short = ["trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1", "callbacks=default"]
    tiny = [*tiny_data_overrides, *tiny_model_overrides, "module.recall_at=[1,3]"]
    cli("train", folder, "-m", *tiny, *short, "module.token_posteriors=true", "seed=0,1")
    return folder


def refused(cli: Cli, folder: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli(arguments[0], folder, *arguments[1:])
    return str(caught.value.code)


def test_a_run_says_what_it_was(sweep: Path, tiny_world) -> None:
    record = read_json(sweep / "seed=1" / "run.json")
    assert record["choices"]["encoder"] == "word_embeddings"
    assert "hydra/job_logging" not in record["choices"]
    assert "seed=1" in record["overrides"]
    assert record["data"]["test"] == {"file": str(tiny_world.test), **fingerprint(tiny_world.test)}
    assert set(record["data"]) == {"passages", "train", "validation", "test"}
    assert {"python", "torch"} <= set(record["versions"])
    assert record["machine"]["cores"] >= 1
    assert "commit" in record
    runs = find_runs(sweep)
    assert [run.seed for run in runs] == [0, 1]
    assert len(by_signature(runs)) == 1


def test_a_resumed_run_keeps_what_it_began_with(cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "seed=0"
    cli("train", f"'{folder}'", *tiny_train)  # quoted: equals signs
    began = read_json(folder / "run.json")
    cli("train", f"'{folder}'", f"resume='{folder}'", "trainer.max_steps=3")
    record = read_json(folder / "run.json")
    assert {key: record[key] for key in began} == began
    ((resumed, further),) = [later["overrides"] for later in record["resumed"]]
    assert str(folder) in resumed
    assert further == "trainer.max_steps=3"


def test_an_evaluation_says_what_it_judged(cli: Cli, sweep: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        setting = [f"num_passages={number}", "trainer.enable_progress_bar=false"]
        cli("evaluate", tmp_path / f"k{number}", f"checkpoint='{sweep / 'seed=1'}'", *setting)
    runs = find_runs(tmp_path)
    assert [run.seed for run in runs] == [1, 1]
    assert len(by_signature(runs)) == 2
    assert runs[0].overrides == ("num_passages=1",)
    assert runs[0].record["checkpoint"] == str(sweep / "seed=1")
    assert runs[0].data_file("test") == runs[1].data_file("test")
    assert "token_posteriors" not in next(read_json_lines(tmp_path / "k1" / "predictions.jsonl"))[1]


def test_token_posteriors_are_refused_where_there_are_none(cli: Cli, sweep: Path, tmp_path: Path) -> None:
    wanted = ["evaluate", f"checkpoint='{sweep / 'seed=1'}'", "module.token_posteriors=true"]
    message = refused(cli, tmp_path, *wanted, "retrieval_only=true")
    assert "module.token_posteriors: expected answers to tell of, got retrieval_only=true" in message
    message = refused(cli, tmp_path, *wanted, "decoding.mode=stuffed")
    assert "expected a model that reads its passages apart" in message


def test_answers_are_told_in_tables_pictures_and_pages(cli: Cli, sweep: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = [f"runs={sweep}", "errors=true", "plots=true", "page=true", "num_heatmaps=1", "rows={ours: 'seed=*'}"]
    cli("report", tmp_path / "out", *arguments, "metrics=[exact_match,f1]")
    (counts,) = read_json(sweep / "errors.json").values()
    assert counts["num_questions"] == 10
    names = ("right", "annotation_mismatch", "not_retrieved", "not_read")
    assert sum(counts[name] for name in names) == 10
    assert "11.8 %" in (sweep / "errors.md").read_text(encoding="utf-8")
    assert "\\bottomrule" in (sweep / "errors.tex").read_text(encoding="utf-8")
    for name in ("learning_curves", "index_age", "calibration", "heatmap_1"):
        assert (sweep / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    for seed in (0, 1):
        assert '"heat"' in (sweep / f"seed={seed}" / "predictions.html").read_text(encoding="utf-8")
    assert "| ours | f1 |" in (sweep / "groups.md").read_text(encoding="utf-8")


def test_the_page_of_a_file(cli: Cli, tmp_path: Path, json_lines) -> None:
    questions, passages = write_questions(tmp_path)
    file = json_lines(tmp_path / "told.jsonl", [prediction(number, "x") for number in range(4)])
    command = ["report", f"predictions={file}"]
    cli(command[0], tmp_path / "out", command[1], f"questions={questions}", f"passages={passages}")
    assert (tmp_path / "told.html").is_file()
    assert "predictions: expected questions=FILE with it" in refused(cli, tmp_path / "out", *command)
    message = refused(cli, tmp_path / "out", *command, f"questions={questions}")
    assert "predictions: expected passages=FILE with it" in message
    assert "report: page: ask for it in a report of its own" in refused(cli, tmp_path / "out", *command, "page=true")
    file.write_text("{}\n", encoding="utf-8")
    message = refused(cli, tmp_path / "out", *command, f"questions={questions}", f"passages={passages}")
    assert "told.jsonl, line 1: field 'passages': expected a list" in message


def test_runs_that_cannot_be_judged_are_named(cli: Cli, tmp_path: Path) -> None:
    write_run(tmp_path / "runs/unfinished", None)
    write_run(tmp_path / "runs/lost", ANSWERS, data=tmp_path / "gone")
    heads = write_run(tmp_path / "runs/heads", None, metrics={"accuracy": 1.0})
    (heads / "predictions.jsonl").write_text(json.dumps({"expected": "a", "predicted": "a"}) + "\n", encoding="utf-8")
    message = refused(cli, tmp_path / "out", "report", f"runs={tmp_path / 'runs'}", "errors=true")
    assert "expected runs whose answers can be judged, found none." in message
    assert "unfinished: no predictions.jsonl" in message
    assert "lost: no question file at" in message
    assert "heads: labels, not answers" in message
    questions, passages = write_questions(tmp_path / "data")
    files = [f"questions={questions}", f"passages={passages}"]
    cli("report", tmp_path / "out", f"runs={tmp_path / 'runs'}", "errors=true", *files)
    (counts,) = read_json(tmp_path / "runs" / "errors.json").values()
    assert counts["right"] == 4
    assert "Left out: heads (labels, not answers)." in (tmp_path / "runs" / "errors.md").read_text(encoding="utf-8")
