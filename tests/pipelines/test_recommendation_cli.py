"""Recommendation from the command line: trained and ranked beside its baselines, explained, refused."""

from pathlib import Path
from typing import Any

import pytest

from rag_lightning.utils.io import read_json, read_json_lines
from tests.movielens_files import MOVIES, write_movielens

RANKINGS = ("dense", "dense_popularity", "popularity", "bm25")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """A tiny retriever and generator with the data set's vocabulary; 12 films."""
    pytest.importorskip("bm25s")
    write_movielens(tmp_path / "data" / "movielens_latest_small")
    small = "d_model=16 encoder_layers=1 decoder_layers=1 encoder_attention_heads=2 decoder_attention_heads=2"
    small += " encoder_ffn_dim=24 decoder_ffn_dim=24"
    words = f"task=movielens task.folder={tmp_path / 'data'} paths.cache_dir={tmp_path / 'cache'}"
    words += " encoder.settings.hidden_size=16 task.prepare.min_history=2"
    words += " data.batch_size=4 trainer.max_steps=2 trainer.val_check_interval=2 trainer.enable_progress_bar=false"
    words += " module.recall_at=[1,3] model.num_passages=3 decoding.max_new_tokens=6"
    return [*words.split(), *(f"generator.settings.{setting}" for setting in small.split())]


def test_a_retriever_is_ranked_beside_its_baselines(settings: list[str], cli: Any, tmp_path: Path) -> None:
    cli("train", tmp_path / "run", *settings, "callbacks.ranking.ks=[1,3]", "monitor=val/dense_ndcg@3")
    metrics = read_json(tmp_path / "run" / "metrics.json")
    for ranking in RANKINGS:
        figures = [metrics[f"{ranking}_{name}"] for name in ("hit@1", "hit@3", "ndcg@3", "mrr")]
        assert all(0 <= figure <= 1 for figure in figures)
        assert metrics[f"{ranking}_hit@1"] <= metrics[f"{ranking}_ndcg@3"] <= metrics[f"{ranking}_hit@3"]
    assert metrics["num_questions"] == 5  # the sixth user rated too few films
    assert metrics["recall@3"] == pytest.approx(metrics["dense_hit@3"])
    cli("evaluate", tmp_path / "again", f"checkpoint={tmp_path / 'run'}", "num_passages=3")
    again = read_json(tmp_path / "again" / "metrics.json")
    ranked = {name: value for name, value in metrics.items() if name.startswith(RANKINGS)}
    assert {name: again[name] for name in ranked} == pytest.approx(ranked)


def test_a_generator_writes_titles_with_reasons(settings: list[str], cli: Any, tmp_path: Path) -> None:
    chosen = ("objective=rag_token", "task.prepare.answer=explanation")
    cli("train", tmp_path / "run", *settings, *chosen)
    assert "dense_hit@10" in read_json(tmp_path / "run" / "metrics.json")
    titles = {number: name.split(" (")[0].removesuffix(", The") for number, name, _ in MOVIES}
    records = [record for _, record in read_json_lines(tmp_path / "run" / "predictions.jsonl")]
    assert len(records) == 5
    for record in records:
        liked = record["question"].split("; ")
        found = {titles[int(passage["id"])] for passage in record["passages"] if passage["id"]}
        assert found
        assert not found & {title.removeprefix("The ") for title in liked}  # what was seen is not retrieved
    (train,) = (tmp_path / "cache" / "prepared").glob("*/train.jsonl")
    assert any(", because you liked " in record["answers"][0] for _, record in read_json_lines(train))


def test_a_folder_without_movielens_is_refused(settings: list[str], cli: Any, tmp_path: Path) -> None:
    (tmp_path / "data" / "movielens_latest_small" / "ratings.csv.gz").unlink()
    with pytest.raises(SystemExit, match="expected a file ratings.csv or ratings.csv.gz in .*movielens_latest_small"):
        cli("train", tmp_path / "run", *settings)
