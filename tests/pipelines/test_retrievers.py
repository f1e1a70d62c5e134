"""Every kind of retriever: trained with, tested, saved, opened again with the same answers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from rag_lightning.rag import RagModel

KINDS = {
    "dense": [],
    "sparse": ["optim.train_query_encoder=false"],
    "hybrid_rrf": ["optim.train_query_encoder=false"],
    "hybrid_convex": [],
    "hybrid_gate": [],
    "rerank_live": ["optim.train_passage_encoder=true", "retriever.rerank_candidates=20"],
    "rerank_cross_encoder": ["optim.train_query_encoder=false", "retriever.rerank_candidates=6"],
}


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory, tiny_encoder):
    tokenizer = tiny_encoder().tokenizer
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**size, vocab_size=len(tokenizer), num_labels=1))
    folder = tmp_path_factory.mktemp("cross_encoder")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_trained_tested_saved_and_opened_again(kind, cli, tiny_train, cross_encoder, tmp_path):
    if kind.startswith(("sparse", "hybrid")):
        pytest.importorskip("bm25s")
    extra = [*KINDS[kind], *([f"retriever.cross_encoder={cross_encoder}"] if "cross" in kind else [])]
    run = tmp_path / "run"
    cli("train", run, *tiny_train, f"retriever={kind}", "optim.lr_fusion=0.1", "optim.warmup_steps=0", *extra)
    trained = json.loads((run / "metrics.json").read_text())
    cli("evaluate", tmp_path / "again", f"checkpoint={run}", "trainer.limit_test_batches=2")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    for name, value in again.items():
        assert value == pytest.approx(trained[name], rel=1e-4), name

    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    model = RagModel.from_pretrained(run / "model")
    predictions = model.generate([line["question"] for line in lines])
    for line, prediction in zip(lines, predictions, strict=True):
        assert prediction.answer == line["answer"]
        assert [p.id for p in prediction.passages] == [p["id"] for p in line["passages"]]
        assert prediction.log_likelihood == pytest.approx(line["log_likelihood"], rel=1e-4)
    assert (model.encoder is None) == (kind == "sparse")
    assert (run / "index").exists() == (kind != "sparse")


def test_the_gate_is_taught_by_the_answers(tiny_run, tiny_model, cli, tiny_train, tmp_path):
    """Through the whole command line: its weights leave their start, and the run's model keeps them."""
    pytest.importorskip("bm25s")
    cli("train", tmp_path, *tiny_train, "retriever=hybrid_gate", "optim.lr_fusion=0.1", "optim.warmup_steps=0")
    weights = {}
    for file in Path(tmp_path / "model").rglob("*.safetensors"):
        weights |= {name: value for name, value in load_file(file).items() if "gate" in name or "fusion" in str(file)}
    assert weights, "the gate is saved with the model"
    assert any(float(value.abs().max()) > 0.01 for value in weights.values())


def test_a_query_encoder_that_the_loss_cannot_reach_is_refused(cli, tiny_train, tmp_path):
    pytest.importorskip("bm25s")
    with pytest.raises(SystemExit, match="optim.train_query_encoder=true, but retriever .* would never learn"):
        cli("train", tmp_path, *tiny_train, "retriever=hybrid_rrf")


@pytest.mark.parametrize("kind", ["dense", "sparse", "hybrid_rrf", "hybrid_convex", "hybrid_gate", "rerank_live"])
def test_a_trained_model_is_evaluated_with_another_retriever(kind, cli, tiny_train, tmp_path):
    pytest.importorskip("bm25s")
    cli("train", tmp_path / "run", *tiny_train)
    where = [f"checkpoint={tmp_path / 'run'}", "retrieval_only=true", "num_passages=24"]
    cli("evaluate", tmp_path / "other", *where, f"retriever={kind}")
    figures = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert figures["num_questions"] == 5
    if not kind.startswith("sparse"):  # a title's word finds its film; where words find no more, no more are found
        assert figures["recall@20"] > 0.5
    if kind == "sparse":
        assert figures["recall@1"] == 1.0


# ---------------------------------------------------------------------- what once went wrong


def test_a_checkpoint_is_evaluated_with_its_runs_retriever(cli, tiny_train, tmp_path):
    """It was searched by vectors alone, whatever it had been trained with."""
    pytest.importorskip("bm25s")
    cli("train", tmp_path / "run", *tiny_train, "retriever=hybrid_convex", "callbacks=no_validation")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    cli("evaluate", tmp_path / "again", f"checkpoint={checkpoint}", "trainer.limit_test_batches=2")
    figures = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again")]
    assert figures[1]["recall@1"] == figures[0]["recall@1"]
    assert figures[1]["nll"] == pytest.approx(figures[0]["nll"], rel=1e-4)


def test_a_trained_gate_is_kept_when_other_settings_are_tried(cli, tiny_train, tmp_path):
    """It was replaced by an untrained one."""
    pytest.importorskip("bm25s")
    learning = ["optim.lr_fusion=0.5", "optim.warmup_steps=0"]
    cli("train", tmp_path / "run", *tiny_train, "retriever=hybrid_gate", *learning)
    for name, retriever in (("own", []), ("wider", ["retriever=hybrid_gate", "retriever.num_candidates=20"])):
        where = [f"checkpoint={tmp_path / 'run'}", "trainer.limit_test_batches=2"]
        cli("evaluate", tmp_path / name, *where, *retriever)
    own, wider = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("own", "wider"))
    assert wider == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("settings", [["retriever=sparse", "optim.train_query_encoder=false"], ["encoder.shared=true"]])
def test_what_could_not_be_trained_so_can_be_evaluated(settings, cli, tiny_train, tmp_path):
    """Evaluation refused towers that are shared, and models without a part that a contrastive objective would train."""
    if "retriever=sparse" in settings:
        pytest.importorskip("bm25s")
    shared = ["optim.train_passage_encoder=true"] if "shared" in settings[0] else []
    cli("train", tmp_path / "run", *tiny_train, *settings, *shared)
    cli("evaluate", tmp_path / "again", f"checkpoint={tmp_path / 'run'}", "retrieval_only=true")
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["num_questions"] == 5


def test_a_run_may_start_from_a_ready_snapshot_and_be_tested_and_resumed(cli, tiny_train, tmp_path):
    """The snapshot lies outside the run's folder: it was looked for inside."""
    cli("train", tmp_path / "first", *tiny_train)
    (snapshot,) = (path for path in (tmp_path / "first" / "index").iterdir() if path.name.startswith("step"))
    run = tmp_path / "second"
    cli("train", run, *tiny_train, f"index.snapshot={snapshot}")
    assert not list((run / "index").glob("step*")), "nothing was built"
    cli("train", run, f"resume={run}", "trainer.max_steps=3")


def test_a_model_that_was_not_tested_names_an_index_of_its_own_tower(cli, tiny_train, tmp_path):
    """It named the index of the tower as it was before training, which no evaluation would open."""
    cli("train", tmp_path / "run", *tiny_train, "optim.train_passage_encoder=true", "data.test=null")
    assert RagModel.from_pretrained(tmp_path / "run" / "model").generate(["who made Amber"])
