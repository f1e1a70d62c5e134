"""The command line, end to end in the tiny world: every command on what `train` left, and every bad input.

Commands run in this process where they can; what only a real process shows (exit status, streams) runs in a few.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rag_lightning import RagModel
from rag_lightning.corpora.questions import read_questions
from rag_lightning.metrics.answers import exact_match, token_f1
from rag_lightning.utils.io import read_json

Cli = Callable[..., None]
NOT_COMPARED = {"seconds", "num_questions"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measures(folder: Path) -> dict[str, float]:
    return {name: value for name, value in read_json(folder / "metrics.json").items() if name not in NOT_COMPARED}


@pytest.fixture(scope="module")
def run_dir(cli: Cli, tiny_train: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-step joint training of both towers."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    cli("train", folder, *tiny_train, "optim.train_passage_encoder=true")
    return folder


@pytest.fixture(scope="module")
def closed_book_dir(cli: Cli, tiny_train: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-step training without passages."""
    folder = tmp_path_factory.mktemp("cli") / "closed_book"
    kept = [text for text in tiny_train if not text.startswith("model.num_passages")]
    cli("train", folder, *kept, "objective=closed_book", "callbacks=no_validation")
    return folder


# ---------------------------------------------------------------------- train


def test_train_leaves_metrics_of_its_own_predictions(run_dir: Path, tiny_world: Any) -> None:
    metrics = read_json(run_dir / "metrics.json")
    questions = {question.id: question for question in read_questions(tiny_world.test)}
    predictions = lines_of(run_dir / "predictions.jsonl")
    assert metrics["num_questions"] == len(predictions) == 5
    assert metrics["seconds"] > 0
    hits = [exact_match(row["answer"], questions[row["id"]].answers) for row in predictions]
    assert metrics["exact_match"] == pytest.approx(sum(hits) / 5)
    f1 = [token_f1(row["answer"], questions[row["id"]].answers) for row in predictions]
    assert metrics["f1"] == pytest.approx(sum(f1) / 5)
    gold_first = [row["passages"][0]["id"] in questions[row["id"]].positive_passage_ids for row in predictions]
    assert metrics["recall@1"] == pytest.approx(sum(gold_first) / 5)


def test_predictions_have_the_documented_fields(run_dir: Path, tiny_world: Any) -> None:
    predictions = lines_of(run_dir / "predictions.jsonl")
    assert [row["id"] for row in predictions] == [question.id for question in read_questions(tiny_world.test)]
    for row in predictions:
        assert set(row) == {"id", "question", "answer", "log_likelihood", "passages"}
        assert row["log_likelihood"] <= 0
        assert len(row["passages"]) == 3
        assert all(set(p) == {"id", "title", "score", "probability", "posterior"} for p in row["passages"])
        scores = [passage["score"] for passage in row["passages"]]
        assert scores == sorted(scores, reverse=True)
        for weight in ("probability", "posterior"):
            assert sum(passage[weight] for passage in row["passages"]) == pytest.approx(1, abs=1e-5)


