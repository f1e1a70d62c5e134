"""Runs of heads from the command line: trained, resumed, refused."""

from pathlib import Path
from typing import Any

import pytest

from rag_lightning.heads.model import HeadedModel
from rag_lightning.utils.io import read_json, read_json_lines
from tests.labelled_files import write_labelled
from tests.unit.heads import tiny


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """A tiny reader and tiny towers, saved; tiny data."""
    tokens = tiny.tokenizer()
    tiny.backbone(tokens).float().save_pretrained(tmp_path / "bert")
    tokens.save_pretrained(tmp_path / "bert")
    bert, data = tmp_path / "bert", write_labelled(tmp_path / "data")
    words = f"reader=hf reader.source={bert} reader.max_tokens=32 encoder=hf encoder.source={bert} task.folder={data}"
    words += " encoder.max_query_tokens=32 encoder.max_passage_tokens=30 task.data.batch_size=4"
    words += " task.data.allow_unknown=true trainer.enable_progress_bar=false"
    return words.split()


@pytest.mark.parametrize("task", ["sst2", "wikigold", "semeval2010_task8"])
def test_a_run_with_retrieval_leaves_figures_predictions_and_a_model(
    task: str, settings: list[str], cli: Any, tmp_path: Path
) -> None:
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=2", "task.retrieval.num_passages=2")
    cli("train", tmp_path / "run", f"task={task}", *steps, *settings)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert {name for name in metrics if name.startswith(f"{task}/majority_")}
    predictions = [record for _, record in read_json_lines(tmp_path / "run" / "predictions.jsonl")]
    assert len(predictions) == metrics["num_examples"]
    for record in predictions:
        assert len(record["passages"]) == 2
        assert sum(probability for _, probability in record["passages"]) == pytest.approx(1.0, abs=1e-5)
    model, labels = HeadedModel.from_pretrained(tmp_path / "run" / "model")
    assert list(labels) == [task]
    assert model.settings.num_passages == 2


def test_a_run_of_several_tasks_is_resumed(settings: list[str], cli: Any, tmp_path: Path) -> None:
    chosen = ("task=multitask", "curriculum=task_graph", "trainer.val_check_interval=2")
    cli("train", tmp_path / "whole", *chosen, "trainer.max_steps=6", *settings)
    cli("train", tmp_path / "part", *chosen, "trainer.max_steps=4", *settings)
    cli("train", tmp_path / "part", f"resume={tmp_path / 'part'}", "trainer.max_steps=6")
    whole, part = (read_json(tmp_path / name / "metrics.json") for name in ("whole", "part"))
    assert {k: v for k, v in whole.items() if k != "seconds"}.keys() == {k for k in part if k != "seconds"}


def test_a_curriculum_without_tasks_is_refused(cli: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="curriculum: expected tasks to walk over, got none"):
        cli("train", tmp_path / "run", "curriculum=task_graph")
