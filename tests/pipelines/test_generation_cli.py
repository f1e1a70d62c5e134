"""Runs of generation tasks from the command line: trained, swept, resumed, evaluated, asked, refused."""

import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rag_lightning.utils.io import read_json, read_json_lines
from tests.generation_files import write_generation

SIZES = "d_model=16 encoder_layers=1 decoder_layers=1 encoder_attention_heads=2 decoder_attention_heads=2"
SIZES += " encoder_ffn_dim=24 decoder_ffn_dim=24"


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Tiny parts whose vocabulary the run makes, and tiny data."""
    words = f"task.folder={write_generation(tmp_path / 'data')} paths.cache_dir={tmp_path / 'cache'}"
    words += " encoder=own_vocabulary encoder.settings.hidden_size=16 model.num_passages=2 data.batch_size=4"
    words += " decoding.max_new_tokens=6 trainer.enable_progress_bar=false trainer.max_steps=2"
    words += " trainer.val_check_interval=2 trainer.limit_test_batches=1 data.limit_validation=4"
    return [*words.split(), *(f"generator.settings.{size}" for size in SIZES.split())]


@pytest.mark.parametrize(
    ("task", "figures"),
    [
        ("multi30k", {"bleu", "chrf", "exact_match"}),
        ("kdconv", {"bleu", "rougeL", "knowledge_f1", "recall@1"}),
        ("dailydialog", {"bleu", "rougeL"}),
    ],
)
def test_a_run_leaves_the_figures_of_its_task(
    task: str, figures: set[str], settings: list[str], cli: Any, tmp_path: Path
) -> None:
    cli("train", tmp_path / "run", f"task={task}", *settings)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert figures <= set(metrics)
    for _, record in read_json_lines(tmp_path / "run" / "predictions.jsonl"):
        assert len(record["passages"]) == 2
    first = (tmp_path / "run" / "metrics.json").read_bytes()
    cli("evaluate", tmp_path / "evaluated", f"checkpoint={tmp_path / 'run'}", "trainer.enable_progress_bar=false",
        "data.eval_batch_size=32", "+trainer.limit_test_batches=1")  # fmt: skip
    again = read_json(tmp_path / "evaluated" / "metrics.json")
    assert {name: again[name] for name in figures} == pytest.approx({name: metrics[name] for name in figures})
    assert (tmp_path / "run" / "metrics.json").read_bytes() == first


def test_plain_and_augmented_are_swept_over_the_same_files(settings: list[str], cli: Any, tmp_path: Path) -> None:
    usual = [setting for setting in settings if not setting.startswith("model.num_passages")]
    cli("train", tmp_path / "sweep", "-m", "task=jeopardy", "objective=closed_book,rag_token", *usual)
    plain, augmented = (tmp_path / "sweep" / f"objective={name}" for name in ("closed_book", "rag_token"))
    assert "recall@1" not in read_json(plain / "metrics.json")
    assert {"bleu1", "qbleu1", "answer_recall@1"} <= set(read_json(augmented / "metrics.json"))
    config = OmegaConf.load(augmented / "config.yaml")
    assert config.data.train == OmegaConf.load(plain / "config.yaml").data.train
    assert len([path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir()]) == 2  # and a tokenizer


def test_a_training_question_never_finds_itself(settings: list[str], cli: Any, tmp_path: Path) -> None:
    cli("train", tmp_path / "run", "task=multi30k", *settings)
    prepared = Path(str(OmegaConf.load(tmp_path / "run" / "config.yaml").task.prepared))
    answers = tmp_path / "answers.jsonl"
    asked = ("questions=" + str(prepared / "train.jsonl"), f"output={answers}")
    cli("predict", tmp_path / "out", f"checkpoint={tmp_path / 'run'}", *asked, "num_passages=11")
    records = [record for _, record in read_json_lines(answers)]
    assert len(records) == 12
    for record in records:
        found = [passage["id"] for passage in record["passages"]]
        assert len(set(found)) == 11
        assert record["id"] not in found


def test_a_cleared_cache_is_filled_again_to_resume_and_to_evaluate(
    settings: list[str], cli: Any, tmp_path: Path
) -> None:
    cli("train", tmp_path / "run", "task=jeopardy", *settings)
    shutil.rmtree(tmp_path / "cache")
    cli("train", tmp_path / "run", f"resume={tmp_path / 'run'}", "trainer.max_steps=4")
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").trainer.max_steps == 4
    shutil.rmtree(tmp_path / "cache" / "prepared")
    cli("evaluate", tmp_path / "again", f"checkpoint={tmp_path / 'run'}", "trainer.enable_progress_bar=false")
    assert "bleu1" in read_json(tmp_path / "again" / "metrics.json")


def test_a_tokenizer_of_another_language_is_refused_with_its_share(
    settings: list[str], cli: Any, tmp_path: Path, tiny_world: Any
) -> None:
    english = ("task=drcd", f"generator.tokenizer={tiny_world.tokenizer}")
    with pytest.raises(SystemExit, match=r"generator: expected a tokenizer that knows .*came \d+%.*task.allow_unknown"):
        cli("train", tmp_path / "run", *english, *settings)
    cli("train", tmp_path / "run", *english, *settings, "task.allow_unknown=true")


def test_what_belongs_to_heads_is_refused(settings: list[str], cli: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="curriculum: expected tasks to walk over, got none"):
        cli("train", tmp_path / "run", "task=multi30k", "curriculum=task_graph", *settings)


def test_a_missing_data_set_is_named(settings: list[str], cli: Any, tmp_path: Path) -> None:
    usual = [setting for setting in settings if not setting.startswith("task.folder")]
    with pytest.raises(SystemExit, match=r"task.folder: no such file: .*elsewhere/multi30k_en_de"):
        cli("train", tmp_path / "run", "task=multi30k", f"task.folder={tmp_path / 'elsewhere'}", *usual)
    with pytest.raises(SystemExit, match="task.folder: expected a value, came none"):
        cli("train", tmp_path / "run", "task=multi30k", *usual)


def test_a_data_set_that_changed_since_is_not_resumed(settings: list[str], cli: Any, tmp_path: Path) -> None:
    cli("train", tmp_path / "run", "task=jeopardy", "objective=closed_book", *settings)
    file = tmp_path / "data" / "jeopardy" / "all.jsonl.gz"
    lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    file.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(SystemExit, match="task.prepared: expected .*, which the run began with, came"):
        cli("train", tmp_path / "run", f"resume={tmp_path / 'run'}", "trainer.max_steps=4")