def test_train_leaves_its_configuration_and_logs(run_dir: Path) -> None:
    config = OmegaConf.load(run_dir / "config.yaml")
    assert config.trainer.max_steps == 2
    assert config.paths.run_dir == str(run_dir)
    with (run_dir / "logs" / "version_0" / "metrics.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == [0, 1]
    assert all(row["index/age_steps"] for row in rows if row["train/loss"]), "each training line has the index age"
    assert (run_dir / "checkpoints" / "last.ckpt").is_file()


def test_a_saved_model_answers(run_dir: Path) -> None:
    model = RagModel.from_pretrained(run_dir / "model")
    (row,) = lines_of(run_dir / "predictions.jsonl")[:1]
    (prediction,) = model.generate([row["question"]])
    assert prediction.answer == row["answer"]
    assert prediction.log_likelihood == pytest.approx(row["log_likelihood"], rel=1e-4)
    assert [passage.id for passage in prediction.passages] == [passage["id"] for passage in row["passages"]]


def test_a_run_folder_can_be_moved(run_dir: Path, tmp_path: Path) -> None:
    expected = RagModel.from_pretrained(run_dir / "model").generate(["who made Amber"])
    moved = run_dir.parent / "moved"
    shutil.copytree(run_dir, moved)
    shutil.move(run_dir, run_dir.parent / "away")
    try:
        assert RagModel.from_pretrained(moved / "model").generate(["who made Amber"]) == expected
    finally:
        shutil.move(run_dir.parent / "away", run_dir)
        shutil.rmtree(moved)


def test_a_closed_book_run_has_no_passages(closed_book_dir: Path) -> None:
    assert all(row["passages"] == [] for row in lines_of(closed_book_dir / "predictions.jsonl"))
    assert "recall@1" not in read_json(closed_book_dir / "metrics.json")
    assert not (closed_book_dir / "index").exists()
    (prediction,) = RagModel.from_pretrained(closed_book_dir / "model").generate(["who made Amber"])
    assert prediction.passages == ()


def test_a_run_is_resumed_with_its_own_configuration(
    cli: Cli, tiny_train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "s3cret")
    folder = tmp_path / "run"
    cli("train", folder, *tiny_train, "data.test=null", f"data.cache_dir='{tmp_path}/${{oc.env:A_SECRET}}'")
    cli("train", folder, f"resume={folder}", "trainer.max_steps=4")
    steps = []
    for version in (0, 1):
        with (folder / "logs" / f"version_{version}" / "metrics.csv").open(encoding="utf-8") as stream:
            steps.append([int(row["step"]) for row in csv.DictReader(stream) if row["train/loss"]])
    assert steps == [[0, 1], [2, 3]]
    written = (folder / "config.yaml").read_text(encoding="utf-8")
    assert "max_steps: 4" in written
    assert "${oc.env:A_SECRET}" in written
    assert "s3cret" not in written
    message = refusal(cli, folder, "train", f"resume={folder}", "objective=rag_sequence")
    assert "resume: expected plain values such as trainer.max_steps=500, got objective=rag_sequence" in message
    message = refusal(cli, tmp_path / "other", "train", f"resume={tmp_path / 'other'}")
    assert "resume: expected a run folder with config.yaml" in message


def test_a_sweep_trains_every_combination(cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    cli("train", tmp_path, "-m", *tiny_train, "objective=rag_token,rag_sequence", "seed=0,1")
    folders = {path.parent.name for path in tmp_path.glob("*/metrics.json")}
    assert folders == {f"objective={kind},seed={seed}" for kind in ("rag_token", "rag_sequence") for seed in (0, 1)}
    seeds = {folder: OmegaConf.load(tmp_path / folder / "config.yaml") for folder in folders}
    for folder, config in seeds.items():
        assert folder == f"objective={config.model.objective},seed={config.seed}"
        assert config.data.seed == config.seed
    cli("report", tmp_path / "report", f"runs={tmp_path}", "order=['objective=rag_sequence,seed=1']")
    results = read_json(tmp_path / "results.json")
    assert set(results) == folders
    assert next(iter(results)) == "objective=rag_sequence,seed=1"
    for folder, figures in results.items():
        assert set(figures) == {"exact_match", "f1", "recall@1", "recall@5", "seconds"}
        assert figures["recall@1"] == read_json(tmp_path / folder / "metrics.json")["recall@1"]


# ---------------------------------------------------------------------- evaluate, predict


@pytest.mark.parametrize("place", [".", "checkpoints/last.ckpt", "model"])
def test_evaluate_repeats_the_test_of_training(place: str, run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    cli("evaluate", tmp_path, f"checkpoint={run_dir / place}", "trainer.enable_progress_bar=false")
    assert measures(tmp_path) == pytest.approx(measures(run_dir), rel=1e-4)
    expected = lines_of(run_dir / "predictions.jsonl")
    for row, other in zip(lines_of(tmp_path / "predictions.jsonl"), expected, strict=True):
        assert (row["id"], row["answer"]) == (other["id"], other["answer"])
        assert [passage["id"] for passage in row["passages"]] == [passage["id"] for passage in other["passages"]]


def test_evaluate_retrieval_only_repeats_the_recall_and_reads_nothing(run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    cli("evaluate", tmp_path, f"checkpoint={run_dir}", "retrieval_only=true", "trainer.enable_progress_bar=false")
    found, trained = measures(tmp_path), measures(run_dir)
    retrieval = {name: value for name, value in trained.items() if "recall" in name or "mrr" in name}
    assert {name: found[name] for name in retrieval} == pytest.approx(retrieval, rel=1e-4)
    assert "exact_match" not in found
    assert not (tmp_path / "predictions.jsonl").exists()


def test_evaluate_measures_recall_at_other_cut_offs(run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    """Only those of the run were measured, so that DPR's top-100 could not be."""
    only = (f"checkpoint={run_dir}", "retrieval_only=true", "trainer.enable_progress_bar=false", "num_passages=7")
    cli("evaluate", tmp_path, *only, "module.recall_at=[2,7]")
    found = measures(tmp_path)
    told = {name for name in found if name.startswith(("recall@", "answer_recall@"))}
    assert told == {"recall@2", "recall@7", "answer_recall@2", "answer_recall@7"}
    assert found["recall@2"] <= found["recall@7"]
    with pytest.raises(SystemExit, match=r"recall_at: expected cut-offs up to K = 7, got 100\. .*num_passages=100"):
        cli("evaluate", tmp_path, *only, "module.recall_at=[7,100]")


def test_evaluate_a_closed_book_run(closed_book_dir: Path, cli: Cli, tmp_path: Path) -> None:
    cli("evaluate", tmp_path, f"checkpoint={closed_book_dir}", "trainer.enable_progress_bar=false")
    assert measures(tmp_path) == pytest.approx(measures(closed_book_dir), rel=1e-4)


def test_evaluate_takes_other_questions_decoding_and_k(
    run_dir: Path, cli: Cli, tiny_world: Any, tmp_path: Path
) -> None:
    settings = ["decoding.mode=rag_sequence_thorough", "decoding.num_beams=2", "num_passages=2"]
    other = f"data.test={tiny_world.validation}"
    cli("evaluate", tmp_path, f"checkpoint={run_dir}", other, *settings, "trainer.enable_progress_bar=false")
    rows = lines_of(tmp_path / "predictions.jsonl")
    assert [row["id"] for row in rows] == [question.id for question in read_questions(tiny_world.validation)]
    assert {len(row["passages"]) for row in rows} == {2}


def test_evaluate_samples_alike_with_the_same_seed(run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        settings = ["decoding.sample=true", "decoding.num_return=3", "decoding.top_p=0.9", "data.eval_batch_size=2"]
        cli("evaluate", tmp_path / name, f"checkpoint={run_dir}", *settings, "trainer.enable_progress_bar=false")
        written.append(lines_of(tmp_path / name / "predictions.jsonl"))
    assert written[0] == written[1]
    for row in written[0]:
        assert row["alternatives"][0]["answer"] == row["answer"]
        likelihoods = [one["log_likelihood"] for one in row["alternatives"]]
        assert likelihoods == sorted(likelihoods, reverse=True)
    assert max(len(row["alternatives"]) for row in written[0]) == 3


def test_predict_a_question_shows_passages_and_probabilities(
    run_dir: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("predict", tmp_path, f"checkpoint={run_dir}", "question=who made Amber, and Bob's film?")
    shown = capsys.readouterr().out
    assert "who made Amber, and Bob's film?" in shown
    (expected,) = RagModel.from_pretrained(run_dir / "model").generate(["who made Amber, and Bob's film?"])
    assert f"answer: {expected.answer}" in shown
    assert f"log p(y|x) = {expected.log_likelihood:.2f}" in shown
    for passage in expected.passages:
        assert f"p(z|x) {passage.probability:5.1%}   p(z|x,y) {passage.posterior:5.1%}   {passage.title}:" in shown


def test_predict_a_file_of_questions(run_dir: Path, cli: Cli, tiny_world: Any, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    cli("predict", tmp_path, f"checkpoint={run_dir}", f"questions={tiny_world.test}", f"output={output}", "limit=4")
    rows = lines_of(output)
    expected = lines_of(run_dir / "predictions.jsonl")[:4]
    assert [(row["id"], row["answer"]) for row in rows] == [(row["id"], row["answer"]) for row in expected]


def test_predict_writes_the_n_best_of_allowed_answers(run_dir: Path, cli: Cli, tiny_world: Any, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Ada Ash\nEve Cedar\nCleo\n", encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    settings = ["decoding.num_beams=3", "decoding.num_return=3", f"decoding.allowed={tmp_path / 'names.txt'}"]
    files = [f"questions={tiny_world.test}", f"output={output}", "batch_size=2"]
    cli("predict", tmp_path, f"checkpoint={run_dir}", *files, *settings)
    for row in lines_of(output):
        assert {one["answer"] for one in row["alternatives"]} == {"ada ash", "eve cedar", "cleo"}
        assert row["alternatives"][0] == {"answer": row["answer"], "log_likelihood": row["log_likelihood"]}


def test_predict_draws_answers_of_each_question_anew(
    run_dir: Path, cli: Cli, tiny_world: Any, tmp_path: Path, json_lines: Any
) -> None:
    same = [{"id": str(number), "question": "who made Amber", "answers": ["x"]} for number in range(4)]
    files = [f"questions={json_lines(tmp_path / 'same.jsonl', same)}", "batch_size=1"]
    drawn = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        output = tmp_path / f"{name}.jsonl"
        settings = ["decoding.sample=true", f"decoding.seed={seed}", f"output={output}"]
        cli("predict", tmp_path, f"checkpoint={run_dir}", *files, *settings)
        drawn.append([row["answer"] for row in lines_of(output)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_predict_draws_a_heat_map(run_dir: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    settings = [f"heatmap={tmp_path / 'heat.png'}", "decoding.num_beams=2", "decoding.num_return=2"]
    cli("predict", tmp_path, f"checkpoint={run_dir}", "question=who made Amber", *settings)
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"
    assert "      or: " in capsys.readouterr().out


# ---------------------------------------------------------------------- index


@pytest.fixture(scope="module")
def snapshot(run_dir: Path, cli: Cli, tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot that ``rag-lightning index build`` made with the run's encoder."""
    folder = tmp_path_factory.mktemp("index")
    cache = f"paths.cache_dir={tiny_world.root / 'cache'}"
    place = f"output={folder / 'index'}"
    cli("index", folder, "build", f"checkpoint={run_dir}", f"passages={tiny_world.passages}", place, cache)
    (published,) = (folder / "index").iterdir()
    return published


def test_index_build_gives_the_vectors_of_training(snapshot: Path, run_dir: Path) -> None:
    ours = read_json(snapshot / "manifest.json")
    of_run = [read_json(path) for path in run_dir.glob("index/*/manifest.json")]
    (tested,) = [manifest for manifest in of_run if manifest["encoder_hash"] == ours["encoder_hash"]]
    assert ours["checksums"]["vectors.npy"] == tested["checksums"]["vectors.npy"]
    assert ours["num_vectors"] == 24


def test_index_info_prints_the_manifest(
    snapshot: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("index", tmp_path, "info", f"snapshot={snapshot}")
    assert json.loads(capsys.readouterr().out) == read_json(snapshot / "manifest.json")


def test_index_verify_names_what_it_verified(
    snapshot: Path, run_dir: Path, cli: Cli, tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passages = f"passages={tiny_world.passages}"
    cli("index", tmp_path, "verify", f"snapshot={snapshot}", passages, f"checkpoint={run_dir}")
    assert "checksums, encoder, corpus verified" in capsys.readouterr().out


def test_evaluate_searches_a_snapshot_that_is_named(snapshot: Path, run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    place = f"checkpoint={run_dir / 'checkpoints' / 'last.ckpt'}"
    cli("evaluate", tmp_path, place, f"index.snapshot={snapshot}", "trainer.enable_progress_bar=false")
    assert measures(tmp_path) == pytest.approx(measures(run_dir), rel=1e-4)
    assert not (tmp_path / "index").exists(), "no index is built where one is given"


def test_evaluate_builds_the_index_that_is_asked_for(
    run_dir: Path, cli: Cli, tiny_train: list[str], tmp_path: Path
) -> None:
    """It used to search the run's own snapshot whatever index was asked for."""
    quiet = (f"checkpoint={run_dir}", "retrieval_only=true", "trainer.enable_progress_bar=false")
    coarse = ("index=faiss_ivf", "index.factory='IVF8,Flat'", "index.nprobe=1")
    cli("evaluate", tmp_path / "coarse", *quiet, *coarse)
    (snapshot,) = (tmp_path / "coarse" / "index").glob("step*")
    assert read_json(snapshot / "manifest.json")["factory"] == "IVF8,Flat"
    missed = measures(tmp_path / "coarse")["index_recall@3"]
    assert 0 < missed < 1
    ready = ("index=own", f"index.snapshot={snapshot}", "index.nprobe=8")
    cli("evaluate", tmp_path / "all_lists", *quiet, *ready)
    assert measures(tmp_path / "all_lists")["index_recall@3"] == 1, "the ready snapshot is searched as widely as asked"
    cli("evaluate", tmp_path / "own", *quiet)
    assert "index_recall@3" not in measures(tmp_path / "own"), "exact search misses nothing"
    message = refusal(cli, tmp_path / "exact", "evaluate", *quiet, "index.nprobe=8")
    assert "expected a FAISS index, as nprobe and ef_search are about one, came exact search" in message
    message = refusal(cli, tmp_path / "train", "train", *tiny_train, "index=own")
    assert "index.factory: expected exact or a FAISS factory, came none: index=own is for evaluate." in message


# ---------------------------------------------------------------------- bad input: one clear line, nothing more


def refusal(cli: Cli, folder: Path, command: str, *arguments: str) -> str:
    """Runs a command that must end with one line of error; returns it."""
    with pytest.raises(SystemExit) as caught:
        cli(command, folder, *arguments)
    message = caught.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    message = refusal(cli, tmp_path, "train", *tiny_train, "data.train=nowhere/questions.jsonl")
    assert "questions: no such file: nowhere/questions.jsonl" in message


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("train", '{"id": "q", "question": "who?", "answers": ["x"]\n', "line 1: expected one JSON object"),
        ("train", '{"id": "q", "question": "who?", "answers": []}\n', "line 1: field 'answers'"),
        ("train", "", "expected at least one question"),
        ("validation", '{"id": "q", "question": 5, "answers": ["x"]}\n', "line 1: field 'question'"),
        ("passages", "", "at least one passage"),
        ("passages", '{"id": "p", "title": "t", "text": "x"}\n' * 2, "line 1 and again on line 2"),
        ("test", '{"id": "q", "question": "w", "answers": ["x"], "positive_passage_ids": ["no"]}\n', "came 'no'"),
    ],
)
def test_a_bad_line_is_named(
    field: str, text: str, expected: str, cli: Cli, tiny_train: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text, encoding="utf-8")
    message = refusal(cli, tmp_path / "run", "train", *tiny_train, f"data.{field}={file}")
    assert str(file) in message
    assert expected in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("decoding.temperature=0",), "decoding option temperature: expected a number > 0"),
        (("decoding.sample=true", "decoding.num_beams=4"), "decoding options sample and num_beams exclude each other"),
        (("decoding.allowed=none.txt",), "decoding.allowed: no such file"),
        (("heatmap=heat.gif",), "picture: expected a file ending in .png, .svg, .pdf, got 'heat.gif'"),
    ],
)
def test_decoding_that_cannot_be_is_refused(
    settings: tuple[str, ...], expected: str, run_dir: Path, cli: Cli, tmp_path: Path
) -> None:
    message = refusal(cli, tmp_path, "predict", f"checkpoint={run_dir}", "question=who made Amber", *settings)
    assert expected in message


def test_a_heat_map_of_many_questions_is_refused(run_dir: Path, cli: Cli, tiny_world: Any, tmp_path: Path) -> None:
    settings = [f"questions={tiny_world.test}", "heatmap=heat.png"]
    message = refusal(cli, tmp_path, "predict", f"checkpoint={run_dir}", *settings)
    assert "heatmap draws one answer: expected question=" in message


def test_an_allowed_answer_that_cannot_be_tokenised_is_named(run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Ada Ash\n\N{SNOWMAN}\n", encoding="utf-8")
    settings = ["question=who made Amber", f"decoding.allowed={names}"]
    message = refusal(cli, tmp_path, "predict", f"checkpoint={run_dir}", *settings)
    assert f"{names}, line 2: expected an answer that the generator's tokenizer knows, came '\N{SNOWMAN}'" in message


def test_k_beyond_the_corpus_is_refused(cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    message = refusal(cli, tmp_path, "train", *tiny_train, "model.num_passages=25")
    assert "num_passages: expected at most the 24 passages" in message
    assert "got 25" in message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optim.lr_generator=0", "optim.lr_generator: expected a positive number, got 0"),
        ("model.temperature=-1", "temperature > 0, got -1"),
        ("reindex.schedule=10-5:2", "reindex.schedule: expected each piece to end after it starts"),
        ("reindex.schedule=5", "passage encoder does not learn"),
        ("decoding.num_beams=0", "num_beams"),
        ("data.passages=null", "data.passages: expected a passage file"),
        ("data.train=null", "data.train: expected a question file"),
    ],
)
def test_a_bad_setting_is_named(setting: str, expected: str, cli: Cli, tiny_train: list[str], tmp_path: Path) -> None:
    assert expected in refusal(cli, tmp_path, "train", *tiny_train, setting)


def test_a_setting_without_a_value_is_named(cli: Cli, tmp_path: Path) -> None:
    assert (
        refusal(cli, tmp_path, "evaluate") == "error: checkpoint: expected a value, came none. Give one: checkpoint=…"
    )


def test_a_folder_without_a_model_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("evaluate", "predict"):
        question = ["question=who?"] if command == "predict" else []
        message = refusal(cli, tmp_path / "out", command, f"checkpoint={tmp_path / 'empty'}", *question)
        assert "expected a run folder with model/, a .ckpt file or a model folder" in message
    assert "no such folder" in refusal(cli, tmp_path / "out", "evaluate", f"checkpoint={tmp_path / 'none'}")
    missing = f"checkpoint={tmp_path / 'none.ckpt'}"
    assert "no such file" in refusal(cli, tmp_path / "out", "evaluate", missing)


def test_a_checkpoint_of_another_vocabulary_is_refused(run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    config = OmegaConf.load(copy / "config.yaml")
    config.encoder.tokenizer = config.generator.tokenizer = "bundled:films/tokenizer"
    OmegaConf.save(config, copy / "config.yaml")
    message = refusal(cli, tmp_path / "out", "evaluate", f"checkpoint={copy / 'checkpoints' / 'last.ckpt'}")
    assert "was it trained with another tokenizer?" in message


def test_a_snapshot_of_another_encoder_or_corpus_is_refused(
    snapshot: Path, run_dir: Path, closed_book_dir: Path, cli: Cli, tiny_world: Any, tmp_path: Path
) -> None:
    other = tmp_path / "passages.jsonl"
    other.write_text(tiny_world.passages.read_text(encoding="utf-8").replace("Amber", "Ochre"), encoding="utf-8")
    message = refusal(cli, tmp_path / "out", "index", "verify", f"snapshot={snapshot}", f"passages={other}")
    manifest = read_json(snapshot / "manifest.json")
    assert manifest["corpus_hash"][:8] in message
    (first,) = [p for p in run_dir.glob("index/*") if read_json(p / "manifest.json")["step"] == 0]
    message = refusal(cli, tmp_path / "out", "index", "verify", f"snapshot={first}", f"checkpoint={run_dir}")
    assert manifest["encoder_hash"][:8] in message
    closed = refusal(cli, tmp_path / "out", "index", "verify", f"snapshot={first}", f"checkpoint={closed_book_dir}")
    assert "a closed-book model has no encoder" in closed


def test_a_torn_snapshot_is_refused(snapshot: Path, cli: Cli, tmp_path: Path) -> None:
    torn = tmp_path / snapshot.name
    shutil.copytree(snapshot, torn)
    with (torn / "vectors.npy").open("r+b") as stream:
        stream.truncate(200)
    message = refusal(cli, tmp_path / "out", "index", "verify", f"snapshot={torn}")
    assert "vectors.npy" in message


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("index", ["action=dance"], "expected action=plan, build, verify, info, benchmark; got 'dance'"),
        ("index", ["build"], "index action=build: expected passages=FILE, came none"),
        ("index", ["verify"], "index action=verify: expected snapshot=FOLDER, came none"),
        ("predict", ["checkpoint=x"], "one of them"),
        ("predict", ["checkpoint=x", "question=a", "questions=b"], "one of them"),
        ("report", ["runs=/nowhere/at/all"], "runs: no such file: /nowhere/at/all"),
        ("dance", [], "expected one of train, evaluate, predict, index, mine, data, report, benchmark, got 'dance'"),
    ],
)
def test_a_bad_command_is_explained(
    command: str, arguments: Sequence[str], expected: str, cli: Cli, tmp_path: Path
) -> None:
    assert expected in refusal(cli, tmp_path, command, *arguments)


# ---------------------------------------------------------------------- real processes


def run_process(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rag_lightning", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_an_unknown_setting_gets_hydras_hint(tmp_path: Path) -> None:
    done = run_process(["train", "optim.lr_reader=1"], tmp_path)
    assert done.returncode == 1
    assert "Key 'lr_reader' is not in struct" in done.stderr
    assert "To append to your config use +optim.lr_reader=1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refusal_is_one_line_and_a_failure_of_the_process(tmp_path: Path) -> None:
    done = run_process(["report", f"runs={tmp_path}"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: runs: expected run folders with metrics.json")
    assert "Traceback" not in done.stderr + done.stdout


def test_help_is_quick_and_lists_the_commands(tmp_path: Path) -> None:
    done = run_process(["--help"], tmp_path)
    assert done.returncode == 0
    for command in ("train", "evaluate", "predict", "index", "report"):
        assert f"  {command}" in done.stdout
