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


@pytest.mark.parametrize(
    ("task", "question"),
    [
        ("sst2", "a warm and funny film"),
        ("wikigold", "Anna sings in Oslo"),
        ("semeval2010_task8", "<e1>fire</e1> made <e2>smoke</e2>"),
    ],
)
def test_finished_heads_are_measured_again_and_asked(
    task: str, question: str, settings: list[str], cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    steps = ("trainer.max_steps=4", "trainer.limit_val_batches=0", "task.retrieval.num_passages=2")
    cli("train", run, f"task={task}", *steps, *settings)
    cli("evaluate", tmp_path / "again", f"checkpoint={run}")
    first, again = (read_json(folder / "metrics.json") for folder in (run, tmp_path / "again"))
    assert {name: value for name, value in again.items() if name != "seconds"} == pytest.approx(
        {name: value for name, value in first.items() if name != "seconds"}
    )
    capsys.readouterr()
    cli("predict", tmp_path / "asked", f"checkpoint={run / 'model'}", f"question='{question}'")
    said = capsys.readouterr().out
    assert task in said
    assert said.count("p(z|x)") == 2

    with pytest.raises(
        SystemExit, match="evaluate: of a run of heads expected .*, got num_passages, decoding.num_beams"
    ):
        cli("evaluate", tmp_path / "refused", f"checkpoint={run}", "num_passages=3", "decoding.num_beams=2")
    with pytest.raises(SystemExit, match="predict: expected question="):
        cli("predict", tmp_path / "refused", f"checkpoint={run}", "questions=F")


def test_a_walk_over_ways_to_train_on_one_task(settings: list[str], cli: Any, tmp_path: Path) -> None:
    chosen = ("task=sst2", "curriculum=augmentation_graph", "trainer.max_steps=8", "trainer.limit_val_batches=0")
    cli("train", tmp_path / "run", *chosen, "task.data.train_share=0.5", *settings)
    graph = read_json(tmp_path / "run" / "curriculum.json")
    assert set(graph["nodes"]) == {"plain", "deletion", "swap", "masking", "top", "wide"}
    assert (tmp_path / "run" / "curriculum.png").stat().st_size > 1000


@pytest.mark.parametrize("estimate", ["{by: gradients, num_batches: 2}", "{by: transfer, num_steps: 3}"])
def test_edges_are_measured_before_training(estimate: str, settings: list[str], cli: Any, tmp_path: Path) -> None:
    chosen = ("task=multitask", "curriculum=task_graph", "trainer.max_steps=2", "trainer.limit_val_batches=0")
    cli("train", tmp_path / "run", *chosen, f"curriculum.estimate={estimate}", *settings)
    edges = read_json(tmp_path / "run" / "curriculum.json")["edges"]
    assert len({edge["weight"] for edge in edges}) > 1


def test_graphs_that_do_not_fit_are_refused(settings: list[str], cli: Any, tmp_path: Path) -> None:
    def refused(message: str, *overrides: str) -> None:
        with pytest.raises(SystemExit, match=message):
            cli("train", tmp_path / "run", "trainer.max_steps=2", *overrides, *settings)

    graph = "curriculum.graph={nodes: {sst2: {}, ag_news: {}, fever: {}, boolq: {}}, edges: %s}"
    cycle = "[{from: sst2, to: fever}, {from: fever, to: sst2}, {from: ag_news, to: boolq}, {from: boolq, to: boolq}]"
    several = ("task=multitask", "curriculum=task_graph")
    estimate = "curriculum.estimate={by: %s}"
    refused("cycle", *several, graph % cycle, "curriculum.ordered=true")
    refused(
        "expected no curriculum.graph.edges with it", *several, graph % cycle, "curriculum.estimate={by: gradients}"
    )
    refused("estimate: expected by, num_batches, got num_steps", *several, estimate % "gradients, num_steps: 2")
    refused("expected one of gradients, transfer, got 'gradient'", *several, estimate % "gradient")
    refused("'nowhere'", *several, graph % "[{from: sst2, to: nowhere}]")
    refused(
        "expected the run's tasks as nodes", "task=sst2", "curriculum=augmentation_graph",
        "curriculum.estimate={by: gradients}",
    )  # fmt: skip
